"""The plan's memory against a real run: two virtual CPU devices in a process of their own."""

import argparse
import sys
from pathlib import Path

import pytest

from unialign_jax.benchmarks import memory

ROOT = Path(__file__).resolve().parents[2]
SMALLER = (
    "image_size=128",
    "text_length=32",
    "model.depth=4",
    "model.tap_depth=2",
    "text_encoder.depth=1",
    "autoencoder.kind=space_to_depth",
    "autoencoder.latent_channels=192",
    "model.latent_channels=192",
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of a process's memory is Linux's")
def test_the_plan_is_what_a_run_takes(monkeypatch):
    # Little time of compiling; where buffers lie is decided before.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    parser.set_defaults(changes=list(SMALLER))
    arguments = parser.parse_args(["--devices=2", "--mesh=fsdp=2", "--remat=none"])
    ((row,),) = memory.benchmark_memory(arguments).values()
    # Under fsdp the float32 state is held once, as masters, two moments and an average: by hand, without biases, the
    # blocks' 36 D^2, the text's ends, the patches', three of modulation and time; and the heads, which have no average.
    width = 384
    parameters = 4 * 36 * width**2 + width * (512 + 8000) + 2 * width * 768 + width * (2 * width + 256 + width)
    heads = 2 * (width * 256 + 256 * 256)
    assert row["parameters"] + row["optimizer"] == pytest.approx(4 * (4 * parameters + 3 * heads) / 1e9, rel=0.02)
    assert row["temporaries"] > row["parameters"] + row["optimizer"]  # activations are a fair share
    assert row["plan"] == pytest.approx(row["real"], rel=0.15)


@pytest.mark.parametrize("mesh", ["fsdp", "fsdp=8,depth=2", "fsdp=half", ""])
def test_a_bad_mesh_is_told_in_a_line(mesh):
    axes = "replica, data, state, encoder, fsdp, context, tensor"
    with pytest.raises(ValueError, match=f"^--mesh is .*, expected sizes of {axes}"):
        memory.mesh_changes(mesh)
