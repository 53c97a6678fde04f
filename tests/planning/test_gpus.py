"""GPUs that are not here: their names, what is asked of the compiler, and full-size programs where it is installed."""

import types

import numpy as np
import pytest

from unialign_jax.parallel import hardware
from unialign_jax.planning import gpu_report, gpu_sweep, gpus, sampling, topology
from unialign_jax.planning.collectives import Collective
from unialign_jax.planning.report import BEGIN, END
from unialign_jax.planning.roofline import Roofline, compute_seconds, link_seconds
from unialign_jax.planning.step import CompiledMemory, StepPlan, plan_step
from unialign_jax.planning.sweep import write_plans
from unialign_jax.planning.topology import GIB
from unialign_jax.training.config import read_config

# The cache of compiled programs cannot load those of devices that are not here, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
needs_compiler = pytest.mark.skipif(bool(gpus.missing_packages()), reason=f"needs XLA's GPU compiler: {gpus.INSTALL}")
H100 = hardware.find_chip("NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", ("h100", 1, 1)),
        ("h100:1", ("h100", 1, 1)),
        ("a100-40g:8", ("a100-40g", 1, 8)),
        ("b200:16x8", ("b200", 16, 8)),
    ],
)
def test_names(name, expected):
    assert gpus.split_gpus(name) == expected
    assert topology.count_chips(name) == expected[1] * expected[2]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h100:", "^topology is 'h100:', expected such as h100:1, h100:8 or h100:2x8$"),
        ("h100:0", "expected such as h100:1"),
        ("h100:2x2x2", "expected such as h100:1"),
        ("h100:16", r"a host has 1 to 8 GPUs.*\(two hosts of eight: h100:2x8\)"),
        ("h100:1000x8", "hosts are at most 128"),
        ("l4:2x8", "several hosts of l4 are not planned"),
        ("h300:8", "topology is 'h300:8', expected such as v4:4x4x4 .*, h100:8$"),
        ("H100:8", "topology is 'H100:8'"),
    ],
)
def test_other_names_are_refused_in_a_line(name, words):
    with pytest.raises(ValueError, match=words):
        topology.count_chips(name)


def test_more_gpus():
    larger = {"h100:1": "h100:8", "h100:8": "h100:2x8", "h100:2x4": "h100:2x8", "a100-80g:2x8": "a100-80g:4x8"}
    assert {name: topology.larger(name) for name in larger} == larger
    assert topology.larger("l4:8") is topology.larger("h100:128x8") is None
    assert topology.larger("v5e-8") == "v5e-16"


def test_memory_that_may_be_taken():
    """By hand, in GiB: 95% of what CUDA reports (H100 79.11, T4 14.57) less 0.6 for its context."""
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert topology.usable_bytes(device) / GIB == pytest.approx(0.95 * (79.11 - 0.6), abs=0.01)
    assert gpus.usable_bytes(types.SimpleNamespace(device_kind="Tesla T4")) / GIB == pytest.approx(13.27, abs=0.01)


def test_every_gpu_has_its_figures():
    for gpu in gpus.GPUS.values():
        assert gpu.chip.memory and gpu.chip.memory_bandwidth and gpu.chip.link and not gpu.chip.axes
        text = gpus.TARGET.format(gpu=gpu, features="NONE")
        assert text.count("{") == text.count("}") == 2
        assert f"device_memory_size: {gpu.chip.memory:.0f}\n" in text and f'name: "{gpu.kind}"' in text


def test_without_the_compiler_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpus, "is_installed", lambda module: module == "nvidia.cuda_nvcc")
    with pytest.raises(
        ValueError, match=r"not installed \(jax-cuda12-plugin\): pip install 'jax-cuda12-plugin==0.10.2'"
    ):
        topology.topology_devices("h100:8")
    with pytest.raises(ValueError, match="topology h100:8 has no slices"):
        topology.topology_devices("h100:8", 2)


