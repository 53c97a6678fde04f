"""The mesh for a machine: what fits, by hand, and what lies along the torus."""

import dataclasses
import importlib.util
import types

import numpy as np
import pytest

from unialign_jax.parallel import hardware, sharding
from unialign_jax.planning import sampling_plan
from unialign_jax.training import meshes
from unialign_jax.training.config import build_configs, read_config
from unialign_jax.training.state import Networks

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
# Bytes of the full model: 2.1e9 trained parameters in bf16, and 16 bytes each of state (float32 masters, two moments,
# the average); T5's 4.76e9 in bf16, a small autoencoder; a sample's activations, 0.6 GB with all blocks computed again.
NEEDS = meshes.Needs(4.2e9, 0.17e9, 33.6e9, 9.5e9, 0.4e9, 0.2e9, {"dots": 2.2e9, "block": 0.6e9})


def slice_of(name, slices=1):
    kind, grid = hardware.topology_name(name).split(":")
    chip = next(chip for chip in hardware.CHIPS if chip.name == kind)
    grid = tuple(map(int, grid.split("x")))
    return meshes.Machine(slices * int(np.prod(grid)), chip.kinds[0], chip, grid, slices)


@pytest.mark.parametrize(
    ("name", "slices", "expected"),
    [
        ("v5e-1", 1, "of one device"),
        ("v5e-8", 1, "fsdp=8"),
        ("v5e-256", 1, "replica=4, data=16, encoder=4"),
        ("v5e-128", 1, "replica=2, data=16, encoder=4"),
        ("v5e-256", 4, "replica=16, data=16, encoder=4"),
        ("v4-8", 1, "fsdp=4"),
        ("v4-32", 1, "replica=2, data=4, encoder=2"),
        ("v4-128", 1, "replica=4, data=4, encoder=4"),
        ("v4-256", 1, "replica=4, data=8, encoder=4"),
        ("v5p-128", 1, "replica=4, data=4, encoder=4"),
        ("v5p-1024", 1, "replica=16, data=8, encoder=4"),
        ("v5p-8192", 1, "replica=64, data=16, encoder=4"),
        ("v6e-256", 1, "replica=4, data=16, encoder=4"),
        ("v5e-8", 2, "replica=2, fsdp=8"),
    ],
)
def test_the_mesh_of_a_slice(name, slices, expected):
    machine = slice_of(name, slices)
    choice = meshes.choose_mesh(machine, max(256, machine.devices), 1, "block", NEEDS)
    assert meshes.format_mesh(choice.sizes) == expected
    assert np.prod(list(choice.sizes.values())) == machine.devices


