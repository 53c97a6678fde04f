"""What a task needs in memory on a chip that is not here: the pipeline's own programs, compiled ahead of time.

The TPU compiler (the package libtpu) runs on any machine, and says how large arguments, outputs, temporaries and code
are. Parameters are shapes only, so that a laptop plans the 7 B of a full model in a few minutes.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from unialign_jax.bundle import BundleConfig
from unialign_jax.data.kinds import task_name
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.inference import weights
from unialign_jax.inference.options import check_whole
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.inference.quantization import abstract_quantized, tree_bytes
from unialign_jax.models import presets
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.parallel import hardware
from unialign_jax.sampling.programs import make_guidance
from unialign_jax.sampling.solvers import solver_table

TASKS = ("text_to_image", "edit", "caption")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a task: `function(params, *inputs, **static)`, all arguments ShapeDtypeStructs."""

    name: str
    components: tuple[str, ...]  # whose parameters it reads
    function: Callable  # jitted
    params: dict
    inputs: tuple
    static: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A program's memory on the device in bytes, without its parameters."""

    name: str
    components: tuple[str, ...]
    inputs: int
    outputs: int
    temporaries: int
    code: int


def topology_devices(name, num_slices=1) -> list:
    """The devices of a TPU topology such as "v5e:1x1" or "v4-128" (see `hardware.topology_name`), to compile for.

    Args: `num_slices`: how many such slices.
    Raises ValueError when libtpu is missing or has no such topology.
    """
    name = hardware.topology_name(name)
    kind, grid = name.split(":")
    options = {}
    if math.prod(map(int, grid.split("x"))) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if num_slices > 1:
        options["num_slices"] = num_slices
    sides = list(map(int, grid.split("x")))
    if any(rings := hardware.rings(kind, sides)):
        options["wrap"] = rings
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # or else each chip counts as two devices
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as error:
        if "not installed" in str(error):
            raise ValueError(
                "the TPU compiler is not installed: pip install 'libtpu==0.0.42.*' (that is jax 0.10.2's; "
                "for another jax the version that pip install --dry-run 'jax[tpu]' names)"
            ) from None
        raise ValueError(f"topology {name}: {str(error).splitlines()[0][:200]}") from None


def usable_bytes(device) -> int | None:
    """The memory that the compiler may use on a device, as it says itself when asked for too much; None unasked."""
    place = jax.sharding.SingleDeviceSharding(device)
    try:
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=place)).compile()
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", str(error)):
            return round(float(match[1] or match[2]) * GIB)
    return None


def published_config() -> BundleConfig:
    """The released model's sizes."""
    return BundleConfig(
        transformer=presets.MMDIT["unialign_2b"],
        text_encoder=presets.TEXT_ENCODER["t5_xxl"],
        autoencoder=presets.AUTOENCODER["sd3"],
    )


def check_sampling(config: BundleConfig, size: int, batch: int) -> None:
    """Raises ValueError for a size in pixels or a batch that the pipeline of such a model does not take."""
    ImageSizes.of(config.transformer, config.autoencoder).check("size", size)
    check_whole("batch", batch, 1, 2**16)