def test_time_on_nvlink_and_between_hosts():
    """Two hosts of two: an all-gather of 100 MB pieces brings 300 MB to a GPU, 100 of them over InfiniBand."""
    hosts = np.array([0, 0, 1, 1])
    gather = Collective("all-gather", "", 10**8, np.arange(4).reshape(1, 4), 2, True)
    assert gather.received_across(hosts) == pytest.approx(2 * 10**8)
    hidden, shown = link_seconds([gather], H100, [None] * 4, hosts, {})
    assert (hidden, shown) == (pytest.approx(2 * 2e8 / 4.5e11), 0)


def test_time_of_matmuls_and_attention():
    """An H100's matmuls at 70% of 989 TFLOP/s, attention at 60% of that."""
    seconds = compute_seconds({"matmul": 989e12, "attention": 98.9e12}, H100, 64)
    assert seconds == pytest.approx(1 / 0.7 + 0.1 / 0.42)


def test_what_sampling_computes():
    """Against the table of docs/inference.md, in TFLOP a sample: forwards of 1.99, 3.92, and 2.01 with T5's 2.40."""
    config = sampling.published_config()
    for task, program, expected in (
        ("text_to_image", "sample", 28 * 2 * 1.99),
        ("edit", "sample", 50 * 2 * 3.92),
        ("caption", "write text", 32 * (2.01 + 2.40)),
    ):
        work = sampling.sampling_work(task, config, size=512, batch=2)[program]
        assert 2 * expected == pytest.approx((work.matmul + work.other + work.attention) / 1e12, rel=0.01), task
        assert work.matmul > 0.75 * (work.matmul + work.other + work.attention)
    plain = sampling.program_seconds(work, H100, 0, 64, None)
    assert sampling.program_seconds(work, H100, 0, 64, "int8") == plain
    halved = sampling.program_seconds(work, H100, 0, 64, "fp8")
    assert plain - halved == pytest.approx(work.matmul / 2 / 989e12 / 0.7)
    assert sampling.program_seconds(work, H100, 1e12, 64, None) == pytest.approx(32 * 1e12 / 3.352e12)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("task", ["text_to_image", "caption"])
def test_a_full_size_task_compiles_for_an_h100(task):
    """The parameters by hand, in GiB: T5 8.87 and the MM-DiT 3.93 in bf16, the autoencoder 0.16."""
    figures = sampling.plan_sampling(task, "h100:1", size=512, batch=1, quantize=None, low_memory=False)
    whole = figures["rows"][-1]
    assert figures["fits"] and whole["parameters"] == pytest.approx(8.87 + 3.93 + 0.16, abs=0.02)
    assert 0 < whole["temporaries"] < 0.5 and whole["peak"] < whole["parameters"] + 0.6


@pytest.mark.slow
@needs_compiler
def test_8_bits_are_not_transposed_on_an_h100():
    """All of T5's kernels turned around would be 4.3 GiB of temporaries in each call."""
    (device,) = topology.topology_devices("h100:1")
    for mode in ("w8a8", "fp8"):
        programs, _ = sampling.sampling_programs("text_to_image", device, quantize=mode)
        assert sampling.measure(programs[0]).temporaries < 0.3 * GIB


@pytest.mark.slow
@needs_compiler
def test_a_full_size_step_compiles_for_an_h100():
    """State by hand, in bytes: 2.12e9 float32 masters, two moments and an average of the MM-DiT alone; T5 in bf16."""
    devices = topology.topology_devices("h100:1")
    config = read_config("configs/stage1.py", ["accumulation=32", "model.remat=block"])
    step = plan_step(config, devices, "text_to_image", usable=topology.usable_bytes(devices[0]))
    assert step.memory.fits and 55 * GIB < step.memory.peak < 65 * GIB
    assert step.memory.parameters + step.memory.optimizer == pytest.approx(16 * 2.12e9, rel=0.01)
    assert not any(step.bytes_inside.values()) and 0.5 < step.roofline.mfu < 0.7


