"""What a sweep's folder says, as the generated part of docs/tpu.md and a plot of scaling.

Every number comes from the folder's files and from `hardware.CHIPS`; the same folder gives the same page.
"""

import math
import textwrap
from pathlib import Path

from unialign_jax.files import check_regular, replacing_file
from unialign_jax.parallel import hardware
from unialign_jax.parallel.mesh import format_mesh
from unialign_jax.planning.sampling_plan import GIB
from unialign_jax.planning.step_plan import MATMUL_SHARE, StepPlan
from unialign_jax.planning.sweep import STAGE, TOPOLOGIES, check_kinds, read_json, read_rows

BEGIN = "<!-- plans: written by python launch/plan.py --report, not by hand -->"
END = "<!-- end of plans -->"
PLOT = "scaling.png"
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
COLORS = dict(zip(GENERATIONS, ("#4c78a8", "#f58518", "#54a24b", "#b279a2"), strict=True))
ROW = {"chip": str, "chips": int, "slices": int, "usable": int | None, "tried": list}  # of a plan, beside sweep.ROW
KINDS = ("all-gather", "reduce-scatter", "all-reduce")  # the others are one column


def write_report(folder: Path, docs: Path):
    """Puts the tables of a sweep's folder into `docs`/tpu.md, between its two marks, and plots `docs`/scaling.png.

    Raises ValueError where there are no plans, no marks, or no matplotlib.
    """
    rows, stages = read_folder(folder)
    page = docs / "tpu.md"
    check_regular(page)
    text = splice(page.read_text(), markdown(rows, stages))
    plot(rows, stages[0], docs / PLOT)
    with replacing_file(page) as scratch:
        scratch.write_text(text)


