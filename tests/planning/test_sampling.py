"""Plans of sampling: their arithmetic, the programs at tiny size, and the TPU compiler where it is installed."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.planning import report, sampling, step, topology
from unialign_jax.planning.sampling import ProgramMemory
from unialign_jax.planning.topology import GIB, DoesNotFit

ROOT = Path(__file__).resolve().parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU compiler: pip install 'libtpu==0.0.42.*'")

RESIDENT = {"text_encoder": 9 * GIB, "transformer": 4 * GIB, "autoencoder": GIB}
MEASURED = [
    ProgramMemory("encode prompts", ("text_encoder",), inputs=0, outputs=GIB // 4, temporaries=GIB, code=GIB // 8),
    ProgramMemory("sample", ("transformer",), inputs=GIB // 4, outputs=GIB // 2, temporaries=2 * GIB, code=GIB // 8),
    ProgramMemory("decode images", ("autoencoder",), inputs=0, outputs=0, temporaries=8 * GIB, code=GIB // 4),
]


def test_peaks_count_what_is_there_at_that_moment():
    # Code of all programs: 1/2. Everything resident: 14; each program adds its own and the outputs before it.
    assert sampling.peaks(MEASURED, RESIDENT, low_memory=False) == [
        int(GIB * (14 + 0.5 + 0.25 + 1)),
        int(GIB * (14 + 0.5 + 0.25 + 0.25 + 0.5 + 2)),
        int(GIB * (14 + 0.5 + 0.75 + 8)),
    ]
    assert sampling.peaks(MEASURED, RESIDENT, low_memory=True) == [
        int(GIB * (9 + 0.5 + 0.25 + 1)),
        int(GIB * (4 + 0.5 + 0.25 + 0.25 + 0.5 + 2)),
        int(GIB * (1 + 0.5 + 0.75 + 8)),
    ]


def test_table_ends_with_the_whole_task():
    rows = sampling.memory_rows(MEASURED, RESIDENT)
    assert [row["program"] for row in rows] == ["encode prompts", "sample", "decode images", "whole task"]
    assert rows[1]["parameters"] == 4 and rows[1]["temporaries"] == 2
    assert rows[-1]["parameters"] == 14 and rows[-1]["peak"] == 23.25 and rows[-1]["peak_low_memory"] == 10.75
    header, *_, last = report.format_table(rows).splitlines()
    assert header.split() == "program parameters inputs outputs temporaries code peak peak low memory".split()
    assert last.split() == ["whole", "task", "14.00", "0.25", "0.50", "8.00", "0.50", "23.25", "10.75"]
    assert len(header) == len(last)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text_to_image", "edit", "personalization", "caption"])
def test_the_pipelines_own_programs_are_lowered(task, positioned_bundle):
    """The tiny model's, on this machine's device: the pipeline's functions accept the planned shapes."""
    config = bundle.read_config(positioned_bundle)
    programs, params = sampling.sampling_programs(
        task, jax.devices()[0], config=config, size=32, batch=2, steps=3, dtype="float32", quantize="int8"
    )
    out = {
        program.name: jax.tree.leaves(program.function.eval_shape(program.params, *program.inputs, **program.static))
        for program in programs
    }
    if task == "caption":
        assert list(out) == ["encode images", "write text"]
        assert out["write text"][0].shape == (2, config.text_length)
    else:
        encoded = [] if task == "text_to_image" else ["encode images"]
        assert list(out) == ["encode prompts", *encoded, "sample", "decode images"]
        assert out["sample"][0].shape == (2, 8, 8, 48)
        assert (out["decode images"][0].shape, out["decode images"][0].dtype) == ((2, 32, 32, 3), np.uint8)
    assert params["text_encoder"]["layers"]["query"]["kernel"].qvalue.dtype == np.int8
    assert params["transformer"]["text_positions"].shape == (24, 32)
    assert params["transformer"]["text_positions"].dtype == np.float32


