"""launch/learning_curve.py: its points are those of the rows, stage after stage."""

import json

import pytest
from PIL import Image


def write_run(folder, batch_size, rows):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"batch_size": batch_size}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(step, seconds):
    return {"step": step, "stream": "text_to_image", "loss": 1.0, "seconds_per_step": seconds}


def validation(step, **values):
    return {"step": step, "stream": "validation/text_to_image", **values}


def test_points_go_on_from_stage_to_stage(launch_command, tmp_path, capsys):
    rows = [training(5, 0.1), training(10, 0.2), validation(10, loss=0.5, exact=0.25), training(20, 0.2)]
    write_run(tmp_path / "one", 8, [*rows, validation(20, exact=0.5)])
    write_run(tmp_path / "two", 4, [training(10, 1.0), validation(10, exact=0.75, color=1.0)])
    runs = [f"{tmp_path}/one", f"{tmp_path}/two"]
    command = launch_command("learning_curve")
    options = ["--figures=text_to_image/exact,text_to_image/color", f"--output={tmp_path}/curve.png"]
    assert command.main([*runs, *options]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    # 5 steps of 0.1 s and 5 of 0.2 s; 10 more of 0.2 s; 10 of the next stage of 1 s.
    assert lines == ["| 80 | 2 | 0.250 |  |", "| 160 | 4 | 0.500 |  |", "| 200 | 14 | 0.750 | 1.000 |"]
    assert Image.open(tmp_path / "curve.png").width > 500


def test_a_stage_is_as_long_as_its_newest_checkpoint_says(launch_command, monkeypatch, tmp_path, capsys):
    """It was stopped at step 13, and had written its last row at 10."""
    write_run(tmp_path / "one", 8, [training(10, 0.1), validation(10, exact=0.5)])
    (tmp_path / "one/checkpoints").mkdir()
    write_run(tmp_path / "two", 4, [training(10, 1.0), validation(10, exact=0.75)])
    monkeypatch.setattr("unialign_jax.training.runs.latest_step", lambda run: 13)
    figures = "--figures=text_to_image/exact"
    assert launch_command("learning_curve").main([f"{tmp_path}/one", f"{tmp_path}/two", figures]) == 0
    assert [line.split(" ")[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["80", "144"]


@pytest.mark.bad_input
def test_what_has_no_curve(command_refuses, tmp_path):
    write_run(tmp_path / "run", 8, [training(5, 0.1)])
    command_refuses("learning_curve", [tmp_path / "run"], "has no validations")
    command_refuses("learning_curve", [tmp_path], "no metrics.jsonl")
    command_refuses("learning_curve", [tmp_path, "--output=curve.jpg"], "ends in .png")
