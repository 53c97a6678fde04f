"""Weighs each alignment term in the shapes world (paper, Fig. 8): python launch/ablate.py --help"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unialign_jax.environment import explain_missing_packages

explain_missing_packages()

DESCRIPTION = """\
Trains the tiny stages with and without the cross-modal and the intrinsic-modal term, each variant from several seeds,
and compares what they learn: losses on held-out records, and the accuracies of `launch/evaluate.py shapes`.

Every run is `launch/train.py`: stage 1 from random weights, then stage 2 with text to image and edits alone. What is
finished is kept: the same command goes on where it stopped. Writes OUTPUT/results.json, table.md and ablation.png.
"""
EXAMPLES = """\
examples:
  python launch/prepare_data.py --format=shapes --output=data/shapes
  python launch/ablate.py --output=runs/ablation
  python launch/ablate.py --output=runs/trial --variants=both,neither --seeds=1 --steps=200 --edit-steps=100 --scenes=32
"""
# What each variant changes in the configuration of both stages.
VARIANTS = {
    "both": [],
    "no_cross_modal": ["loss_weights.cross_modal=0"],
    "no_intrinsic_modal": ["loss_weights.intrinsic_modal=0"],
    "neither": ["loss_weights.cross_modal=0", "loss_weights.intrinsic_modal=0"],
    "one_way": ["cross_modal.direction=image_to_text"],
    "cross_modal_x4": ["loss_weights.cross_modal=0.2"],
    "intrinsic_modal_x5": ["loss_weights.intrinsic_modal=0.5"],
}
# The figures of the table: (stage, name in a run's results, heading, whether it is a share).
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


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"), metavar="DIR", help="default %(default)s")
    default = "both,no_cross_modal,no_intrinsic_modal,neither"
    parser.add_argument(
        "--variants", default=default, metavar="A,B", help=f"of {', '.join(VARIANTS)} (default {default})"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, metavar="N", help="of stage 1 (%(default)s)")
    parser.add_argument("--edit-steps", type=int, default=400, metavar="N", help="of stage 2; 0: none (%(default)s)")
    parser.add_argument("--scenes", type=int, default=128, metavar="N", help="evaluated of each task (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs of both stages")
    arguments = parser.parse_args(argv)
    arguments.variants = [name.strip() for name in arguments.variants.split(",")]
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants names {unknown[0]!r}, expected some of {', '.join(VARIANTS)}")
    for name, least in (("seeds", 1), ("steps", 1), ("edit_steps", 0), ("scenes", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least {least}")
    return arguments


def run_changes(arguments, variant: str, seed: int, stage: str) -> list[str]:
    """The configuration of one run, as changes to that of its stage."""
    steps = arguments.steps if stage == "stage1" else arguments.edit_steps
    changes = [
        f"num_steps={steps}",
        f"seed={seed}",
        f"checkpoint.every={steps}",
        "samples.count=0",
        f"validation.every={steps}",
        f"compilation_cache={arguments.output.absolute() / 'compiled'}",
        "validation.records=256",
        f"streams.text_to_image.path={arguments.data / 'text_to_image'}",
    ]
    if stage == "stage2":
        changes += [
            f"init_from={run_folder(arguments, variant, seed, 'stage1')}",
            f"streams.edit.path={arguments.data / 'edit'}",
            "streams.text_to_image.weight=1",
            "streams.perception.weight=0",
            "streams.personalization.weight=0",
        ]
    return [*changes, *VARIANTS[variant], *arguments.set]


def run_folder(arguments, variant: str, seed: int, stage: str) -> Path:
    return arguments.output / variant / f"seed{seed}" / stage


def train(arguments, variant: str, seed: int, stage: str) -> None:
    """Trains one run, or goes on with it; its log is STAGE.log beside its folder. Raises ValueError when it fails."""
    folder = run_folder(arguments, variant, seed, stage)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "launch" / "train.py", "--noprogress", f"--config={ROOT}/configs/{stage}.py:tiny"]
    command += [f"--workdir={folder}"]
    command += [f"--config.{change}" for change in run_changes(arguments, variant, seed, stage)]
    path = folder.with_suffix(".log")
    with open(path, "a+") as log:
        status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
            raise ValueError(f"training {folder} ended with status {status}: {last} (all of it is in {path})")


def evaluate(arguments, folder: Path, stage: str) -> dict[str, float]:
    """The figures of a finished run: {"validation/...": loss, "task/score": mean}."""
    from unialign_jax import Pipeline
    from unialign_jax.evaluation import shapes, shapes_run

    found = validation_losses(folder)
    pipeline = Pipeline.from_bundle(folder, max_batch=64)
    for task in TASKS[stage]:
        results = shapes_run.run_task(pipeline, task, arguments.scenes)
        for name, score in shapes.summary([result.scores for result in results]).items():
            found[f"{task}/{name}"] = score["mean"]
    return found


def validation_losses(folder: Path) -> dict[str, float]:
    """The last losses on held-out records that a run wrote, by "validation/STREAM/NAME"."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["stream"].startswith("validation/"):
            found |= {f"{row['stream']}/{key}": value for key, value in row.items() if key not in ("step", "stream")}
    return found


