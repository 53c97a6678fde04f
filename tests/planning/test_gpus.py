"""GPUs that are not here: their names, what is asked of the compiler, and full-size programs where it is installed."""

import types

import numpy as np
import pytest

from unialign_jax.parallel import hardware
from unialign_jax.planning import gpus, sampling, topology
from unialign_jax.planning.collectives import Collective
from unialign_jax.planning.roofline import compute_seconds, link_seconds
from unialign_jax.planning.topology import GIB

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
    hidden, shown = link_seconds([gather], H100, [None] * 4, hosts, 1.0)
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
