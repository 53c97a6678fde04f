"""The `step` part of launch/benchmark.py: the training step alone, on the devices at hand, and what its parts take.

    python launch/benchmark.py step --micro-batches=1,2,4,8 --remat=none,dots,block --output=step.json
    python launch/benchmark.py step --micro-batches=4 --accumulation=4 --profile=/tmp/trace
    python launch/benchmark.py step --config=configs/stage1.py:tiny --micro-batches=4

Every micro-batch (samples per device) runs with every remat policy, each pair in a process of its own, and has a row:
compile time, step time, TFLOP/s and MFU per device (FLOPs by models/flops.py), images per second, peak memory, whether
the step or the initialisation before it had that peak, the memory that the compiler planned, and the mesh. A setting
that does not fit has a row that says so. Of the fastest setting the parts are then compiled and measured apart: T5,
VAE, the MM-DiT with its losses forward, and forward and backward, the optimizer with the average, and attention alone;
and a chain of matmuls of the blocks' shapes, an upper bound for the step. Weights are random and made on the devices;
no data is read.
"""

import argparse
import functools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unialign_jax.benchmarks.sample import (
    MOST_ROUNDS,
    answer,
    batch_sizes,
    call_alone,
    check_counts,
    jax_matmul,
    not_measured,
)

PROFILED_STEPS = 3
FAILED = "failed"  # how the outcome of a setting begins that broke for another reason than memory


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--config", default="configs/stage1.py", help="stage file, default %(default)s")
    parser.add_argument("--devices", type=int, help="how many of those here to use, default all")
    parser.add_argument("--stream", help="whose step, default the first of the configuration")
    parser.add_argument("--micro-batches", default="1,2,4,8", help="samples of one device to try, default %(default)s")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step, default %(default)s")
    parser.add_argument("--remat", help="policies to try, such as none,dots,block; default the configuration's")
    parser.add_argument("--attention", help="auto, xla, cudnn or splash, default the configuration's")
    parser.add_argument("--steps", type=int, default=5, help="steps of one measurement, default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; medians count, default %(default)s")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first, default %(default)s")
    parser.add_argument("--no-parts", action="store_true", help="do not measure the parts of the best setting")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="keep a trace of three steps of each setting there")


def benchmark_step(arguments: argparse.Namespace) -> dict:
    """{figure: value}, of which some are tables. Raises ValueError for bad options, and when nothing was measured."""
    from unialign_jax.files import make_folder
    from unialign_jax.training.config import active_streams, config_problems, read_config

    config = read_config(arguments.config, arguments.changes)
    streams = list(active_streams(config))
    stream = arguments.stream or streams[0]
    if stream not in streams:
        raise ValueError(f"--stream is {stream!r}, expected one of {', '.join(streams)}")
    check_counts(arguments, **dict.fromkeys(("devices", "accumulation", "steps", "rounds", "warmup"), MOST_ROUNDS))
    sizes = sorted(batch_sizes("--micro-batches", arguments.micro_batches))
    policies = (arguments.remat or config.model.remat).split(",")
    attention = arguments.attention or config.model.attention
    for policy in policies:
        config.model.update({"remat": policy, "attention": attention})
        if problems := config_problems(config):
            raise ValueError("the configuration cannot run: " + "; ".join(problems))
    if arguments.profile:
        make_folder(arguments.profile, "--profile")

    rows, tried = [], []
    for remat in policies:
        too_large = None
        for size in sizes:
            trace = arguments.profile and str(arguments.profile / f"micro-batch-{size}-remat-{remat}")
            settings = {
                "config": arguments.config,
                "changes": [*arguments.changes, f"model.remat={remat}", f"model.attention={attention}"],
                "stream": stream,
                "devices": arguments.devices,
                "micro_batch": size,
                "accumulation": arguments.accumulation,
                "steps": arguments.steps,
                "rounds": arguments.rounds,
                "warmup": arguments.warmup,
                "profile": trace,
            }
            if too_large:
                row = unmeasured(f"not tried: {too_large} was out of memory")
            else:
                row = measure_alone(settings)
                too_large = size if row["outcome"].startswith("out of memory") else None
            rows.append({"micro-batch": size, "remat": remat} | row)
            tried.append(settings)
    measured = [i for i, row in enumerate(rows) if row["images/s"]]
    if not measured:
        raise ValueError("no setting could be measured: " + "; ".join(sorted({row["outcome"] for row in rows})))
    best = max(measured, key=lambda i: rows[i]["images/s"])
    devices = [row.pop("devices") for row in rows][best]
    figures = {
        "config": " ".join([arguments.config, *arguments.changes]),
        "step": f"of {stream}, {config.image_size} px, {config.text_length} tokens, attention {attention}, "
        f"accumulation {arguments.accumulation}",
        "devices": devices,
        "mesh": rows[best]["mesh"],
        "settings": rows,
    }
    if not arguments.no_parts:
        print("measuring the parts of the best ...", file=sys.stderr, flush=True)
        try:
            settings = tried[best] | {"step_seconds": rows[best]["step, ms"] / 1e3}
            figures |= call_alone("step", "parts", settings)
        except ValueError as error:  # the settings' rows are worth having
            figures["parts"] = not_measured(error)
    return figures


