"""launch/ablate.py: its runs, its table and picture, and resuming. Nothing is trained here."""

import json

import pytest
from PIL import Image

from unialign_jax.evaluation import ablation


@pytest.fixture
def ablate(launch_command):
    return launch_command("ablate")


def figures(value):
    return {name: value for _, name, _, _ in ablation.FIGURES}


@pytest.mark.slow
def test_it_resumes_and_writes_table_and_picture(ablate, monkeypatch, tmp_path, capsys):
    trained = []

    def train(arguments, variant, seed, stage):
        if len(trained) == 5 and "stopped" not in trained:
            trained.append("stopped")
            raise ValueError("the power went")
        trained.append(f"{variant}/{seed}/{stage}")

    def evaluate(folder, stage, scenes):
        seed = int(folder.parent.name.removeprefix("seed"))
        return figures((0.5 if "both" in str(folder) else 0.25) + 0.1 * seed)

    monkeypatch.setattr(ablate, "train", train)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    command = [f"--output={tmp_path}", "--variants=both,neither", "--seeds=2"]
    assert ablate.main(command) == 1
    assert "error: the power went" in capsys.readouterr().err
    assert ablate.main(command) == 0
    assert len(trained) == len(set(trained)) == 9  # two variants, two seeds, two stages, and the stop
    table = (tmp_path / "table.md").read_text()
    assert "| colour, % | 55.0 ± 63.5 | 30.0 ± 63.5 |" in table  # 12.71 * 0.0707 / sqrt(2)
    assert "| colour, % | -25.0 ± 0.0 |" in table  # less `both`, seed by seed: the seeds' own differences fall out
    assert Image.open(tmp_path / "ablation.png").width > 500
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 8


def test_what_a_run_is_trained_with(ablate, tmp_path):
    """Every change is one that the stages know, and the variants differ in their terms alone."""
    from unialign_jax.training.config import read_config

    arguments = ablate.parse_arguments([f"--output={tmp_path}", "--variants=both,neither"])
    configs = {
        (variant, stage): read_config(f"configs/{stage}.py:tiny", ablate.run_changes(arguments, variant, 1, stage))
        for variant in ablate.VARIANTS
        for stage in ("stage1", "stage2")
    }
    for stage in ("stage1", "stage2"):
        both, neither = configs["both", stage], configs["neither", stage]
        assert neither.loss_weights.cross_modal == neither.loss_weights.intrinsic_modal == 0
        assert both.loss_weights.cross_modal > 0 and both.loss_weights.intrinsic_modal > 0
        assert both.seed == neither.seed == 1
        assert neither.init_from == ("" if stage == "stage1" else f"{tmp_path}/neither/seed1/stage1")


def test_changes_of_the_user_come_last(ablate, tmp_path):
    for option in ("--config.ema_decay=0.5", "--set=ema_decay=0.5"):
        arguments = ablate.parse_arguments([f"--output={tmp_path}", option])
        assert ablate.run_changes(arguments, "both", 0, "stage1")[-1] == "ema_decay=0.5"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("option", "words"),
    [("--variants=both,none", "'none'"), ("--seeds=0", "--seeds is 0"), ("--steps=-1", "--steps is -1")],
)
def test_bad_options(command_refuses, tmp_path, option, words):
    command_refuses("ablate", [f"--output={tmp_path}/out", option], words)


@pytest.mark.bad_input
def test_other_options_in_the_same_folder(command_refuses, ablate, monkeypatch, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"steps": 3}, "runs": {}}))
    command_refuses("ablate", [f"--output={tmp_path}"], "choose another --output")