def interval(values: list[float]) -> tuple[float, float]:
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


def tabulate(results: dict, variants: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """{heading: {variant: (mean, half width of its interval)}} of what all variants have."""
    table = {}
    for stage, name, heading, _ in FIGURES:
        rows = {variant: list(values_of(results, name, stage, variant).values()) for variant in variants}
        if all(rows.values()):
            table[heading] = {variant: interval(values) for variant, values in rows.items()}
    return table


def compare(results: dict, variants: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """The differences of all variants to the first, as `tabulate`; seed by seed, for a seed has one start and one order
    of data, so that much of the chance falls out."""
    table = {}
    for stage, name, heading, _ in FIGURES:
        base, *others = (values_of(results, name, stage, variant) for variant in variants)
        rows = [[values[seed] - base[seed] for seed in sorted(base.keys() & values.keys())] for values in others]
        if rows and all(rows):
            table[heading] = dict(zip(variants[1:], map(interval, rows), strict=True))
    return table


def write_table(path: Path, results: dict, variants: list[str], settings: str) -> None:
    lines = [settings, "", *table_lines(tabulate(results, variants), variants)]
    if len(variants) > 1:
        differences = table_lines(compare(results, variants), variants[1:], sign="+")
        lines += ["", f"Less {variants[0]}, seed by seed:", "", *differences]
    path.write_text("\n".join(lines) + "\n")


def table_lines(table, variants, sign="") -> list[str]:
    shares = {heading for _, _, heading, share in FIGURES if share}
    lines = ["| | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for heading, row in table.items():
        factor, digits, unit = (100, 1, ", %") if heading in shares else (1, 4, "")
        pairs = [(factor * mean, factor * half) for mean, half in (row[variant] for variant in variants)]
        cells = [f"{mean:{sign}.{digits}f} ± {half:.{digits}f}" for mean, half in pairs]
        lines.append(f"| {heading}{unit} | " + " | ".join(cells) + " |")
    return lines


def draw(path: Path, table, variants) -> None:
    """Bars of every figure, a panel each, with the 95% intervals over seeds."""
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


def ablate(arguments) -> None:
    import jax

    from unialign_jax import files

    # Runs of one shape have programs in common: what one has compiled, the next loads.
    jax.config.update("jax_compilation_cache_dir", str(arguments.output.absolute() / "compiled"))
    path = arguments.output / "results.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": arguments.steps,
        "edit_steps": arguments.edit_steps,
        "scenes": arguments.scenes,
        "set": arguments.set,
    }
    content = files.read_json(path) if path.exists() else {"settings": settings, "runs": {}}
    if content.get("settings") != settings:
        found = content.get("settings")
        raise ValueError(f"{path} was made with {found}: choose another --output, or give the same options")
    stages = ("stage1", "stage2") if arguments.edit_steps else ("stage1",)
    cells = [(v, s, t) for t in stages for s in range(arguments.seeds) for v in arguments.variants]
    for number, (variant, seed, stage) in enumerate(cells):
        key = f"{variant}/seed{seed}/{stage}"
        if key in content["runs"]:
            continue
        began = time.monotonic()
        train(arguments, variant, seed, stage)
        content["runs"][key] = evaluate(arguments, run_folder(arguments, variant, seed, stage), stage)
        files.write_json(path, content, indent=1)
        print(f"{number + 1} of {len(cells)}: {key}, {time.monotonic() - began:.0f} s", flush=True)
    table = tabulate(content["runs"], arguments.variants)
    told = (
        f"{arguments.seeds} seeds, {arguments.steps} steps of stage 1 and {arguments.edit_steps} of stage 2; mean and "
        f"95% interval over seeds; accuracies over {arguments.scenes} held-out scenes."
    )
    write_table(arguments.output / "table.md", content["runs"], arguments.variants, told)
    draw(arguments.output / "ablation.png", table, arguments.variants)
    print((arguments.output / "table.md").read_text())


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        ablate(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        from unialign_jax.files import first_line

        print(f"error: {first_line(error, 500)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
