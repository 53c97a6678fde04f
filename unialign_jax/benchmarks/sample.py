"""The `sample` part of launch/benchmark.py: the speed and memory of inference, beside diffusers' SD3 if wanted.

    python launch/benchmark.py sample --random=tiny --steps=4
    python launch/benchmark.py sample --random=unialign_2b --compare=diffusers --output=sample.json
    python launch/benchmark.py sample --random=unialign_2b --parts=forward --compare=diffusers
    python launch/benchmark.py sample --bundle=bundles/unialign --quantize=int8 --batch=1,4

Three parts, chosen by --parts:

    images     Pipeline.generate at each batch size: per image and by component, against the matmuls of this machine
    captions   Pipeline.caption at each batch size, every token denoised
    forward    one forward of the MM-DiT for one image: all the work of a sampler's step without guidance

Each measurement runs in a process of its own, one after the other: they share neither memory nor caches. diffusers'
side is SD3Transformer2DModel of the same size and dtype with random weights in a plain Euler loop, compiled by torch on
a GPU. All times are medians of --rounds calls after a first one.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("images", "captions", "forward")
RANDOM = {  # by name: MM-DiT, T5, autoencoder, pixels, tokens
    "unialign_2b": ("unialign_2b", "t5_xxl", "sd3", 512, 256),
    "tiny": ("tiny", "tiny", "tiny", 64, 32),
}
# The matmul that speeds are compared with: (side, calls in a row, so that starting them does not count).
MATMUL, LARGE_MATMUL = {"cpu": (2048, 1)}, (8192, 16)
MOST_BATCH = 65536
MOST_ROUNDS = 1_000_000  # of steps, rounds and the like: more is a mistake
FORWARD_TURNS = 2  # ours and diffusers are measured in turn, so that a busy moment of the machine meets both


def add_arguments(parser: argparse.ArgumentParser):
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", type=Path, help="a bundle written by launch/convert.py")
    model.add_argument("--random", choices=RANDOM, help="random weights of this size, T5 and autoencoder included")
    parser.add_argument("--parts", default="images,captions", help=f"of {', '.join(PARTS)}; default %(default)s")
    parser.add_argument("--compare", choices=["diffusers"], help="measure this beside ours")
    parser.add_argument("--size", type=int, help="pixels of a side, default what the model was trained with")
    parser.add_argument("--steps", type=int, default=28, help="Euler steps of an image, default %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=7.0, help="1 switches it off; default %(default)s")
    parser.add_argument("--batch", default="1,8", help="images in a batch, default %(default)s")
    parser.add_argument("--caption-batch", default="1,32", help="captions in a batch, default %(default)s")
    parser.add_argument("--caption-steps", type=int, default=32, help="default %(default)s")
    parser.add_argument("--caption-tokens", type=int, help="default what the model was trained with")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--quantize", choices=["int8", "w8a8", "fp8"], help="8 bits, see models/quantization.py")
    parser.add_argument("--rounds", type=int, default=3, help="calls of which the median counts, default %(default)s")


def benchmark_sample(arguments: argparse.Namespace) -> dict:
    """{figure: value}; a figure that could not be measured says so. Raises ValueError for options that do not fit."""
    from unialign_jax.inference.options import MAX_STEPS, MAX_TOKENS, check_range, check_whole
    from unialign_jax.planning.sampling import check_sampling

    settings = {k: v for k, v in vars(arguments).items() if k not in ("measure", "output", "command")}
    settings["bundle"] = str(arguments.bundle.resolve()) if arguments.bundle else None
    settings["batch"] = batch_sizes("--batch", arguments.batch)
    settings["caption_batch"] = batch_sizes("--caption-batch", arguments.caption_batch)
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"--parts has {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    check_counts(arguments, steps=MAX_STEPS, caption_steps=MAX_STEPS, rounds=MOST_ROUNDS)
    check_range("--guidance-scale", arguments.guidance_scale, 0, 100)
    if arguments.caption_tokens is not None:
        check_whole("--caption-tokens", arguments.caption_tokens, 8, MAX_TOKENS)
    config = model_config(settings)
    missing = [name for name in ("transformer", "text_encoder", "autoencoder") if getattr(config, name) is None]
    if missing:
        raise ValueError(f"{settings['bundle']} lacks {' and '.join(missing)}, which are measured too")
    check_sampling(config, config.image_size if arguments.size is None else arguments.size, 1)
    positions = config.transformer.text_positions
    if positions and (arguments.caption_tokens or 0) > positions:
        raise ValueError(f"--caption-tokens is {arguments.caption_tokens}, the model has positions for {positions}")
    if arguments.compare and importlib.util.find_spec(arguments.compare) is None:
        raise ValueError("--compare needs diffusers and torch: pip install -r requirements-test.txt")

    figures = {"model": f"random weights, {arguments.random}" if arguments.random else settings["bundle"]}
    figures["load average at the start"] = os.getloadavg()[0]
    if "forward" in parts:
        figures |= compare_forward(settings)
    if "images" in parts or "captions" in parts:
        ours = worker("ours", "pipeline", settings | {"parts": parts})
        figures |= ours
        if "images" in parts:
            figures |= compare_loop(settings, ours)
    figures["load average at the end"] = os.getloadavg()[0]
    return figures


def compare_forward(settings: dict) -> dict:
    sides = ["ours"] + ([settings["compare"]] if settings["compare"] else [])
    turns = {side: [] for side in sides}
    for _ in range(FORWARD_TURNS if settings["compare"] else 1):
        for side in sides:
            turns[side].append(worker(side, "forward", settings))
    figures, medians = {}, {}
    for side, results in turns.items():
        medians[side] = statistics.median(s for result in results for s in result["seconds"])
        matmul = max(result["matmul"] for result in results)
        figures |= {
            f"forward, {side}: taken on": results[0]["taken on"],
            f"forward, {side}: s": medians[side],
            f"forward, {side}: all calls, s": ", ".join(f"{s:.3g}" for r in results for s in r["seconds"]),
            f"forward, {side}: TFLOP/s": results[0]["flops"] / medians[side] / 1e12,
            f"forward, {side}: its large square matmul, TFLOP/s": matmul / 1e12,
            f"forward, {side}: share of that": results[0]["flops"] / medians[side] / matmul,
            f"forward, {side}: first call, s": results[0]["first call"],
            f"forward, {side}: peak host memory, GB": results[0]["host GB"],
        }
    ratio = medians["ours"] / medians["diffusers"] if settings["compare"] else not_measured("no --compare=diffusers")
    return figures | {"forward, ours / diffusers": ratio}


def compare_loop(settings: dict, ours: dict) -> dict:
    """diffusers' loop at the batch sizes of ours, and the ratios of the times."""
    if not settings["compare"]:
        return {"image loop, ours / diffusers": not_measured("no --compare=diffusers")}
    try:
        theirs = worker("diffusers", "loop", settings)
    except ValueError as error:  # ours are worth keeping
        return {"image loop, ours / diffusers": not_measured(error)}
    figures = {f"diffusers, {name}": value for name, value in theirs.items()}
    for batch in settings["batch"]:
        name = f"image batch {batch}: loop, s"
        figures[f"image batch {batch}: loop, ours / diffusers"] = ours[name] / theirs[name]
    return figures