def read_folder(folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of a sweep, "step" as a StepPlan or None, in the order of the tables; and its stages by name."""
    rows = read_rows(folder)
    stages = [read_json(path, STAGE) for path in sorted(folder.glob("stage-*.json"))]
    if not rows or not stages:
        raise ValueError(
            f"{folder} has no plans: python launch/plan.py --config=FILE --all --output={folder} makes them"
        )
    for row in rows:
        path = folder / f"plan-{row['shape']}-{row['topology']}.json"
        check_kinds(path, row, ROW)
        check_kinds(path, row["made"], dict.fromkeys(("date", "jax", "libtpu"), str))
        if row["chip"] not in GENERATIONS:
            raise ValueError(f"{path} is of the chip {row['chip']!r}, expected one of {', '.join(GENERATIONS)}")
    for stage in stages:
        for stream in stage["streams"].values():
            path = folder / f"stage-{stage['name']}.json"
            check_kinds(path, stream if isinstance(stream, dict) else {}, {"shape": str, "weight": int | float})
    rows = [row | {"step": row["step"] and StepPlan(**row["step"])} for row in rows]
    return sorted(rows, key=lambda row: (GENERATIONS.index(row["chip"]), row["chips"])), stages


def splice(page: str, part: str) -> str:
    """A page with what is between its marks replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, once each, around what is written")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{part.strip()}\n\n{END}{rest.partition(END)[2]}"


def markdown(rows: list[dict], stages: list[dict]) -> str:
    made = [row["made"] for row in rows]
    dates = sorted({entry["date"] for entry in made})
    versions = ", ".join(
        f"{name} {' and '.join(sorted({entry[name] for entry in made}))}" for name in ("jax", "libtpu")
    )
    parts = [
        f"Compiled {' to '.join(dict.fromkeys((dates[0], dates[-1])))} ({versions}). All of it is arithmetic from the "
        "compiled programs, not measured. Of all numbers of micro-batches (accumulation) and remat policies these are "
        "the fastest on paper that fit. The batch is the configuration's, or a sample a chip where there are more "
        "chips; hours are those of the stage's samples. `python launch/plan.py --config=FILE --all --output=DIR` "
        "compiles, `--report=DIR` writes this part."
    ]
    missing = [name for name in TOPOLOGIES if name not in {row["topology"] for row in rows}]
    if missing:
        parts.append(f"Not compiled yet: {', '.join(missing)}.")
    for stage in stages:
        parts += stage_part(rows, stage)
    parts += [
        "### Scaling",
        f"![predicted MFU and bytes received by a chip, against chips]({PLOT})",
        f"The step of {plotted(stages[0])[1]}, batches as above; hollow marks are of several slices.",
        "### What the chips are taken to be",
        table(map(chip_cells, (chip for chip in hardware.CHIPS if chip.axes))),
        f"Sources: {hardware.SOURCES} Matmuls are taken to reach {100 * MATMUL_SHARE:.0f}% of the peak.",
    ]
    return "\n\n".join(part if part[0] in "|#!" else wrap(part) for part in parts)


def wrap(text: str) -> str:
    """A paragraph in lines as long as the page's others."""
    return textwrap.fill(text, 124, break_long_words=False, break_on_hyphens=False)


def stage_part(rows, stage) -> list[str]:
    """A stage's tables over the slices for which all of its streams were planned."""
    shapes = {}
    for name, stream in stage["streams"].items():
        shapes.setdefault(stream["shape"], []).append(name)
    by_slice = {}
    for row in rows:
        if row["shape"] in shapes:
            by_slice.setdefault(row["topology"], {})[row["shape"]] = row
    planned = {topology: found for topology, found in by_slice.items() if len(found) == len(shapes)}
    title = f"### {stage['name']}: {stage['num_steps']:,} steps of {stage['batch_size']} samples"
    if not planned:
        return [title, "Not planned yet."]
    chosen = [(found[shape], names) for found in planned.values() for shape, names in shapes.items()]
    several = len(shapes) > 1
    labels = [label(row, names if several else None) for row, names in chosen]
    parts = [
        title,
        table(first | choice_cells(row) for first, (row, _) in zip(labels, chosen, strict=True)),
        "GB that a chip receives in a step, by collective and, across slices, over DCN; milliseconds of a step; MFU as "
        "it stands, and if all communication ran beside the compute:",
    ]
    speeds = []
    for first, (row, _) in zip(labels, chosen, strict=True):
        if row["step"]:
            whole = {} if several else stage_cells(stage, planned[row["topology"]])
            speeds.append(first | speed_cells(row["step"]) | whole)
    parts.append(table(speeds) if speeds else "Nothing fits.")
    if len(planned) < len(by_slice):
        parts.append("Of the other slices not all streams of this stage are compiled.")
    if several:
        totals = (label(next(iter(found.values()))) | stage_cells(stage, found) for found in planned.values())
        parts += [
            "Each stream's plan is its own. A run has one mesh, accumulation and remat for all of its streams, those "
            "of its heaviest (`--search` finds them), so the whole, by the streams' shares of the steps, is at best:",
            table(totals),
        ]
    return parts


def label(row, streams=None) -> dict[str, str]:
    cells = {"slice": row["topology"], "chips": f"{row['chips']:,}"}
    return cells | ({"streams": ", ".join(streams)} if streams else {})


def choice_cells(row) -> dict[str, str]:
    step = row["step"]
    usable = f"{row['usable'] / GIB:.2f}" if row["usable"] else "unknown"
    if step is None:
        least = row["tried"][-1]
        need = f"{least['bytes'] / GIB:.2f} of {usable}" if least["bytes"] else f"more than {usable}"
        return {
            "mesh": "does not fit",
            "batch": f"{row['batch_size']:,}",
            "accumulation": str(least["accumulation"]),
            "remat": least["remat"],
            "peak of usable, GiB": f"**{need}**",
        }
    return {
        "mesh": format_mesh(step.mesh),
        "batch": f"{step.batch_size:,}",
        "accumulation": str(step.accumulation),
        "remat": step.remat,
        "peak of usable, GiB": f"{step.peak / GIB:.2f} of {usable}",
    }


def speed_cells(step: StepPlan) -> dict[str, str]:
    received = {kind: step.bytes_inside.get(kind, 0.0) for kind in KINDS}
    received["other"] = sum(step.bytes_inside.values()) - sum(received.values())
    received["DCN"] = sum(step.bytes_across.values())
    times = {
        "compute": step.compute,
        "HBM": step.hbm,
        "ICI overlapped": step.ici_overlapped,
        "ICI exposed": step.ici_exposed,
        "DCN": step.dcn,
        "step": step.seconds,
    }
    return (
        {f"{kind} GB": f"{number / 1e9:.2f}" for kind, number in received.items()}
        | {f"{part} ms": short(1e3 * seconds) for part, seconds in times.items()}
        | {
            "MFU %": f"{100 * step.mfu:.0f}",
            "all overlapped %": f"{100 * step.mfu_overlapped:.0f}",
            "images/s": short(step.images_per_second),
        }
    )


def stage_cells(stage, found: dict[str, dict]) -> dict[str, str]:
    """The whole stage on one slice, from its streams' plans {shape: row}; dashes where one of them does not fit."""
    steps = {shape: row["step"] for shape, row in found.items()}
    if not all(steps.values()):
        cells = dict.fromkeys(("hours", "chip-hours"), "-")
        return cells if len(steps) == 1 else dict.fromkeys(("images/s", "MFU %"), "-") | cells
    total = sum(stream["weight"] for stream in stage["streams"].values())
    shares = [(stream["weight"] / total, steps[stream["shape"]]) for stream in stage["streams"].values()]
    seconds = sum(share * step.seconds for share, step in shares)
    flops = sum(share * step.flops for share, step in shares)
    first = shares[0][1]
    hours = stage["num_steps"] * stage["batch_size"] / first.batch_size * seconds / 3600
    cells = {"hours": short(hours), "chip-hours": short(hours * first.chips)}
    if len(steps) == 1:
        return cells
    return {
        "images/s": short(first.batch_size / seconds),
        "MFU %": f"{100 * flops / seconds / first.peak_flops:.0f}",
    } | cells


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


def table(rows) -> str:
    """Rows of the same keys as a Markdown table, the first column to the left."""
    rows = list(rows)
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plotted(stage) -> tuple[str, str]:
    """The shape of step that the plot is of, and its stream: the one with the fewest condition images."""
    return min((stream["shape"], name) for name, stream in stage["streams"].items())


def plot(rows, stage, path: Path):
    """MFU and bytes received, against chips from 8 on, of `plotted`; a line for each generation."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from None
    shape, _ = plotted(stage)
    lines = {}
    for row in rows:
        if row["shape"] == shape and row["step"] and row["chips"] >= 8:
            name = row["chip"] + (f", {row['slices']} slices" if row["slices"] > 1 else "")
            lines.setdefault(name, []).append(row["step"])
    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    speed, moved = figure.subplots(1, 2)
    for name, steps in lines.items():
        style = {"color": COLORS[name.partition(",")[0]], "label": name, "marker": "o", "markersize": 4}
        style |= {"marker": "D", "linestyle": "none", "markerfacecolor": "none"} if "," in name else {}
        chips = [step.chips for step in steps]
        received = [(sum(step.bytes_inside.values()) + sum(step.bytes_across.values())) / 1e9 for step in steps]
        speed.plot(chips, [100 * step.mfu for step in steps], **style)
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