def sampling_programs(task, device, *, config=None, size=512, batch=1, steps=None, dtype="bfloat16", quantize=None):
    """The programs of a task in the order in which `Pipeline` runs them, and every component that they read.

    Args:
      task: "text_to_image" or "edit" (guided; one condition image), or "caption" (of `config.text_length` tokens).
      device: where the arguments live; of `topology_devices`, or a real one.
      config: a BundleConfig; the published sizes when None.
      size: height and width of the images in pixels.
      batch: images at a time.
      steps: of the sampler; the pipeline's default when None.
      quantize: a mode of `quantization`, or None.

    Returns (list of Program, {component: abstract parameters}).
    Raises ValueError for a task that there is not, and a size or batch that the pipeline does not take.
    """
    task = task_name(task)
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    config = config or published_config()
    check_sampling(config, size, batch)
    place = jax.sharding.SingleDeviceSharding(device)

    def on_device(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=place), tree)

    def array(shape, kind):
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    params = {name: weights.abstract_component(config, name, dtype) for name in ("transformer", "text_encoder")}
    if quantize:
        params = {name: abstract_quantized(tree, quantize) for name, tree in params.items()}
    params["autoencoder"] = weights.abstract_component(config, "autoencoder", dtype)
    params = on_device(params)
    tokenizer = types.SimpleNamespace(mask_id=config.transformer.vocab_size - 1, eos_id=1)  # any ids: of no size
    pipeline = Pipeline(config, params.__getitem__, tokenizer, dtype=dtype, quantize=quantize, device=device)

    compiled = pipeline.programs
    factor, channels = config.autoencoder.downsample_factor, config.autoencoder.latent_channels
    latent_shape = (size // factor, size // factor, channels)
    images, latents = array((batch, size, size, 3), np.uint8), array((batch, *latent_shape), np.float32)
    seeds = array((batch,), np.uint32)
    encode = Program("encode images", ("autoencoder",), compiled.encode_images, params["autoencoder"], (images,))
    if task == "caption":
        both = {name: params[name] for name in ("transformer", "text_encoder")}
        ids, targets = (array((batch, config.text_length), kind) for kind in (np.int32, np.bool_))
        numbers = [array((), np.float32)] * 3  # temperature, threshold, entropy bound
        inputs = (latents, ids, targets, seeds, array((), np.int32), *numbers)
        describe = Program("write text", tuple(both), compiled.describe, both, inputs, {"decoding": "ancestral"})
        return [encode, describe], params

    table = solver_table("euler", sampling_sigmas(steps or {"text_to_image": 28, "edit": 50}[task], shift=3.0))
    guidance = make_guidance(batch, table, scale=7.0)
    text = array((batch, config.text_length, config.text_encoder.width), jnp.dtype(dtype))
    conditions = array((batch, 1, *latent_shape), np.float32) if task == "edit" else None
    inputs = (seeds, on_device(table), text, text, on_device(guidance), conditions)
    # The prompts of the batch and the negative one, filled up to a power of two.
    prompts = array((min(pipeline.max_batch, 1 << batch.bit_length()), config.text_length), np.int32)
    static = {"latent_shape": latent_shape}
    programs = [
        Program("encode prompts", ("text_encoder",), compiled.encode_prompts, params["text_encoder"], (prompts,)),
        Program("sample", ("transformer",), compiled.sample_images, params["transformer"], inputs, static),
        Program("decode images", ("autoencoder",), compiled.decode_images, params["autoencoder"], (latents,)),
    ]
    return ([programs[0], encode, *programs[1:]] if task == "edit" else programs), params


def measure(program: Program) -> Memory:
    """Compiles a program and asks the compiler. Raises ValueError when it does not fit the device at all."""
    lowered = program.function.lower(program.params, *program.inputs, **program.static)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{program.name}: {' '.join(str(error).split())[:300]}") from None
    found = compiled.memory_analysis()
    return Memory(
        name=program.name,
        components=program.components,
        inputs=tree_bytes(program.inputs),
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def resident_bytes(params) -> int:
    """What parameters take on their device, in the layout that the compiler gives them (which may pad them)."""
    program = jax.jit(lambda params: jnp.zeros(()), keep_unused=True)
    return program.lower(params).compile().memory_analysis().argument_size_in_bytes


def peaks(measured: list[Memory], resident: dict[str, int], *, low_memory: bool) -> list[int]:
    """The most that is on the device while each program of a task runs, in bytes.

    That is its parameters (with `low_memory`; or else those of every component of the task), its inputs, outputs and
    temporaries, what earlier programs gave, and the code of all.
    """
    code = sum(program.code for program in measured)
    result, held = [], 0
    for program in measured:
        names = program.components if low_memory else {name for other in measured for name in other.components}
        parameters = sum(resident[name] for name in names)
        result.append(parameters + held + program.inputs + program.outputs + program.temporaries + code)
        held += program.outputs
    return result


def table(measured: list[Memory], resident: dict[str, int]) -> list[dict]:
    """One row for each program, in GiB, and a last one for the whole task."""
    whole, lean = (peaks(measured, resident, low_memory=low) for low in (False, True))
    rows = [
        {
            "program": program.name,
            "parameters": sum(resident[name] for name in program.components) / GIB,
            "inputs": program.inputs / GIB,
            "outputs": program.outputs / GIB,
            "temporaries": program.temporaries / GIB,
            "code": program.code / GIB,
            "peak": peak / GIB,
            "peak_low_memory": lean_peak / GIB,
        }
        for program, peak, lean_peak in zip(measured, whole, lean, strict=True)
    ]
    used = {name for program in measured for name in program.components}
    total = {
        "program": "whole task",
        "parameters": sum(resident[name] for name in used) / GIB,
        "inputs": max(row["inputs"] for row in rows),
        "outputs": max(row["outputs"] for row in rows),
        "temporaries": max(row["temporaries"] for row in rows),
        "code": sum(row["code"] for row in rows),
        "peak": max(whole) / GIB,
        "peak_low_memory": max(lean) / GIB,
    }
    return [*rows, total]


def format_table(rows: list[dict]) -> str:
    """Rows of one set of keys as aligned text; numbers with two decimals."""
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(lines)
