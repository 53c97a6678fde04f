"""The `quantize` part of launch/benchmark.py: what 8 bits for T5's weights change, as in training.

    python launch/benchmark.py quantize
    python launch/benchmark.py quantize --bundle=bundles/sd3 --texts=prompts.txt

A row for each of `quantize_text_encoder`'s modes, and for bfloat16 in place of float32: the relative error (norm of the
difference over the norm) of T5's embeddings, and of the velocity that the MM-DiT predicts from them, beside float32.
The MM-DiT computes in float32 throughout, so that T5's errors are seen alone.

    random       weights as drawn at the start of a run, in --depth layers of the sizes of T5-XXL and the 2B model
    structured   the same, where channels differ: each output of a kernel, and each input, times exp(normal / 2), and
                 one norm scale in 200 times 20: such outliers are what 8 bits bear worst
    the bundle   trained weights
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

MODES = ("bfloat16", "int8", "w8a8", "fp8")
OUTLIERS, OUTLIER = 200, 20.0  # one norm scale in so many, and its factor
SPREAD = 0.5  # of the logarithm of a channel's size
IMAGE_SIZE, SEED = 256, 0


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--bundle", default="demo", help="trained weights, default %(default)s, which the package has")
    parser.add_argument("--texts", type=Path, help="a file of texts, one a line; default: of the shapes world")
    parser.add_argument("--count", type=int, default=8, help="texts of the shapes world, default %(default)s")
    parser.add_argument("--depth", type=int, default=2, help="layers of random weights, default %(default)s")


def benchmark_quantize(arguments: argparse.Namespace) -> dict:
    """{"errors": a row for each mode and kind of weights}.

    Raises ValueError or OSError for arguments that do not fit.
    """
    from unialign_jax import bundle
    from unialign_jax.benchmarks.sample import check_counts
    from unialign_jax.models import presets

    check_counts(arguments, count=4096, depth=24)
    config, stored = bundle.load(bundle.locate(arguments.bundle), components=["transformer", "text_encoder"])
    texts = read_texts(arguments)
    tokenizer = bundle.read_tokenizer(bundle.locate(arguments.bundle))
    ids = np.stack([tokenizer.encode(text, config.text_length) for text in texts])
    encoder = dataclasses.replace(presets.TEXT_ENCODER["t5_xxl"], depth=arguments.depth)
    transformer = dataclasses.replace(presets.MMDIT["unialign_2b"], depth=arguments.depth, tap_depth=1)
    rows = []
    for name, structured in (("random", False), ("structured", True)):
        params = random_params(transformer, encoder, structured)
        rows += error_rows(name, transformer, encoder, params, ids)
    rows += error_rows(arguments.bundle, config.transformer, config.text_encoder, stored, ids)
    layers = f"T5-XXL's and the 2B model's, {arguments.depth} of each"
    return {"texts": f"{len(ids)} of {ids.shape[1]} tokens", "layers of random weights": layers, "errors": rows}


def read_texts(arguments: argparse.Namespace) -> list[str]:
    from unialign_jax.data.shapes.tasks import shapes_example
    from unialign_jax.files import check_regular

    if not arguments.texts:
        return [shapes_example("text_to_image", 1, i, image_size=8).caption for i in range(arguments.count)]
    check_regular(arguments.texts, 2**20)
    texts = [line for line in arguments.texts.read_text().splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{arguments.texts} has no texts, expected one a line")
    return texts


def random_params(transformer: Any, encoder: Any, structured: bool) -> dict:
    """Parameters of both networks. No kernel of the MM-DiT is zero, as some are at a start: the text must be heard."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from unialign_jax.models import parameters

    generator = np.random.default_rng(SEED)
    keys = jax.random.split(jax.random.key(SEED))
    trees = {"text_encoder": parameters.init(encoder, keys[0]), "transformer": parameters.init(transformer, keys[1])}

    def drawn(leaf):
        return (generator.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-2])).astype(np.float32)

    def spread(path, leaf):
        leaf = np.array(leaf)
        if path.endswith("kernel"):
            for axis in (1, leaf.ndim - 1):  # the inputs and the outputs of stacked layers
                shape = np.ones(leaf.ndim, int)
                shape[axis] = leaf.shape[axis]
                leaf *= np.exp(SPREAD * generator.standard_normal(shape, np.float32))
        elif path.endswith("norm/scale"):
            leaf *= np.where(generator.random(leaf.shape) < 1 / OUTLIERS, OUTLIER, 1.0).astype(np.float32)
        return leaf

    flat = flatten_dict(trees["transformer"], sep="/")
    flat = {path: leaf if np.any(leaf) or not path.endswith("kernel") else drawn(leaf) for path, leaf in flat.items()}
    trees["transformer"] = unflatten_dict(flat, sep="/")
    if structured:
        flat = flatten_dict(trees["text_encoder"], sep="/")
        trees["text_encoder"] = unflatten_dict({path: spread(path, leaf) for path, leaf in flat.items()}, sep="/")
    return trees


def error_rows(name: str, transformer: Any, encoder: Any, params: dict, ids: np.ndarray) -> list[dict]:
    """The errors of each mode with these weights."""
    import jax
    import jax.numpy as jnp

    from unialign_jax.models.mmdit import MMDiT
    from unialign_jax.models.quantization import quantize_module, quantize_params
    from unialign_jax.models.text_encoder import TextEncoder

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    exact, low = (TextEncoder(dataclasses.replace(encoder, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    network = MMDiT(dataclasses.replace(transformer, dtype="float32", attention="xla", remat="none"))
    side = min(IMAGE_SIZE // 8, transformer.max_patches * transformer.patch_size)
    noisy = jax.random.normal(jax.random.key(SEED), (len(ids), side, side, transformer.latent_channels))
    sigma = jnp.linspace(0.1, 0.9, len(ids))

    @jax.jit
    def velocity(weights, embeddings):
        return network.apply({"params": weights}, noisy, embeddings.astype(jnp.float32), sigma).velocity

    def both(module, weights):
        embeddings = jax.jit(module.apply)({"params": weights}, ids)
        return embeddings, velocity(params["transformer"], embeddings)

    expected = both(exact, params["text_encoder"])
    rows = []
    for mode in MODES:
        if mode == "bfloat16":
            found = both(low, params["text_encoder"])
        else:
            found = both(quantize_module(exact, mode), quantize_params(params["text_encoder"], mode))
        errors = [100 * relative_error(*pair) for pair in zip(found, expected, strict=True)]
        rows.append({"weights": name, "mode": mode, "embedding, %": errors[0], "velocity, %": errors[1]})
    return rows


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
