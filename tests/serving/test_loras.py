"""Adapters that requests name: through the API and the page, in their batches, and back to the plain weights."""

import base64
import io
import json
import threading

import jax
import numpy as np
import pytest
import requests
from PIL import Image

from unialign_jax import Pipeline
from unialign_jax.serving import api, page_worker, snippets
from unialign_jax.serving.requests import BadRequest, Limits, make_work

pytestmark = pytest.mark.slow

BODY = {"prompt": "a red circle", "seed": 7, "steps": 2}


@pytest.fixture(scope="module")
def url(lora_engine, limits, running):
    with running(api.make_app(lora_engine, model="tiny", limits=limits)) as url:
        yield url


def ask(url, **more):
    answer = requests.post(f"{url}/v1/images/generations", json=BODY | more, timeout=60)
    return answer.json(), answer.status_code


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def weights(pipeline):
    return pipeline._weights.get("transformer")["transformer"]


def test_chosen_adapters_are_those_that_are_loaded_alone(tiny_pipeline, tiny_bundle, lora_engine, lora_files):
    other = Pipeline.from_bundle(tiny_bundle)
    plain, sets = jax.tree.map(np.asarray, weights(other)), []
    for scales in ({"style": 0.8}, {"style": 0.5, "water": -1.0}, {}, {"style": 0.8}, {"water": 1.0}, {"style": 0.8}):
        tiny_pipeline.choose_loras(scales, kept=2)
        other.unload_lora()
        for name, scale in scales.items():
            other.load_lora(lora_files[name], scale)
        jax.tree.map(np.testing.assert_array_equal, weights(tiny_pipeline), weights(other))
        sets.append(weights(tiny_pipeline))
    adapted, unchanged = ([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)] for tree in sets[1:3])
    assert sum(a != b for a, b in zip(adapted, unchanged, strict=True)) == 2  # the arrays that the adapters change
    assert sets[0] is sets[3] is sets[5]  # kept, not read again
    tiny_pipeline.choose_loras({})
    jax.tree.map(np.testing.assert_array_equal, weights(tiny_pipeline), plain)
    with pytest.raises(ValueError, match="there is no LoRA 'none', loaded: style, water"):
        tiny_pipeline.choose_loras({"none": 1.0})


def test_a_request_names_adapters_and_the_next_has_none(url, tiny_pipeline):
    before, _ = ask(url)
    made = {
        "object": ask(url, lora={"style": 0.8})[0],
        "name": ask(url, lora="style")[0],
        "model": ask(url, model="tiny:style")[0],
    }
    after, _ = ask(url, model="tiny", lora={"style": 0})
    both, _ = ask(url, model="tiny:water", lora={"style": 0.8})
    assert before["data"][0]["b64_json"] == after["data"][0]["b64_json"] and before["lora"] == {}
    assert len({answer["data"][0]["b64_json"] for answer in made.values()}) == 1
    assert all(answer["lora"] == {"style": 0.8} for answer in made.values())
    parameters = json.loads(
        Image.open(io.BytesIO(base64.b64decode(made["name"]["data"][0]["b64_json"]))).info["parameters"]
    )
    assert parameters["loras"] == {"style": 0.8} and both["lora"] == {"style": 0.8, "water": 1.0}
    tiny_pipeline.choose_loras({"style": 0.8})
    [expected] = tiny_pipeline.generate(**{("prompts" if key == "prompt" else key): BODY[key] for key in BODY})
    np.testing.assert_array_equal(pixels(made["name"]["data"][0]["b64_json"]), np.asarray(expected))
    images = [pixels(answer["data"][0]["b64_json"]).astype(int) for answer in (before, made["name"], both)]
    assert min(np.abs(images[i] - images[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 20
    listed = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    assert [(entry["id"], entry.get("parent")) for entry in listed] == [
        ("tiny", None), ("tiny:style", "tiny"), ("tiny:water", "tiny"),
    ]  # fmt: skip


def test_requests_at_once_each_get_their_own_adapters(url):
    asked = [{}, {"lora": "style"}, {"lora": "water"}, {"lora": {"style": 0.3}}]
    expected = [ask(url, **more)[0]["data"][0]["b64_json"] for more in asked]
    assert len(set(expected)) == 4
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ask(url, **asked[n % 4])[0]["data"][0]["b64_json"]}))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, content in found.items():  # in a batch of two a value may round otherwise
        assert np.abs(pixels(content).astype(int) - pixels(expected[number % 4])).max() <= 1
    assert len(found) == 12


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "more, status, words",
    [
        ({"lora": "none"}, 400, "lora names 'none', expected one of this server's: style, water"),
        ({"lora": {"style": "much"}}, 400, "the scale of style is 'much', expected a number from -10"),
        ({"lora": {"style": 1e9}}, 400, "the scale of style is"),
        ({"lora": ["style"]}, 400, "lora is ['style'], expected a name, or an object"),
        ({"model": "tiny:none"}, 404, "there is no model 'tiny:none'; LoRAs of this server: style, water"),
    ],
)
def test_wrong_adapters_are_refused_in_one_line(url, more, status, words):
    answer, found = ask(url, **more)
    assert found == status and words in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_a_server_without_adapters_says_so():
    with pytest.raises(BadRequest, match="expected one of this server's: none"):
        make_work("text_to_image", {"prompt": "a", "lora": "style"}, [], Limits())
    work = make_work("text_to_image", {"prompt": "a", "model": "other:style"}, [], Limits(), model="tiny")
    assert work.loras == {}


def test_the_page_offers_adapters_and_copies_them(lora_engine, limits, running, tmp_path):
    gradio = pytest.importorskip(
        "gradio", reason="Gradio is not installed: pip install --no-deps -r requirements-page.txt"
    )
    from unialign_jax.serving import page
    from unialign_jax.serving.examples import examples_for

    assert gradio
    worker = page_worker.Worker(lora_engine, tmp_path, model="tiny", limits=limits, stamp={})
    blocks = page.Layout(worker, examples_for(lora_engine.pipeline.tokenizer)).build("tiny")
    choosers = [block for block in blocks.blocks.values() if getattr(block, "label", None) == "LoRA"]
    assert len(choosers) == 5 and choosers[0].choices == [("none", ""), ("style", "style"), ("water", "water")]
    work = make_work("text_to_image", BODY | {"lora": "style"}, [], limits, loras=lora_engine.loras)
    python, curl, _ = worker.copies([work], "http://127.0.0.1:8000")
    assert "pipeline.load_lora('style', scale=0.8)" in python and '"lora": {"style": 0.8}' in curl
    assert api.from_form("lora", snippets._as_form({"style": 0.8})) == {"style": 0.8}
