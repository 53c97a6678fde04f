"""Plans as tables: as text for the command line, and of a sweep as docs/tpu_tables.md and a part of docs/tpu.md.

Every number of the pages comes from the sweep's file and from `hardware.CHIPS`; the same file gives the same pages. The
marks of plans that older code has made depend on today's code too.
"""

import dataclasses
import math
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path

from unialign_jax.files import check_regular, replacing_file
from unialign_jax.parallel import hardware
from unialign_jax.parallel.mesh import format_mesh
from unialign_jax.planning.stage import StagePlan, stage_total
from unialign_jax.planning.step import StepPlan
from unialign_jax.planning.sweep import TOPOLOGIES, Plans, SlicePlan, Stage, read_plans
from unialign_jax.planning.topology import GIB, split_name
from unialign_jax.training.config import active_streams

BEGIN = "<!-- plans: written by python launch/plan.py --report, not by hand -->"
END = "<!-- end of plans -->"
GUIDE, TABLES, PLOT = "tpu.md", "tpu_tables.md", "scaling.png"
REFERENCE = ("v5e-256", "v4-128", "v5p-128", "v6e-64", "v6e-256")  # the slices that the guide shows
OLDER = "†"  # behind the name of a slice whose plan older code has made
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
COLORS = dict(zip(GENERATIONS, ("#4c78a8", "#f58518", "#54a24b", "#b279a2"), strict=True))
KINDS = ("all-gather", "reduce-scatter", "all-reduce")  # the others are one column
TIMES = {"compute": "compute", "hbm": "HBM", "ici_overlapped": "ICI overlapped", "ici_exposed": "ICI exposed"}
TIMES |= {"dcn": "DCN", "seconds": "step"}  # {attribute of a Roofline: heading}
GPU_TIMES = TIMES | {"ici_overlapped": "NVLink overlapped", "ici_exposed": "NVLink exposed", "dcn": "InfiniBand"}


