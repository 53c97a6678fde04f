"""Runs that train adapters: what they change, keep and refuse."""

import contextlib
import json
import logging
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.models.lora import adapted, adapters_by_path
from unialign_jax.training import base_model, runs
from unialign_jax.training.checkpoints import Checkpoints, stored_shapes
from unialign_jax.training.config import config_problems
from unialign_jax.training.loop import Trainer, expected_seconds, train
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.program import StepProgram
from unialign_jax.training.samples import tell_change
from unialign_jax.training.state import init_state

pytestmark = pytest.mark.slow

KERNELS = {f"blocks/joint/{half}/{name}/kernel" for half in ("image", "text") for name in ("qkv", "out")}
CLOCK = {"images_per_second", "seconds_per_step", "tflops_per_second_per_device", "data_wait_share", "host_peak_gb"}


@pytest.fixture(scope="module")
def lora_config(small_config, tiny_bundle):
    """A function (key__subkey=value ...) -> the configuration of a small run of adapters over `tiny_bundle`."""

    def make(**overrides):
        settings = {"num_steps": 4, "checkpoint__every": 2, "init_from": str(tiny_bundle), "lora__rank": 4}
        settings |= {"optimizer__learning_rate": 2e-2, "optimizer__warmup_steps": 1, "validation__records": 8}
        return small_config("finetune", **settings | overrides)

    return make


