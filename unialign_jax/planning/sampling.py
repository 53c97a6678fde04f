"""A sampling task on a chip that is not here: the memory of the pipeline's own programs, compiled ahead of time, and
their time by arithmetic.

Parameters are shapes only, so a laptop plans the full model (7 B parameters) in a few minutes.
"""

import dataclasses
import math
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.bundle import BundleConfig
from unialign_jax.data.kinds import TASKS, task_name
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.inference import weights
from unialign_jax.inference.options import OPTIONS, TEXT_TASKS, check_whole
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.models import flops, presets
from unialign_jax.models.quantization import abstract_quantized, tree_bytes
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.parallel import hardware
from unialign_jax.planning import gpus, topology
from unialign_jax.planning.roofline import compute_seconds
from unialign_jax.planning.topology import GIB
from unialign_jax.sampling.programs import make_guidance
from unialign_jax.sampling.solvers import solver_table

# Images that a sample is made of, and steps: the pipeline's defaults. Perception is as an edit, an answer as a caption.
CONDITIONS = {"text_to_image": 0, "edit": 1, "perception": 1, "personalization": OPTIONS["slots"].default}
STEPS = {task: 50 if conditions else 28 for task, conditions in CONDITIONS.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a task: `function(params, *inputs, **static)`, all arguments ShapeDtypeStructs."""

    name: str
    components: tuple[str, ...]  # that it reads the parameters of
    function: Callable  # jitted
    params: dict
    inputs: tuple
    static: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program computes, in FLOPs; `weights` is how often it reads its parameters."""

    matmul: float  # in the weights that `quantize` makes 8 bits
    other: float  # other matmuls, and convolutions
    attention: float
    weights: int


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """A compiled program's memory on the device in bytes, without its parameters."""

    name: str
    components: tuple[str, ...]
    inputs: int
    outputs: int
    temporaries: int
    code: int


def published_config() -> BundleConfig:
    """The released model's sizes."""
    return BundleConfig(
        transformer=presets.MMDIT["unialign_2b"],
        text_encoder=presets.TEXT_ENCODER["t5_xxl"],
        autoencoder=presets.AUTOENCODER["sd3"],
    )


def check_sampling(config: BundleConfig, size: int, batch: int) -> None:
    """Raises ValueError for a size in pixels or a batch that the pipeline of such a model refuses."""
    ImageSizes.of(config.transformer, config.autoencoder).check("size", size)
    check_whole("batch", batch, 1, 2**16)


def sampling_programs(
    task: str,
    device: jax.Device,
    *,
    config: BundleConfig | None = None,
    size: int = 512,
    batch: int = 1,
    steps: int | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> tuple[list[Program], dict[str, dict]]:
    """The programs of a task in the order in which `Pipeline` runs them, and {component: abstract parameters}.

    Args:
      task: one of `data.kinds.TASKS`. Images are guided, texts are of `config.text_length` tokens.
      device: holds the arguments; one of `topology_devices`, or a real one.
      config: the published sizes when None.
      size: height and width of the images in pixels.
      steps: of the sampler; the pipeline's default when None.

    Raises ValueError for an unknown task, and for a size or batch that the pipeline refuses.
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
    latents, seeds = array((batch, *latent_shape), np.float32), array((batch,), np.uint32)
    count = CONDITIONS.get(task, 1)
    # In batches that are filled up, as those of prompts.
    encoded = min(pipeline.max_batch, 1 << (batch * count - 1).bit_length()) if count else 0
    images = array((encoded, size, size, 3), np.uint8)
    encode = Program("encode images", ("autoencoder",), compiled.encode_images, params["autoencoder"], (images,))
    if task in TEXT_TASKS:
        both = {name: params[name] for name in ("transformer", "text_encoder")}
        ids, targets = (array((batch, config.text_length), kind) for kind in (np.int32, np.bool_))
        numbers = [array((), np.float32)] * 3  # temperature, threshold, entropy bound
        inputs = (latents, ids, targets, seeds, array((), np.int32), *numbers)
        describe = Program("write text", tuple(both), compiled.describe, both, inputs, {"decoding": "ancestral"})
        return [encode, describe], params

    table = solver_table("euler", sampling_sigmas(steps or STEPS[task], shift=3.0))
    guidance = make_guidance(batch, table, scale=7.0)
    text = array((batch, config.text_length, config.text_encoder.width), jnp.dtype(dtype))
    conditions = array((batch, count, *latent_shape), np.float32) if count else None
    inputs = (seeds, on_device(table), text, text, on_device(guidance), conditions)
    # The prompts of the batch and the negative one, filled up to a power of two.
    prompts = array((min(pipeline.max_batch, 1 << batch.bit_length()), config.text_length), np.int32)
    static = {"latent_shape": latent_shape}
    programs = [
        Program("encode prompts", ("text_encoder",), compiled.encode_prompts, params["text_encoder"], (prompts,)),
        Program("sample", ("transformer",), compiled.sample_images, params["transformer"], inputs, static),
        Program("decode images", ("autoencoder",), compiled.decode_images, params["autoencoder"], (latents,)),
    ]
    return ([programs[0], encode, *programs[1:]] if count else programs), params


def sampling_work(task: str, config: BundleConfig, *, size: int, batch: int, steps: int | None = None) -> dict:
    """{program's name: its Work} of a task, in closed form (`models.flops`); as in `sampling_programs`."""
    model, text_encoder, autoencoder = config.transformer, config.text_encoder, config.autoencoder
    length, latents = config.text_length, (size // autoencoder.downsample_factor,) * 2
    encoded = batch * CONDITIONS.get(task, 1)
    encode = Work(0, encoded * flops.autoencoder_encode(autoencoder, image_size=size), 0, encoded)

    def forwards(count, of_text, conditions=0, text_pass=False):
        """`count` of the MM-DiT, one after another of a batch, and `of_text` times T5."""
        tokens = (1 + conditions) * math.prod(latents) // model.patch_size**2 + length
        heads = {"text_head": text_pass, "velocity_head": not text_pass}
        whole = count * flops.mmdit_forward(
            model, latent_size=latents, text_length=length, num_conditions=conditions, **heads
        )
        attention = count * model.depth * flops.attention(tokens, model.width)
        blocks = count * model.depth * tokens * 12 * model.width * flops.linear(1, 1, model.width)
        text = of_text * flops.text_encoder_forward(text_encoder, text_length=length)
        text_width = text_encoder.num_heads * text_encoder.head_width
        text_attention = of_text * text_encoder.depth * flops.attention(length, text_width)
        matmul = blocks + text - text_attention
        return matmul, whole - blocks - attention, attention + text_attention

    if task in TEXT_TASKS:
        steps = steps or 32
        return {
            "encode images": encode,
            "write text": Work(*forwards(steps * batch, steps * batch, text_pass=True), steps),
        }
    steps = steps or STEPS[task]
    sample = Work(*forwards(2 * steps * batch, 0, conditions=CONDITIONS[task]), steps)
    decode = Work(0, batch * flops.autoencoder_decode(autoencoder, image_size=size), 0, batch)
    prompts = Work(*forwards(0, batch + 1), 1)
    return {"encode prompts": prompts, "encode images": encode, "sample": sample, "decode images": decode}


def program_seconds(work: Work, chip: hardware.Chip, parameters: float, head_width: int, quantize: str | None) -> float:
    """The time of a program by a roofline, arithmetic: the larger of its FLOPs and of reading its parameters.

    Args:
      parameters: bytes that it reads them from.
    """
    rate = {"w8a8": chip.int8, "fp8": chip.fp8}.get(quantize, 1)
    parts = {"matmul": work.matmul / rate + work.other, "attention": work.attention}
    return max(compute_seconds(parts, chip, head_width), work.weights * parameters / chip.memory_bandwidth)


def measure(program: Program) -> ProgramMemory:
    """Compiles a program and reads its memory. Raises DoesNotFit when it does not fit the device by itself."""
    lowered = program.function.lower(program.params, *program.inputs, **program.static)
    found = topology.compile_program(lowered, program.name).memory_analysis()
    return ProgramMemory(
        name=program.name,
        components=program.components,
        inputs=tree_bytes(program.inputs),
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def resident_bytes(params: dict) -> int:
    """Bytes of parameters on their device, in the compiler's layout (which may pad them)."""
    program = jax.jit(lambda params: jnp.zeros(()), keep_unused=True)
    return program.lower(params).compile().memory_analysis().argument_size_in_bytes


def peaks(measured: list[ProgramMemory], resident: dict[str, int], *, low_memory: bool) -> list[int]:
    """Bytes on the device while each program of a task runs.

    They are the parameters of every component of the task (with `low_memory` only of the program's own), the program's
    inputs, outputs and temporaries, the outputs of earlier programs, and the code of all programs.
    """
    code = sum(program.code for program in measured)
    result, held = [], 0
    for program in measured:
        names = program.components if low_memory else {name for other in measured for name in other.components}
        parameters = sum(resident[name] for name in names)
        result.append(parameters + held + program.inputs + program.outputs + program.temporaries + code)
        held += program.outputs
    return result


def memory_rows(measured: list[ProgramMemory], resident: dict[str, int]) -> list[dict]:
    """One row for each program, in GiB, and a last one for the whole task."""
    whole, lean = (peaks(measured, resident, low_memory=low) for low in (False, True))
    columns = ("inputs", "outputs", "temporaries", "code")
    rows = [
        {"program": program.name, "parameters": sum(resident[name] for name in program.components) / GIB}
        | {column: getattr(program, column) / GIB for column in columns}
        | {"peak": peak / GIB, "peak_low_memory": lean_peak / GIB}
        for program, peak, lean_peak in zip(measured, whole, lean, strict=True)
    ]
    used = {name for program in measured for name in program.components}
    total = {"program": "whole task", "parameters": sum(resident[name] for name in used) / GIB}
    total |= {column: max(row[column] for row in rows) for column in rows[0] if column not in total}
    return [*rows, total | {"code": sum(row["code"] for row in rows)}]


def plan_sampling(
    task: str, topology_name: str, *, size: int, batch: int, quantize: str | None, low_memory: bool
) -> dict:
    """The memory of a task with the published model on one chip, as JSON: rows in GiB, and whether it fits; with the
    seconds of a roofline.

    Raises ValueError for a size, batch or topology that cannot be, DoesNotFit when one program alone finds no room.
    """
    check_sampling(published_config(), size, batch)
    chips = topology.count_chips(topology_name)
    if chips > 1:
        one = "v5e:1x1" if not gpus.is_gpu(topology_name) else f"{topology_name.partition(':')[0]}:1"
        raise ValueError(f"topology {topology_name} has {chips} chips, sampling runs on one: {one}")
    device = topology.topology_devices(topology_name)[0]
    usable = topology.usable_bytes(device)
    programs, params = sampling_programs(task, device, size=size, batch=batch, quantize=quantize)
    names = {name for program in programs for name in program.components}
    resident = {name: resident_bytes(params[name]) for name in sorted(names)}
    measured = []
    for program in programs:
        print(f"compiling: {program.name}", file=sys.stderr)
        measured.append(measure(program))
    rows = memory_rows(measured, resident)
    config, chip = published_config(), hardware.find_chip(device.device_kind)
    work = sampling_work(task_name(task), config, size=size, batch=batch)
    for program, row in zip(programs, rows[:-1], strict=True):
        read = GIB * row["parameters"]
        row["seconds"] = program_seconds(work[program.name], chip, read, config.transformer.head_width, quantize)
    rows[-1]["seconds"] = sum(row["seconds"] for row in rows[:-1])
    peak = rows[-1]["peak_low_memory" if low_memory else "peak"]
    figures = {"task": task, "topology": topology_name, "size": size, "batch": batch, "quantize": quantize}
    figures |= {"low_memory": low_memory, "usable": usable and usable / GIB}
    figures |= {"matmul_share": chip.matmul_share, "peak_flops": chip.peak, "per_second": batch / rows[-1]["seconds"]}
    return figures | {"fits": usable is None or peak * GIB <= usable, "rows": rows}
