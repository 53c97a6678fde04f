"""launch/benchmark.py sample: what it prints adds up, and what it cannot measure it says. No times are judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "sample"]
SMALL = ["--steps=4", "--batch=2", "--caption-batch=1,2", "--caption-steps=3", "--rounds=1"]


def run(*options):
    # Compiling takes its usual time, so that what the cache saves of it is seen.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    return subprocess.run([*COMMAND, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_figures_of_a_tiny_run_add_up(tmp_path):
    output = tmp_path / "figures.json"
    done = run("--random=tiny", *SMALL, f"--output={output}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    printed = [line.split("  ", 1)[0] for line in done.stdout.splitlines()]
    assert printed == list(figures)
    assert figures["model"] == "random weights, tiny" and figures["taken on"] == "cpu, float32"
    assert figures["images"] == "64 px, 4 Euler steps, guidance 7, 32 text tokens"

    matmul = figures["large square matmul, TFLOP/s"]
    # The tiny MM-DiT by hand, 16 image and 32 text tokens of width 128: 24 D^2 a token in each of 4 blocks, attention,
    # and a few percent for the rest; four guided steps.
    block = 48 * 24 * 128**2 + 4 * 48**2 * 128
    loop = 4 * 2 * 4 * block / 1e12
    parts = sum(figures[f"image batch 2: {part}, s"] for part in ("T5", "loop", "VAE decode"))
    assert 0 < parts <= figures["image batch 2: all, s"] * 1.001
    assert figures["image batch 2: s an image"] * 2 == pytest.approx(figures["image batch 2: all, s"])
    rate = figures["image batch 2: loop, TFLOP/s"]
    assert rate * figures["image batch 2: loop, s"] / 2 == pytest.approx(loop, rel=0.06)
    assert figures["image batch 2: loop, share of the measured matmul"] == pytest.approx(rate / matmul)
    for batch in (1, 2):
        assert 1 <= figures[f"caption batch {batch}: evaluations of the network"] <= 3
        assert 0 < figures[f"caption batch {batch}: loop, s"] < figures[f"caption batch {batch}: all, s"]
    ratio = figures["caption batch 1: s a caption"] / figures["caption batch 2: s a caption"]
    assert figures["captions / s, batch 2 against 1"] == pytest.approx(ratio)
    for name in ("image batch 2", "caption batch 1"):
        cold, cached = figures[f"{name}: compiling, s"], figures[f"{name}: compiling, from the persistent cache, s"]
        assert 0 <= cached < cold
    assert 0.1 < figures["peak host memory, GB"] < 20

    # A CPU has no bf16 peak and tells no device memory; nothing was compared.
    missing = {name for name, value in figures.items() if str(value).startswith("not measured: ")}
    always = {"peak device memory, GB", "image loop, ours / diffusers"}
    assert always < missing
    assert all("device's bf16 peak" in name for name in missing - always)


@pytest.mark.slow
def test_a_forward_of_ours_and_of_diffusers(tiny_bundle, monkeypatch):
    pytest.importorskip("diffusers")
    from unialign_jax.benchmarks import diffusers as theirs
    from unialign_jax.benchmarks import sample as ours

    monkeypatch.setattr(ours, "worker", lambda side, name, settings: getattr(workers[side], name)(settings))
    monkeypatch.setitem(ours.MATMUL, "cpu", (512, 1))
    workers = {"ours": ours, "diffusers": theirs}
    settings = {"bundle": str(tiny_bundle), "dtype": "float32", "quantize": None, "size": None, "rounds": 2}
    settings |= {"steps": 2, "guidance_scale": 7.0, "batch": [1], "compare": "diffusers"}

    figures = ours.compare_forward(settings)
    ratio = figures["forward, ours: s"] / figures["forward, diffusers: s"]
    assert figures["forward, ours / diffusers"] == pytest.approx(ratio)
    assert figures["forward, ours: taken on"].startswith("jax ") and "float32" in figures["forward, ours: taken on"]
    assert "diffusers" in figures["forward, diffusers: taken on"]
    for side in workers:
        calls = [float(s) for s in figures[f"forward, {side}: all calls, s"].split(", ")]
        assert len(calls) == 4 and min(calls) * 0.99 <= figures[f"forward, {side}: s"] <= max(calls) * 1.01

    figures = ours.compare_loop(settings, {"image batch 1: loop, s": 1.0})
    theirs_s = figures["diffusers, image batch 1: loop, s"]
    assert figures["image batch 1: loop, ours / diffusers"] == pytest.approx(1 / theirs_s)
