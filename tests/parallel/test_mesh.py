"""The mesh of a machine: how many devices lie along each axis, and where in the torus."""

import importlib.util
import types

import numpy as np
import pytest

from unialign_jax.parallel import hardware
from unialign_jax.parallel.mesh import (
    AXES,
    axes_without_wraparound,
    choose_mesh,
    complete_mesh_shape,
    format_mesh,
    make_mesh,
    read_topology,
    zero1_mesh,
)
from unialign_jax.planning.topology import topology_devices

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


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
    choice = choose_mesh(read_topology(devices), bytes_per_chip=None)
    assert format_mesh(choice.sizes) == expected
    if platform != "tpu":
        assert list(make_mesh(**choice.sizes, devices=devices).devices.flat) == devices


def test_the_torus_is_read_from_coordinates():
    def devices(*coordinates, slices=1):
        return [
            types.SimpleNamespace(device_kind="TPU v4", platform="tpu", coords=place, slice_index=index)
            for index in range(slices)
            for place in coordinates
        ]

    whole = [(x, y, z) for x in (2, 3) for y in (0, 1) for z in (0, 1, 2, 3)]
    topology = read_topology(devices(*whole))
    assert (topology.devices, topology.chip.name, topology.grid, topology.slices) == (16, "v4", (2, 2, 4), 1)
    topology = read_topology(devices(*whole, slices=3))
    assert (topology.devices, topology.grid, topology.slices) == (48, (2, 2, 4), 3)
    assert read_topology(devices(*whole[:-1])).grid == ()  # a part of a slice: no torus to speak of


@pytest.mark.parametrize(
    ("kind", "grid", "axes", "expected"),
    [
        ("TPU v5 lite", (8, 8), {"replica": 2, "encoder": 4, "data": 8}, ("replica", "encoder", "data")),
        ("TPU v5 lite", (4, 16), {"encoder": 4, "data": 16}, ("encoder",)),
        ("TPU v5 lite", (4, 16), {"state": 2, "encoder": 2, "data": 16}, ("state",)),  # the first and the third chip
        ("TPU v5 lite", (2, 2), {"encoder": 2, "data": 2}, ()),  # both ends are next to each other
        ("TPU v4", (2, 4, 4), {"replica": 2, "encoder": 4, "data": 4}, ("encoder", "data")),
        ("TPU v4", (4, 4, 4), {"replica": 4, "encoder": 4, "data": 4}, ()),  # a whole cube
        ("NVIDIA H200", (2, 4), {"data": 2, "encoder": 4}, ()),
    ],
    ids=str,
)
def test_which_axes_have_no_wraparound(kind, grid, axes, expected):
    """The grid's chips in order, so that its last axis is the mesh's."""
    chips = [types.SimpleNamespace(device_kind=kind, coords=place) for place in np.ndindex(*grid)]
    devices = np.array(chips).reshape(*axes.values())
    mesh = types.SimpleNamespace(devices=devices, axis_names=tuple(axes), shape=axes)
    assert axes_without_wraparound(mesh) == expected


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((1, 1, 1, 1, -1, 1, 1), 8, (1, 1, 1, 1, 8, 1, 1)),
        ((2, 1, 1, 1, -1, 2, 2), 8, (2, 1, 1, 1, 1, 2, 2)),
        ((1,) * 7, 1, (1,) * 7),
    ],
)
def test_a_free_axis_takes_what_is_left(sizes, devices, expected):
    assert complete_mesh_shape(sizes, devices) == expected


@pytest.mark.parametrize(
    "sizes", [(1, 3, 1, 1, -1, 1, 1), (1, 1, 1, 1, 4, 1, 1), (1, -1, 1, 1, -1, 1, 1), (1, 0, 1, 1, 8, 1, 1)]
)
def test_a_mesh_that_does_not_come_out_even_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        complete_mesh_shape(sizes, 8)


@pytest.mark.parametrize(
    ("grid", "group", "expected"),
    [
        ((16, 16), 1, "replica=4, data=16, state=4"),
        ((16, 16), 2, "replica=4, data=16, state=2, encoder=2"),
        ((16, 16), 4, "replica=4, data=16, encoder=4"),
        ((4, 4, 4), 1, "replica=4, data=4, state=4"),
        ((2, 2, 4), 4, "replica=2, data=4, encoder=2"),  # no axis of four chips is left
        ((2, 2, 1), 1, "data=2, state=2"),
    ],
)
def test_the_text_encoder_takes_its_group_from_the_second_axis(grid, group, expected):
    """Whatever the group, the state is split over as many chips."""
    assert format_mesh(zero1_mesh(grid, 1, group)) == expected


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU compiler: pip install 'libtpu==0.0.42.*'")
@pytest.mark.parametrize(
    ("name", "slices"), [("v4-32", 1), ("v5e-256", 2), ("v6e-256", 1), ("v5p-512", 1), ("v5p-2048", 1), ("v4-64", 1)]
)
def test_axes_that_scatter_lie_along_the_torus(name, slices, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topology_devices(name, slices)
    topology = read_topology(devices)
    assert topology.grid == tuple(map(int, hardware.topology_name(name).split(":")[1].split("x")))
    pairs = make_mesh(**zero1_mesh(topology.grid, slices, 2), devices=devices)
    two = pairs.devices[0, 0, 0, :, 0, 0]
    assert len(two) == 2 and np.abs(np.subtract(two[0].coords, two[1].coords)).sum() == 1
    mesh = make_mesh(**zero1_mesh(topology.grid, slices, 4), devices=devices)
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    for axis in ("data", "encoder"):
        first = np.moveaxis(places, AXES.index(axis), 0).reshape(mesh.shape[axis], -1, 3)[:, 0]
        assert np.count_nonzero(np.ptp(first, axis=0)) == 1, axis
    expected = {"v4-32": ("data",), "v4-64": ("data", "encoder"), "v5e-256": ("encoder",), "v6e-256": ("encoder",)}
    expected |= {"v5p-512": (), "v5p-2048": ("encoder",)}
    assert tuple(axis for axis in axes_without_wraparound(mesh) if axis != "replica") == expected[name]