def measure_alone(settings: dict) -> dict:
    """The row of a setting, measured in a process of its own."""
    print(f"measuring {settings['micro_batch']} a device, {settings['changes'][-2]} ...", file=sys.stderr, flush=True)
    try:
        return call_alone("step", "whole", settings)
    except ValueError as error:  # the other settings are worth having
        return unmeasured(f"{FAILED}: {error}")


def unmeasured(outcome: str) -> dict:
    """The row of a setting without figures."""
    times = ("compile, s", "step, ms", "least, ms", "TFLOP/s", "MFU %", "images/s")
    return dict.fromkeys((*times, "peak GB", "peak of", "planned GB", "loss", "mesh", "devices")) | {"outcome": outcome}


def peak_of(before: float | None, after: float | None) -> str | None:
    """Whether some steps raised the peak of memory since the process began, from the peaks before and after them."""
    if after is None:
        return None
    return "the step" if after > before else "making the weights: the step took less"


# In a process of its own


class Setup:
    """A stream's training step on some devices, with arguments made at random."""

    def __init__(self, config, name: str, devices):
        from unialign_jax.training.program import StepProgram

        self.program = StepProgram(config, devices)
        self.config, self.networks, self.mesh = config, self.program.networks, self.program.mesh
        self.name, self.stream, self.batch = name, self.program.settings[name], self.program.batch_shapes(name)
        self.state, self.frozen = self.program.abstract_state, self.program.abstract_frozen

    def compile_step(self):
        return self.program.compile_step(self.name)

    def compile_makers(self):
        """Programs that make the state, the frozen networks and a batch, at random, where they belong."""
        import jax

        from unialign_jax.parallel import sharding
        from unialign_jax.training.state import init_frozen, init_state

        def shardings(tree):
            return jax.tree.map(lambda leaf: leaf.sharding, tree)

        key = jax.random.key(self.config.seed)
        make_state = functools.partial(init_state, self.networks, self.program.tx, self.config.ema_decay, key)
        makers = (
            (make_state, shardings(self.state)),
            (functools.partial(init_frozen, self.networks), shardings(self.frozen)),
            (functools.partial(random_batch, self.batch), sharding.batch_sharding(self.mesh)),
        )
        with jax.set_mesh(self.mesh):
            return [jax.jit(make, out_shardings=place).lower().compile() for make, place in makers]

    def make(self):
        return tuple(maker() for maker in self.compile_makers())


