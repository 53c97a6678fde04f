"""Accuracies against samples seen and seconds spent, of runs with validation: python launch/learning_curve.py --help"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

DESCRIPTION = """\
Reads the validations of a run (--config.validation.every, --config.validation.scenes) and prints a table of accuracies
by samples seen and seconds of training; --output draws them too. Stages that follow one another are one curve: name
their folders in order.
"""
EXAMPLES = """\
examples:
  python launch/learning_curve.py runs/stage1
  python launch/learning_curve.py runs/stage1 runs/stage2 --figures=text_to_image/exact,edit/exact --output=curve.png
"""
FIGURES = "text_to_image/color,text_to_image/place,text_to_image/shape,text_to_image/exact,caption/parses,caption/true"
COLORS = ("#3b6ea5", "#d98032", "#5a9e5a", "#b35a5a", "#8a63a8", "#4aa3a3", "#9a9a9a", "#c0a000", "#222222", "#e377c2")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one stage after another")
    parser.add_argument("--figures", default=FIGURES, metavar="A,B", help="TASK/FIGURE of evaluation (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="draw the curves into this file")
    arguments = parser.parse_args(argv)
    if arguments.output and arguments.output.suffix.lower() != ".png":
        parser.error(f"--output is {arguments.output}, expected a name that ends in .png")
    arguments.figures = [name.strip() for name in arguments.figures.split(",") if name.strip()]
    return arguments


def read_curve(runs: list[Path], figures: list[str]) -> list[dict]:
    """[{"samples", "seconds", figure: value}] of every validation, in order.

    Seconds count training steps alone. Raises ValueError for a run without validations.
    """
    from unialign_jax.files import read_json
    from unialign_jax.training.metrics import read_metrics
    from unialign_jax.training.runs import latest_step

    points, samples_before, seconds = [], 0, 0.0
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ValueError(f"{run} has no metrics.jsonl: expected the folder of a run")
        batch_size, step, found = read_json(run / "config.json")["batch_size"], 0, {}
        for row in read_metrics(run):
            if "seconds_per_step" in row:
                seconds += (row["step"] - step) * row["seconds_per_step"]
                step = max(step, row["step"])
            if row["stream"].startswith("validation/"):
                point = found.setdefault(row["step"], {"samples": samples_before + row["step"] * batch_size})
                point["seconds"] = seconds
                task = row["stream"].removeprefix("validation/")
                point |= {name: row[key] for key in row if (name := f"{task}/{key}") in figures}
        if not found:
            raise ValueError(f"{run} has no validations: train with --config.validation.every=N")
        points += found.values()
        # The last steps may come after the last row; the newest checkpoint counts them.
        last = latest_step(run) if (run / "checkpoints").is_dir() else 0
        samples_before += max(step, last, *found) * batch_size
    return points


def table(points: list[dict], figures: list[str]) -> str:
    lines = ["| samples | seconds | " + " | ".join(figures) + " |", "|---" * (2 + len(figures)) + "|"]
    for point in points:
        cells = [f"{point[name]:.3f}" if name in point else "" for name in figures]
        lines.append(f"| {point['samples']:,} | {point['seconds']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, points: list[dict], figures: list[str]) -> None:
    """A curve over samples for each figure, a share from 0 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    wide, high, left, top, bottom = 760, 380, 46, 16, 34
    legend = 20 * -(-len(figures) // 3)
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (wide, high + legend), "white")
    pen = ImageDraw.Draw(picture)
    most = max(point["samples"] for point in points)
    x = lambda samples: left + (wide - left - 20) * samples / most  # noqa: E731
    y = lambda share: top + (high - top - bottom) * (1 - share)  # noqa: E731
    for tenth in range(0, 11, 2):
        pen.line((left, y(tenth / 10), wide - 20, y(tenth / 10)), fill="#dddddd")
        pen.text((12, y(tenth / 10) - 8), f"{tenth / 10:.1f}", fill="black", font=font)
    tick = 10 ** math.floor(math.log10(most))
    tick = tick / 5 if most / tick < 2 else tick / 2 if most / tick < 5 else tick
    for number in range(1, int(most / tick) + 1):
        pen.text((x(number * tick) - 20, high - bottom + 6), f"{number * tick:,.0f}", fill="black", font=font)
    pen.text((left, high - bottom + 6), "samples", fill="#555555", font=font)
    for number, name in enumerate(figures):
        color = COLORS[number % len(COLORS)]
        places = [(x(point["samples"]), y(min(max(point[name], 0), 1))) for point in points if name in point]
        if len(places) > 1:
            pen.line(places, fill=color, width=3)
        corner = (left + 235 * (number % 3), high + 20 * (number // 3))
        pen.line((corner[0], corner[1] + 8, corner[0] + 20, corner[1] + 8), fill=color, width=3)
        pen.text((corner[0] + 26, corner[1]), name, fill="black", font=font)
    picture.save(path)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def work():
        points = read_curve(arguments.runs, arguments.figures)
        print(table(points, arguments.figures))
        if arguments.output:
            draw(arguments.output, points, arguments.figures)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
