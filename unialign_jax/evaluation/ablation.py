"""Figures of several variants of a training run, each from several seeds: their means, intervals, table and picture.

Results are {"VARIANT/SEED/STAGE": {figure's name: value}}.
"""

import math
import statistics
from pathlib import Path

from unialign_jax.evaluation import shapes, shapes_run
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.training.metrics import read_metrics

# Figures of the table: (stage, name in a run's results, heading, whether it is a share).
FIGURES = (
    ("stage1", "validation/text_to_image/flow_matching", "flow loss", False),
    ("stage1", "validation/text_to_image/masked_text", "text loss", False),
    ("stage1", "text_to_image/color", "colour", True),
    ("stage1", "text_to_image/place", "place", True),
    ("stage1", "text_to_image/shape", "shape", True),
    ("stage1", "text_to_image/exact", "exact", True),
    ("stage1", "caption/parses", "captions parse", True),
    ("stage1", "caption/true", "captions true", True),
    ("stage2", "validation/edit/flow_matching", "flow loss of edits", False),
    ("stage2", "edit/exact", "edits exact", True),
    ("stage2", "edit/unchanged", "rest unchanged", True),
)
TASKS = {"stage1": ("text_to_image", "caption"), "stage2": ("edit",)}

Interval = tuple[float, float]  # mean, and half the width of its 95% interval
Table = dict[str, dict[str, Interval]]  # heading -> variant -> interval


def evaluate(run: Path, stage: str, scenes: int) -> dict[str, float]:
    """The figures of a finished run: its last losses on held-out records, and scores over `scenes` scenes per task."""
    found = {}
    for row in read_metrics(run):
        if row["stream"].startswith("validation/"):
            found |= {f"{row['stream']}/{key}": value for key, value in row.items() if key not in ("step", "stream")}
    pipeline = Pipeline.from_bundle(run, max_batch=64)
    for task in TASKS[stage]:
        results = shapes_run.run_task(pipeline, task, scenes)
        scores = shapes.summary([result.scores for result in results])
        found |= {f"{task}/{name}": score["mean"] for name, score in scores.items()}
    return found


def interval(values: list[float]) -> Interval:
    """Mean, and half the width of its 95% interval by Student's t; infinite for a single value."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return values[0], math.inf
    return statistics.fmean(values), float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def values_of(results: dict, name: str, stage: str, variant: str) -> dict[str, float]:
    """{seed: figure} of the runs of a variant that have it."""
    found = {}
    for key, run in results.items():
        of_variant, seed, of_stage = key.split("/")
        if (of_variant, of_stage) == (variant, stage) and name in run:
            found[seed] = run[name]
    return found


def tabulate(results: dict, variants: list[str]) -> Table:
    """The figures that all variants have."""
    table = {}
    for stage, name, heading, _ in FIGURES:
        rows = {variant: list(values_of(results, name, stage, variant).values()) for variant in variants}
        if all(rows.values()):
            table[heading] = {variant: interval(values) for variant, values in rows.items()}
    return table


def compare(results: dict, variants: list[str]) -> Table:
    """The differences of all variants from the first, seed by seed.

    Runs of one seed share their start and their order of data, so that most of the chance cancels.
    """
    table = {}
    for stage, name, heading, _ in FIGURES:
        base, *others = (values_of(results, name, stage, variant) for variant in variants)
        rows = [[values[seed] - base[seed] for seed in sorted(base.keys() & values.keys())] for values in others]
        if rows and all(rows):
            table[heading] = dict(zip(variants[1:], map(interval, rows), strict=True))
    return table


def write_table(path: Path, results: dict, variants: list[str], settings: str) -> None:
    """A Markdown file: the line `settings`, the table, and the differences from the first variant."""
    lines = [settings, "", *table_lines(tabulate(results, variants), variants)]
    if len(variants) > 1:
        differences = table_lines(compare(results, variants), variants[1:], sign="+")
        lines += ["", f"Less {variants[0]}, seed by seed:", "", *differences]
    path.write_text("\n".join(lines) + "\n")


def table_lines(table: Table, variants: list[str], sign: str = "") -> list[str]:
    shares = {heading for _, _, heading, share in FIGURES if share}
    lines = ["| | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for heading, row in table.items():
        factor, digits, unit = (100, 1, ", %") if heading in shares else (1, 4, "")
        pairs = [(factor * mean, factor * half) for mean, half in (row[variant] for variant in variants)]
        cells = [f"{mean:{sign}.{digits}f} ± {half:.{digits}f}" for mean, half in pairs]
        lines.append(f"| {heading}{unit} | " + " | ".join(cells) + " |")
    return lines


def draw(path: Path, table: Table, variants: list[str]) -> None:
    """A panel of bars for every figure, with the intervals over seeds."""
    from PIL import Image, ImageDraw, ImageFont

    colors = ("#3b6ea5", "#d98032", "#5a9e5a", "#9a9a9a", "#8a63a8", "#b35a5a", "#4aa3a3")
    wide, high, left, columns = 230, 190, 12, 4
    rows = -(-len(table) // columns)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    picture = Image.new("RGB", (wide * columns, high * rows + 24 * (1 + len(variants) // 4)), "white")
    pen = ImageDraw.Draw(picture)
    for number, (heading, row) in enumerate(table.items()):
        x, y = wide * (number % columns) + left, high * (number // columns)
        pen.text((x, y + 6), heading, fill="black", font=font)
        top = max(mean + (half if math.isfinite(half) else 0) for mean, half in row.values()) or 1
        base, room, step = y + high - 26, high - 62, (wide - 2 * left) / len(variants)
        pen.line((x, base, x + wide - 2 * left, base), fill="black")
        for i, variant in enumerate(variants):
            mean, half = row[variant]
            x0, x1 = x + step * i + 4, x + step * (i + 1) - 4
            pen.rectangle((x0, base - room * mean / top, x1, base), fill=colors[i % len(colors)])
            pen.text((x0, base + 3), f"{mean:.3g}", fill="black", font=small)
            if math.isfinite(half):
                middle, low, up = (x0 + x1) / 2, max(0, mean - half), mean + half
                pen.line((middle, base - room * low / top, middle, base - room * up / top), fill="black", width=2)
    for i, variant in enumerate(variants):
        x, y = left + 230 * (i % 4), high * rows + 24 * (i // 4) + 4
        pen.rectangle((x, y, x + 14, y + 14), fill=colors[i % len(colors)])
        pen.text((x + 20, y), variant, fill="black", font=font)
    picture.save(path)