def test_the_page_by_hand(tmp_path):
    """Two rows: a t2i that fits an L4, and a step whose time is its compute."""
    memory = CompiledMemory(8 * GIB, 25 * GIB, 9 * GIB, 0, 20 * GIB, 0, None)
    roofline = Roofline(flops=989e12, peak_flops=989e12, compute=2.0, hbm=0.1, ici_overlapped=0, ici_exposed=0, dcn=0)
    step = StepPlan("text_to_image", 1, {}, "", 256, 16, "dots", memory, roofline, {"all-gather": 5e9}, {})
    made = {"date": "2026-11-29", "jax": "0.10.2", "compiler": "jax-cuda12-plugin 0.10.2"}
    parts = [("encode prompts", 9.0, 13.0, 9.5), ("sample", 4.0, 14.0, 4.5), ("decode images", 0.0, 13.0, 0.5)]
    rows = [
        {"program": name, "parameters": size, "peak": peak, "peak_low_memory": low} for name, size, peak, low in parts
    ]
    rows.append({"program": "whole task", "parameters": 13.0, "peak": 14.0, "peak_low_memory": 9.5})
    plans = gpu_sweep.GpuPlans(
        [gpu_sweep.TrainingRow("h100:1", "stage1", "text_to_image", 16, "dots", step, made)],
        [gpu_sweep.SamplingRow("text_to_image", "h100:1", 512, 1, None, rows, made)],
    )
    write_plans(tmp_path / "plans.json", plans)
    assert gpu_sweep.read_gpu_plans(tmp_path / "plans.json") == plans
    (tmp_path / "gpu.md").write_text(f"before\n\n{BEGIN}\n{END}\nafter\n")
    gpu_report.write_report(tmp_path / "plans.json", tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n")
    assert "2 of 2 plans are of older code than this page" in " ".join(page.split())
    # H100: 119 TFLOP of which 8.5 are attention, at 692 and 415 TFLOP/s.
    (sampled,) = [line for line in page.splitlines() if line.startswith("| text_to_image |")]
    cells = [cell.strip() for cell in sampled.strip("|").split("|")]
    assert cells[:9] == ["text_to_image", "512", "1", "bfloat16", "13.00", "14.00", "L4", "9.50", "L4"]
    assert float(cells[11]) == pytest.approx(0.18, abs=0.02)
    # 256 samples in 2 s, 40,000 steps; 62 GiB fit 80 GB.
    assert "| 1 | 16 | 16 |  | 62.0 (H100) |  |" in page
    assert "| 1 | 16 | dots | 62.0 | H100 | 5.0 | 0.0 | 2.00 | 50 | 128 | 22.2 |" in page


def test_rows_of_older_code_are_compiled_again_and_todays_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sweep, "is_distributed", lambda name: True)
    monkeypatch.setattr(gpu_sweep.importlib.metadata, "version", lambda name: "1.0")
    first, second = ("caption", "h100:1", 512, 1, None), ("text_to_image", "h100:1", 512, 1, None)
    compiled, path = [], tmp_path / "plans.json"

    def add(key):
        def compile_row():
            compiled.append(key)
            return gpu_sweep.SamplingRow(*key, [], gpu_sweep.made(gpu_sweep.SAMPLING_SOURCES))

        gpu_sweep.add(path, "sampling", key, compile_row)

    for key in (first, second, first, second):
        add(key)
    assert compiled == [first, second]
    plans = gpu_sweep.read_gpu_plans(path)
    assert [row.key for row in plans.sampling] == [second, first]  # the order of the page
    plans.sampling[0].made["sources"] = "older code"
    write_plans(path, plans)
    add(first), add(second)
    assert compiled == [first, second, second]
    assert len(gpu_sweep.read_gpu_plans(path).sampling) == 2
