"""What launch/plan.py and launch/benchmark.py cannot do, they refuse in one line before anything is compiled."""

import json
from pathlib import Path

import pytest

from unialign_jax.benchmarks import loop

ROOT = Path(__file__).resolve().parents[2]
STAGE = "--config=configs/stage1.py:tiny"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """The compiler and other processes are out of reach: what gets so far fails."""
    import subprocess

    from unialign_jax.planning import sweep, topology

    def reached(*_, **__):
        raise AssertionError("reached the work")

    monkeypatch.setattr(topology, "topology_devices", reached)
    monkeypatch.setattr(sweep, "topology_devices", reached)
    monkeypatch.setattr(subprocess, "run", reached)
    monkeypatch.setattr(subprocess, "Popen", reached)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


PLAN = [
    # Slices
    ([STAGE, "--topology=v5e"], "topology is 'v5e', expected such as v4:4x4x4 or v4-128, v5e-256"),
    ([STAGE, "--topology="], "topology is ''"),
    ([STAGE, "--topology=v3-8"], "topology is 'v3-8'"),
    ([STAGE, "--topology=V5E-16"], "topology is 'V5E-16'"),
    ([STAGE, "--topology=v5e-17"], "v5e slices named so have 1 to 256 chips, a power of two"),
    ([STAGE, "--topology=v4-4"], "v4 slices named so have 8 to 8192 cores"),
    ([STAGE, "--topology=v5e-99999999999999999999"], "topology is"),
    ([STAGE, "--topology=v5e:0x4"], "a v5e slice has 2 sides and 1 to 256 chips"),
    ([STAGE, "--topology=v5e:9999x9999"], "a v5e slice has 2 sides and 1 to 256 chips"),
    ([STAGE, "--topology=v5e:2x2x2"], "a v5e slice has 2 sides"),
    ([STAGE, "--topology=v4:4x4"], "a v4 slice has 3 sides"),
    ([STAGE, "--topology=v4:-4x4x4"], "topology is 'v4:-4x4x4'"),
    ([STAGE, "--topology=v4:4x4x4x4"], "topology is 'v4:4x4x4x4'"),
    ([STAGE, "--topology=v5e:４x４"], "topology is"),  # full-width digits
    ([STAGE, "--topology=v5e-8\nv5e-16"], "topology is 'v5e-8\\nv5e-16'"),
    ([STAGE, "--topology=h100:9"], "a host has 1 to 8 GPUs"),
    ([STAGE, "--topology=h100:8x"], "topology is 'h100:8x', expected such as h100:1, h100:8 or h100:2x8"),
    ([STAGE, "--num-slices=0"], "--num-slices is 0, expected 1 to 256"),
    ([STAGE, "--num-slices=-2"], "--num-slices is -2"),
    ([STAGE, "--num-slices=1000000000"], "--num-slices is 1000000000"),
    ([STAGE, "--num-slices=two"], "invalid int value: 'two'"),
    # Configurations
    (["--config=configs/stage9.py"], "there is no stage file configs/stage9.py"),
    (["--config="], "--config"),
    (["--config=launch"], "'launch' is a folder"),
    (["--config=README.md"], "README.md gives no configuration"),
    ([STAGE + "x"], "gives no configuration"),
    ([STAGE, "--stream=video"], "unknown stream 'video', expected one of text_to_image"),
    ([STAGE, "--config.batch_size=0"], "batch_size is 0, expected at least 1"),
    ([STAGE, "--config.model.remat=some"], "model.remat is 'some', expected one of none, block, dots, offload"),
    ([STAGE, "--config.image_size=500"], "image_size"),
    # Sampling
    (["--task=paint"], "invalid choice: 'paint'"),
    (["--task=t2i", "--size=500"], "size is 500, expected a multiple of 16 up to 3072, such as 496"),
    (["--task=t2i", "--size=0"], "size is 0"),
    (["--task=edit", "--size=-512"], "size is -512"),
    (["--task=t2i", "--size=1e3"], "invalid int value: '1e3'"),
    (["--task=t2i", "--size=16000000"], "size is 16000000"),
    (["--task=caption", "--batch=0"], "batch is 0, expected"),
    (["--task=t2i", "--topology=v5e-8"], "has 8 chips, sampling runs on one: v5e:1x1"),
    (["--task=t2i", "--topology=h100:8"], "has 8 chips, sampling runs on one: h100:1"),
    (["--task=t2i", "--quantize=int4"], "invalid choice: 'int4'"),
    # What does not go together
    ([], "one of the arguments --task --config --gpus --report is required"),
    (["--task=t2i", STAGE], "not allowed with argument"),
    (["--task=t2i", "--config.image_size=256"], "--config.KEY=VALUE does not go with --task"),
    ([STAGE, "--all"], "--all needs --config="),
    ([STAGE, "--all", "--output=FOLDER/plans.json", "--topologies=v4-128,"], "topology is ''"),
    ([STAGE, "--all", "--output=FOLDER/plans.json", "--topologies=0xv5e-256"], "topology is '0xv5e-256'"),
    ([STAGE, "--all", "--output=FOLDER/plans.json", "--topologies=h100:8"], "h100:8 is no TPU slice: --gpus plans"),
    (["--gpus"], "--gpus needs --output=JSON"),
    (["--gpus", "--topology=h100:8"], "--gpus needs --output=JSON"),
    ([STAGE, "--all", "--output=FOLDER"], "FOLDER is a folder"),
    ([STAGE, "--all", "--output=FILE"], "not replaced", "FILE is not JSON"),
    # Outputs
    (["--task=t2i", "--output=missing/plan.json"], "there is no folder missing"),
    (["--task=t2i", "--output=FOLDER"], "FOLDER is a folder"),
    (["--task=t2i", "--output=FILE"], "not replaced", "FILE is not JSON"),
    (["--task=t2i", "--output=/dev/null"], "/dev/null is a device"),
    ([STAGE, "--dump=FILE"], "--dump=FILE cannot be a folder: File exists"),
    (["--report=missing"], "missing has no plans"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("arguments", "words"), [(case[0], case[1:]) for case in PLAN], ids=lambda x: str(x)[:60])
def test_plan_refuses(command_refuses, places, arguments, words):
    command_refuses("plan", places(arguments), *places(words))


BENCHMARK = [
    ([], "the following arguments are required: command"),
    (["dance"], "invalid choice: 'dance'"),
    (["train", "--steps=0"], "--steps is 0, expected a whole number from 1"),
    (["train", "--rounds=-1"], "--rounds is -1"),
    (["train", "--config=configs/stage9.py"], "there is no stage file configs/stage9.py"),
    (["train", "--output=missing/x.json"], "there is no folder missing"),
    (["train", "--output=FOLDER"], "FOLDER is a folder"),
    (["train", "--output=FILE"], "FILE is not JSON"),
    (["convert", "--parts=sd3,sd4"], "--parts has 'sd4', expected some of sd3, t5"),
    (["convert", "--parts="], "--parts has ''"),
    (["convert", "--scratch=FILE"], "--scratch=FILE cannot be a folder: File exists"),
    (["sample"], "one of the arguments --bundle --random is required"),
    (["sample", "--random=huge"], "invalid choice: 'huge'"),
    (["sample", "--random=unialign_2b", "--size=500"], "size is 500, expected a multiple of 16 up to 3072"),
    (["sample", "--random=tiny", "--size=0"], "size is 0"),
    (["sample", "--random=tiny", "--size=-64"], "size is -64"),
    (["sample", "--random=tiny", "--steps=0"], "--steps is 0, expected a whole number from 1 to 1000"),
    (["sample", "--random=tiny", "--steps=99999999"], "--steps is 99999999"),
    (["sample", "--random=tiny", "--caption-steps=0"], "--caption-steps is 0"),
    (["sample", "--random=tiny", "--caption-tokens=0"], "--caption-tokens is 0"),
    (["sample", "--random=tiny", "--rounds=0"], "--rounds is 0"),
    (["sample", "--random=tiny", "--guidance-scale=nan"], "--guidance-scale is nan, expected a number from 0 to 100"),
    (["sample", "--random=tiny", "--guidance-scale=-1"], "--guidance-scale is -1.0"),
    (["sample", "--random=tiny", "--batch=1,none"], "--batch is '1,none', expected batch sizes such as 1,8"),
    (["sample", "--random=tiny", "--batch="], "--batch is ''"),
    (["sample", "--random=tiny", "--batch=0"], "--batch is '0'"),
    (["sample", "--random=tiny", "--caption-batch=1000000000"], "--caption-batch is '1000000000'"),
    (["sample", "--random=tiny", "--parts=images,video"], "--parts has video, expected some of images"),
    (["sample", "--random=tiny", "--dtype=float7"], "invalid choice: 'float7'"),
    (["sample", "--bundle=missing"], "missing: there is no such bundle"),
    (["sample", "--bundle=FILE"], "FILE"),
    (["sample", "--bundle=launch"], "is not a bundle"),
    (["options", "--bundle=missing"], "missing: there is no such bundle"),
    (["options", "--bundle=missing", "--count=0"], "--count is 0"),
    (["options", "--bundle=missing", "--solution-steps=0"], "--solution-steps is 0"),
    (["options", "--bundle=missing", "--guidance-scale=inf"], "--guidance-scale is inf"),
    (["step", "--micro-batches=1,none"], "--micro-batches is '1,none', expected batch sizes such as 1,8"),
    (["step", "--remat=none,some"], "model.remat is 'some', expected one of none, block, dots, offload"),
    (["step", "--attention=flash9"], "model.attention is 'flash9'"),
    (["step", "--stream=video"], "--stream is 'video', expected one of text_to_image"),
    (["step", "--accumulation=0"], "--accumulation is 0, expected a whole number from 1"),
    (["step", "--devices=0"], "--devices is 0"),
    (["step", "--warmup=0"], "--warmup is 0"),
    (["step", STAGE, "--profile=FILE"], "--profile=FILE cannot be a folder: File exists"),
    (["memory", "--mesh=fsdp=two"], "--mesh is 'fsdp=two', expected sizes of replica"),
    (["memory", "--mesh=rows=2"], "--mesh is 'rows=2'"),
    (["memory", "--devices=0"], "--devices is 0"),
    (["memory", "--remat=sometimes"], "model.remat is 'sometimes'"),
    (["memory", "--mesh=fsdp=3"], "mesh"),
    (["memory", "--platform=abacus"], "invalid choice: 'abacus'"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("arguments", "words"), [(case[0], case[1:]) for case in BENCHMARK], ids=lambda x: str(x)[:60])
def test_benchmark_refuses(command_refuses, places, arguments, words):
    command_refuses("benchmark", places(arguments), *places(words))


@pytest.fixture
def places(tmp_path):
    """A function that puts a file and a folder of the user in the place of FILE and FOLDER."""
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "folder").mkdir()

    def put(words):
        return [word.replace("FILE", f"{tmp_path}/notes.txt").replace("FOLDER", f"{tmp_path}/folder") for word in words]

    yield put
    assert (tmp_path / "notes.txt").read_text() == "my notes"
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "notes.txt"]


def test_figures_of_before_are_replaced_whole(launch_command, monkeypatch, tmp_path, capsys):
    output = tmp_path / "figures.json"
    output.write_text('{"older": 1}')
    benchmark = launch_command("benchmark")
    monkeypatch.setattr(loop, "benchmark_train", lambda arguments: {"steps": arguments.steps})
    benchmark.main(["train", "--steps=3", f"--output={output}"])
    figures = json.loads(output.read_text())
    assert figures["steps"] == 3 and figures["machine"] and "older" not in figures
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert "steps" in capsys.readouterr().out
