"""A training step compiled ahead of time for chips that are not here: its memory, its traffic and its roofline.

The compiler's count of memory decides whether a step fits; `training.meshes.estimate` does without the compiler.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unialign_jax.parallel import hardware, sharding
from unialign_jax.planning.collectives import read_collectives, received_bytes
from unialign_jax.planning.roofline import (
    Roofline,
    compute_seconds,
    dcn_seconds,
    hbm_bytes,
    held_bytes,
    link_seconds,
    step_work,
)
from unialign_jax.planning.topology import compile_program
from unialign_jax.training.program import StepProgram


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes of a compiled step on one chip; `usable` is what the compiler may use, or None if unknown."""

    parameters: int  # the float32 masters
    optimizer: int  # moments, average, step, and the padding of all arguments
    frozen: int
    batch: int
    temporaries: int  # compute weights, activations, gradients, and the compiler's own
    code: int
    usable: int | None

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.frozen + self.batch + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.usable is None or self.peak <= self.usable


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A compiled step; `roofline` is None on chips whose networks hardware.py does not know, as CPUs."""

    stream: str
    chips: int
    mesh: dict[str, int]
    mesh_reason: str
    batch_size: int
    accumulation: int
    remat: str
    memory: CompiledMemory
    roofline: Roofline | None
    bytes_inside: dict[str, float]  # {kind of collective: bytes that a chip receives from its own slice}
    bytes_across: dict[str, float]  # from other slices

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.roofline.seconds


def slice_number(device: Any) -> int:
    """The TPU slice of a device; of a GPU its host, for other GPUs are reached over a network too."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", 0) or 0


def plan_step(
    config: ConfigDict, devices: list, name: str, *, usable: int | None = None, dump: Path | None = None
) -> StepPlan:
    """Compiles the step of the stream `name` of a configuration for the devices of a topology.

    Args:
      usable: bytes that the compiler may use on a device.
      dump: a file for the optimised HLO.

    Raises ValueError for a configuration that cannot run there, DoesNotFit when the compiler runs out of memory.
    """
    program = StepProgram(config, devices)
    networks, mesh, stream = program.networks, program.mesh, program.settings[name]
    state, frozen = program.abstract_state, program.abstract_frozen
    lowered = program.lower_step(name)
    compiled = compile_program(lowered, f"the step of {name}")
    text = compiled.as_text()
    if dump:
        dump.write_text(text)
    memory = compiled.memory_analysis()
    parameters, optimizer, frozen_bytes = (held_bytes(tree) for tree in (state.params, state[2:], frozen))
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in program.batch_shapes(name).values()) // math.prod(
        mesh.shape[axis] for axis in sharding.BATCH[0]
    )
    # Layout padding is not reported per argument; charge it to the optimizer state, the largest of them.
    padding = memory.argument_size_in_bytes - parameters - optimizer - frozen_bytes - batch
    collectives = read_collectives(text)
    slice_of = np.array([slice_number(device) for device in mesh.devices.flat])
    inside, across = received_bytes(collectives, slice_of)
    chip = hardware.find_chip(devices[0].device_kind)
    roofline = None
    if chip and chip.memory_bandwidth:
        work = step_work(config, networks, stream, len(devices))
        parts = {name: compute_seconds(part, chip, config.model.head_width) for name, part in work["parts"].items()}
        overlapped, exposed = link_seconds(collectives, chip, list(mesh.devices.flat), slice_of, parts)
        roofline = Roofline(
            flops=work["model"],
            peak_flops=chip.peak,
            compute=compute_seconds(work, chip, config.model.head_width),
            hbm=hbm_bytes(config, state, frozen, mesh, memory.temp_size_in_bytes) / chip.memory_bandwidth,
            ici_overlapped=overlapped,
            ici_exposed=exposed,
            dcn=dcn_seconds(
                collectives,
                chip,
                slice_of,
                config.model.depth * config.accumulation,
                max(0.0, parts["backward"] - overlapped),
            ),
        )
    return StepPlan(
        stream=name,
        chips=len(devices),
        mesh=program.mesh_choice.sizes,
        mesh_reason=program.mesh_choice.reason,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        remat=config.model.remat,
        memory=CompiledMemory(
            parameters=parameters,
            optimizer=optimizer + padding,
            frozen=frozen_bytes,
            batch=batch,
            temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            usable=usable,
        ),
        roofline=roofline,
        bytes_inside=inside,
        bytes_across=across,
    )
