"""Samples of a run: the same on every mesh, the same as the pipeline's, and the sheet that shows them."""

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.sampling import programs
from unialign_jax.training.loop import Trainer
from unialign_jax.training.samples import Sampler, draw_sheet, sample_seeds

COUNT, STEP = 5, 3  # no axis of the mesh divides five samples


@pytest.fixture(scope="module")
def random_params(small_config):
    """The weights of the transformer and the text encoder, random ones that carry signal everywhere, on the host."""
    trainer = Trainer(small_config("stage3"), jax.devices()[:1])
    shapes = {
        "transformer": trainer.abstract_state.params["transformer"],
        "text_encoder": trainer.abstract_frozen["text_encoder"],
    }
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.2 * generator.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def sampled(small_config, random_params, tmp_path_factory):
    """A function (devices, streams, mesh) -> the trainer, and {stream: (examples, images, ids)}."""

    def sample(devices, streams, **mesh):
        config = small_config("stage3", samples__count=COUNT, samples__guidance_scale=3.0)
        config.mesh.update(mesh)
        trainer = Trainer(config, devices)
        workdir = tmp_path_factory.mktemp("run")
        sampler = Sampler(config, trainer.networks, trainer.mesh, trainer.streams, trainer.tokenizer, workdir)
        place = lambda tree, like: jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))  # noqa: E731
        params = place(random_params["transformer"], trainer.abstract_state.params["transformer"])
        text_encoder = place(random_params["text_encoder"], trainer.abstract_frozen["text_encoder"])
        frozen = {"text_encoder": text_encoder, "autoencoder": {}}
        return trainer, {name: sampler.sample(trainer.streams[name], STEP, params, frozen) for name in streams}

    return sample


@pytest.fixture(scope="module")
def on_one_device(sampled):
    return sampled(jax.devices()[:1], ("text_to_image", "edit", "vqa"))


def difference(a, b):
    return np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max()


@pytest.mark.slow
def test_a_mesh_gives_the_samples_of_one_device(sampled, on_one_device):
    _, expected = on_one_device
    _, found = sampled(jax.devices(), ("edit", "vqa"), data=2, fsdp=2, tensor=2)
    for name, (examples, images, ids) in found.items():
        assert len(ids) == COUNT == len(examples["image"])
        np.testing.assert_array_equal(ids, expected[name][2], err_msg=name)
        assert (images is None) == (name == "vqa")
        if images is not None:
            assert images.shape == (COUNT, 32, 32, 3) and difference(images, expected[name][1]) <= 1, name
            assert np.std(images) > 20  # not a flat or saturated field, in which anything would agree


@pytest.mark.slow
def test_samples_are_those_of_the_pipeline(small_config, random_params, on_one_device, tmp_path):
    trainer, samples = on_one_device
    config, networks = trainer.config, trainer.networks
    model = bundle.BundleConfig(
        transformer=networks.transformer.config,
        text_encoder=networks.text_encoder.config,
        autoencoder=networks.autoencoder.config,
        image_size=config.image_size,
        text_length=config.text_length,
    )
    bundle.save(tmp_path / "bundle", model, random_params | {"autoencoder": {}}, tokenizer=trainer.tokenizer)
    pipeline = Pipeline.from_bundle(tmp_path / "bundle")
    seeds = sample_seeds(config.seed, STEP, COUNT).tolist()
    options = {"steps": config.samples.steps, "guidance_scale": 3.0, "shift": config.samples.shift, "seeds": seeds}
    texts = {"steps": config.samples.caption_steps, "seeds": seeds}
    for name, (examples, images, ids) in samples.items():
        records = [trainer.streams[name].records[i] for i in range(COUNT)]
        if name == "text_to_image":
            expected = pipeline.generate([record.caption for record in records], **options)
        elif name == "edit":
            given = [Image.fromarray(image) for (image,) in examples["conditions"]]
            expected = pipeline.edit([record.instruction for record in records], given, **options)
        if images is not None:
            assert max(map(difference, images, expected)) <= 1, name
        pictures = [Image.fromarray(image) for image in examples["image"]]
        if name == "vqa":
            starts = examples["text_is_target"].argmax(axis=1)
            found = [trainer.tokenizer.decode(row[start:]).strip() for row, start in zip(ids, starts, strict=True)]
            questions = [record.question for record in records]
            assert found == pipeline.answer(pictures, questions, decoding="ancestral", temperature=1, **texts)
        else:
            found = [trainer.tokenizer.decode(row).strip() for row in ids]
            assert found == pipeline.caption(pictures, **texts), name