@pytest.mark.parametrize(
    ("kind", "platform", "expected"),
    [
        ("cpu", "cpu", "fsdp=6"),
        ("NVIDIA H200", "gpu", "fsdp=6"),
        ("TPU v9", "tpu", "replica=2, fsdp=3"),  # between slices only replicas
    ],
)
def test_other_devices_split_all(kind, platform, expected):
    """On two hosts: JAX calls each host of GPUs a slice."""
    shared = {"device_kind": kind, "platform": platform}
    devices = [type("Device", (), shared | {"id": i, "slice_index": i // 3})() for i in range(6)]
    choice = meshes.choose_mesh(meshes.read_machine(devices), 6, 1, "block", None)
    assert meshes.format_mesh(choice.sizes) == expected
    if platform != "tpu":
        assert list(sharding.make_mesh(**choice.sizes, devices=devices).devices.flat) == devices


def test_the_torus_is_read_from_coordinates():
    def devices(*coordinates, slices=1):
        return [
            types.SimpleNamespace(device_kind="TPU v4", platform="tpu", coords=place, slice_index=index)
            for index in range(slices)
            for place in coordinates
        ]

    whole = [(x, y, z) for x in (2, 3) for y in (0, 1) for z in (0, 1, 2, 3)]
    machine = meshes.read_machine(devices(*whole))
    assert (machine.devices, machine.chip.name, machine.grid, machine.slices) == (16, "v4", (2, 2, 4), 1)
    machine = meshes.read_machine(devices(*whole, slices=3))
    assert (machine.devices, machine.grid, machine.slices) == (48, (2, 2, 4), 3)
    assert meshes.read_machine(devices(*whole[:-1])).grid == ()  # a part of a slice: no torus to speak of


def test_bytes_a_chip_by_hand():
    sizes = dict.fromkeys(sharding.AXES, 1)
    repeated = sizes | {"replica": 4, "data": 16, "encoder": 4}
    # GB on v5e-256: weights 4.2 and gradients 4.2, T5 9.5 over 4 chips, state 33.6 over 64, the autoencoder, a sample.
    assert meshes.estimate(NEEDS, repeated, 1, "block") == 4.2e9 + 4.2e9 + 2.375e9 + 0.525e9 + 0.2e9 + 0.6e9
    assert meshes.estimate(NEEDS, repeated, 4, "dots") == pytest.approx(11.5e9 + 4 * 2.2e9)
    split = sizes | {"fsdp": 8}
    expected = 8.4e9 / 8 + 9.5e9 / 8 + 0.2e9 + 33.6e9 / 8 + 2 * (2 * 0.17e9 + 0.4e9) + 2 * 0.6e9
    assert meshes.estimate(NEEDS, split, 2, "block") == pytest.approx(expected)


def test_smaller_micro_batches_make_room_for_repeated_weights():
    machine = slice_of("v5e-64")  # 4 samples a chip: 11.5 GB, half of 33.6 / 32 more, and 0.6 a sample, of 16
    tight = dataclasses.replace(NEEDS, activations={"dots": 2.2e9, "block": 1.5e9})
    assert meshes.choose_mesh(machine, 256, 1, "block", tight).sizes["fsdp"] == 64
    assert meshes.choose_mesh(machine, 256, 2, "dots", tight).sizes["fsdp"] == 64
    choice = meshes.choose_mesh(machine, 256, 2, "block", tight)
    assert choice.sizes == {"replica": 2, "data": 8, "encoder": 4, "fsdp": 1, "tensor": 1}
    assert str(choice) == (
        "mesh replica=2, data=8, encoder=4: chosen for 8x8 v5e, weights are repeated and the state is split: "
        "by arithmetic 15.0 of 16 GB a chip"
    )


def test_what_the_full_model_needs():
    """Against counts of parameters (MM-DiT with heads 2.10e9, T5 v1.1 XXL's encoder 4.76e9), and two plans compiled
    with remat dots: 13.3 GB on v5e-256, 21.4 GB on v4-128.
    """
    config = read_config("configs/stage1.py", [])
    networks = Networks.create(*build_configs(config, "tpu"))
    needs = meshes.read_needs(config, networks)
    assert needs.weights == pytest.approx(2 * 2.10e9, rel=0.02)
    assert needs.state == pytest.approx(16 * 2.10e9, rel=0.02)
    assert needs.text_encoder == pytest.approx(2 * 4.76e9, rel=0.01)
    sizes = dict.fromkeys(sharding.AXES, 1) | {"replica": 4, "encoder": 4}
    assert meshes.estimate(needs, sizes | {"data": 16}, 1, "dots") == pytest.approx(13.3e9, rel=0.1)
    assert meshes.estimate(needs, sizes | {"data": 4}, 4, "dots") == pytest.approx(21.4e9, rel=0.1)
    several = meshes.read_needs(read_config("configs/stage2.py", []), networks)
    assert several.activations["block"] > 2 * needs.activations["block"]  # of three condition images


def test_a_given_mesh_is_kept():
    devices = [types.SimpleNamespace(device_kind="cpu") for _ in range(8)]
    config = read_config("configs/stage1.py:tiny", ["mesh.data=2", "mesh.tensor=-1"])
    choice = meshes.mesh_for(config, devices, None)
    assert choice.sizes == {"replica": 1, "data": 2, "encoder": 1, "fsdp": 1, "tensor": 4}
    assert str(choice) == "mesh data=2, tensor=4: as given"


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU compiler: pip install 'libtpu==0.0.42.*'")
@pytest.mark.parametrize(
    ("name", "slices"), [("v4-32", 1), ("v5e-256", 2), ("v6e-256", 1), ("v5p-512", 1), ("v5p-2048", 1), ("v4-64", 1)]
)
def test_axes_that_scatter_lie_along_the_torus(name, slices, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = sampling_plan.topology_devices(name, slices)
    machine = meshes.read_machine(devices)
    assert machine.grid == slice_of(name).grid
    mesh = sharding.make_mesh(**meshes.repeating(machine.grid, slices), devices=devices)
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    for axis in ("data", "encoder"):
        first = np.moveaxis(places, sharding.AXES.index(axis), 0).reshape(mesh.shape[axis], -1, 3)[:, 0]
        assert np.count_nonzero(np.ptp(first, axis=0)) == 1, axis
    expected = {"v4-32": ("data",), "v4-64": ("data", "encoder"), "v5e-256": ("encoder",), "v6e-256": ("encoder",)}
    expected |= {"v5p-512": (), "v5p-2048": ("encoder",)}
    assert tuple(axis for axis in sharding.lines(mesh) if axis != "replica") == expected[name]
