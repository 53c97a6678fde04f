"""The `shapes` part of launch/evaluate.py: scores on held-out scenes of the procedural world.

The output folder gets scores.json (means, standard errors, counts, settings), for each task worst_TASK.png or .md with
the records of the lowest score, and what a run of every suite has: settings.json, scores.jsonl and a report.
"""

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from unialign_jax import __version__, files
from unialign_jax.command_line import Parser
from unialign_jax.data.kinds import task_name
from unialign_jax.evaluation import reporting, shapes, shapes_run
from unialign_jax.evaluation.running import SCORES, SETTINGS
from unialign_jax.evaluation.shapes_run import HELD_OUT_SEED, TASKS
from unialign_jax.evaluation.shapes_suite import PICTURES, Shapes, write_rows
from unialign_jax.evaluation.suite import Request, write_scores
from unialign_jax.inference.options import OPTIONS

# The options that it offers, of those of the pipeline.
IMAGE_OPTIONS, TEXT_OPTIONS = ("steps", "guidance_scale"), ("decoding", "temperature")


def add_arguments(shapes: argparse.ArgumentParser) -> None:
    """The options of the command."""
    shapes.add_argument("--bundle", required=True, metavar="DIR", help="the model: a bundle, a run's folder, or demo")
    shapes.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    shapes.add_argument("--overwrite", action="store_true", help="replace the scores that are there")
    shapes.add_argument(
        "--tasks", metavar="A,B", help=f"some of {', '.join(TASKS)}; all that the model was trained for by default"
    )
    shapes.add_argument("--scenes", type=int, default=256, metavar="N", help="records of each task (%(default)s)")
    shapes.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the held-out world (%(default)s)")
    shapes.add_argument("--weights", choices=["raw", "ema"], help="of a run: default its average, if it keeps one")
    shapes.add_argument("--batch", type=int, default=32, metavar="N", help="most samples at a time (%(default)s)")
    for name in (*IMAGE_OPTIONS, *TEXT_OPTIONS):
        option, whose = OPTIONS[name], "images" if name in IMAGE_OPTIONS else "texts"
        metavar = "|".join(option.choices) or "X"
        text = f"of {whose}: {option.help}; default the model's"
        shapes.add_argument(f"--{name.replace('_', '-')}", type=option.parse, metavar=metavar, help=text)


def check_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """An error where options are out of range."""
    parser.check_least(arguments, scenes=1, seed=0, batch=1)
    if arguments.tasks is not None:
        arguments.tasks = [task_name(name.strip()) for name in arguments.tasks.split(",")]
        unknown = [name for name in arguments.tasks if name not in TASKS]
        if unknown:
            parser.error(f"--tasks names {unknown[0]!r}, expected some of {', '.join(TASKS)}")


def run(arguments: argparse.Namespace) -> None:
    """Writes the output folder."""
    from unialign_jax.inference.opening import ModelSource

    files.refuse_existing(arguments.output, overwrite=arguments.overwrite, foreign=foreign_names)
    source = ModelSource(arguments.bundle, weights=arguments.weights)
    pipeline, run, model = source.open(max_batch=arguments.batch), source.run, {"bundle": str(source.folder)}
    if run:
        model = {"run": str(source.folder), "step": run.step, "weights": run.weights}
    tasks = arguments.tasks or shapes_run.tasks_of(pipeline.config)
    image_options, text_options = given(arguments, IMAGE_OPTIONS), given(arguments, TEXT_OPTIONS)
    content = {
        "suite": "shapes",
        "model": model,
        "settings": {
            "scenes": arguments.scenes,
            "seed": arguments.seed,
            "image": image_options,
            "text": text_options,
        },
        "scores": {},
    }
    rows = []
    with files.replacing_folder(arguments.output, overwrite=arguments.overwrite, foreign=foreign_names) as folder:
        for task in tasks:
            began = time.monotonic()
            with tqdm(total=arguments.scenes, desc=task, unit="record", disable=None) as bar:
                results = shapes_run.run_task(
                    pipeline,
                    task,
                    arguments.scenes,
                    image_options=image_options,
                    text_options=text_options,
                    seed=arguments.seed,
                    batch=arguments.batch,
                    progress=bar.update,
                )
            content["scores"][task] = shapes.summary([result.scores for result in results])
            shapes_run.write_worst(folder, task, results)
            rows += write_rows(folder, task, results)
            print(shapes_run.table(task, content["scores"][task], time.monotonic() - began), flush=True)
        (folder / "scores.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_report(folder, content["settings"], source.stamp(None, None), rows)
    print(f"wrote {arguments.output}")


def write_report(folder: Path, asked: dict, model: dict, rows: list) -> None:
    """Writes settings.json, scores.jsonl and the report."""
    settings = {"suite": "shapes", "request": {**asked, "mode": ""}, "model": model, "items": len(rows), "data": {}}
    settings["unialign_jax"] = __version__
    files.write_json(folder / SETTINGS, settings)
    write_scores(folder / SCORES, rows)
    reporting.write(Shapes(), Request(data=folder, output=folder, mode=""), settings, rows)


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """The options that are given; the pipeline knows the model's own values for the others."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def foreign_names(folder: Path) -> list[str]:
    """Names in a folder of scores that this command does not write."""
    own = {"scores.json", SETTINGS, SCORES, reporting.JSON, reporting.MARKDOWN, reporting.PAGE}
    own |= {f"worst_{task}{end}" for task in TASKS for end in (".png", ".md")}
    pictures = {folder / PICTURES / task for task in TASKS}
    foreign = [path.name for path in folder.iterdir() if path.name not in own | {PICTURES}]
    foreign += [path.name for path in folder.iterdir() if path.name in own and not path.is_file()]
    if (folder / PICTURES).is_dir():
        foreign += [f"{PICTURES}/{path.name}" for path in (folder / PICTURES).iterdir() if path not in pictures]
    return sorted(foreign)
