"""Plans of training: the roofline's arithmetic, names and links of slices, and the chips' compiler where it is."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.parallel import hardware, sharding
from unialign_jax.parallel.gradients import scan_reducing_late
from unialign_jax.planning import sampling_plan, step_plan
from unialign_jax.planning.collectives import Collective, read_collectives
from unialign_jax.planning.sampling_plan import GIB
from unialign_jax.training.config import read_config

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU compiler: pip install 'libtpu==0.0.42.*'")
V4, V5E = (next(chip for chip in hardware.CHIPS if chip.name == name) for name in ("v4", "v5e"))
PLAN = step_plan.StepPlan(
    stream="text_to_image",
    chips=256,
    mesh={"replica": 4, "data": 16, "encoder": 4, "fsdp": 1, "tensor": 1},
    mesh_reason="as given",
    batch_size=256,
    accumulation=1,
    remat="block",
    parameters=GIB,
    optimizer=2 * GIB,
    frozen=3 * GIB,
    batch=0,
    temporaries=4 * GIB,
    code=0,
    usable=16 * GIB,
    flops=20e12,
    compute=0.10,
    hbm=0.05,
    ici_overlapped=0.08,
    ici_exposed=0.02,
    dcn=0.01,
    peak_flops=200e12,
    bytes_inside={"all-gather": 4e9},
    bytes_across={"all-gather": 0.0},
)


def test_what_overlaps_counts_once_and_what_does_not_is_added():
    assert PLAN.seconds == pytest.approx(0.10 + 0.02 + 0.01)
    assert dataclasses.replace(PLAN, ici_overlapped=0.3).seconds == pytest.approx(0.3 + 0.02 + 0.01)
    assert PLAN.mfu == pytest.approx(20e12 / 0.13 / 200e12)
    assert PLAN.mfu_overlapped == pytest.approx(20e12 / 0.10 / 200e12)
    assert PLAN.images_per_second == pytest.approx(256 / 0.13)
    assert PLAN.peak == 10 * GIB and PLAN.fits
    assert not dataclasses.replace(PLAN, usable=9 * GIB).fits


def test_the_stage_is_the_streams_by_their_shares():
    config = read_config("configs/stage2.py", ["streams.perception.weight=0", "streams.personalization.weight=0"])
    slow = dataclasses.replace(PLAN, stream="edit", compute=0.20)
    figures = step_plan.report(config, [PLAN, slow])
    (stage,) = figures["tables"]["the stage"]
    seconds = 0.75 * 0.13 + 0.25 * 0.23
    assert stage["hours"] == pytest.approx(40_000 * seconds / 3600)
    assert stage["chip-hours"] == pytest.approx(256 * stage["hours"])
    assert stage["MFU %"] == pytest.approx(100 * 20e12 / seconds / 200e12)
    assert [row["peak"] for row in figures["tables"]["memory"]] == [10.0, 10.0]
    assert figures["tables"]["interconnect"][0]["all-gather"] == 4.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v4:4x4x4", "v4:4x4x4"),
        ("v4-8", "v4:2x2x1"),
        ("v4-16", "v4:2x2x2"),
        ("v4-128", "v4:4x4x4"),
        ("v4-512", "v4:4x8x8"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-8192", "v5p:16x16x16"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5e-1", "v5e:1x1"),
        ("v6e-8", "v6e:2x4"),
    ],
)
def test_names_as_on_google_cloud(name, expected):
    assert hardware.topology_name(name) == expected


@pytest.mark.parametrize("name", ["v4-7", "v5e-512", "v5p-2", "v3-8", "h100-8", "v5e:", "v5e-0", "v6e-3"])
def test_other_names_are_refused_in_a_line(name):
    with pytest.raises(ValueError, match=f"^topology is '{name}'"):
        hardware.topology_name(name)


def test_chips_are_found_by_their_kind():
    kinds = ["TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H100 PCIe", "NVIDIA H200", "cpu"]
    found = [hardware.find_chip(kind) for kind in kinds]
    assert [chip and chip.name for chip in found] == ["v5e", "v5p", "v6e", "H100 PCIe", "H200", None]


def grid(*sizes):
    return np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), axis=-1).reshape(-1, len(sizes))


def test_a_groups_links():
    # as "ICI for a gather over the whole slice"
    assert step_plan.group_bandwidth(V4, grid(4, 4, 4), (4, 4, 4)) == 2.7e11
    assert step_plan.group_bandwidth(V5E, grid(16, 16), (16, 16)) == 1.8e11
    assert step_plan.group_bandwidth(V5E, grid(4, 4), (4, 4)) == 0.9e11  # no ring
    assert step_plan.group_bandwidth(V4, grid(1, 1, 4), (4, 4, 4)) == 0.9e11  # one ring of four
    assert step_plan.group_bandwidth(V4, grid(1, 1, 4), (2, 2, 4)) == 0.45e11  # not of whole cubes: a line
    assert step_plan.group_bandwidth(V5E, grid(2, 2), (16, 16)) == 0.9e11
    assert step_plan.group_bandwidth(V5E, 2 * grid(8, 8), (16, 16)) == 0.9e11  # every second chip: links shared by two


def test_overlapped_and_exposed_collectives():
    devices = [type("Device", (), {"coords": (i, 0, 0)})() for i in range(4)]
    groups = np.arange(4)[None]
    both = [Collective("all-gather", "", 9_000_000, groups, 2, overlaps) for overlaps in (True, False)]
    overlapped, exposed = step_plan.ici_seconds(both, V5E, devices, np.zeros(4, int), 0.0)
    assert overlapped == exposed == pytest.approx(2 * 3 * 9e6 / 4.5e10)
    # Of two such slices: of the seven pieces of others a chip fetches one from the other slice, six come by the ICI.
    groups, slice_of = np.arange(8)[None], np.repeat([0, 1], 4)
    gather = [Collective("all-gather", "", 9_000_000, groups, 2, False)]
    expected = 2 * 6 * 9e6 / 4.5e10
    assert step_plan.ici_seconds(gather, V5E, 2 * devices, slice_of, 0.0) == (0.0, pytest.approx(expected))


def test_permutes_load_links_and_both_ways_at_once():
    ring = np.stack([grid(1, 16), np.roll(grid(1, 16), -1, axis=0)], axis=1)  # each to the next, the last to the first
    assert step_plan.link_flows(V5E, ring, (16, 16)) == {(1, 1): 1}
    assert step_plan.link_flows(V5E, ring[:, ::-1], (16, 16)) == {(1, -1): 1}
    line = np.stack([grid(1, 4), np.roll(grid(1, 4), -1, axis=0)], axis=1)
    assert step_plan.link_flows(V5E, line, (16, 16)) == {(1, 1): 1, (1, -1): 1}  # back over the three links between
    apart = np.stack([grid(1, 16), np.roll(grid(1, 16), -4, axis=0)], axis=1)
    assert step_plan.link_flows(V5E, apart, (16, 16)) == {(1, 1): 4}

    devices = [type("Device", (), {"coords": (0, i, 0)})() for i in range(16)]
    devices += [type("Device", (), {"coords": (15, 15, 0)})()]  # so that the slice is 16 x 16
    pairs = np.stack([np.arange(16), np.roll(np.arange(16), -1)], axis=1)
    both = [Collective("collective-permute", "", 4_500_000, way, 15, True) for way in (pairs, pairs[:, ::-1])]
    slice_of = np.zeros(17, int)
    once = 15 * 4.5e6 / 4.5e10
    assert step_plan.ici_seconds(both, V5E, devices, slice_of, 0.0) == (pytest.approx(once), 0.0)
    alone = [dataclasses.replace(collective, overlaps=False) for collective in both]
    assert step_plan.ici_seconds(alone, V5E, devices, slice_of, 0.0) == (0.0, pytest.approx(2 * once))

    # Sums of gradients run beside the backward pass of the blocks, the last block's beside nothing.
    def named(name):
        return [dataclasses.replace(collective, name=name) for collective in both]

    in_blocks = named("jit(train_step)/transpose(jvp(MMDiT))/shard_map/while/body/closed_call/ppermute")
    after = named("jit(train_step)/transpose(jvp(MMDiT))/shard_map/ppermute")
    seconds = step_plan.ici_seconds(in_blocks + after, V5E, devices, slice_of, 10 * once)
    assert seconds == (pytest.approx(once), pytest.approx(once))
    seconds = step_plan.ici_seconds(in_blocks, V5E, devices, slice_of, 0.25 * once)
    assert seconds == (pytest.approx(0.25 * once), pytest.approx(0.75 * once))
    # One axis comes after the other.
    assert step_plan.both_ways({(0, 1): 1.0, (0, -1): 2.0, (1, 1): 4.0}) == 6.0


def test_sums_of_gradients_are_known_by_their_names():
    def layer(params, index, carry, shared):
        return jnp.tanh(carry @ params["image"]["mlp_in"]["kernel"]) + shared

    def loss(params, x):
        return jnp.sum(scan_reducing_late(layer, params, x, x, "blocks"))

    params = {"image": {"mlp_in": {"kernel": jnp.ones((3, 8, 8))}}}
    with jax.set_mesh(sharding.make_mesh(data=8, fsdp=1)):
        text = jax.jit(jax.grad(loss)).lower(params, jnp.ones((8, 8))).compile().as_text()
    permutes = [found for found in read_collectives(text) if found.kind == "collective-permute"]
    inside = sum(found.times for found in permutes if step_plan.IN_BLOCKS.search(found.name))
    assert inside == 3 * sum(found.times for found in permutes) / 4 == 3 * 7


def test_the_compilers_refusal_in_a_line():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by 5.75G."
    error = step_plan.misfit("edit", message)
    assert str(error) == "the step of edit does not fit: it needs 21.50G of 15.75G"
    assert error.needed == 21.5 * GIB
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (43.25G) exceeds "
        "available HBM (15.75G)."
    )
    error = step_plan.misfit("edit", message)
    assert str(error) == "the step of edit does not fit: it needs 43.25G of 15.75G, for temporaries alone"
    assert error.needed == 43.25 * GIB
    assert step_plan.misfit("edit", "RESOURCE_EXHAUSTED: no room").needed is None


def test_work_on_paper():
    """A sample of text_to_image by hand, in TFLOP: forward, the image pass takes 1.98 and the text pass 2.01 (24 blocks
    of width 1536 on 1024 image and 256 text tokens), with the backward pass three times that; T5 takes 2.40 for each
    of two texts, the VAE 1.1. Remat of all blocks adds a forward of the blocks of both passes, 3.95.
    """
    from unialign_jax.training.config import build_configs
    from unialign_jax.training.state import Networks

    config = read_config("configs/stage1.py", ["model.remat=block"])
    networks = Networks.create(*build_configs(config, "tpu"))
    work = step_plan.step_work(config, networks, config.streams.text_to_image, 256)
    assert work["model"] == pytest.approx((3 * (1.98 + 2.01) + 2 * 2.40 + 1.1) * 1e12, rel=0.02)
    config.model.remat = "none"
    none = step_plan.step_work(config, networks, config.streams.text_to_image, 256)
    done = [work["matmul"] + work["attention"] for work in (work, none)]
    assert done[0] - done[1] == pytest.approx(3.95e12, rel=0.03)
    # Twice the forward pass of the blocks, and it once more where they are computed again.
    backward = none["backward"]["matmul"] + none["backward"]["attention"] * 2 / step_plan.ATTENTION_BACKWARD
    assert backward == pytest.approx(2 * 3.95e12, rel=0.03)
    assert work["backward"]["matmul"] == pytest.approx(1.5 * none["backward"]["matmul"])
    assert none["matmul"] + none["attention"] / (1 + step_plan.ATTENTION_BACKWARD) * 3 == pytest.approx(none["model"])


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
    weights are repeated) and as many bytes of gradients. T5 lies over groups of four chips: its 24 layers sum twice
    each, which moves 2 x 3/4 of the group's activations: two texts a sample, 256 tokens of width 4096, in bf16.
    """
    devices = sampling_plan.topology_devices(topology)
    config = read_config("configs/stage1.py", [])
    step = step_plan.plan_step(config, devices, "text_to_image", usable=sampling_plan.usable_bytes(devices[0]))
    assert step.fits
    assert step.mfu > (0.50 if topology == "v5e:16x16" else 0.55)
    assert step.mesh == {"replica": 4, "data": len(devices) // 16, "encoder": 4, "fsdp": 1, "tensor": 1}
    samples = 256 // len(devices)
    expected = 2 * 2 * 2.10e9 + 48 * 2 * 3 / 4 * (4 * 2 * samples * 256 * 4096 * 2)
    assert sum(step.bytes_inside.values()) == pytest.approx(expected, rel=0.15)
    assert sum(step.bytes_across.values()) == 0
    # The blocks' gradients, nine tenths of all, go round in rings beside the compute.
    permuted = step.bytes_inside["collective-permute"]
    assert permuted > 0.9 * 2 * 2.10e9 * (1 - 4 / len(devices))
    chip = hardware.find_chip(devices[0].device_kind)
    assert step.ici_overlapped > 0.7 * permuted / 2 / chip.link


@needs_libtpu
@pytest.mark.parametrize("topology", POD_SLICES)
@pytest.mark.parametrize(
    ("stage", "name"), [("stage2", "edit"), ("stage2", "personalization"), ("stage3", "vqa")], ids=str
)
def test_the_other_streams_fit(stage, name, topology, compiler):
    """With text_to_image these are all shapes of steps of stages 2 and 3; perception has those of edit."""
    devices = sampling_plan.topology_devices(topology)
    config = read_config(f"configs/{stage}.py", [])
    assert step_plan.plan_step(config, devices, name, usable=sampling_plan.usable_bytes(devices[0])).fits


@needs_libtpu
def test_a_misfit_is_said_with_its_numbers(compiler):
    devices = sampling_plan.topology_devices("v5e:1x1")
    config = read_config("configs/stage1.py", ["batch_size=1"])
    message = r"^the step of text_to_image does not fit: it needs [\d.]+G of 15\.75G"
    with pytest.raises(step_plan.DoesNotFit, match=message):
        step_plan.plan_step(config, devices, "text_to_image")
