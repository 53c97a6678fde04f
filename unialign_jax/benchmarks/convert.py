"""The `convert` part of launch/benchmark.py: time and memory of full-size conversions, each in its own process.

    python launch/benchmark.py convert --scratch=/tmp/convert

It writes files of random numbers in the published sizes and layouts (Stability's single file with SD3's transformer and
VAE, 4.2 GB in fp16; T5 v1.1 XXL, 9.5 GB in fp16), converts them with launch/convert.py, loads the bundles, and reports
wall time and peak resident memory of each process. It needs 30 GB of disk, and frees them at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from unialign_jax import bundle
_, params = bundle.load(sys.argv[1], dtype="bfloat16")
jax.block_until_ready(params)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default="sd3,t5", help="which of sd3 and t5, default %(default)s")
    parser.add_argument("--scratch", type=Path, help="where the files go, default a temporary folder")


def benchmark_convert(arguments: argparse.Namespace) -> dict:
    """{figure: value}: of each part the GB read and written, and seconds and peak GB of converting and of loading."""
    from unialign_jax.files import make_folder

    makers, parts, figures = {"sd3": make_sd3, "t5": make_t5}, arguments.parts.split(","), {}
    if unknown := [part for part in parts if part not in makers]:
        raise ValueError(f"--parts has {', '.join(map(repr, unknown))}, expected some of {', '.join(makers)}")
    if arguments.scratch:
        make_folder(arguments.scratch, "--scratch")
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    try:
        for part in parts:
            source, flags = makers[part](scratch)
            output = scratch / f"{part}_bundle"
            command = [sys.executable, "launch/convert.py", "sd3", f"--source={source}", f"--output={output}", *flags]
            figures |= measure(f"{part} conversion", command)
            figures[f"{part} source GB"] = source.stat().st_size / 1e9
            source.unlink()
            figures |= measure(f"{part} loading as bfloat16", [sys.executable, "-c", LOAD, str(output)])
            figures[f"{part} bundle GB"] = sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) / 1e9
            shutil.rmtree(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return figures


def measure(name: str, command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident GB of a command. Raises ValueError when the command fails."""
    from unialign_jax.training.metrics import peak_bytes

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command[1:3])} failed with status {process.returncode}")
    return {f"{name} seconds": time.perf_counter() - began, f"{name} peak GB": peak_bytes(usage) / 1e9}


def make_sd3(scratch: Path) -> tuple[Path, list[str]]:
    """Writes Stability's sd3_medium.safetensors, transformer and VAE in fp16; (its path, options of convert.py)."""
    from unialign_jax import bundle
    from unialign_jax.conversion import autoencoder, exporting, rules, transformer
    from unialign_jax.models import presets

    config = bundle.BundleConfig(transformer=presets.MMDIT["unialign_2b"], autoencoder=presets.AUTOENCODER["sd3"])
    ours = shapes_of(config)
    tables = {
        "transformer": transformer.sd3_export_table("stability", config.transformer),
        "autoencoder": autoencoder.autoencoder_table("ldm", config.autoencoder),
    }
    shapes, known = {}, {}
    for name, table in tables.items():
        prefix = exporting.STABILITY_PREFIXES[name]
        shapes |= {prefix + key: shape for key, shape in rules.export_shapes(table, ours[name]).items()}
        known |= {prefix + constant.key: constant.make for constant in table.constants}
    known = {key: make for key, make in known.items() if key.endswith("pos_embed")}
    path = scratch / "sd3_medium.safetensors"
    write_random(path, shapes, known)
    return path, ["--components=transformer,autoencoder"]


def make_t5(scratch: Path) -> tuple[Path, list[str]]:
    """Writes t5xxl_fp16.safetensors, and a tokenizer, which a text encoder needs; (its path, options of convert.py)."""
    from unialign_jax import bundle
    from unialign_jax.conversion import rules, text_encoder
    from unialign_jax.data.tokenizer import load_tokenizer
    from unialign_jax.models import presets

    config = bundle.BundleConfig(text_encoder=presets.TEXT_ENCODER["t5_xxl"])
    table = text_encoder.t5_table(config.text_encoder)
    path = scratch / "t5xxl_fp16.safetensors"
    write_random(path, rules.export_shapes(table, shapes_of(config)["text_encoder"]), {})
    load_tokenizer().save(scratch / "tokenizer")
    return path, ["--components=text_encoder", f"--tokenizer={scratch / 'tokenizer'}"]


def shapes_of(config: Any) -> dict[str, dict]:
    """{component: {path: shape}} of a bundle's parameters."""
    from flax.traverse_util import flatten_dict

    from unialign_jax import bundle

    trees = bundle.abstract_params(config)
    return {
        name: {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()} for name, tree in trees.items()
    }


def write_random(path: Path, shapes: dict, known: dict) -> None:
    """Writes a safetensors file in fp16. The random numbers repeat after 32 million, which changes no measurement."""
    import numpy as np

    from unialign_jax.conversion.safetensors_file import Writer

    pool = np.random.default_rng(0).standard_normal(2**25, np.float32).astype(np.float16) * np.float16(0.02)
    with Writer(path, {key: (np.float16, shape) for key, shape in shapes.items()}) as writer:
        for key, shape in shapes.items():
            writer.write(key, known[key]().astype(np.float16) if key in known else np.resize(pool, shape))
