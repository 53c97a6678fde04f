"""The tables of docs/gpu.md, from the file of `gpu_sweep`; the same file gives the same page."""

from collections.abc import Iterable
from pathlib import Path

from unialign_jax.files import check_regular, replacing_file
from unialign_jax.parallel import hardware
from unialign_jax.planning import gpus, sampling
from unialign_jax.planning.gpu_sweep import (
    REMAT,
    SAMPLING,
    TRAINING,
    GpuPlans,
    SamplingRow,
    TrainingRow,
    read_gpu_plans,
)
from unialign_jax.planning.report import format_table, short, splice, wrap
from unialign_jax.planning.topology import GIB
from unialign_jax.training.config import read_config

PAGE = "gpu.md"
SPEEDS = ("l4", "a100-80g", "h100", "b200")  # GPUs of the columns of seconds
NAMES = {"a100-80g": "A100 80 GB", "a100-40g": "A100 40 GB"}


def write_report(path: Path, docs: Path) -> None:
    """Puts the tables of a file of `gpu_sweep` into `docs`/gpu.md, between its two marks.

    Raises ValueError where there are no plans or no marks.
    """
    plans = read_gpu_plans(path)
    if not plans.training or not plans.sampling:
        raise ValueError(f"{path} lacks plans: python launch/plan.py --gpus --output={path} makes them")
    page = docs / PAGE
    check_regular(page)
    text = splice(page.read_text(), markdown(plans))
    with replacing_file(page) as scratch:
        scratch.write_text(text)


def markdown(plans: GpuPlans) -> str:
    rows = plans.training + plans.sampling
    made, older = [row.made for row in rows], sum(not row.is_current for row in rows)
    dates = sorted({entry["date"] for entry in made})
    versions = ", ".join(sorted({f"jax {entry['jax']}, {entry['compiler']}" for entry in made}))
    chip = gpus.GPUS["h100"].chip
    parts = [
        f"Compiled {' to '.join(dict.fromkeys((dates[0], dates[-1])))} ({versions}). Memory is what the compiler "
        f"plans, in GiB. Seconds, images/s, MFU and hours are arithmetic: matmuls at {100 * chip.matmul_share:.0f}% of "
        f"the data sheet's peak, attention at {100 * chip.attention_share:.0f}% of that, memory and links where those "
        "take longer; norms and other element-wise work are not counted. Nothing of it was compared with a real GPU. "
        "`python launch/plan.py --gpus --output=JSON` compiles, `--report=JSON` writes this part."
        + (f" {older} of {len(rows)} plans are of older code than this page: today's may differ." if older else ""),
        "### What a GPU has",
        table(map(gpu_cells, gpus.GPUS)),
        f"Sources: {hardware.GPU_SOURCES}",
        "### Sampling",
        "Peak with everything resident, and with `low_memory`; the smallest GPU that holds it and leaves "
        f"{100 * hardware.ROOM:.0f}%; seconds of a batch. Perception is as an edit, an answer as a caption, and "
        f"personalization is of {sampling.CONDITIONS['personalization']} references. Rows of T4 are compiled for it "
        "(convolutions in float32, attention by XLA), the others for an H100.",
        table(map(sampling_cells, plans.sampling)),
        "### Training",
        "Stage 1 at a global batch of 256; the peak of a GPU by `model.remat`, with the smallest GPU that holds it so.",
        table(training_table(plans.training)),
        "The same steps by H100's figures, those that fit some GPU, the fastest first:",
        table(map(speed_cells, fastest(plans.training))),
        "The other streams of stages 2 and 3:",
        table(map(stream_cells, others(plans.training))),
    ]
    done = {row.key for row in rows}
    if missing := [" ".join(map(str, key)) for key in SAMPLING + TRAINING if key not in done]:
        parts.append(f"Not compiled yet: {'; '.join(missing)}.")
    return "\n\n".join(part if part[0] in "|#" else wrap(part) for part in parts)


def table(rows: Iterable[dict]) -> str:
    rows = list(rows)
    return format_table(rows, markdown=True) if rows else "None yet."


def gpu_name(kind: str) -> str:
    return NAMES.get(kind, kind.upper())


def smallest(peak: float, topology: str) -> str:
    """The GPU with the least memory that holds `peak` bytes of a program and leaves ROOM; a dash where none does.

    Programs for a T4 need more than those for the others, which need the same.
    """
    kinds = [kind for kind in gpus.GPUS if (kind == "t4") == topology.startswith("t4")]
    by_room = sorted(kinds, key=lambda kind: (gpus.room(kind), gpus.GPUS[kind].chip.peak))
    return next((gpu_name(kind) for kind in by_room if peak <= (1 - hardware.ROOM) * gpus.room(kind)), "-")