def random_batch(shapes: dict) -> dict:
    """A batch of random pixels, ids and features of these shapes; every token may be masked."""
    import jax
    import jax.numpy as jnp

    def draw(key, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.random.randint(key, leaf.shape, 0, 256, leaf.dtype)

    keys = jax.random.split(jax.random.key(1), len(shapes))
    flags = {"text_is_target": True, "replaced": False}
    return {
        name: jnp.full(leaf.shape, flags[name]) if name in flags else draw(key, leaf)
        for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
    }


def open_setup(settings: dict) -> Setup:
    import jax

    from unialign_jax.parallel import processes
    from unialign_jax.training.config import batch_shards, read_config

    processes.prepare_memory(os.environ)  # as in training
    config = read_config(settings["config"], settings["changes"])
    devices = jax.devices()[: settings["devices"]]
    config.accumulation = settings["accumulation"]
    config.batch_size = settings["micro_batch"] * settings["accumulation"] * batch_shards(config.mesh, len(devices))
    return Setup(config, settings["stream"], devices)


def whole(settings: dict) -> dict:
    """The row of a setting, without its name."""
    import jax

    try:
        return measure_step(open_setup(settings), settings)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            raise
        return unmeasured("out of memory: " + " ".join(str(error).split())[:200])


def measure_step(setup: Setup, settings: dict) -> dict:
    import jax

    from unialign_jax.models.flops import peak_flops
    from unialign_jax.parallel.mesh import format_mesh
    from unialign_jax.training.metrics import memory_use, to_means

    began = time.perf_counter()
    program = setup.compile_step()
    compile_seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    state, frozen, batch = jax.block_until_ready(setup.make())
    before = memory_use().get("device_peak_gb")

    def step():
        nonlocal state
        state, metrics = program(state, frozen, batch)
        return metrics

    loss = to_means(jax.device_get(step()))["loss"]
    seconds = seconds_a_call(step, settings["rounds"], settings["steps"], settings["warmup"])
    if settings["profile"]:
        with jax.profiler.trace(settings["profile"]):
            jax.block_until_ready([step() for _ in range(PROFILED_STEPS)])
    median, highest = statistics.median(seconds), memory_use().get("device_peak_gb")
    rate = step_flops(setup) / median
    peak = peak_flops(setup.mesh.devices.flat[0].device_kind)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return {
        "compile, s": compile_seconds,
        "step, ms": 1e3 * median,
        "least, ms": 1e3 * min(seconds),
        "TFLOP/s": rate / 1e12,
        "MFU %": 100 * rate / peak if peak else None,
        "images/s": setup.config.batch_size / median,
        "peak GB": highest,
        "peak of": peak_of(before, highest),
        "planned GB": planned / 1e9,
        "loss": loss,
        "mesh": format_mesh(dict(setup.mesh.shape)),
        "devices": setup.mesh.size,
        "outcome": "measured",
    }


def seconds_a_call(call: Callable, rounds: int, calls: int, warmup: int = 1) -> list[float]:
    """Seconds per call in each round of `calls` calls; each round ends when the device is done."""
    import jax

    def run(count):
        began = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / count

    run(warmup)
    return [run(calls) for _ in range(rounds)]


def step_flops(setup: Setup) -> float:
    """The model's FLOPs of a step on one device."""
    from unialign_jax.planning.roofline import step_work

    return step_work(setup.config, setup.networks, setup.stream, setup.mesh.size)["model"]


def part_flops(setup: Setup) -> dict[str, float]:
    """The model's FLOPs of each part in a step on one device."""
    from unialign_jax.models import flops

    config, networks, passes = setup.config, setup.networks, pass_tokens(setup)
    model, samples = networks.transformer.config, config.batch_size / setup.mesh.size
    text = flops.text_encoder_forward(networks.text_encoder.config, text_length=config.text_length)
    image = flops.autoencoder_encode(networks.autoencoder.config, image_size=config.image_size)
    image *= not config.data.cached_latents
    encoders = samples * len(passes) * text, samples * (1 + setup.stream.num_conditions) * image
    forward = (step_flops(setup) - sum(encoders)) / 3  # the backward pass counts twice
    attention = samples * sum(model.depth * flops.attention(tokens, model.width) for tokens in passes)
    return {
        "T5 encode": encoders[0],
        "VAE encode": encoders[1],
        "MM-DiT and losses: forward": forward,
        "MM-DiT and losses: forward and backward": 3 * forward,
        "optimizer and average": 0.0,
        "attention: forward": attention,
        "attention: forward and backward": 3 * attention,
    }


def pass_tokens(setup: Setup) -> list[int]:
    """The tokens of each pass over a sample: the image pass, if there is one, and the text pass."""
    from unialign_jax.training.step import has_image_pass

    config = setup.config
    patch = config.autoencoder.downsample_factor * config.model.patch_size
    image = (config.image_size // patch) ** 2
    images = [1 + setup.stream.num_conditions] * has_image_pass(setup.stream.kind) + [1]
    return [count * image + config.text_length for count in images]


class Given:
    """Stands in for a frozen network: its parameters are its output."""

    def __init__(self, config):
        self.config = config

    def apply(self, variables: dict, *_, **__):
        return variables["params"]


# These parts add up to the step; the others lie inside them.
WHOLE = ("T5 encode", "VAE encode", "MM-DiT and losses: forward and backward", "optimizer and average")


def parts(settings: dict) -> dict:
    """Time, FLOPs and share of each part of the step, and the rate of matmuls alone."""
    import jax

    from unialign_jax.models.flops import peak_flops

    setup = open_setup(settings)
    step_seconds = settings["step_seconds"]
    peak = peak_flops(setup.mesh.devices.flat[0].device_kind)
    with jax.set_mesh(setup.mesh):
        seconds = part_seconds(setup, lambda call: statistics.median(seconds_a_call(call, settings["rounds"], 5)))
    work = part_flops(setup)

    def row(name, took, done):
        rate = done / took if done else None
        return {
            "part": name,
            "ms a step": 1e3 * took,
            "share %": 100 * took / step_seconds,
            "TFLOP": done / 1e12,
            "TFLOP/s": rate and rate / 1e12,
            "MFU %": 100 * rate / peak if rate and peak else None,
        }

    rows = [row(name, seconds[name], work[name]) for name in work]
    rest = step_seconds - sum(seconds[name] for name in WHOLE)
    rows += [row("what the step takes beyond its parts", rest, 0.0), row("step", step_seconds, step_flops(setup))]
    chain, dtype = block_matmuls(setup, settings["micro_batch"], settings["rounds"]), setup.config.model.dtype
    square = jax_matmul(dtype)
    return {
        "parts": rows,
        f"matmuls of the blocks' shapes, {dtype}, TFLOP/s": chain / 1e12,
        f"large square matmul, {dtype}, TFLOP/s": square / 1e12,
        "step / matmuls of the blocks' shapes": step_flops(setup) / step_seconds / chain,
        "step / large square matmul": step_flops(setup) / step_seconds / square,
    }


def part_seconds(setup: Setup, measure: Callable) -> dict[str, float]:
    """Seconds in a step of every part of `part_flops`, by `measure(call)`. Call it under `jax.set_mesh`."""
    import jax

    from unialign_jax.parallel import sharding
    from unialign_jax.training.step import compute_losses, encode_images, encode_texts, has_image_pass, update_state

    config, networks, kind = setup.config, setup.networks, setup.stream.kind
    count = config.accumulation
    state, frozen, batch = setup.make()
    batch = jax.tree.map(lambda x: x[::count], batch)
    batch = jax.device_put(batch, sharding.batch_sharding(setup.mesh))
    key = jax.random.key(0)
    ids = [batch["prompt_ids"]] * has_image_pass(kind) + [batch["text_ids"]]

    encode_text = jax.jit(lambda frozen, ids: encode_texts(networks, frozen, *ids))
    encode_image = jax.jit(lambda frozen, batch: encode_images(networks, frozen, batch, key))
    seconds = {name: count * measure(call) for name, call in attention_calls(setup).items()}
    seconds["T5 encode"] = count * measure(lambda: encode_text(frozen, ids))
    seconds["VAE encode"] = count * measure(lambda: encode_image(frozen, batch))

    # The step's own passes and losses, with the outputs of the encoders in place of the encoders.
    given = networks._replace(
        text_encoder=Given(networks.text_encoder.config), autoencoder=Given(networks.autoencoder.config)
    )
    outputs = jax.jit(functools.partial(encoder_outputs, networks))(frozen, batch, ids)

    def losses(params, outputs, batch):
        return compute_losses(config, given, kind, *setup.program.token_ids, params, outputs, batch, key)

    place = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    forward = jax.jit(losses)
    backward = jax.jit(jax.grad(losses, has_aux=True), out_shardings=(place.params, sharding.replicated(setup.mesh)))
    seconds["MM-DiT and losses: forward"] = count * measure(lambda: forward(state.params, outputs, batch))
    seconds["MM-DiT and losses: forward and backward"] = count * measure(
        lambda: backward(state.params, outputs, batch)[1]
    )
    gradients, _ = backward(state.params, outputs, batch)
    update = jax.jit(
        functools.partial(update_state, config, setup.program.tx), donate_argnums=0, out_shardings=(place, None)
    )

    def optimizer():
        nonlocal state
        state, norms = update(state, gradients)
        return norms

    seconds["optimizer and average"] = measure(optimizer)
    return seconds


def encoder_outputs(networks: Any, frozen: dict, batch: dict, ids: list) -> dict:
    """The outputs of the frozen networks in a step, in its order: moments of all images, embeddings of all texts."""
    import jax.numpy as jnp

    from unialign_jax.models.autoencoder import from_pixels

    images = batch["image"][:, None]
    if "conditions" in batch:
        images = jnp.concatenate([images, batch["conditions"]], axis=1)
    pixels = from_pixels(images.reshape(-1, *images.shape[2:]))
    texts = jnp.stack(ids, axis=1).reshape(-1, ids[0].shape[1])
    return {
        "autoencoder": networks.autoencoder.apply({"params": frozen["autoencoder"]}, pixels, method="encode"),
        "text_encoder": networks.text_encoder.apply({"params": frozen["text_encoder"]}, texts),
    }


def attention_calls(setup: Setup) -> dict[str, Callable]:
    """The attention of all blocks in a micro-batch, as one program: forward, and forward and backward."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from unialign_jax.models.attention import attention
    from unialign_jax.parallel.activations import BATCH_AXES, HEAD_AXES, axes_that_divide

    model = setup.networks.transformer.config
    rows = setup.config.batch_size // setup.config.accumulation
    shapes = [(rows, tokens, model.num_heads, model.head_width) for tokens in pass_tokens(setup)]
    if len(set(shapes)) == 1:
        shapes = [(rows * len(shapes), *shapes[0][1:])]
    place = NamedSharding(setup.mesh, jax.P(BATCH_AXES, None, axes_that_divide(HEAD_AXES, setup.mesh, model.num_heads)))

    @functools.partial(jax.jit, out_shardings=place)
    def make():
        keys = jax.random.split(jax.random.key(2), 3)
        return [[jax.random.normal(k, shape, jnp.dtype(model.dtype)) for k in keys] for shape in shapes]

    attend = functools.partial(attention, implementation=model.attention)

    @jax.jit
    def forward(passes):
        def block(passes, _):
            return [[attend(*qkv), *qkv[1:]] for qkv in passes], None

        return jax.lax.scan(block, passes, length=model.depth)[0]

    @jax.jit
    def backward(passes):
        def both_ways(qkv):
            attended, pull = jax.vjp(attend, *qkv)
            return [x + gradient for x, gradient in zip(qkv, pull(attended), strict=True)]

        return jax.lax.scan(lambda passes, _: ([both_ways(qkv) for qkv in passes], None), passes, length=model.depth)[0]

    passes = make()
    return {
        "attention: forward": lambda: forward(passes),
        "attention: forward and backward": lambda: backward(passes),
    }


def block_matmuls(setup: Setup, samples: int, rounds: int) -> float:
    """FLOP/s of one device in a chain of matmuls of the blocks' shapes, with nothing between them."""
    import jax
    import jax.numpy as jnp

    model, config = setup.networks.transformer.config, setup.config
    dtype, width, hidden = jnp.dtype(model.dtype), model.width, model.mlp_ratio * model.width
    text = samples * config.text_length * len(pass_tokens(setup))
    image = samples * sum(tokens - config.text_length for tokens in pass_tokens(setup))
    # Queries, keys and values; the same backwards, to return to the width; output; MLP.
    sides = [(width, 3 * width), (3 * width, width), (width, width), (width, hidden), (hidden, width)]

    def normal(key, *shape):
        return (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)

    @jax.jit
    def make():
        key = jax.random.key(3)
        weights = [[normal(key, model.depth, *side) for side in sides] for _ in range(2)]
        return [normal(key, image, width), normal(key, text, width)], weights

    @jax.jit
    def chain(streams, weights):
        def block(streams, weights):
            return [functools.reduce(jnp.matmul, own, x) for x, own in zip(streams, weights, strict=True)], None

        return jax.lax.scan(block, streams, weights)[0]

    with jax.default_device(jax.local_devices()[0]):
        streams, weights = make()
        seconds = min(seconds_a_call(lambda: chain(streams, weights), rounds, 3))
    work = 2 * (image + text) * model.depth * sum(a * b for a, b in sides)
    return work / seconds


if __name__ == "__main__":
    answer((whole, parts))