@pytest.mark.slow
def test_measuring_on_this_machine(tiny_bundle):
    """T5 of the tiny bundle on three texts, filled up to four: [4, 24] ids in, [4, 24, 32] out, all float32."""
    config = bundle.read_config(tiny_bundle)
    programs, params = sampling.sampling_programs(
        "t2i", jax.devices()[0], config=config, size=32, batch=2, steps=3, dtype="float32"
    )
    memory = sampling.measure(programs[0])
    assert (memory.inputs, memory.outputs) == (4 * 24 * 4, 4 * 24 * 32 * 4)
    floats = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params["text_encoder"]))
    assert sampling.resident_bytes(params["text_encoder"]) == 4 * floats


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"^unknown task 'paint', expected one of text_to_image, edit, .*, vqa$"):
        sampling.sampling_programs("paint", jax.devices()[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--all", "--config=FILE"], "--all needs --config=FILE and --output=JSON"),
        (["--all", "--config=FILE", "--output=JSON", "--num-slices=2"], "--num-slices does not go with --all"),
        (["--config=FILE", "--topologies=v4-8"], "--topologies does not go with --config, which takes --topology, "),
        (["--task=t2i", "--search"], "--search does not go with --task"),
        (["--task=t2i", "--config.image_size=256"], "--config.KEY=VALUE does not go with --task"),
        (["--report=JSON", "--output=FILE"], "--output does not go with --report, which takes --docs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, expected):
    done = subprocess.run([sys.executable, ROOT / "launch/plan.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr


DEVICES = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 16


@pytest.fixture
def plan_command(launch_command, monkeypatch, capsys):
    """A function (arguments) -> (status, printed text) of plan.py, with a compiler for which nothing fits."""

    def refuse(config, devices, name, **_):
        raise DoesNotFit(f"the step of {name} does not fit: it needs 21.50G of 15.75G", 21 * GIB)

    monkeypatch.setattr(topology, "topology_devices", lambda *_: DEVICES)
    monkeypatch.setattr(topology, "usable_bytes", lambda _: 15 * GIB)
    monkeypatch.setattr(step, "plan_step", refuse)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            launch_command("plan").main(arguments)
        return ended.value.code, capsys.readouterr().out

    return run


def commands_in(printed):
    return [line.strip() for line in printed.splitlines() if line.strip().startswith("python launch/plan.py ")]


def test_a_training_that_does_not_fit_is_told_what_may(plan_command):
    same = "python launch/plan.py --config=configs/stage1.py --config.batch_size=128"
    status, printed = plan_command("--config=configs/stage1.py", "--topology=v5e-16", "--config.batch_size=128")
    assert status == 1 and "DOES NOT FIT: the step of text_to_image" in printed
    assert commands_in(printed) == [
        f"{same} --topology=v5e-16 --search",
        f"{same} --config.model.remat=block --topology=v5e-16",
        f"{same} --topology=v5e-32",
    ]
    # Blocks are computed again already, and there is no larger slice.
    _, printed = plan_command("--config=configs/stage1.py", "--topology=v5e:16x16", "--config.model.remat=block")
    assert len(commands_in(printed)) == 1 and commands_in(printed)[0].endswith(" --topology=v5e:16x16 --search")


def test_what_may_fit_on_gpus(plan_command, monkeypatch):
    from unialign_jax.planning import search

    found = search.SearchResult(None, [], "the step of text_to_image does not fit: it needs 90 of 74.58 GiB")
    monkeypatch.setattr(search, "candidates", lambda *_: [])
    monkeypatch.setattr(search, "search", lambda *_: found)
    _, printed = plan_command(
        "--config=configs/stage1.py", "--topology=h100:8", "--search", "--config.model.remat=block"
    )
    assert commands_in(printed)[-1].endswith("--config.model.remat=block --topology=h100:2x8 --search")

    def measure(program):
        raise DoesNotFit("sample does not fit")

    monkeypatch.setattr(
        sampling, "sampling_programs", lambda *_, **__: ([sampling.Program("sample", (), None, {}, ())], {})
    )
    monkeypatch.setattr(sampling, "measure", measure)
    _, printed = plan_command("--task=edit", "--topology=t4:1", "--low-memory", "--quantize=int8")
    assert commands_in(printed) == [
        "python launch/plan.py --task=edit --topology=l4:1 --quantize=int8 --low-memory",
    ]


def test_a_search_in_vain_names_the_next_slice(plan_command, monkeypatch):
    from unialign_jax.planning import search

    found = search.SearchResult(None, [], "the step of text_to_image does not fit: it needs 17.0G of 15.75G")
    monkeypatch.setattr(search, "candidates", lambda *_: [])
    monkeypatch.setattr(search, "search", lambda *_: found)
    status, printed = plan_command("--config=configs/stage1.py", "--topology=v5e-4", "--search")
    assert status.startswith("error: the step of text_to_image does not fit") and "needs less" in status
    assert commands_in(printed) == ["python launch/plan.py --config=configs/stage1.py --topology=v5e-8 --search"]


def test_a_sampling_that_does_not_fit_is_told_what_may(plan_command, monkeypatch):
    def measure(program):
        raise DoesNotFit(f"{program.name} does not fit: it needs 21.50G of 15.75G")

    program = sampling.Program("sample", (), None, {}, ())
    monkeypatch.setattr(sampling, "sampling_programs", lambda *_, **__: ([program], {}))
    monkeypatch.setattr(sampling, "measure", measure)
    status, printed = plan_command("--task=edit", "--batch=8")
    assert status == "error: sample does not fit: it needs 21.50G of 15.75G"
    assert commands_in(printed) == [
        "python launch/plan.py --task=edit --batch=8 --low-memory",
        "python launch/plan.py --task=edit --batch=8 --quantize=int8",
        "python launch/plan.py --task=edit --batch=4",
        "python launch/plan.py --task=edit --topology=v6e:1x1 --batch=8",
    ]


@pytest.mark.slow
@pytest.mark.skipif(HAS_LIBTPU, reason="the TPU compiler is here")
def test_without_the_compiler_the_command_says_what_to_install():
    command = [sys.executable, ROOT / "launch/plan.py", "--task=t2i"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the TPU compiler is not installed: pip install 'libtpu==")


@needs_libtpu
def test_the_chip_says_how_much_there_is_and_compiles_t5(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topology.topology_devices("v5e:1x1")[0]
    assert topology.usable_bytes(device) == 15.75 * GIB
    programs, params = sampling.sampling_programs("t2i", device, quantize="int8")
    memory = sampling.measure(programs[0])
    assert memory.outputs >= 256 * 4096 * 2
    # 4.76 B parameters: a byte each, and two for the 32128 x 4096 of the token table.
    assert 4.5 * GIB < sampling.resident_bytes(params["text_encoder"]) < 4.65 * GIB
    with pytest.raises(ValueError, match="^topology v5e:3x5"):
        topology.topology_devices("v5e:3x5")
