"""A reproducible server: the same bytes through page, API, command and Python, alone and among others."""

import asyncio
import base64
import concurrent.futures
import io

import numpy as np
import pytest
import requests
from PIL import Image

from unialign_jax import Pipeline
from unialign_jax.inference.opening import ModelSource
from unialign_jax.serving import api, page_worker
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.requests import Limits

pytestmark = pytest.mark.slow

FIELDS = {"prompt": "a red circle", "seed": 7, "steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline.from_bundle(tiny_bundle, max_batch=4, reproducible=True)


def test_a_seed_has_the_same_bytes_everywhere(pipeline, tiny_bundle, launch_command, running, tmp_path):
    stamp = ModelSource(tiny_bundle).stamp(None, None, reproducible=True)
    engine = Engine([pipeline])
    worker = page_worker.Worker(engine, tmp_path, model="tiny", limits=Limits(), stamp=stamp)

    def on_the_page(live):
        async def last():
            return [moment async for moment in worker.do([("text_to_image", FIELDS, [])], live)][-1]

        [(work, [image])] = asyncio.run(last()).made
        return worker.keep(image, work.job.seed).read_bytes()

    with running(api.make_app(engine, model="tiny", stamp=stamp)) as url:

        def ask(**more):
            answer = requests.post(f"{url}/v1/images/generations", json=FIELDS | more, timeout=60).json()
            assert answer["reproducible"] is True
            return [base64.b64decode(item["b64_json"]) for item in answer["data"]]

        [made] = ask()
        assert on_the_page(live=False) == on_the_page(live=True) == made
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            others = [{"prompt": "a blue square", "seed": 1}, {}, {"seed": 6, "n": 3}, {"prompt": "two stars"}, {}]
            crowd = list(pool.map(lambda more: ask(**more), others))
        assert crowd[1] == crowd[4] == [made] and crowd[2][1] == made
        assert len({content for contents in crowd for content in contents}) == 5
    file = tmp_path / "made.png"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items()]
    command = [f"--bundle={tiny_bundle}", "--task=text_to_image", *options, f"--output={file}"]
    assert launch_command("generate").main([*command, "--reproducible"]) == 0
    assert file.read_bytes() == made
    prompts = ["two stars", FIELDS["prompt"], "a blue square"]
    options = {name: value for name, value in FIELDS.items() if name not in ("prompt", "seed")}
    images = pipeline.generate(prompts, seed=[2, 7, 9], **options)
    np.testing.assert_array_equal(np.asarray(images[1]), np.asarray(Image.open(io.BytesIO(made))))


def test_edits_and_texts_are_the_same_alone_and_in_a_batch(pipeline):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    seeds, words = [5, 3, 8], ["make it red", "add a star", "remove the circle"]
    settings = {"steps": 3, "guidance_scale": 3.0}
    together = pipeline.edit(words, images, seed=seeds, **settings)
    for image, instruction, seed, expected in zip(images, words, seeds, together, strict=True):
        [alone] = pipeline.edit(instruction, image, seed=seed, **settings)
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(expected))
    # With a temperature the words depend on every bit of the logits.
    settings = {"steps": 4, "temperature": 1.0, "max_tokens": 12}
    texts = pipeline.caption(images, seed=seeds, **settings)
    assert len(set(texts)) == 3
    assert [
        pipeline.caption(image, seed=seed, **settings)[0] for image, seed in zip(images, seeds, strict=True)
    ] == texts
    asked = ["What color?", "How many?", "Is there a star?"]
    answers = pipeline.answer(images, asked, seed=seeds, **settings)
    alone = [pipeline.answer(*pair, seed=seed, **settings)[0] for *pair, seed in zip(images, asked, seeds, strict=True)]
    assert alone == answers
