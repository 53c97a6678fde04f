"""A step's plan with the TPU compiler, where it is installed: against arithmetic by hand."""

import importlib.util

import pytest

from unialign_jax.parallel import hardware
from unialign_jax.planning.step import plan_step
from unialign_jax.planning.topology import DoesNotFit, topology_devices, usable_bytes
from unialign_jax.training.config import read_config

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU compiler: pip install 'libtpu==0.0.42.*'")
POD_SLICES = ["v5e:16x16", "v4:4x4x4", "v5p:4x4x4"]


@pytest.fixture
def compiler(monkeypatch):
    """The chips' compiler without the chips; a full-size step takes it minutes."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@needs_libtpu
@pytest.mark.parametrize("topology", POD_SLICES)
def test_stage1_fits_and_moves_what_arithmetic_says(topology, compiler):
    """A step at global batch 256 by hand. A chip receives the 2.10e9 weights once in bf16 (the state is split, the
    weights are repeated) and as many bytes of gradients. T5 lies over groups of chips: its 24 layers sum twice each,
    which in a group of n moves 2 x (n - 1) / n of the group's activations: two texts a sample, 256 tokens of width
    4096, in bf16.
    """
    devices = topology_devices(topology)
    config = read_config("configs/stage1.py", [])
    step = plan_step(config, devices, "text_to_image", usable=usable_bytes(devices[0]))
    assert step.memory.peak < (1 - hardware.ROOM) * step.memory.usable
    assert step.roofline.mfu > (0.55 if topology == "v5e:16x16" else 0.60)
    group = 2 if topology == "v5e:16x16" else 1
    second = {"state": 4 // group, "encoder": group}
    assert step.mesh == {"replica": 4, "data": len(devices) // 16, **second, "fsdp": 1, "context": 1, "tensor": 1}
    samples = 256 // len(devices)
    expected = 2 * 2 * 2.10e9 + 48 * 2 * (group - 1) / group * (group * 2 * samples * 256 * 4096 * 2)
    assert sum(step.bytes_inside.values()) == pytest.approx(expected, rel=0.15)
    assert sum(step.bytes_across.values()) == 0
    # The blocks' gradients, nine tenths of all, travel in rings that overlap with compute.
    permuted = step.bytes_inside["collective-permute"]
    assert permuted > 0.9 * 2 * 2.10e9 * (1 - 4 / len(devices))
    chip = hardware.find_chip(devices[0].device_kind)
    assert step.roofline.ici_overlapped > 0.7 * permuted / 2 / chip.link


@needs_libtpu
@pytest.mark.parametrize("topology", POD_SLICES)
@pytest.mark.parametrize(
    ("stage", "name"), [("stage2", "edit"), ("stage2", "personalization"), ("stage3", "vqa")], ids=str
)
def test_the_other_streams_fit(stage, name, topology, compiler):
    """With text_to_image these are all shapes of steps of stages 2 and 3; perception has those of edit."""
    devices = topology_devices(topology)
    config = read_config(f"configs/{stage}.py", [])
    assert plan_step(config, devices, name, usable=usable_bytes(devices[0])).memory.fits


@needs_libtpu
def test_the_error_has_the_compilers_numbers(compiler):
    devices = topology_devices("v5e:1x1")
    config = read_config("configs/stage1.py", ["batch_size=1"])
    message = r"^the step of text_to_image does not fit: it needs [\d.]+G of 15\.75G"
    with pytest.raises(DoesNotFit, match=message):
        plan_step(config, devices, "text_to_image")