def gpu_cells(kind: str) -> dict[str, str]:
    chip = gpus.GPUS[kind].chip
    return {
        "name": f"`{kind}`",
        "GPU": gpus.GPUS[kind].kind,
        "usable, GiB": f"{gpus.room(kind) / GIB:.1f}",
        "peak, TFLOP/s": f"{chip.peak / 1e12:g}",
        "memory, TB/s": f"{chip.memory_bandwidth / 1e12:.2f}",
        "link, one way, GB/s": f"{chip.link / 1e9:.0f}",
        "InfiniBand a GPU, GB/s": f"{chip.network / 1e9:.0f}" if chip.network else "-",
    }


def sampling_cells(row: SamplingRow) -> dict[str, str]:
    whole, config = row.rows[-1], sampling.published_config()
    work = sampling.sampling_work(row.task, config, size=row.size, batch=row.batch)
    old = row.topology == "t4:1"
    cells = {
        "task": row.task + ", T4" * old,
        "px": str(row.size),
        "batch": str(row.batch),
        "weights": row.quantize or "bfloat16",
        "parameters": f"{whole['parameters']:.2f}",
        "peak": f"{whole['peak']:.2f}",
        "fits": smallest(GIB * whole["peak"], row.topology),
        "`low_memory`": f"{whole['peak_low_memory']:.2f}",
        "fits with it": smallest(GIB * whole["peak_low_memory"], row.topology),
    }
    for kind in SPEEDS:
        chip, head = gpus.GPUS[kind].chip, config.transformer.head_width
        seconds = sum(
            sampling.program_seconds(work[part["program"]], chip, GIB * part["parameters"], head, row.quantize)
            for part in row.rows[:-1]
        )
        fp8_emulated = row.quantize == "fp8" and chip.fp8 == 1
        cells[f"s, {gpu_name(kind)}"] = "-" if old or fp8_emulated else short(seconds)
    return cells


def is_stage1(row: TrainingRow) -> bool:
    return row.stage == "stage1"


def training_table(rows: list[TrainingRow]) -> list[dict[str, str]]:
    """One row for each number of GPUs and micro-batches, with a column for each remat policy."""
    found = {}
    for row in filter(is_stage1, rows):
        peaks = found.setdefault((row.topology, row.accumulation, row.step.chips), {})
        peaks[row.remat] = row.step.memory.peak
    return [
        {"GPUs": topology.partition(":")[2], "accumulation": str(count), "samples a GPU": f"{256 // count // chips}"}
        | {
            remat: f"{peaks[remat] / GIB:.1f} ({smallest(peaks[remat], topology)})" if remat in peaks else ""
            for remat in REMAT
        }
        for (topology, count, chips), peaks in found.items()
    ]


def fastest(rows: list[TrainingRow]) -> list[TrainingRow]:
    """The steps of stage 1 that some GPU holds, by the number of GPUs, the fastest first."""
    held = [row for row in filter(is_stage1, rows) if smallest(row.step.memory.peak, row.topology) != "-"]
    return sorted(held, key=lambda row: (row.step.chips, row.step.roofline.seconds))


def others(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [row for row in rows if not is_stage1(row)]


def speed_cells(row: TrainingRow) -> dict[str, str]:
    step, roofline = row.step, row.step.roofline
    steps = read_config(row.stage, []).num_steps
    return {
        "GPUs": row.topology.partition(":")[2],
        "accumulation": str(row.accumulation),
        "remat": row.remat,
        "peak": f"{step.memory.peak / GIB:.1f}",
        "fits": smallest(step.memory.peak, row.topology),
        "GB over NVLink": f"{sum(step.bytes_inside.values()) / 1e9:.1f}",
        "InfiniBand": f"{sum(step.bytes_across.values()) / 1e9:.1f}",
        "step, s": short(roofline.seconds),
        "MFU %": f"{100 * roofline.mfu:.0f}",
        "images/s": short(step.images_per_second),
        "hours of the stage": short(steps * roofline.seconds / 3600),
    }


def stream_cells(row: TrainingRow) -> dict[str, str]:
    cells = speed_cells(row)
    del cells["hours of the stage"]
    return {"stream": f"{row.stage} {row.stream}"} | cells
