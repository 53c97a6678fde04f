"""Every task on a small bundle of random weights, against plain loops over the networks."""

import dataclasses
import inspect
import io
import json
import logging
import weakref
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.bundle_config import write_content
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.inference.options import options_of
from unialign_jax.inference.weights import bundle_loader
from unialign_jax.integrity import checksums
from unialign_jax.models.autoencoder import Moments, denormalize, make_autoencoder, sample_latents
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.sampling import programs

SIDE = 32
METHODS = {
    "text_to_image": "generate",
    "edit": "edit",
    "perception": "perceive",
    "personalization": "personalize",
    "caption": "caption",
    "vqa": "answer",
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline.from_bundle(tiny_bundle, max_batch=4)


def picture(seed=0, size=(SIDE, SIDE)):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def plain_image(directory, tokenizer, prompt, seed, conditions=(), *, steps, scale):
    """The reference's sampler, spelled out: each half of the guidance its own forward, adaLN made at every step."""
    config, params = bundle.load(directory)
    autoencoder = make_autoencoder(config.autoencoder)
    network = jax.jit(lambda *inputs: MMDiT(config.transformer).apply({"params": params["transformer"]}, *inputs))

    def encode(image):
        pixels = np.asarray(image, np.float32)[None] / 127.5 - 1
        moments = autoencoder.apply({"params": params["autoencoder"]}, pixels, method="encode")
        return sample_latents(Moments(*moments), None, config.autoencoder)

    def text(prompt):
        ids = jnp.asarray(tokenizer.encode(prompt, config.text_length))[None]
        return TextEncoder(config.text_encoder).apply({"params": params["text_encoder"]}, ids)

    given = jnp.stack([encode(image)[0] for image in conditions])[None] if conditions else None
    latents = jax.random.normal(jax.random.key(seed), (1, 8, 8, 48))
    prompt, empty = text(prompt), text("")
    sigmas = sampling_sigmas(steps)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        conditional, unconditional = (
            network(latents, text, jnp.full((1,), sigma), given).velocity for text in (prompt, empty)
        )
        latents = latents + (following - sigma) * (unconditional + scale * (conditional - unconditional))
    raw = denormalize(latents, config.autoencoder)
    image = autoencoder.apply({"params": params["autoencoder"]}, raw, method="decode")[0]
    return np.clip((np.asarray(image) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def difference(a, b):
    return np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max()


@pytest.mark.slow
def test_generate_equals_a_plain_loop(pipeline, tiny_bundle):
    (image,) = pipeline.generate("a red circle", steps=4, seeds=5)
    expected = plain_image(tiny_bundle, pipeline.tokenizer, "a red circle", 5, steps=4, scale=7.0)
    assert difference(image, expected) <= 1
    assert np.std(expected) > 20  # not a flat or saturated field, in which anything would agree
    parameters = json.loads(image.info["parameters"])
    assert parameters["prompt"] == "a red circle" and parameters["seed"] == 5 and parameters["steps"] == 4


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers(pipeline, tmp_path):
    options = {"steps": np.int64(1), "guidance_scale": np.float32(3)}
    (image,) = pipeline.personalize("a hat", picture(), **options)  # a single reference needs no list
    assert json.loads(image.info["parameters"])["guidance_scale"] == 3
    talk = pipeline.conversation(picture(), **options)
    talk.edit("a hat")
    talk.save(tmp_path / "talk")
    assert json.loads((tmp_path / "talk/conversation.json").read_text())["edits"][0]["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_conditions_equal_a_plain_loop(count, pipeline, tiny_bundle):
    references = [picture(i) for i in range(count)]
    if count == 1:
        (image,) = pipeline.edit("make it green", references, steps=3, seeds=2)
    else:
        (image,) = pipeline.personalize("make it green", references, steps=3, seeds=2)
    expected = plain_image(tiny_bundle, pipeline.tokenizer, "make it green", 2, references, steps=3, scale=7.0)
    assert difference(image, expected) <= 1
    other = plain_image(tiny_bundle, pipeline.tokenizer, "make it green", 2, [picture(9)] * count, steps=3, scale=7.0)
    assert difference(image, other) > 20  # the conditions matter


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(pipeline):
    prompts, seeds = ["a red circle", "a blue square", "two green stars"], [3, 1, 4]
    together = pipeline.generate(prompts, steps=3, seeds=seeds)
    again = pipeline.generate(prompts, steps=3, seeds=seeds)
    swapped = pipeline.generate(prompts[::-1], steps=3, seeds=seeds[::-1])[::-1]
    alone = [pipeline.generate(prompt, steps=3, seeds=seed)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    for i in range(3):
        assert difference(together[i], again[i]) == 0
        assert difference(together[i], swapped[i]) == 0
        assert difference(together[i], alone[i]) <= 1
    assert difference(together[0], together[1]) > 20
    assert difference(together[0], pipeline.generate(prompts[0], steps=3, seeds=4)[0]) > 20


@pytest.mark.slow
def test_a_caption_does_not_depend_on_its_batch(pipeline):
    images, seeds = [picture(i) for i in range(3)], [3, 1, 4]
    together = pipeline.caption(images, steps=4, seeds=seeds)
    assert pipeline.caption(images[::-1], steps=4, seeds=seeds[::-1])[::-1] == together
    for image, seed, caption in zip(images, seeds, together, strict=True):
        assert pipeline.caption(image, steps=4, seeds=seed) == [caption]
    assert len(set(together)) == 3


def likeliest(directory, image, ids):
    """The text pass by hand: ids [L] with every mask replaced by the model's likeliest token."""
    config, params = bundle.load(directory)
    pixels = np.asarray(image, np.float32)[None] / 127.5 - 1
    moments = make_autoencoder(config.autoencoder).apply({"params": {}}, pixels, method="encode")
    latents = sample_latents(Moments(*moments), None, config.autoencoder)
    text = TextEncoder(config.text_encoder).apply({"params": params["text_encoder"]}, ids[None])
    output = MMDiT(config.transformer).apply({"params": params["transformer"]}, latents, text, jnp.zeros((1,)))
    mask_id = config.transformer.vocab_size - 1
    logits = np.array(output.text_logits)[0]
    logits[:, mask_id] = -np.inf
    return np.where(ids == mask_id, logits.argmax(axis=-1), ids)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 5])
def test_captions_are_read_off_the_image_by_the_text_pass(cap, pipeline, tiny_bundle):
    # Temperature 0 in a single step: the likeliest token at every position, all of them masked.
    tokenizer = pipeline.tokenizer
    ids = np.full(24, tokenizer.mask_id)
    ids[cap or 24 :] = tokenizer.eos_id  # what a cap leaves out is end-of-text from the start
    expected = tokenizer.decode(likeliest(tiny_bundle, picture(1), ids)).strip()
    assert pipeline.caption(picture(1), steps=1, temperature=0, max_tokens=cap) == [expected]


@pytest.mark.slow
def test_answers_are_read_off_the_image_and_the_question(pipeline, tiny_bundle):
    tokenizer, images = pipeline.tokenizer, [picture(0), picture(1)]
    questions = ["is the circle red ?", "where is the star ?"]
    expected = []
    for image, question in zip(images, questions, strict=True):
        prefix = tokenizer.token_ids(f"Q: {question} A: ")
        ids = np.full(24, tokenizer.eos_id)
        ids[: len(prefix)] = prefix
        ids[len(prefix) : len(prefix) + 4] = tokenizer.mask_id
        expected.append(tokenizer.decode(likeliest(tiny_bundle, image, ids)[len(prefix) :]).strip())
    assert pipeline.answer(images, questions, steps=1, temperature=0, max_tokens=4) == expected


@pytest.mark.slow
def test_a_caption_goes_on_from_its_prefix(pipeline, tiny_bundle):
    tokenizer = pipeline.tokenizer
    given = tokenizer.token_ids("a red star")
    ids = np.full(24, tokenizer.mask_id)
    ids[: len(given)] = given
    for cap in (None, 5):  # of what comes after the prefix
        ids[len(given) + (cap or 24) :] = tokenizer.eos_id
        expected = tokenizer.decode(likeliest(tiny_bundle, picture(1), ids)).strip()
        options = {"steps": 1, "temperature": 0, "max_tokens": cap}
        assert pipeline.caption(picture(1), prefix="a red star", **options) == [expected]
        assert expected.startswith("a red star")
    assert pipeline.caption(picture(1), prefix="a red star", seeds=1) != pipeline.caption(picture(1), seeds=1)


@pytest.mark.slow
def test_edits_keep_the_images_size(pipeline, caplog):
    images = [picture(0, (50, 37)), picture(1, (32, 64)), picture(2, (600, 300))]
    with caplog.at_level(logging.WARNING):
        edited = pipeline.edit("make it green", images, steps=1)
    assert [image.size for image in edited] == [(50, 37), (32, 64), (256, 128)]
    assert "image 2 is 600 x 300 pixels" in caplog.text
    (told,) = pipeline.edit("make it green", images[0], steps=1, height=32, width=32)
    assert told.size == (32, 32)


@pytest.mark.slow
def test_values_compile_nothing(pipeline):
    compiled, image = [], picture()

    def note(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    pipeline.generate("a red circle", steps=2)
    pipeline.caption(image, steps=2)
    compiled.clear()
    pipeline.generate("a blue square", steps=2, seeds=9, guidance_scale=3.0, shift=2.0, guidance_rescale=0.5)
    pipeline.generate("a blue square", steps=2, solver="dpmpp_2m", negative_prompts="a star")
    pipeline.caption(picture(1), steps=7, temperature=0.5, seeds=3, max_tokens=3)
    assert not compiled
    pipeline.generate("a blue square", steps=5)
    assert compiled  # the listener works


@pytest.mark.slow
def test_each_program_is_traced_once(positioned_bundle, monkeypatch):
    """Whatever the seeds, guidance, schedule, texts and images; each decoding is a program, here that of both tasks."""
    chex.clear_trace_counter()
    # Programs of its own: those that are kept would be traced already, and others would find these.
    monkeypatch.setattr(programs.Programs, "of", classmethod(programs.Programs.of.__func__.__wrapped__))
    for name in ("encode_images", "sample_images", "decode_images", "describe"):
        monkeypatch.setattr(programs, name, chex.assert_max_traces(getattr(programs, name), n=1))
    once = Pipeline.from_bundle(positioned_bundle)
    for seed, scale in ((0, 7.0), (5, 2.0)):
        image = picture(seed)
        once.edit("make it green", image, steps=2, seeds=seed, guidance_scale=scale, shift=1 + scale)
        once.edit("add a star", image, steps=2, guidance_rescale=0.5, solver="unipc", negative_prompts="a dog")
        once.caption(image, steps=1 + seed, seeds=seed, temperature=0.5 * scale)
        once.answer(image, "is it red ?", steps=3, max_tokens=4)


@pytest.mark.slow
def test_guidance_modes(pipeline):
    make = lambda **options: pipeline.generate("a red circle", steps=3, **options)[0]  # noqa: E731
    plain = make(guidance_scale=1.0)
    assert json.loads(plain.info["parameters"])["negative_prompt"] == ""
    # Outside of the interval guidance is off; an interval that holds no noise level is the conditional model alone.
    assert difference(make(guidance_interval=(0.0, 0.001)), plain) <= 1
    assert difference(make(guidance_interval=(0.0, 0.999)), make()) > 3
    image = picture()
    edit = lambda **options: pipeline.edit("make it green", image, steps=3, **options)[0]  # noqa: E731
    # Both scales 1 leave the prediction under image and text.
    assert difference(edit(image_guidance_scale=1.0, guidance_scale=1.0), edit(guidance_scale=1.0)) <= 1
    assert difference(edit(image_guidance_scale=3.0), edit()) > 3


@pytest.mark.slow
def test_a_callback_sees_every_step_and_changes_nothing(pipeline):
    steps = []
    (image,) = pipeline.generate("a red circle", steps=3, seeds=1, callback=steps.append)
    assert difference(image, pipeline.generate("a red circle", steps=3, seeds=1)[0]) <= 1
    assert [(step.index, step.count, step.members) for step in steps] == [(i, 3, (0,)) for i in (1, 2, 3)]
    # The last evaluation is followed by a step to noise level 0: what is predicted then is the result.
    assert difference(steps[-1].images()[0], image) <= 1


@pytest.mark.slow
def test_low_memory_frees_a_component_before_the_next_is_read_and_changes_nothing(pipeline, tiny_bundle):
    config, read, held = bundle.read_config(tiny_bundle), {}, []
    loader = bundle_loader(tiny_bundle, config, dtype="float32", device=jax.devices()[0])

    def load(name):
        held.append((name, [other for other, leaf in read.items() if leaf() is not None]))
        params = loader(name)
        if leaves := jax.tree.leaves(params):
            read[name] = weakref.ref(leaves[0])
        return params

    lean = Pipeline(config, load, bundle.read_tokenizer(tiny_bundle), low_memory=True)
    assert difference(lean.generate("a red circle", steps=3)[0], pipeline.generate("a red circle", steps=3)[0]) == 0
    assert held == [("text_encoder", []), ("transformer", []), ("autoencoder", [])]
    held.clear()
    assert lean.caption(picture(), steps=3) == pipeline.caption(picture(), steps=3)
    assert held == [("transformer", []), ("text_encoder", ["transformer"])]


@pytest.mark.slow
def test_a_conversation_is_kept_undone_and_replayed(pipeline, tmp_path):
    talk = pipeline.conversation(picture(), steps=2)
    first = talk.edit("make it green")
    second = talk.edit("add a star", seed=9)
    assert difference(second, pipeline.edit("add a star", first, seeds=9, steps=2)[0]) == 0
    assert [step.instruction for step in talk.edits] == ["make it green", "add a star"]
    assert talk.undo() is first and talk.image is first
    assert talk.redo() is second
    again = talk.replay()
    assert difference(again.image, second) == 0
    assert difference(talk.replay(picture(3)).image, second) > 3
    talk.save(tmp_path / "talk")
    kept = json.loads((tmp_path / "talk/conversation.json").read_text())
    assert [step["seed"] for step in kept["edits"]] == [0, 9]
    assert difference(Image.open(tmp_path / "talk/2.png"), second) == 0
    talk.save(tmp_path / "talk")  # its own folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/1.png").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="1.png"):
            talk.save(tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine/1.png").read_text() == "precious"
    talk.undo()
    talk.undo()
    with pytest.raises(ValueError, match="no edit to undo"):
        talk.undo()


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    prompt = "a red circle and " * 12 + "a blue square"
    with caplog.at_level(logging.WARNING):
        pipeline.generate(prompt, steps=2)
    assert "cut off" in caplog.text and "a blue square" in caplog.text


@pytest.mark.slow
def test_long_questions_are_cut_with_a_warning(pipeline, caplog):
    image = Image.new("RGB", (32, 32))
    with caplog.at_level(logging.WARNING):
        pipeline.answer(image, "is there a " + "red " * 40 + "star?", steps=2)
    assert "question 0 is 49 tokens long, the model reads 23: its middle is left out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipeline.answer(image, "is there a red star?", steps=2)
    assert "question" not in caplog.text


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p.generate(None), "prompt is a NoneType, expected a text or a list of texts"),
        (lambda p: p.generate({"a": 1}), "prompt is a dict, expected a text or a list"),
        (lambda p: p.generate([3]), "prompt 0 is a int, expected a text"),
        (lambda p: p.generate("x" * 2**21), "prompt 0 has 2,097,152 characters, expected at most"),
        (lambda p: p.generate("\ud800"), "prompt 0 holds half of a character"),
        (lambda p: p.generate("a", negative_prompts=3), "negative_prompt is 3, expected a text"),
        (lambda p: p.generate("a", negative_prompts=[None]), "negative prompt 0 is a NoneType, expected a text"),
        (lambda p: p.generate("a", negative_prompts="\udfff"), "negative prompt 0 holds half of a character"),
        (lambda p: p.generate("a", height=10_000_000), "height is 10000000, expected a multiple of 8 up to 768"),
        (lambda p: p.generate("a", height=2**70), "height is 1180591620717411303424, expected a multiple of 8"),
        (lambda p: p.generate("a", height=True), "height is True, expected a multiple of 8"),
        (lambda p: p.generate("a", height=float("nan")), "height is nan, expected a multiple of 8"),
        (lambda p: p.generate("a", steps=10**9), "steps is 1000000000, expected a whole number from 1 to 1000"),
        (lambda p: p.generate("a", steps=True), "steps is True, expected a whole number"),
        (lambda p: p.generate("a", steps="28"), "steps is '28', expected a whole number"),
        (lambda p: p.generate("a", seeds=2**70), "seed is 1180591620717411303424, expected 0 to 4294967295"),
        (lambda p: p.generate("a", seeds=True), "seed is True, expected a whole number"),
        (lambda p: p.generate("a", seeds="7"), "seed is '7', expected a whole number"),
        (lambda p: p.generate("a", seeds={7}), r"seed is \{7\}, expected a whole number"),
        (lambda p: p.generate("a", seeds=[[7]]), r"seed is \[\[7\]\], expected a whole number"),
        (lambda p: p.generate("a", seeds=10**5000), "expected 0 to 4294967295"),
        (lambda p: p.generate("a", images_per_prompt=10**9), "images_per_prompt is 1000000000, expected"),
        (lambda p: p.generate("a", guidance_scale="7"), "guidance_scale is '7', expected a number from 0 to 100"),
        (lambda p: p.generate("a", guidance_scale=True), "guidance_scale is True, expected a number from 0 to 100"),
        (
            lambda p: p.generate("a", guidance_scale=float("inf")),
            "guidance_scale is inf, expected a number from 0 to 100",
        ),
        (lambda p: p.generate("a", guidance_scale=[7]), r"guidance_scale is \[7\], expected a number from 0 to 100"),
        (lambda p: p.generate("a", guidance_interval={0, 1}), "guidance_interval is {0, 1}, expected two"),
        (lambda p: p.generate("a", guidance_interval=(0, float("nan"))), "0 <= low <= high <= 1"),
        (lambda p: p.generate("a", shift=0), "shift is 0, expected a number from 0.01 to 100"),
        (lambda p: p.generate("a", solver=["euler"]), r"solver is \['euler'\], expected one of"),
        (lambda p: p.edit("a", b"bytes"), "image 0 is a bytes, expected a PIL image or a path"),
        (lambda p: p.edit("a", io.BytesIO(b"x")), "image 0 is a BytesIO, expected a PIL image or a path"),
        (lambda p: p.edit("a", Path(__file__)), "cannot be decoded: it is no image of a known format"),
        (lambda p: p.edit("a", "/dev/zero"), "image 0.*/dev/zero is a device, pipe or socket, expected a file"),
        (lambda p: p.edit("a", "/"), "image 0.*is a folder, expected a file"),
        (lambda p: p.edit("a", "a\0b.png"), "image 0.*cannot be opened"),
        (lambda p: p.edit("a", Image.new("RGB", (2000, 1))), "image 0 is 2,000 x 1 pixels, expected sides that"),
        (lambda p: p.edit("a", [[picture()]]), "image 0 is a list, expected a PIL image or a path"),
        (lambda p: p.perceive(["depth"], picture()), r"kind is \['depth'\], expected one of canny"),
        (lambda p: p.perceive("depth", picture(), instruction=""), "instruction 0 is empty"),
        (lambda p: p.personalize("a", []), "expected 1 to 4"),
        (
            lambda p: p.caption(picture(), temperature=float("nan")),
            "temperature is nan, expected a number from 0 to 100",
        ),
        (lambda p: p.caption(picture(), entropy_bound=-1), "entropy_bound is -1, expected a number of at least 0"),
        (lambda p: p.caption(picture(), text_length=10**9), "text_length is 1000000000, expected a whole number"),
        (lambda p: p.caption(picture(), max_tokens=True), "max_tokens is True, expected a whole number"),
        (lambda p: p.caption(picture(), decoding={}), "decoding is {}, expected one of ancestral"),
        (lambda p: p.answer(picture(), ["a", 5]), "question 1 is a int, expected a text"),
        (lambda p: p.generate(" "), "prompt 0 is empty"),
        (lambda p: p.generate([]), "no prompt was given"),
        (lambda p: p.generate("a", height=36), "height is 36, expected a multiple of 8 up to 768, such as 32"),
        (lambda p: p.generate("a", width=1024), "width is 1024"),
        (lambda p: p.generate("a", steps=0), "steps is 0, expected a whole number from 1 to 1000"),
        (lambda p: p.generate("a", steps=2.5), "steps is 2.5, expected a whole number"),
        (lambda p: p.caption(picture(), max_tokens=2.5), "max_tokens is 2.5, expected a whole number"),
        (lambda p: p.generate("a", images_per_prompt=1.5), "images_per_prompt is 1.5, expected a whole number"),
        (lambda p: p.generate("a", height="32"), "height is '32', expected a multiple of 8"),
        (lambda p: p.generate("a", width=32.0), "width is 32.0, expected a multiple of 8"),
        (lambda p: p.edit("a", picture(), height=0), "height is 0, expected a multiple of 8"),
        (lambda p: p.generate("a", seeds=1.5), "seed is 1.5, expected a whole number"),
        (lambda p: p.generate("a", seeds=[1.5]), r"seed is \[1.5\], expected a whole number"),
        (lambda p: p.generate("a", guidance_interval=None), "guidance_interval is None, expected two numbers"),
        (lambda p: p.generate("a", guidance_interval="ab"), "guidance_interval is 'ab', expected two numbers"),
        (lambda p: p.personalize("a", [picture()], slots=9), "slots is 9, expected a whole number from 1 to 4"),
        (lambda p: p.conversation(picture()).edit("a", seeds=9), "a step of a conversation is one image"),
        (lambda p: p.conversation(picture(), images_per_prompt=2).edit("a"), "a step of a conversation is one image"),
        (lambda p: p.generate("a", guidance_scale=-1), "guidance_scale is -1"),
        (lambda p: p.generate("a", guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda p: p.generate("a", guidance_interval=(0.5, 0.1)), "0 <= low <= high <= 1"),
        (lambda p: p.generate("a", solver="magic"), "expected one of euler"),
        (lambda p: p.generate("a", seeds=[1, 2]), "2 seeds for 1 results"),
        (lambda p: p.generate("a", seeds=-1), "seed is -1"),
        (lambda p: p.generate(["a", "b"], negative_prompts=["c"] * 3), "2 prompts, but 3 negative prompts"),
        (lambda p: p.edit(["a", "b"], [picture()] * 3), "2 instructions, but 3 images"),
        (lambda p: p.edit("a", "/nowhere/image.png"), "image 0.*/nowhere/image.png: there is no such file"),
        (lambda p: p.edit("a", 3), "image 0 is a int, expected a PIL image or a path"),
        (lambda p: p.perceive("smell", picture()), "expected one of canny, depth, pose"),
        (lambda p: p.personalize("a", [picture()] * 5), "has 5 references, expected 1 to 4"),
        (lambda p: p.personalize(["a", "b"], [[picture()]]), "2 prompts, but 1 lists of references"),
        (lambda p: p.caption(picture(), decoding="magic"), "expected one of ancestral"),
        (lambda p: p.caption(picture(), max_tokens=0), "max_tokens is 0"),
        (lambda p: p.caption(picture(), prefix=["a"]), "prefix is a list, expected a text"),
        (lambda p: p.caption(picture(), prefix="a " * 24), "prefix is 24 tokens long, expected at most 23 of a text"),
        (lambda p: p.caption([]), "no image was given"),
        (lambda p: p.answer(picture(), ""), "question 0 is empty"),
    ],
)
def test_bad_input_is_one_clear_line(call, message, pipeline):
    with pytest.raises(ValueError, match=message) as error:
        call(pipeline)
    assert "\n" not in str(error.value)


def test_options_are_listed_and_other_names_stand_for_them(pipeline):
    """The signature and the help of each method come from the table of options."""
    for task, method in METHODS.items():
        listed = inspect.signature(getattr(Pipeline, method)).parameters
        documented = getattr(Pipeline, method).__doc__
        for name, option in options_of(task).items():
            assert name in listed and (name == "kind" or f"\n  {name}: {option.help}" in documented)
    with pytest.raises(TypeError, match=r"perception takes no option promt"):
        pipeline.perceive("depth", picture(), promt=1)
    (image,) = pipeline.generate("a", steps=1, seed=3, images_per_prompt=1, negative_prompt="b")
    (again,) = pipeline.generate("a", num_inference_steps=1, seeds=3, num_images_per_prompt=1, negative_prompts="b")
    assert difference(image, again) == 0 and image.info == again.info
    with pytest.raises(TypeError, match=r"text_to_image takes no option stepz \(nearest: steps\)"):
        pipeline.generate("a", stepz=1)
    with pytest.raises(ValueError, match="seed is given twice, also as seeds"):
        pipeline.generate("a", seeds=1, seed=1)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8"}, "dtype is 'float8', expected one of bfloat16, float32"),
        ({"dtype": 32}, "dtype is 32, expected one of"),
        ({"quantize": "int4"}, "quantize is 'int4', expected one of int8, w8a8"),
        ({"attention": "flash"}, "flash"),
        ({"max_batch": 0}, "max_batch is 0, expected a whole number from 1"),
        ({"max_batch": 2.5}, "max_batch is 2.5, expected a whole number"),
        ({"max_batch": 2**40}, "max_batch is 1099511627776, expected"),
        ({"weights": "ema"}, "weights is 'ema', which a run's folder has"),
    ],
)
def test_a_pipeline_that_cannot_be(tiny_bundle, refuses, options, message):
    refuses(lambda: Pipeline.from_bundle(tiny_bundle, **options), message)


def rewritten(source, target, **changes):
    """A bundle like another, of which config.json says something else; its files stay where they are."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            (target / path.name).symlink_to(path)
    write_content(target, json.loads((source / "config.json").read_text()) | changes)
    return target


@pytest.mark.slow
def test_a_bundle_is_sampled_as_it_says_and_as_one_asks(tiny_bundle, tmp_path):
    sampling = {"steps": 2, "edit_steps": 1, "caption_steps": 3, "guidance_scale": 3.5, "shift": 2.0}
    pipeline = Pipeline.from_bundle(rewritten(tiny_bundle, tmp_path / "own", sampling=sampling))

    def made(images):
        parameters = json.loads(images[0].info["parameters"])
        return tuple(parameters[key] for key in ("task", "steps", "guidance_scale", "shift"))

    assert made(pipeline.generate("a red circle")) == ("text_to_image", 2, 3.5, 2.0)
    assert made(pipeline.generate("a red circle", steps=1, guidance_scale=5.0, shift=1.0)) == (
        "text_to_image",
        1,
        5.0,
        1.0,
    )
    assert made(pipeline.edit("make it green", picture())) == ("edit", 1, 3.5, 2.0)
    assert made(pipeline.perceive("depth", picture())) == ("perception", 1, 3.5, 2.0)
    assert pipeline.caption(picture()) == pipeline.caption(picture(), steps=3)


@pytest.mark.slow
def test_texts_are_decoded_as_the_bundle_says_and_as_one_asks(pipeline, tiny_bundle, positioned_bundle, tmp_path):
    question, surest = "is it red ?", {"decoding": "top_k", "temperature": 0}
    by_chance = {"decoding": "ancestral", "temperature": 1}
    assert pipeline.caption(picture(), seeds=4) == pipeline.caption(picture(), seeds=4, **by_chance)
    assert pipeline.answer(picture(), question, seeds=4) == pipeline.answer(picture(), question, seeds=5, **surest)
    asked = pipeline.answer(picture(), question, seeds=4, **by_chance)
    assert asked != pipeline.answer(picture(), question, seeds=4)

    positioned = Pipeline.from_bundle(positioned_bundle)
    assert positioned.caption(picture(), seeds=4) == positioned.caption(picture(), seeds=5, **surest)
    own = {"caption_decoding": "ancestral", "caption_temperature": 1, "answer_decoding": "ancestral"}
    own["answer_temperature"] = 1
    said = Pipeline.from_bundle(rewritten(positioned_bundle, tmp_path / "own", sampling=own))
    assert said.caption(picture(), seeds=4) == positioned.caption(picture(), seeds=4, **by_chance)
    assert said.answer(picture(), question, seeds=4) == positioned.answer(picture(), question, seeds=4, **by_chance)
    assert said.caption(picture(), seeds=4) != positioned.caption(picture(), seeds=4)


@pytest.mark.slow
def test_a_table_of_zeros_changes_nothing_and_another_does(pipeline, positioned_bundle, tmp_path):
    config, params = bundle.load(positioned_bundle)
    zeros = params["transformer"] | {"text_positions": np.zeros_like(params["transformer"]["text_positions"])}
    params |= {"transformer": zeros}
    bundle.save(tmp_path / "zeros", config, params, tokenizer=bundle.tokenizer_path(positioned_bundle))
    calls = (
        lambda p: np.asarray(p.generate("a red circle", steps=2)[0]).tolist(),
        lambda p: p.caption(picture(), steps=4, decoding="ancestral", temperature=1),
    )
    zeros, positioned = Pipeline.from_bundle(tmp_path / "zeros"), Pipeline.from_bundle(positioned_bundle)
    for call in calls:
        assert call(zeros) == call(pipeline) != call(positioned)


@pytest.mark.bad_input
def test_texts_longer_than_the_table_of_positions(positioned_bundle, tmp_path, refuses, command_refuses):
    positioned = Pipeline.from_bundle(positioned_bundle)
    words = ("text_length is 25, expected at most 24", "positions")
    refuses(lambda: positioned.caption(picture(), text_length=25), *words)
    refuses(lambda: positioned.answer(picture(), "is it red ?", text_length=25), *words)
    picture().save(tmp_path / "a.png")
    arguments = [f"--bundle={positioned_bundle}", "--task=caption", f"--image={tmp_path}/a.png", "--text-length=25"]
    command_refuses("generate", [*arguments, "--compilation-cache=none"], *words)
    longer = rewritten(positioned_bundle, tmp_path / "longer", text_length=25)
    refuses(lambda: Pipeline.from_bundle(longer), "texts have 25 tokens, the transformer has positions for 24")


@pytest.mark.slow
def test_a_task_or_a_size_beyond_training_is_warned_of_once(tiny_bundle, tmp_path, caplog):
    pipeline = Pipeline.from_bundle(rewritten(tiny_bundle, tmp_path / "t2i", tasks=["t2i"]))
    with caplog.at_level(logging.WARNING):
        pipeline.generate("a red circle", steps=1)
        assert not caplog.messages
        for _ in range(2):
            pipeline.perceive("depth", picture(), steps=1, height=48, width=48)
    assert [message.split(str(tmp_path))[-1] for message in caplog.messages] == [
        "/t2i was not trained for perception, as far as it says (its tasks: text_to_image)",
        "sides beyond 32 pixels, which the model was trained at, may repeat what they show",
    ]


@pytest.mark.slow
def test_components_are_hashed_once(tiny_bundle, monkeypatch):
    hashed = []
    digest = checksums.digest
    monkeypatch.setattr(checksums, "digest", lambda path: hashed.append(path) or digest(path))
    lean = Pipeline.from_bundle(tiny_bundle, low_memory=True)
    lean.generate("a red circle", steps=1)
    count = len(hashed)
    assert any("transformer" in str(path) for path in hashed)
    lean.generate("a red circle", steps=1)
    assert len(hashed) == count
    Pipeline.from_bundle(tiny_bundle, verify=False).load()
    assert len(hashed) == count


def shrunk(config, **changes):
    return bundle.BundleConfig(
        transformer=dataclasses.replace(config.transformer, **changes), text_encoder=config.text_encoder
    )


@pytest.mark.slow
def test_a_vocabulary_larger_than_the_tokenizer_says_nothing_that_is_none(pipeline, tiny_bundle, tmp_path):
    """Logits beyond the tokenizer's ids are never drawn, however large: as if the model had only the others."""
    config, params = bundle.load(tiny_bundle)
    wide = dataclasses.replace(config.transformer, vocab_size=config.transformer.vocab_size + 8)
    rows = dataclasses.replace(config.text_encoder, vocab_size=wide.vocab_size)
    head, table = params["transformer"]["text_head"], params["text_encoder"]["token_embedding"]
    kernel, bias = np.pad(head["kernel"], ((0, 0), (0, 8))), np.pad(head["bias"], (0, 8), constant_values=99)
    params["transformer"] = params["transformer"] | {"text_head": {"kernel": kernel, "bias": bias}}
    params["text_encoder"] = params["text_encoder"] | {"token_embedding": np.pad(table, ((0, 8), (0, 0)))}
    config = dataclasses.replace(config, transformer=wide, text_encoder=rows)
    bundle.save(tmp_path / "wide", config, params, tokenizer=load_tokenizer())
    expected = pipeline.caption(picture(), steps=2, temperature=0)
    assert Pipeline.from_bundle(tmp_path / "wide").caption(picture(), steps=2, temperature=0) == expected


def test_a_bundle_must_have_what_the_task_needs(tiny_bundle, tmp_path):
    config, params = bundle.load(tiny_bundle, components=["transformer", "text_encoder"])
    lacking = bundle.BundleConfig(transformer=config.transformer, text_encoder=config.text_encoder)
    bundle.save(tmp_path / "lacking", lacking, params, tokenizer=bundle.tokenizer_path(tiny_bundle))
    with pytest.raises(ValueError, match="lacks autoencoder, which"):
        Pipeline.from_bundle(tmp_path / "lacking").caption(picture())
    bundle.save(tmp_path / "mute", lacking, params)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Pipeline.from_bundle(tmp_path / "mute")
    bundle.save(tmp_path / "small", shrunk(config, vocab_size=100), params, tokenizer=load_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens, the transformer predicts 100"):
        Pipeline.from_bundle(tmp_path / "small")
    with pytest.raises(FileNotFoundError):
        Pipeline.from_bundle(tmp_path / "nothing")
