"""launch/benchmark.py step: its FLOPs are the closed forms', and what does not fit is a row. No times are judged."""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unialign_jax.benchmarks import sample
from unialign_jax.benchmarks import step as module
from unialign_jax.training.config import read_config

ROOT = Path(__file__).resolve().parents[2]
TERA = 1e12
SMALL = (
    "image_size=32",
    "text_length=24",
    "model.depth=2",
    "model.num_heads=2",
    "model.head_width=16",
    "model.text_width=32",
    "heads.hidden_width=32",
    "heads.teacher_width=16",
    "text_encoder.width=32",
    "text_encoder.depth=1",
    "frozen_from=",
    "model.latent_channels=48",
    "autoencoder.kind=space_to_depth",
    "autoencoder.latent_channels=48",
    "autoencoder.downsample_factor=4",
)


@pytest.fixture
def step(monkeypatch):
    """The module; what it runs in processes of its own runs in this one."""
    monkeypatch.setitem(sample.MATMUL, "cpu", (256, 1))
    monkeypatch.setattr(module, "call_alone", lambda _, function, settings: getattr(module, function)(settings))
    return module


@pytest.fixture
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def options(step, *arguments, changes=()):
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    parser.set_defaults(changes=list(changes))
    return parser.parse_args(["--config=configs/stage1.py:tiny", "--steps=1", "--rounds=1", "--warmup=1", *arguments])


def zeros(setup):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (setup.state, setup.frozen, setup.batch))


@pytest.mark.slow
def test_a_small_step_and_its_parts(step, quick_compiler, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(step.Setup, "make", zeros)  # spares compiling what makes them at random
    figures = step.benchmark_step(options(step, "--devices=1", "--micro-batches=2", changes=SMALL))
    (row,) = figures["settings"]
    assert row["outcome"] == "measured" and math.isfinite(row["loss"])
    assert (row["micro-batch"], row["remat"]) == (2, "none")
    assert row["MFU %"] is None and row["peak GB"] is None  # a CPU has no peak and tells no memory
    assert row["peak of"] is None
    assert figures["devices"] == 1 and figures["mesh"] == row["mesh"] == "of one device"  # of the 8 that there are
    seconds = row["step, ms"] / 1e3
    assert row["images/s"] * seconds == pytest.approx(2)

    parts = {part["part"]: part for part in figures["parts"]}
    assert sum(parts[name]["TFLOP"] for name in step.WHOLE) == pytest.approx(parts["step"]["TFLOP"])
    assert row["TFLOP/s"] * seconds == pytest.approx(parts["step"]["TFLOP"])
    whole = [*step.WHOLE, "what the step takes beyond its parts"]
    assert sum(parts[name]["share %"] for name in whole) == pytest.approx(100)
    # T5 by hand, two texts of 24 tokens for each of 2 samples: four projections 32 x 128, three of the MLP 32 x 256.
    text = 4 * (24 * 2 * (4 * 32 * 128 + 3 * 32 * 256) + 4 * 24**2 * 128)
    assert parts["T5 encode"]["TFLOP"] * TERA == pytest.approx(text)
    # Attention by hand: 2 blocks, 2 passes, 2 samples, 16 image and 24 text tokens of width 32.
    assert parts["attention: forward"]["TFLOP"] * TERA == pytest.approx(8 * 4 * 40**2 * 32)
    assert figures["step / matmuls of the blocks' shapes"] > 0


def test_a_peak_from_before_the_steps_is_said(step):
    assert step.peak_of(None, None) is None
    assert step.peak_of(3.0, 4.0) == "the step"
    assert step.peak_of(4.0, 4.0) == "making the weights: the step took less"


@pytest.mark.parametrize(
    "stage, stream, expected",
    [
        # TFLOP a sample, counted by hand for tests/models/test_flops.py: T5, VAE, forward, forward of attention.
        ("stage1", "text_to_image", (4.80, 1.10, 3.99, 2 * 24 * 4 * 1280**2 * 1536 / TERA)),
        ("stage2", "edit", (4.80, 2.20, 5.92, 24 * 4 * (1280**2 + 2304**2) * 1536 / TERA)),
        ("stage3", "vqa", (2.40, 1.10, 2.01, 24 * 4 * 1280**2 * 1536 / TERA)),
    ],
)
def test_work_of_the_parts_at_full_size(step, stage, stream, expected):
    config = read_config(f"configs/{stage}.py", ["batch_size=16", "mesh.fsdp=8"])
    if stage == "stage3":
        config.streams.vqa.path = "data/vqa"
    setup = step.Setup(config, stream, jax.devices())
    work = step.part_flops(setup)
    found = [work[name] / 2 / TERA for name in ("T5 encode", "VAE encode", "MM-DiT and losses: forward")]
    assert found == pytest.approx(expected[:3], rel=0.02)
    assert work["attention: forward"] / 2 / TERA == pytest.approx(expected[3])
    assert work["attention: forward and backward"] == 3 * work["attention: forward"]
    assert sum(work[name] for name in step.WHOLE) == pytest.approx(step.step_flops(setup))


def test_out_of_memory_is_a_row(step, monkeypatch):
    monkeypatch.chdir(ROOT)
    measured = step.unmeasured("measured") | {"images/s": 1.0}

    def whole(settings):
        if settings["micro_batch"] < 4:
            return measured
        return real_whole(settings)

    real_whole = step.whole
    monkeypatch.setattr(step, "whole", whole)
    monkeypatch.setattr(step.Setup, "compile_step", lambda _: jnp.zeros(2**50, jnp.uint8).block_until_ready())
    rows = step.benchmark_step(options(step, "--micro-batches=2,4,8", "--remat=none,block", "--no-parts"))["settings"]
    assert [(row["remat"], row["micro-batch"]) for row in rows] == [
        (r, m) for r in ("none", "block") for m in (2, 4, 8)
    ]
    for first, second, third in (rows[:3], rows[3:]):
        assert first["outcome"] == "measured"
        assert second["outcome"].startswith("out of memory: ") and second["images/s"] is None
        assert third["outcome"] == "not tried: 4 was out of memory"
    with pytest.raises(ValueError, match="^no setting could be measured: out of memory: "):
        step.benchmark_step(options(step, "--micro-batches=4", "--no-parts"))
