"""Trackers: the rows of metrics.jsonl reach Weights & Biases, and a resumed run continues the same one there."""

import json
import sys
import types

import pytest

from unialign_jax.training.metrics import MetricsWriter
from unialign_jax.training.trackers import WandbTracker, check_tracker, open_tracker


class Run:
    """Stands for a run of Weights & Biases, and notes what it is told."""

    def __init__(self, settings):
        self.settings, self.rows, self.axes, self.finished = settings, [], [], False

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.rows.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name; its `runs` are those that were started."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.runs = []
    module.init = lambda **settings: module.runs.append(Run(settings)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def write(config, workdir, start, steps):
    writer = MetricsWriter(workdir, start, open_tracker(config, workdir))
    for step in steps:
        writer.write(step, "edit", {"loss": step / 10, "mfu": 0.5})
    writer.close()


def test_rows_go_to_the_tracker_and_a_resumed_run_goes_on_there(small_config, tmp_path, wandb):
    config = small_config(tracker="wandb", name="stage1")
    write(config, tmp_path, 0, [1, 2])
    write(config, tmp_path, 2, [3])
    first, second = wandb.runs
    assert first.rows == [{"step": n, "edit/loss": n / 10, "edit/mfu": 0.5} for n in (1, 2)]
    assert second.rows == [{"step": 3, "edit/loss": 0.3, "edit/mfu": 0.5}]
    assert first.finished and second.finished and first.axes == [("*", "step")]
    assert first.settings["id"] == second.settings["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert first.settings["resume"] == "allow"
    assert first.settings["name"] == tmp_path.name and first.settings["project"] == "unialign_jax"
    assert first.settings["config"]["batch_size"] == 8
    assert first.settings["config"]["streams"]["text_to_image"]["kind"] == "text_to_image"


def test_other_runs_have_other_ids(small_config, tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(small_config(tracker="wandb"), tmp_path / name, 0, [1])
    assert wandb.runs[0].settings["id"] != wandb.runs[1].settings["id"]


def test_no_tracker_by_default(small_config, tmp_path, wandb):
    write(small_config(), tmp_path, 0, [1])
    assert not wandb.runs and not (tmp_path / "wandb.json").exists()


@pytest.mark.bad_input
def test_a_missing_package_and_a_service_that_does_not_start(small_config, tmp_path, wandb, monkeypatch, refuses):
    config = small_config(tracker="wandb")
    check_tracker(config)

    def fail(**settings):
        raise RuntimeError("not logged in\nat all")

    wandb.init = fail
    refuses(lambda: open_tracker(config, tmp_path), "not logged in", "WANDB_MODE=offline")
    (tmp_path / "wandb.json").write_text("{}")
    refuses(lambda: open_tracker(config, tmp_path), "wandb.json has no id")
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [])
    refuses(lambda: check_tracker(config), "pip install wandb")


def test_the_real_package_offline(small_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = WandbTracker(small_config(tracker="wandb"), tmp_path)
        tracker.log(step, {"edit/loss": 0.5})
        tracker.close()
    (run_id,) = json.loads((tmp_path / "wandb.json").read_text()).values()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))) == 2