def format_table(rows: Iterable[dict], *, markdown: bool = False) -> str:
    """Rows of the same keys as aligned text, or as a Markdown table; floats with two decimals."""
    rows = list(rows)
    cells = [[key if markdown else key.replace("_", " ") for key in rows[0]]]
    cells += [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    if markdown:
        cells.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def stage_figures(plan: StagePlan) -> dict:
    """A stage's plan as JSON: tables for `format_table`, of the streams and of the whole stage; and all numbers."""
    config, streams = plan.config, active_streams(plan.config)
    chip = hardware.find_chip(plan.device_kind)
    inside, across, times = (
        ("in the slice", "across slices", TIMES) if chip.axes else ("in a host", "across hosts", GPU_TIMES)
    )
    memory, network, speed = [], [], []
    for step in plan.steps:
        sizes, roofline = step.memory, step.roofline
        row = {name: getattr(sizes, name) / GIB for name in ("parameters", "optimizer", "frozen", "batch")}
        row |= {"activations": sizes.temporaries / GIB, "code": sizes.code / GIB, "peak": sizes.peak / GIB}
        memory.append({"GiB a chip": step.stream} | row | {"usable": (sizes.usable or 0) / GIB})
        for place, received in ((inside, step.bytes_inside), (across, step.bytes_across)):
            if place == inside or any(received.values()):
                row = {"GB received a chip": f"{step.stream}, {place}"}
                row |= {kind: number / 1e9 for kind, number in received.items()}
                network.append(row | {"total": sum(received.values()) / 1e9})
        speed.append(
            {"ms a step": step.stream, "TFLOP a chip": roofline.flops / 1e12}
            | {heading.lower(): 1e3 * getattr(roofline, name) for name, heading in times.items()}
            | {"MFU %": 100 * roofline.mfu, "all overlapped %": 100 * roofline.mfu_overlapped}
            | {"images/s": step.images_per_second}
        )
    title = f"roofline (arithmetic, not measured; matmuls at {assumed(chip.matmul_share, chip.peak)})"
    tables = {"memory": memory, "interconnect": network, title: speed}
    if plan.steps and {step.stream for step in plan.steps} == streams.keys():
        weighted = [(streams[step.stream].weight, step) for step in plan.steps]
        whole = stage_total(weighted, config.num_steps * config.batch_size)
        tables["the stage"] = [{config.name or "stage": f"{config.num_steps} steps"} | whole]
    steps = [dataclasses.asdict(step) | {"peak": step.memory.peak} for step in plan.steps]
    steps = [{**figures.pop("memory"), **figures.pop("roofline"), **figures} for figures in steps]
    return {
        "tables": tables,
        "steps": steps,
        "chips": plan.chips,
        "mesh": plan.steps[0].mesh if plan.steps else dict(config.mesh),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "remat": config.model.remat,
        "misfits": plan.out_of_memory,
        "fits": plan.fits,
    }


def assumed(share: float, peak: float) -> str:
    return f"{100 * share:.0f}% of the peak of {peak / 1e12:g} TFLOP/s"


def stage_text(plan: StagePlan) -> str:
    """A stage's plan for the command line."""
    config = plan.config
    how = f"batch {config.batch_size}, accumulation {config.accumulation}, remat {config.model.remat}"
    lines = [f"{plan.chips} x {plan.device_kind}, {how}"]
    lines += sorted({f"mesh {format_mesh(step.mesh)}: {step.mesh_reason}" for step in plan.steps})
    tables = stage_figures(plan)["tables"] if plan.steps else {}
    lines += [*(f"\n{title}\n{format_table(rows)}" for title, rows in tables.items()), ""]
    for step in plan.steps:
        verdict = "fits" if step.memory.fits else "DOES NOT FIT"
        lines.append(f"{step.stream}: {verdict}: {step.memory.peak / GIB:.2f} of {(plan.usable or 0) / GIB:.2f} GiB")
    return "\n".join([*lines, *(f"DOES NOT FIT: {line}" for line in plan.out_of_memory)])


def sampling_text(figures: dict) -> str:
    """The figures of `sampling.plan_sampling` for the command line."""
    text = "{task}, {size} px, batch {batch}, bfloat16, quantize {quantize}, on {topology}; GiB\n\n".format(**figures)
    text += format_table(figures["rows"])
    if figures["usable"]:
        verdict = "fits" if figures["fits"] else "DOES NOT FIT"
        mode, peak = ("with", "peak_low_memory") if figures["low_memory"] else ("without", "peak")
        text += f"\n\n{verdict} {mode} low_memory: {figures['rows'][-1][peak]:.2f} of {figures['usable']:.2f} GiB"
    shared = assumed(figures["matmul_share"], figures["peak_flops"])
    text += f"\nseconds are arithmetic, not measured: matmuls at {shared}, or reading the parameters; "
    return text + f"{figures['per_second']:.2f} a second"


def write_report(path: Path, docs: Path) -> None:
    """Writes `docs`/tpu_tables.md and scaling.png from a sweep's file, and the part of `docs`/tpu.md between its marks.

    Raises ValueError where there are no plans, no marks, or no matplotlib.
    """
    plans = read_sweep(path)
    guide, tables = docs / GUIDE, docs / TABLES
    check_regular(guide)
    if os.path.lexists(tables):
        check_regular(tables)
    pages = {guide: splice(guide.read_text(), reference(plans)), tables: markdown(plans)}
    plot(plans, docs / PLOT)
    for page, text in pages.items():
        with replacing_file(page) as scratch:
            scratch.write_text(text)


def read_sweep(path: Path) -> Plans:
    """The plans of a sweep's file in the order of the tables. Raises ValueError where there are none."""
    plans = read_plans(path) if path.exists() else None
    if not plans or not plans.plans or not plans.stages:
        raise ValueError(f"{path} has no plans: python launch/plan.py --config=FILE --all --output={path} makes them")
    for plan in plans.plans:
        if plan.chip not in GENERATIONS:
            raise ValueError(f"{path} has a plan of the chip {plan.chip!r}, expected one of {', '.join(GENERATIONS)}")
    plans.plans.sort(key=lambda plan: (GENERATIONS.index(plan.chip), plan.chips))
    return plans


def splice(page: str, part: str) -> str:
    """A page with `part` between its marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, once each, around the generated part")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{part.strip()}\n\n{END}{rest.partition(END)[2]}"


def markdown(plans: Plans) -> str:
    """The page of all tables."""
    parts = [
        "# Plans of TPU slices: the tables",
        f"{made_of(plans.plans)} [The guide]({GUIDE}) says how it is counted. Each row has the micro-batches "
        "(accumulation) and remat policy that are fastest on paper among those that fit. The batch is the "
        "configuration's, or one sample per chip where there are more chips; hours are those of the stage's samples. "
        "Beside the date is the commit, where it was recorded. This page is written by `python launch/plan.py "
        "--report=docs/plans.json`, not by hand.",
    ]
    missing = [name for name in TOPOLOGIES if name not in {plan.topology for plan in plans.plans}]
    if missing:
        parts.append(f"Not compiled yet: {', '.join(missing)}.")
    for name, stage in sorted(plans.stages.items()):
        parts += stage_part(plans.plans, name, stage)
    parts += [
        "## Scaling",
        f"![predicted MFU and bytes received per chip, against chips]({PLOT})",
        f"The step of {plotted(plans)[1]}, batches as above; hollow marks are runs over several slices.",
        "## Assumed figures of the chips",
        format_table(map(chip_cells, (chip for chip in hardware.CHIPS if chip.axes)), markdown=True),
        f"Sources: {hardware.SOURCES} Matmuls are assumed to reach {100 * hardware.MATMUL_SHARE:.0f}% of the peak.",
    ]
    return joined(parts) + "\n"


def reference(plans: Plans) -> str:
    """The guide's part: stage 1 on the slices of REFERENCE, and where the time of its step goes."""
    shape, stream = plotted(plans)
    found = [plan for name in REFERENCE if (plan := plans.find(shape, name)) and plan.step]
    if not found:
        return "None of the slices that this page shows is planned yet."
    stage = plans.stages[min(plans.stages)]
    rows, parts = [], {}
    for plan in found:
        step = plan.step
        whole = stage_cells(stage, {share.shape: plan for share in stage.streams.values()})
        speed = {"ms a step": short(1e3 * step.roofline.seconds), "MFU %": f"{100 * step.roofline.mfu:.0f}"}
        rows.append(label(plan) | choice_cells(plan) | speed | {"hours": whole["hours"]})
        for part, seconds in time_parts(step).items():
            parts.setdefault(part, {})[label(plan)["slice"]] = short(1e3 * seconds)
    text = [
        f"{min(plans.stages)}, the step of {stream}. {made_of(found)}",
        format_table(rows, markdown=True),
        "Where the milliseconds of that step go:",
        format_table(({"part": part} | cells for part, cells in parts.items()), markdown=True),
    ]
    return joined(text)


def time_parts(step: StepPlan) -> dict[str, float]:
    """The seconds of a step in parts that add up to it."""
    roofline = step.roofline
    peak = roofline.flops / roofline.peak_flops
    reached = peak / hardware.MATMUL_SHARE
    busiest = max(roofline.compute, roofline.hbm, roofline.ici_overlapped)
    return {
        "the model's FLOPs at the peak": peak,
        f"matmuls at {100 * hardware.MATMUL_SHARE:.0f}% of it": reached - peak,
        "attention below that, and recomputation": roofline.compute - reached,
        "memory or overlapped ICI, beyond compute": busiest - roofline.compute,
        "exposed ICI": roofline.ici_exposed,
        "DCN": roofline.dcn,
    }


def made_of(plans: list[SlicePlan]) -> str:
    """When and with what the plans were compiled, and which are of older code."""
    dates = sorted({plan.made["date"] for plan in plans})
    versions = ", ".join(
        f"{name} {' and '.join(sorted({plan.made[name] for plan in plans}))}" for name in ("jax", "libtpu")
    )
    text = f"Compiled {' to '.join(dict.fromkeys((dates[0], dates[-1])))} ({versions})."
    text += " All of it is arithmetic from the compiled programs, not measured."
    older = sum(not plan.is_current for plan in plans)
    if older:
        which = "All plans are" if older == len(plans) else f"{older} of {len(plans)} plans are"
        text += f" {which} of older code than this page and marked {OLDER}: today's step may differ."
    return text


def joined(parts: list[str]) -> str:
    """Paragraphs in lines of the page's width; tables, headings and pictures as they are."""
    return "\n\n".join(part if part[0] in "|#!" else wrap(part) for part in parts)


def wrap(text: str) -> str:
    """A paragraph in lines of the page's width."""
    return textwrap.fill(text, 124, break_long_words=False, break_on_hyphens=False)


def stage_part(plans: list[SlicePlan], name: str, stage: Stage) -> list[str]:
    """A stage's tables over the slices for which all of its streams were planned."""
    shapes = {}
    for stream, share in stage.streams.items():
        shapes.setdefault(share.shape, []).append(stream)
    by_slice = {}
    for plan in plans:
        if plan.shape in shapes:
            by_slice.setdefault(plan.topology, {})[plan.shape] = plan
    planned = {topology: found for topology, found in by_slice.items() if len(found) == len(shapes)}
    title = f"## {name}: {stage.num_steps:,} steps of {stage.batch_size} samples"
    if not planned:
        return [title, "Not planned yet."]
    chosen = [(found[shape], names) for found in planned.values() for shape, names in shapes.items()]
    several = len(shapes) > 1
    labels = [label(plan, streams=names if several else None) for plan, names in chosen]
    parts = [
        title,
        format_table(
            (first | choice_cells(plan) for first, (plan, _) in zip(labels, chosen, strict=True)), markdown=True
        ),
        "GB received per chip and step, by collective and, across slices, over DCN; milliseconds per step; MFU, and "
        "MFU if all communication overlapped with compute:",
    ]
    speeds = []
    for first, (plan, _) in zip(labels, chosen, strict=True):
        if plan.step:
            whole = {} if several else stage_cells(stage, planned[plan.topology])
            speeds.append(first | speed_cells(plan.step) | whole)
    parts.append(format_table(speeds, markdown=True) if speeds else "Nothing fits.")
    if len(planned) < len(by_slice):
        parts.append("On the other slices not all streams of this stage are compiled.")
    if several:
        totals = (label(*found.values()) | stage_cells(stage, found) for found in planned.values())
        parts += [
            "Each stream is planned by itself. A run has one mesh, accumulation and remat for all its streams, those "
            "of the heaviest (`--search` finds them). So the stage, by the streams' shares of the steps, is at best:",
            format_table(totals, markdown=True),
        ]
    return parts


def label(*plans: SlicePlan, streams: list[str] | None = None) -> dict[str, str]:
    """The first cells of a row about one slice's plans."""
    mark = "" if all(plan.is_current for plan in plans) else f" {OLDER}"
    cells = {"slice": plans[0].topology + mark, "chips": f"{plans[0].chips:,}"}
    return cells | ({"streams": ", ".join(streams)} if streams else {})


def choice_cells(plan: SlicePlan) -> dict[str, str]:
    step, usable = plan.step, f"{plan.usable / GIB:.2f}" if plan.usable else "unknown"
    if step:
        mesh, chosen, peak = format_mesh(step.mesh), step, f"{step.memory.peak / GIB:.2f} of {usable}"
    else:
        mesh, chosen = "does not fit", plan.tried[-1]
        peak = f"**{f'{chosen.bytes / GIB:.2f} of' if chosen.bytes else 'more than'} {usable}**"
    return {
        "mesh": mesh,
        "batch": f"{plan.batch_size:,}",
        "accumulation": str(chosen.accumulation),
        "remat": chosen.remat,
        "peak of usable, GiB": peak,
        "compiled": " ".join(plan.made[key] for key in ("date", "code") if key in plan.made),
    }


def speed_cells(step: StepPlan) -> dict[str, str]:
    received = {kind: step.bytes_inside.get(kind, 0.0) for kind in KINDS}
    received["other"] = sum(step.bytes_inside.values()) - sum(received.values())
    received["DCN"] = sum(step.bytes_across.values())
    roofline = step.roofline
    return (
        {f"{kind} GB": f"{number / 1e9:.2f}" for kind, number in received.items()}
        | {f"{heading} ms": short(1e3 * getattr(roofline, name)) for name, heading in TIMES.items()}
        | {"MFU %": f"{100 * roofline.mfu:.0f}", "all overlapped %": f"{100 * roofline.mfu_overlapped:.0f}"}
        | {"images/s": short(step.images_per_second)}
    )


def stage_cells(stage: Stage, found: dict[str, SlicePlan]) -> dict[str, str]:
    """The whole stage on one slice, from {shape: plan}; dashes where a stream does not fit.

    A stage with one shape of step has speed and MFU in its step's row already.
    """
    keys = ("images/s", "MFU %", "hours", "chip-hours")[2 if len(found) == 1 else 0 :]
    if not all(plan.step for plan in found.values()):
        return dict.fromkeys(keys, "-")
    weighted = [(stream.weight, found[stream.shape].step) for stream in stage.streams.values()]
    total = stage_total(weighted, stage.num_steps * stage.batch_size)
    return {key: f"{total[key]:.0f}" if key == "MFU %" else short(total[key]) for key in keys}


def chip_cells(chip: hardware.Chip) -> dict[str, str]:
    return {
        "chip": chip.name,
        "bf16 peak, TFLOP/s": f"{chip.peak / 1e12:.0f}",
        "HBM, GB": f"{chip.memory / 1e9:.0f}",
        "HBM, GB/s": f"{chip.memory_bandwidth / 1e9:,.0f}",
        "ICI link, one way, GB/s": f"{chip.link / 1e9:.0f}",
        "axes of the torus": str(chip.axes),
        "an axis is a ring at multiples of": str(chip.wrap),
        "DCN a chip, one way, GB/s": f"{chip.network / 1e9:g}",
        "rows of the matrix unit": str(chip.matrix_unit),
    }


def short(number: float) -> str:
    """Three digits or more: 0.42, 9.81, 12.3, 1,138."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def plotted(plans: Plans) -> tuple[str, str]:
    """The shape and the stream of the plotted step: of the first stage, that with the fewest condition images."""
    stage = plans.stages[min(plans.stages)]
    return min((share.shape, stream) for stream, share in stage.streams.items())


def plot(plans: Plans, path: Path) -> None:
    """Plots MFU and bytes received of the step `plotted` against chips, from 8 on; one line for each generation."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from None
    shape, _ = plotted(plans)
    lines = {}
    for plan in plans.plans:
        if plan.shape == shape and plan.step and plan.chips >= 8:
            slices, _ = split_name(plan.topology)
            name = plan.chip + (f", {slices} slices" if slices > 1 else "")
            lines.setdefault(name, []).append(plan.step)
    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    speed, moved = figure.subplots(1, 2)
    for name, steps in lines.items():
        style = {"color": COLORS[name.partition(",")[0]], "label": name, "marker": "o", "markersize": 4}
        style |= {"marker": "D", "linestyle": "none", "markerfacecolor": "none"} if "," in name else {}
        chips = [step.chips for step in steps]
        received = [(sum(step.bytes_inside.values()) + sum(step.bytes_across.values())) / 1e9 for step in steps]
        speed.plot(chips, [100 * step.roofline.mfu for step in steps], **style)
        moved.plot(chips, received, **style)
    ticks = [2**power for power in range(3, 13)]
    for axes, title in ((speed, "predicted MFU, %"), (moved, "GB received by a chip in a step")):
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / math.sqrt(2), ticks[-1] * math.sqrt(2))
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("chips")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if lines:
        speed.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
