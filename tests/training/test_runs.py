"""A run's folder as a model: opened as it was trained, told of what it was trained for, refused when it is none."""

import json
import logging
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from unialign_jax import Pipeline, bundle
from unialign_jax.bundle_config import write_content
from unialign_jax.conversion.exporting import bundle_from_run
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.training import runs


@pytest.fixture(scope="module")
def run(small_config, tmp_path_factory):
    """A run's folder with the checkpoints of steps 3 and 12, whose averages are larger by 1."""
    from unialign_jax.training.checkpoints import Checkpoints
    from unialign_jax.training.config import build_configs
    from unialign_jax.training.optimizer import make_optimizer
    from unialign_jax.training.state import Networks, init_state

    config = small_config(samples__guidance_scale=3.0)
    networks = Networks.create(*build_configs(config, "cpu"))
    state = init_state(networks, make_optimizer(**config.optimizer, decay_1d=True)[0], 0.9, jax.random.key(0))
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(workdir)
    for step in (3, 12):
        checkpoints.save(state, step)
    checkpoints.close()
    (workdir / "config.json").write_text(config.to_json_best_effort())
    return SimpleNamespace(folder=workdir, state=state, config=config)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run.folder, tmp_path / "run")


def change(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.slow
def test_a_run_is_sampled_as_its_bundle_is(run, tmp_path):
    bundle_from_run(tmp_path / "bundle", run.folder, weights="ema")
    made = Pipeline.from_bundle(run.folder)
    (image,), (expected,) = (
        pipeline.generate("a red circle", seeds=3) for pipeline in (made, Pipeline.from_bundle(tmp_path / "bundle"))
    )
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    parameters = json.loads(image.info["parameters"])
    assert (parameters["steps"], parameters["guidance_scale"], parameters["shift"]) == (2, 3.0, 3.0)
    config = bundle.read_config(tmp_path / "bundle")
    assert config.tasks == ("text_to_image", "caption") == made.config.tasks
    assert config.sampling == made.config.sampling
    assert config.sampling["caption_steps"] == 2


@pytest.mark.slow
def test_the_average_is_the_default(run):
    opened = {weights: runs.open_to_sample(run.folder, weights) for weights in (None, "raw", "ema")}
    assert [(it.weights, it.step) for it in opened.values()] == [("ema", 12), ("raw", 12), ("ema", 12)]
    assert opened["raw"].digest != opened["ema"].digest == opened[None].digest
    for weights, tree in (("raw", run.state.params["transformer"]), ("ema", run.state.ema)):
        found = dict(opened[weights].leaves("transformer"))
        np.testing.assert_array_equal(found["text_head/kernel"], tree["text_head"]["kernel"])


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, caplog):
    largest = max((copy / "checkpoints/12").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert runs.open_to_sample(copy).step == 3
    assert "checkpoints/12 cannot be read" in caplog.text
    assert runs.open_to_sample(copy, verify=False).step == 12


def test_a_run_keeps_the_tokenizer_that_it_was_trained_with(run, copy, tiny_bundle, tmp_path):
    """Also where the bundle of its frozen parts has another."""
    other = tokenizer_with("zebra", tmp_path / "other")
    change(copy, frozen_from=str(tiny_bundle), tokenizer=str(other))
    bundle_from_run(tmp_path / "bundle", copy, source=str(tiny_bundle))
    written = (tmp_path / "bundle/tokenizer/tokenizer.json").read_text()
    assert "zebra" in written and "zebra" not in (tiny_bundle / "tokenizer/tokenizer.json").read_text()
    assert runs.open_to_sample(copy).tokenizer.decode([40]) == load_tokenizer(other).decode([40])
    change(copy, tokenizer=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="the run was trained with it: bring it back"):
        bundle_from_run(tmp_path / "none", copy, source=str(tiny_bundle))
    assert not (tmp_path / "none").exists()


def tokenizer_with(word, folder):
    """The shapes tokenizer with one of its words replaced."""
    load_tokenizer().save(folder)
    text = (folder / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary[40][0] = word
    else:
        content["model"]["vocab"] = {word if number == 40 else key: number for key, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_what_a_run_was_trained_for_goes_back_to_its_first_stage(run, copy, tiny_bundle, tmp_path):
    def trained(**changes):
        return runs.trained_tasks(runs.read_settings(run.folder) | changes)

    edits = {"edit": {"kind": "edit", "weight": 1.0}, "vqa": {"kind": "vqa", "weight": 0.0}}
    assert trained() == ["text_to_image", "caption"]
    assert trained(streams=edits) == ["edit", "caption"]
    assert trained(streams=edits, init_from=str(copy)) == ["text_to_image", "edit", "caption"]
    assert trained(streams=edits, loss_weights={"masked_text": 0.0}) == ["edit"]
    start = tmp_path / "start"
    start.mkdir()
    write_content(start, {"tasks": ["vqa"]})
    assert trained(streams=edits, init_from=str(start)) == ["edit", "caption", "vqa"]
    change(copy, init_from=str(copy))  # a circle ends
    assert trained(init_from=str(copy)) == ["text_to_image", "caption"]
    assert trained(init_from=str(tmp_path / "gone")) == ["text_to_image", "caption"]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "config.json is not JSON"),
        (b"[]", "config.json holds a JSON list, expected an object"),
        (b"\xff", "config.json is not JSON: it is not UTF-8"),
        (b"[" * 100_000, "config.json is not readable as JSON: it is nested too deeply"),
        (b"{}", "config.json lacks model"),
    ],
)
def test_a_run_without_a_configuration(tmp_path, refuses, content, words):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes(content)
    refuses(lambda: Pipeline.from_bundle(tmp_path), words)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": 3}, "config.json: model is a int, expected an object"),
        ({"model": {"depth": "2"}}, "config.json: model.depth is '2', expected a whole number"),
        ({"model": {"layers": 2}}, "config.json: model has the unknown key 'layers'"),
        ({"autoencoder": {"kind": 3}}, "autoencoder.kind is 3, expected one of kl"),
        ({"text_encoder": None}, "text_encoder is a NoneType, expected an object"),
        ({"streams": []}, "streams is a list, expected an object"),
        ({"samples": "28"}, "samples is a str, expected an object"),
        ({"samples": {"steps": 0}}, "sampling.steps is 0, expected 1 to 1000"),
        ({"image_size": "64"}, "image_size is '64', expected a whole number"),
        ({"text_length": -1}, "text_length is -1, expected a whole number from 2"),
        ({"tokenizer": ["a"]}, "tokenizer is a list, expected a text"),
        ({"frozen_from": 7}, "frozen_from is a int, expected a text"),
        ({"frozen_from": "/nowhere"}, "/nowhere: there is no such bundle"),
    ],
)
def test_a_run_whose_configuration_cannot_be(copy, refuses, changes, words):
    change(copy, **changes)
    refuses(lambda: Pipeline.from_bundle(copy), words)


@pytest.mark.bad_input
def test_a_run_without_checkpoints(tmp_path, run, refuses, command_refuses):
    shutil.copyfile(run.folder / "config.json", tmp_path / "config.json")
    (tmp_path / "checkpoints/damaged-3").mkdir(parents=True)
    refuses(lambda: Pipeline.from_bundle(tmp_path), "holds no whole checkpoint")
    arguments = ["--task=t2i", "--prompt=a", f"--output={tmp_path}/a.png"]
    command_refuses("generate", [f"--bundle={tmp_path}", *arguments], "holds no whole checkpoint")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.bad_input
def test_weights_that_there_are_not(run, refuses):
    refuses(lambda: Pipeline.from_bundle(run.folder, weights="best"), "weights is 'best', expected one of raw, ema")


@pytest.mark.bad_input
def test_a_pipe_among_a_checkpoint_s_files_is_not_waited_for(copy, refuses):
    metadata = next((copy / "checkpoints/3/state").glob("_METADATA"))
    metadata.unlink()
    os.mkfifo(metadata)
    refuses(lambda: runs.has_average(copy, 3), "pipe")
