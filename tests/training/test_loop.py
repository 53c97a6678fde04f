import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.training.loop import Trainer, train
from unialign_jax.training.metrics import Recorder, read_metrics

ROOT = Path(__file__).resolve().parents[2]

CLOCK = {"images_per_second", "seconds_per_step", "tflops_per_second_per_device", "data_wait_share", "host_peak_gb"}


def numbers(rows):
    """Metric rows without what the clock and the machine say."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def run(config, workdir, **kwargs):
    return train(config, workdir, progress=False, devices=jax.devices()[:1], **kwargs)


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    """A stage-2 run of 6 steps, checkpoints at 3 and 6, and its metrics."""
    workdir = tmp_path_factory.mktemp("finished")
    run(small_config("stage2"), workdir)
    return workdir


def test_a_bar_is_not_drawn_into_a_pipe(small_config, tmp_path, capfd):
    trainer = types.SimpleNamespace(config=small_config(), mesh=make_mesh(devices=jax.devices()[:1]))
    Recorder(trainer, tmp_path, 0, progress=True)._bar.update(3)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # Every other batch is of text to image, the other three streams share the rest.
    assert sorted(row["stream"] for row in rows) == ["edit", "perception", "personalization"] + ["text_to_image"] * 3
    expected = {
        "loss",
        "flow_matching",
        "masked_text",
        "cross_modal",
        "intrinsic_modal",
        "gradient_norm",
        "update_norm",
    }
    expected |= {"parameter_norm", "learning_rate"} | CLOCK
    for row in rows:
        assert expected <= row.keys()
        assert any(key.startswith("flow_matching_by_sigma/") for key in row)
        assert any(key.startswith("masked_text_by_mask_fraction/") for key in row)
        assert "mfu" not in row  # no peak is known for a CPU
    assert json.loads((finished / "config.json").read_text())["name"] == "stage2"
    assert list(finished.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(finished, small_config):
    before = (finished / "metrics.jsonl").read_text()
    state = run(small_config("stage2"), finished)
    assert int(state.step) == 6
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_in_two_halves_has_the_numbers_of_one(finished, small_config, tmp_path):
    run(small_config("stage2", num_steps=3), tmp_path)
    state = run(small_config("stage2"), tmp_path)
    assert numbers(read_metrics(tmp_path)) == numbers(read_metrics(finished))
    assert int(state.step) == 6


@pytest.mark.slow
def test_killed_and_stopped_at_any_point_and_started_again_the_numbers_are_the_same(
    small_config, changes_of, shapes_dir, compilation_cache, tmp_path
):
    """Killed before the first checkpoint, stopped, and killed after the second: the numbers of a run in one go."""
    overrides = changes_of(small_config(num_steps=14, checkpoint__every=4, data__num_threads=2))
    overrides += [f"streams.text_to_image.path={shapes_dir}/text_to_image", f"compilation_cache={compilation_cache}"]
    workdir = tmp_path / "run"

    def start(workdir):
        command = [sys.executable, ROOT / "launch" / "train.py", "--noprogress", f"--workdir={workdir}"]
        command += [f"--config={ROOT}/configs/stage1.py:tiny", *(f"--config.{o}" for o in overrides)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def row_count():
        path = workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def start_and_end(after, number):
        """A process that gets this signal after so many rows, one of its own at least -> its exit status and output."""
        after = max(after, row_count() + 1)
        process = start(workdir)
        while process.poll() is None and row_count() < after:
            time.sleep(0.002)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    assert start_and_end(2, signal.SIGKILL)[0] == -signal.SIGKILL
    status, output = start_and_end(5, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, output
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+), saved", output).group(1))
    # The step under way when the signal came is in the checkpoint.
    assert stopped == len(read_metrics(workdir)) >= 5 and (workdir / "checkpoints" / str(stopped)).is_dir()
    assert start_and_end(9, signal.SIGKILL)[0] == -signal.SIGKILL
    for folder in (workdir, tmp_path / "whole"):
        process = start(folder)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert ("resuming" in output) == (folder == workdir)
    whole = read_metrics(tmp_path / "whole")
    assert len(whole) == 14
    assert numbers(read_metrics(workdir)) == numbers(whole)


@pytest.fixture(scope="module")
def on_one_device(small_config, tmp_path_factory):
    """The metrics of four steps of text to image and edit on one device, and the configuration."""
    config = small_config("stage2", num_steps=4, model__text_positions=24)
    for name, stream in config.streams.items():
        stream.weight = float(name in ("text_to_image", "edit"))
    workdir = tmp_path_factory.mktemp("on_one_device")
    run(config, workdir)
    return config, read_metrics(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "state": 2, "encoder": 2, "fsdp": 1}],
    ids=str,
)
def test_every_mesh_gives_the_losses_of_one_device(mesh, on_one_device, tmp_path):
    config, expected = on_one_device
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    train(config, tmp_path, progress=False)
    for one, many in zip(expected, read_metrics(tmp_path), strict=True):
        for name in ("loss", "flow_matching", "masked_text", "cross_modal", "intrinsic_modal", "gradient_norm"):
            message = f"step {one['step']} {name}"
            np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-5, err_msg=message)


@pytest.mark.slow
def test_one_compilation_per_stream_and_none_after(small_config, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    step_function = Trainer.step_function
    # Counted together, by the function's name: once for each of the five streams.
    monkeypatch.setattr(Trainer, "step_function", lambda *args: chex.assert_max_traces(step_function(*args), n=5))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **details: (
            compiled.append(details.get("fun_name")) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    run(small_config("stage3", num_steps=12), tmp_path)
    streams = {row["stream"] for row in read_metrics(tmp_path)}
    assert len(streams) == 5
    assert sum("train_step" in str(name) for name in compiled) == len(streams)


def without_positions(transformer):
    return {name: leaf for name, leaf in transformer.items() if name != "text_positions"}


@pytest.mark.slow
def test_the_three_stages_follow_one_another(small_config, tmp_path):
    """From the second on with text positions, which start at zero and are kept."""
    states = {}
    for stage, before in (("stage1", ""), ("stage2", "stage1"), ("stage3", "stage2")):
        start = {"init_from": str(tmp_path / before), "model__text_positions": 24} if before else {}
        states[stage] = run(small_config(stage, num_steps=2, samples__count=2, **start), tmp_path / stage)
        if before:
            start = Trainer(small_config(stage, **start), jax.devices()[:1]).init_state()
            transformer, expected = start.params["transformer"], states[before].params["transformer"]
            if before == "stage1":
                assert not np.any(transformer["text_positions"])
                transformer = without_positions(transformer)
            jax.tree.map(np.testing.assert_array_equal, transformer, expected)
            jax.tree.map(np.testing.assert_array_equal, start.params["heads"], states[before].params["heads"])
            assert int(start.step) == 0
            trained = states[stage].params["transformer"]["text_positions"]
            assert np.all(np.any(trained, axis=1))  # every place of the text has moved
    samples = sorted(path.name for path in (tmp_path / "stage3" / "samples").iterdir())
    assert samples == sorted(
        [f"{name}_000002.md" for name in ("edit", "perception", "personalization", "text_to_image", "vqa")]
        + [f"{name}_000002.png" for name in ("edit", "perception", "personalization", "text_to_image")]
    )


@pytest.mark.slow
def test_ema_weights_of_another_run_can_be_the_start(finished, small_config):
    config = small_config("stage2", init_from=str(finished), init_weights="ema")
    start = Trainer(config, jax.devices()[:1]).init_state()
    raw = Trainer(small_config("stage2", init_from=str(finished)), jax.devices()[:1]).init_state()
    kernel = lambda state: np.asarray(state.params["transformer"]["blocks"]["joint"]["image"]["mlp_in"]["kernel"])  # noqa: E731
    assert np.abs(kernel(start) - kernel(raw)).max() > 0
    # Six steps from the same start: the average lags behind, but is near.
    assert np.abs(kernel(start) - kernel(raw)).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["average", "bundle"])
def test_text_positions_start_at_zero_where_the_start_has_none(source, finished, small_config, tiny_bundle):
    start = {"init_from": str(tiny_bundle)}
    if source == "average":
        start = {"init_from": str(finished), "init_weights": "ema"}
    plain, state = (
        Trainer(small_config("stage1", model__text_positions=rows, **start), jax.devices()[:1]).init_state()
        for rows in (0, 24)
    )
    for tree, other in ((state.params["transformer"], plain.params["transformer"]), (state.ema, plain.ema)):
        others = without_positions(tree)
        assert tree["text_positions"].shape == (24, 32) and not np.any(tree["text_positions"])
        jax.tree.map(np.testing.assert_array_equal, others, other)


@pytest.mark.slow
@pytest.mark.bad_input
def test_a_start_with_other_text_positions_is_refused(positioned_bundle, small_config, refuses):
    for rows, words in ((0, "wanted nothing"), (32, "wanted (32, 32)")):
        config = small_config("stage1", init_from=str(positioned_bundle), model__text_positions=rows)
        refuses(lambda c=config: Trainer(c, jax.devices()[:1]).init_state(), "transformer/text_positions", words)


@pytest.mark.slow
def test_a_bundle_can_be_the_start_and_gives_the_frozen_encoders_too(small_config, finished, tmp_path):
    source = Trainer(small_config("stage2", init_from=str(finished)), jax.devices()[:1])
    params, frozen = source.init_state().params, source.init_frozen()
    shifted = jax.tree.map(lambda x: x + 1, frozen["text_encoder"])
    content = {"transformer": params["transformer"], "text_encoder": shifted, "autoencoder": frozen["autoencoder"]}
    config = bundle.BundleConfig(
        transformer=source.networks.transformer.config,
        text_encoder=source.networks.text_encoder.config,
        autoencoder=source.networks.autoencoder.config,
    )
    bundle.save(tmp_path / "bundle", config, content)

    run(small_config("stage1", init_from=str(tmp_path / "bundle"), num_steps=1), tmp_path / "run")
    run(small_config("stage1", init_from=str(tmp_path / "run"), num_steps=1), tmp_path / "next")
    recorded = json.loads((tmp_path / "next" / "config.json").read_text())
    assert recorded["frozen_from"] == str(tmp_path / "bundle")
    started = Trainer(
        small_config("stage1", init_from=str(tmp_path / "bundle"), frozen_from=str(tmp_path / "bundle")),
        jax.devices()[:1],
    )
    state = started.init_state()
    jax.tree.map(np.testing.assert_array_equal, state.params["transformer"], params["transformer"])
    jax.tree.map(np.testing.assert_array_equal, started.init_frozen()["text_encoder"], shifted)