def run(config, workdir, devices=1):
    return train(config, workdir, progress=False, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def finished(lora_config, tmp_path_factory):
    """(the folder of a run of four steps, its last state, its log)."""
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("unialign_jax.training.loop")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        state = run(lora_config(), workdir)
    finally:
        logger.removeHandler(handler)
    return workdir, state, records


def test_only_adapters_are_trained_saved_and_averaged(finished, tiny_bundle):
    workdir, state, records = finished
    paths = {f"{path}/{name}" for path in KERNELS for name in "ab"}
    stored = set(stored_shapes(workdir / "checkpoints" / "4"))
    assert {path.removeprefix("params/transformer/") for path in stored if path.startswith("params/")} == paths
    assert {path.removeprefix("ema/") for path in stored if path.startswith("ema/")} == paths
    # The two averages of Adam and counters: nothing else is kept.
    moments = {path for path in stored if path.startswith("opt_state") and path.endswith(("/a", "/b"))}
    assert len(moments) == 2 * len(paths)
    assert {path for path in stored if not path.endswith(("/a", "/b"))} == {"step"} | {
        p for p in stored if "count" in p
    }
    content = json.loads((workdir / "base.json").read_text())
    digest = base_model.network_digest(tiny_bundle, "transformer")
    assert content == {"source": str(tiny_bundle), "weights": "", "step": -1, "digest": digest}
    assert f"{2 * 2 * 4 * 2 * 4 * 32:,} parameters" in " ".join(record.getMessage() for record in records)


def test_training_moves_the_adapters_and_the_output(finished, tiny_bundle, launch_command, tmp_path):
    workdir, state, records = finished
    rows = [row for row in read_metrics(workdir) if row["stream"] == "text_to_image"]
    assert all(row["gradient_norm"] > 0 and row["update_norm"] > 0 for row in rows)
    for path, adapter in adapters_by_path(state.params["transformer"]).items():
        assert np.abs(adapter["b"]).max() > 0.01, path  # they started at zero
    (said,) = [record.getMessage() for record in records if "have changed their kernels" in record.getMessage()]
    assert "after 4 steps" in said and "will not show" not in said
    prompt, options = "a red circle", {"seed": 1, "steps": 2, "guidance_scale": 3.0, "shift": 3.0}
    before, after = (
        np.asarray(Pipeline.from_bundle(source).generate(prompt, **options)[0], np.int32)
        for source in (tiny_bundle, workdir)
    )
    assert np.abs(before - after).max() > 10
    options = [
        "--task=text_to_image",
        f"--prompt={prompt}",
        *(f"--{k.replace('_', '-')}={v}" for k, v in options.items()),
    ]
    command = [f"--bundle={tiny_bundle}", *options, "--compilation-cache=none"]
    generate = launch_command("generate").main
    for scale, expected in ((1, after), (0, before)):
        file = tmp_path / f"{scale}.png"
        assert generate([*command, f"--lora={workdir}:{scale}", f"--output={file}"]) == 0
        image = Image.open(file)
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert json.loads(image.info["parameters"])["loras"] == {"lora": scale}


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_run_opens_with_its_adapters_in_the_base(weights, finished, tiny_bundle):
    workdir, state, _ = finished
    adapters = adapters_by_path(state.ema if weights == "ema" else state.params["transformer"])
    assert adapters.keys() == KERNELS
    opened = runs.open_to_sample(workdir, weights)
    assert opened.config.heads is None and opened.frozen_from == tiny_bundle
    base = flatten_dict(bundle.load(tiny_bundle)[1]["transformer"], sep="/")
    for path, leaf in opened.leaves("transformer"):
        expected = np.asarray(base[path])
        if path in KERNELS:
            expected = adapted(path, expected, jax.tree.map(np.asarray, adapters[path]), 16 / 4)
            assert np.abs(expected - base[path]).max() > 1e-3
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_stopped_and_started_again_the_adapters_are_the_same_bits(finished, lora_config, tmp_path):
    workdir, state, _ = finished
    run(lora_config(num_steps=2), tmp_path)
    again = run(lora_config(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    kept = lambda rows: [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]  # noqa: E731
    assert kept(read_metrics(tmp_path)) == kept(read_metrics(workdir))


def test_stopped_and_started_again_all_options_are_the_same_bits(lora_config, tmp_path):
    """Dropout's masks, DoRA's gains and the base that is rounded to 8 bits anew."""
    options = {"lora__dora": True, "lora__quantize_base": "int8", "lora__dropout": 0.2, "samples__count": 0}
    state = run(lora_config(**options), tmp_path / "whole")
    run(lora_config(**options, num_steps=2), tmp_path / "stopped")
    again = run(lora_config(**options), tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, again, state)
    leaves = flatten_dict(state.params["transformer"], sep="/")
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves.values())
    kept = lambda rows: [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]  # noqa: E731
    assert kept(read_metrics(tmp_path / "stopped")) == kept(read_metrics(tmp_path / "whole"))


def test_the_time_is_told_where_the_device_is_known():
    """1,000 steps of 4, three of four of stream a, on two H100: 989 TFLOP/s, of which 70% are reached."""
    streams = {name: SimpleNamespace(config=SimpleNamespace(weight=weight)) for name, weight in (("a", 3), ("b", 1))}
    trainer = SimpleNamespace(
        streams=streams, sample_flops={"a": 2e13, "b": 4e13}, config=SimpleNamespace(num_steps=1000, batch_size=4)
    )
    for kind, expected in (("NVIDIA H100 80GB HBM3", 4000 * 2.5e13 / (2 * 0.7 * 989e12)), ("cpu", None)):
        trainer.mesh = SimpleNamespace(size=2, devices=np.array([SimpleNamespace(device_kind=kind)]))
        assert expected_seconds(trainer) == (expected and pytest.approx(expected))


def test_adapters_that_have_changed_nothing_are_told(lora_config, caplog):
    trainer = Trainer(lora_config(optimizer__learning_rate=1e-12), jax.devices()[:1])
    caplog.clear()
    trainer.check_change(trainer.init_state(), trainer.init_frozen())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "will not show" in warning and "optimizer.learning_rate is 1e-12" in warning


def test_on_eight_devices_all_options_train_as_on_one(lora_config, tmp_path, caplog):
    """DoRA with dropout over a base in 8 bits; and samples of one's own prompts beside the base's."""
    caplog.set_level(logging.INFO, "unialign_jax")
    options = {"lora__dora": True, "lora__quantize_base": "int8", "lora__dropout": 0.2, "validation__every": 2}
    looks = {"samples__count": 1, "samples__prompts": ("a red circle", "a blue square")}
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "samples__count": 0}
    losses, states = [], []
    for name, changes, devices in (("one", looks, 1), ("eight", mesh, 8)):
        state = run(lora_config(**options, **changes), tmp_path / name, devices)
        rows = read_metrics(tmp_path / name)
        losses.append([row["loss"] for row in rows if row["stream"] == "text_to_image"])
        states.append(flatten_dict(state.params["transformer"], sep="/"))
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for path, leaf in states[0].items():
        assert np.abs(leaf).max() > 0, path  # gains too, which started at zero
        np.testing.assert_allclose(states[1][path], leaf, atol=2e-5, err_msg=path)
    rows = read_metrics(tmp_path / "one")
    validated = ["validation/text_to_image", "validation_raw/text_to_image"]
    assert [row["stream"] for row in rows] == (["text_to_image"] * 2 + validated) * 2
    assert rows[7]["loss"] < rows[3]["loss"]  # of the same records at the same noise, after steps 2 and 4
    samples = tmp_path / "one/samples"
    names = ["prompts_000004.png", "text_to_image_000004.md", "text_to_image_000004.png"]
    assert sorted(path.name for path in samples.iterdir()) == names
    assert (samples / names[1]).read_text().startswith("| | real | before | after |")
    widths = [Image.open(samples / name).width for name in (names[0], names[2])]
    assert widths[0] < widths[1]  # cards of two pictures, and of three
    told = [record for record in caplog.records if "samples of the same seeds" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.INFO]
    assert float(re.search(r"pictures by ([\d.e+]+) of 255", told[0].getMessage())[1]) > 1


def test_samples_that_are_as_before_are_told(caplog):
    image, ids = np.full((2, 4, 4, 3), 7, np.uint8), np.arange(6).reshape(2, 3)
    tell_change([((image, ids), (image, ids)), ((None, ids), (None, ids))])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "pictures by 0 of 255 levels" in record.getMessage()
    caplog.clear()
    tell_change([((None, ids), (None, ids + 1))])
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.slow
def test_a_run_can_be_the_base(small_config, lora_config, tmp_path, refuses):
    whole, adapters = tmp_path / "whole", tmp_path / "adapters"
    config = small_config("stage1", frozen_from=lora_config().init_from)
    program = StepProgram(config, jax.devices()[:1])
    state = init_state(program.networks, program.tx, config.ema_decay, jax.random.key(0))
    state = state._replace(ema=jax.tree.map(lambda leaf: leaf + 0.1, state.ema))
    with contextlib.closing(Checkpoints(whole)) as checkpoints:
        checkpoints.save(state, 1)
    (whole / "config.json").write_text(config.to_json_best_effort())
    run(lora_config(init_from=str(whole), init_weights="ema"), adapters)
    base = base_model.read_base(adapters)
    assert (base.source, base.weights, base.step) == (str(whole), "ema", 1)
    for path, leaf in runs.open_run(adapters)["transformer"].leaves(["text_embed/kernel", *KERNELS]):
        change = np.abs(leaf - flatten_dict(state.ema, sep="/")[path]).max()
        assert (change == 0) == (path == "text_embed/kernel"), path
    (whole / "checkpoints" / "1").rename(whole / "checkpoints" / "2")
    refuses(lambda: runs.open_run(adapters), "whole", "checkpoint 1 is not there")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": ""}, ("init_from is empty",)),
        ({"lora__rank": -1}, ("lora.rank is -1",)),
        ({"lora__alpha": 0.0}, ("lora.alpha is 0.0",)),
        ({"lora__targets": ()}, ("lora.targets is empty",)),
        ({"lora__dropout": 1.0}, ("lora.dropout is 1.0", "less than 1")),
        ({"lora__quantize_base": "w8a8"}, ("lora.quantize_base is 'w8a8'", "int8")),
        ({"lora__targets": ("(",)}, ("lora.targets", "no regular expression")),
        ({"optimizer__freeze": ("transformer/",)}, ("optimizer.freeze", "lora.targets")),
        ({"loss_weights__intrinsic_modal": 0.1}, ("intrinsic_modal", "set it to 0")),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(changes, words, lora_config):
    (problem,) = config_problems(lora_config(**changes))
    assert all(word in problem for word in words), problem


@pytest.mark.bad_input
def test_runs_that_cannot_be_are_one_line(lora_config, finished, tiny_bundle, tmp_path, refuses):
    workdir, _, _ = finished
    train_it = lambda folder, **changes: run(lora_config(**changes), folder)  # noqa: E731
    refuses(lambda: train_it(tmp_path / "a", lora__targets=("patch_embed",)), "'patch_embed'", "text_head/kernel")
    refuses(lambda: train_it(tmp_path / "b", init_from=str(workdir)), "trained adapters", "--format=bundle")
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    refuses(lambda: train_it(copied, num_steps=5, lora__rank=8), "another architecture")
    base = base_model.read_base(copied)
    base_model.write_base(base._replace(digest="0" * 16), copied)
    refuses(lambda: train_it(copied, num_steps=5), str(tiny_bundle), "changed since")
