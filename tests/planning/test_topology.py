"""Names of slices, chips, and the compiler's errors."""

import pytest

from unialign_jax.parallel import hardware
from unialign_jax.planning import topology
from unialign_jax.planning.topology import GIB


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


def test_the_next_larger_slice():
    larger = hardware.larger_slice
    expected = {"v5e-1": "v5e-4", "v5e:4x4": "v5e-32", "v4-8": "v4-16", "v4:2x2x1": "v4-16", "v5litepod-16": "v5e-32"}
    assert {name: larger(name) for name in expected} == expected
    assert larger("v5e-256") is larger("v5p-8192") is larger("v4:4x4x6") is None


def test_the_compilers_refusal_in_a_line():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by 5.75G."
    error = topology.out_of_memory("the step of edit", message)
    assert str(error) == "the step of edit does not fit: it needs 21.50G of 15.75G"
    assert error.needed == 21.5 * GIB
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (43.25G) exceeds "
        "available HBM (15.75G)."
    )
    error = topology.out_of_memory("the step of edit", message)
    assert str(error) == "the step of edit does not fit: it needs 43.25G of 15.75G, for temporaries alone"
    assert error.needed == 43.25 * GIB
    assert topology.out_of_memory("edit", "RESOURCE_EXHAUSTED: no room").needed is None