@pytest.mark.slow
def test_samples_of_later_steps_trace_nothing(small_config, random_params, monkeypatch, tmp_path):
    chex.clear_trace_counter()
    # Programs of its own: those that are kept would be traced already, and others would find these.
    monkeypatch.setattr(programs.Programs, "of", classmethod(programs.Programs.of.__func__.__wrapped__))
    for name in ("encode_images", "sample_images", "decode_images", "describe"):
        monkeypatch.setattr(programs, name, chex.assert_max_traces(getattr(programs, name), n=1))
    trainer = Trainer(small_config("stage1", samples__count=COUNT), jax.devices()[:1])
    sampler = Sampler(trainer.config, trainer.networks, trainer.mesh, trainer.streams, trainer.tokenizer, tmp_path)
    params, text_encoder = jax.device_put((random_params["transformer"], random_params["text_encoder"]))
    for step in (2, 4):
        sampler.write(step, params, {"text_encoder": text_encoder, "autoencoder": {}})
    assert sampler.is_written(2) and sampler.is_written(4)


def test_every_sample_and_step_has_a_seed_of_its_own():
    seeds = np.concatenate([sample_seeds(run, step, 8) for run in (0, 1) for step in (2000, 4000)])
    assert seeds.dtype == np.uint32 and len(set(seeds.tolist())) == 32
    np.testing.assert_array_equal(sample_seeds(0, 2000, 3), sample_seeds(0, 2000, 8)[:3])


def test_a_count_of_zero_writes_nothing(small_config, tmp_path):
    trainer = Trainer(small_config("stage1", samples__count=0), jax.devices()[:1])
    sampler = Sampler(trainer.config, trainer.networks, trainer.mesh, trainer.streams, trainer.tokenizer, tmp_path)
    assert sampler.write(1, None, None) == []
    assert not list(tmp_path.iterdir())


def flat(color, size=32):
    return np.broadcast_to(np.array(color, np.uint8), (size, size, 3))


def test_sheet_shows_every_picture_of_every_card():
    colors = [(200, 10 * i, 30) for i in range(6)]
    cards = [(f"prompt {i}", [("real", flat(colors[2 * i])), ("generated", flat(colors[2 * i + 1]))]) for i in range(3)]
    sheet = np.asarray(draw_sheet(cards, columns=2, smallest=64))
    found = {tuple(c): np.argwhere((sheet == c).all(-1)) for c in colors}
    for color, places in found.items():
        assert len(places) == 64 * 64, color  # enlarged to 64 pixels, nothing drawn over it
    corner = [tuple(places.min(axis=0)) for places in found.values()]
    assert corner[0][0] == corner[1][0] and corner[0][1] < corner[1][1]  # real left of generated
    assert corner[2][0] == corner[0][0] and corner[2][1] > corner[1][1]  # the second card beside the first
    assert corner[4][0] > corner[0][0] and corner[4][1] == corner[0][1]  # the third below
    assert (sheet[: corner[0][0], : corner[1][1]] == 0).all(-1).any()  # black ink above: the prompt


def test_long_prompts_are_wrapped_not_cut_off_at_the_side():
    short = draw_sheet([("a", [("real", flat((1, 2, 3)))])], columns=1)
    long = draw_sheet([("many words " * 12, [("real", flat((1, 2, 3)))])], columns=1)
    assert long.width == short.width and long.height > short.height