def check_counts(arguments: argparse.Namespace, **most: int) -> None:
    """Raises ValueError for an option that is given, and no whole number from 1 to its most."""
    from unialign_jax.inference.options import check_whole, flag

    for name, high in most.items():
        if getattr(arguments, name) is not None:
            check_whole(flag(name), getattr(arguments, name), 1, high)


def batch_sizes(option: str, text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > MOST_BATCH:
        raise ValueError(f"{option} is {text!r}, expected batch sizes such as 1,8, up to {MOST_BATCH:,}")
    return sizes


def not_measured(why: str) -> str:
    return f"not measured: {why}"


def worker(side: str, function: str, settings: dict) -> dict:
    """The result of `function` of this module, or of the one for diffusers, called in a process of its own."""
    module = {"ours": "sample", "diffusers": "diffusers"}[side]
    print(f"measuring {side}: {function} ...", file=sys.stderr, flush=True)
    return call_alone(module, function, settings)


def call_alone(module: str, function: str, settings: dict) -> dict:
    """The result of a module of this folder, run in a process of its own as FUNCTION SETTINGS RESULT, both JSON.

    -P keeps this folder off the path: it has modules named like packages (diffusers). Raises ValueError when it fails.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-P", "-m", f"unialign_jax.benchmarks.{module}"]
        command += [function, json.dumps(settings), str(result)]
        if status := subprocess.run(command, env=environment).returncode:
            hint = ", killed: out of memory?" if status == -9 else ""
            raise ValueError(f"{module}.py {function} failed with status {status}{hint}")
        return json.loads(result.read_text())


# In a process of its own


def model_config(settings: dict):
    """The BundleConfig of --bundle or --random."""
    from unialign_jax import bundle
    from unialign_jax.models import presets

    if settings["bundle"]:
        return bundle.read_config(settings["bundle"])
    transformer, text_encoder, autoencoder, image_size, text_length = RANDOM[settings["random"]]
    return bundle.BundleConfig(
        transformer=presets.MMDIT[transformer],
        text_encoder=presets.TEXT_ENCODER[text_encoder],
        autoencoder=presets.AUTOENCODER[autoencoder],
        image_size=image_size,
        text_length=text_length,
    )


def parameter_loader(settings: dict, config: Any, dtype: Any):
    """A function, name of a component -> its parameters on the device, read from the bundle or random."""
    import jax
    from flax.traverse_util import flatten_dict

    from unialign_jax.inference import weights

    device = jax.devices()[0]
    if settings["bundle"]:
        return weights.bundle_loader(
            settings["bundle"], config, dtype=dtype, device=device, quantize=settings["quantize"]
        )

    def leaves(name):
        abstract = flatten_dict(weights.abstract_component(config, name, dtype), sep="/")
        return ((path, random_array(leaf.shape, leaf.dtype)) for path, leaf in abstract.items())

    return weights.Loader(leaves, dtype=dtype, device=device, quantize=settings["quantize"])


def random_array(shape: tuple[int, ...], dtype: Any):
    """Small normal numbers, repeated after four million, which changes no time."""
    return np.resize(random_pool(np.dtype(dtype)), shape)


@functools.cache
def random_pool(dtype: Any):
    return (0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)).astype(dtype)


class Stopwatch:
    """Times the programs of a pipeline: waits for the result of each and adds up the seconds by part."""

    PARTS = {
        "encode_prompts": "T5",
        "sample_images": "loop",
        "decode_images": "VAE decode",
        "encode_images": "VAE encode",
        "describe": "loop",
    }

    def __init__(self, pipeline):
        self.seconds, self.results = {}, {}
        timed = {name: self._timed(getattr(pipeline.programs, name), part) for name, part in self.PARTS.items()}
        pipeline.programs = dataclasses.replace(pipeline.programs, **timed)

    def _timed(self, program, part):
        import jax

        def call(*args, **kwargs):
            began = time.perf_counter()
            self.results[part] = jax.block_until_ready(program(*args, **kwargs))
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began
            return self.results[part]

        return call

    def measure(self, task: Callable) -> dict[str, float]:
        """The seconds of a call of `task`: by part, and "all"."""
        self.seconds = {}
        seconds = timeit.timeit(task, number=1)
        return self.seconds | {"all": seconds}

    def median(self, task: Callable, rounds: int) -> tuple[dict, float]:
        """(medians of `measure` over `rounds` calls, seconds of compiling: the excess of a first call's programs)."""
        first = self.measure(task)
        calls = [self.measure(task) for _ in range(rounds)]
        seconds = {part: statistics.median(call[part] for call in calls) for part in first}
        return seconds, sum(max(0.0, first[part] - seconds[part]) for part in first if part != "all")


def pipeline(settings: dict) -> dict:
    """Images and captions by our pipeline."""
    import jax

    from unialign_jax import Pipeline, bundle
    from unialign_jax.data.tokenizer import load_tokenizer
    from unialign_jax.inference.pipeline import default_dtype
    from unialign_jax.models.flops import peak_flops
    from unialign_jax.training.metrics import memory_use

    device = jax.devices()[0]
    dtype = settings["dtype"] or default_dtype(device)
    config = model_config(settings)
    tokenizer = bundle.read_tokenizer(settings["bundle"]) if settings["bundle"] else load_tokenizer()
    load = parameter_loader(settings, config, dtype)
    model = Pipeline(config, load, tokenizer, dtype=dtype, quantize=settings["quantize"])
    watch = Stopwatch(model)
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        limits = {"measured matmul": jax_matmul(dtype), "device's bf16 peak": peak_flops(device.device_kind)}
        figures = {
            "taken on": ", ".join([device.device_kind, dtype] + [settings["quantize"]] * bool(settings["quantize"])),
            "large square matmul, TFLOP/s": limits["measured matmul"] / 1e12,
        }
        for part, measure in (("images", measure_images), ("captions", measure_captions)):
            if part in settings["parts"]:
                figures |= measure(settings, model, watch, limits)
    memory = memory_use()
    figures["peak device memory, GB"] = memory.get("device_peak_gb", not_measured(f"{device.platform} does not tell"))
    figures["peak host memory, GB"] = memory["host_peak_gb"]
    return figures


def measure_images(settings: dict, model: Any, watch: Any, limits: dict) -> dict:
    from unialign_jax.models import flops

    config, steps = model.config, settings["steps"]
    size = settings["size"] or config.image_size
    halves = 1 if settings["guidance_scale"] == 1 else 2
    (_, *latent_size, _), _ = forward_shapes(settings, config)
    # The model's FLOPs: modulations count for every sample and evaluation, though they are made once for all samples.
    forward = flops.mmdit_forward(config.transformer, latent_size=latent_size, text_length=config.text_length)
    text = flops.text_encoder_forward(config.text_encoder, text_length=config.text_length)
    decode = flops.autoencoder_decode(config.autoencoder, image_size=size)
    guidance = f"guidance {settings['guidance_scale']:g}"
    figures = {"images": f"{size} px, {steps} Euler steps, {guidance}, {config.text_length} text tokens"}
    model.max_batch = max(settings["batch"])
    for batch in settings["batch"]:
        task = functools.partial(
            model.generate,
            [f"picture number {i}" for i in range(batch)],
            height=size,
            width=size,
            steps=steps,
            guidance_scale=settings["guidance_scale"],
        )
        name = f"image batch {batch}"
        seconds, compiling = watch.median(task, settings["rounds"])
        # T5 reads every prompt, and the empty one once for all.
        work = {"T5": (batch + 1) * text, "loop": batch * steps * halves * forward, "VAE decode": batch * decode}
        figures[f"{name}: s an image"] = seconds["all"] / batch
        figures |= shares(name, seconds, work, limits)
        if batch == settings["batch"][0]:
            figures |= compile_times(name, task, watch, compiling)
    return figures


def measure_captions(settings: dict, model: Any, watch: Any, limits: dict) -> dict:
    from PIL import Image

    from unialign_jax.models import flops

    config, size = model.config, model.config.image_size
    tokens = settings["caption_tokens"] or config.text_length
    (_, *latent_size, _), _ = forward_shapes(settings | {"size": size}, config)
    forward = flops.text_encoder_forward(config.text_encoder, text_length=tokens) + flops.mmdit_forward(
        config.transformer, latent_size=latent_size, text_length=tokens, velocity_head=False, text_head=True
    )
    encode = flops.autoencoder_encode(config.autoencoder, image_size=size)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    figures = {"captions": f"{size} px, {tokens} tokens, ancestral in {settings['caption_steps']} steps"}
    model.max_batch = max(settings["caption_batch"])
    for batch in settings["caption_batch"]:
        images = [Image.fromarray(np.roll(pixels, i, axis=1)) for i in range(batch)]
        task = functools.partial(
            model.caption, images, steps=settings["caption_steps"], text_length=tokens, decoding="ancestral"
        )
        name = f"caption batch {batch}"
        seconds, compiling = watch.median(task, settings["rounds"])
        evaluations = int(watch.results["loop"].evaluations)  # steps that change no token are left out
        work = {"VAE encode": batch * encode, "loop": batch * evaluations * forward}
        figures[f"{name}: s a caption"] = seconds["all"] / batch
        figures[f"{name}: evaluations of the network"] = evaluations
        figures |= shares(name, seconds, work, limits)
        if batch == settings["caption_batch"][0]:
            figures |= compile_times(name, task, watch, compiling)
    least, most = min(settings["caption_batch"]), max(settings["caption_batch"])
    speedup = figures[f"caption batch {least}: s a caption"] / figures[f"caption batch {most}: s a caption"]
    return figures | {f"captions / s, batch {most} against {least}": speedup}


def shares(name: str, seconds: dict, work: dict, limits: dict) -> dict:
    """Seconds by part, and the rates of the loop and of the whole, for the FLOPs `work` by part."""
    figures = {f"{name}: {part}, s": seconds[part] for part in work}
    figures[f"{name}: all, s"] = seconds["all"]
    for part, flops in (("loop", work["loop"]), ("all", sum(work.values()))):
        rate = flops / seconds[part]
        figures[f"{name}: {part}, TFLOP/s"] = rate / 1e12
        for limit, peak in limits.items():
            share = rate / peak if peak else not_measured("none is known for this device")
            figures[f"{name}: {part}, share of the {limit}"] = share
    return figures


def compile_times(name: str, task: Callable, watch: Any, cold: dict) -> dict:
    """The seconds of compiling the programs of `task`, without and with the persistent cache."""
    import jax

    jax.clear_caches()
    _, cached = watch.median(task, 1)
    return {f"{name}: compiling, s": cold, f"{name}: compiling, from the persistent cache, s": cached}


def jax_matmul(dtype: Any) -> float:
    """FLOP/s of a large square matmul in JAX."""
    import jax
    import jax.numpy as jnp

    side, calls = MATMUL.get(jax.devices()[0].platform, LARGE_MATMUL)
    x = jax.device_put(random_array((side, side), jnp.dtype(dtype)))
    multiply = jax.jit(jnp.matmul)
    return matmul_rate(side, calls, lambda: jax.block_until_ready([multiply(x, x) for _ in range(calls)]))


def matmul_rate(side: int, calls: int, run: Callable) -> float:
    """The best FLOP/s of `run()`, which multiplies two square matrices `calls` times and waits for the last."""
    return 2 * side**3 * calls / min(timeit.repeat(run, number=1, repeat=5))


def forward(settings: dict) -> dict:
    """One forward of the MM-DiT, of one image with its text, from noise to velocity."""
    import jax

    from unialign_jax.inference.pipeline import default_dtype
    from unialign_jax.models.attention import resolve_implementation
    from unialign_jax.models.mmdit import MMDiT

    device = jax.devices()[0]
    dtype = settings["dtype"] or default_dtype(device)
    config = model_config(settings)
    attention = "xla" if config.transformer.head_width % 64 else resolve_implementation("auto", device, dtype)
    network = MMDiT(dataclasses.replace(config.transformer, dtype=dtype, attention=attention, remat="none"))
    params = parameter_loader(settings | {"quantize": None}, config, dtype)("transformer")
    latents, text = (jax.device_put(random_array(shape, "float32")) for shape in forward_shapes(settings, config))
    sigma = jax.device_put(np.full(1, 0.5, np.float32))
    velocity = jax.jit(lambda *inputs: network.apply({"params": inputs[0]}, *inputs[1:]).velocity)
    return measure_forward(settings, config, lambda: jax.block_until_ready(velocity(params, latents, text, sigma))) | {
        "matmul": jax_matmul(dtype),
        "taken on": f"jax {jax.__version__}, {device.device_kind}, {dtype}, attention {attention}",
    }


def forward_shapes(settings: dict, config: Any):
    """Shapes of the latents [1, h, w, C] and of the text [1, L, D] of one sample."""
    side = (settings["size"] or config.image_size) // config.autoencoder.downsample_factor
    text = (1, config.text_length, config.transformer.text_width)
    return (1, side, side, config.transformer.latent_channels), text


def measure_forward(settings: dict, config: Any, run: Callable) -> dict:
    from unialign_jax.models import flops
    from unialign_jax.training.metrics import memory_use

    seconds = timeit.repeat(run, number=1, repeat=1 + settings["rounds"])
    latents, text = forward_shapes(settings, config)
    return {
        "seconds": seconds[1:],
        "first call": seconds[0],
        "flops": flops.mmdit_forward(config.transformer, latent_size=latents[1:3], text_length=text[1]),
        "host GB": memory_use()["host_peak_gb"],
        "load": os.getloadavg()[0],
    }


def answer(functions: dict[str, Callable]):
    """The other end of `worker`: calls one of the functions with the settings and writes its result."""
    name, settings, output = sys.argv[1:]
    try:
        result = {function.__name__: function for function in functions}[name](json.loads(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    answer((pipeline, forward))
