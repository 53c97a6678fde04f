"""Scores of a model: python launch/evaluate.py --help"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.environment import explain_missing_packages

explain_missing_packages()

DESCRIPTION = """\
Runs a model on a benchmark and scores what it makes.

  shapes   the procedural world: held-out scenes for every task, and exact figures from a detector of its shapes
"""

EXAMPLES = """\
examples
  python launch/evaluate.py shapes --bundle=runs/quickstart --output=scores/quickstart
  python launch/evaluate.py shapes --bundle=runs/tiny3 --tasks=text_to_image,caption --scenes=64 --output=scores/tiny3

The output folder gets scores.json (means, standard errors, counts, settings) and, for each task, worst_TASK.png or .md
with the records of the lowest score. What each figure means: docs/evaluation.md.
"""


def parse_arguments(argv):
    from unialign_jax.evaluation.shapes_run import HELD_OUT_SEED, TASKS

    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    shapes = suites.add_parser("shapes", help="the procedural world")
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
    shapes.add_argument("--steps", type=int, metavar="N", help="of the image sampler; default the model's")
    shapes.add_argument("--guidance-scale", type=float, metavar="X", help="default the model's")
    decodings = "ancestral, confidence, entropy, top_k"
    shapes.add_argument("--decoding", help=f"of texts: {decodings}; default the model's")
    shapes.add_argument("--temperature", type=float, metavar="X", help="of texts; default the model's")
    shapes.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    for name, least in (("scenes", 1), ("seed", 0), ("batch", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}, expected at least {least}")
    if arguments.tasks is not None:
        arguments.tasks = [name.strip() for name in arguments.tasks.split(",")]
        unknown = [name for name in arguments.tasks if name not in TASKS]
        if unknown:
            parser.error(f"--tasks names {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    return arguments


def open_model(folder: Path, weights: str | None, batch: int):
    """The pipeline of a bundle or a run's folder, and what tells this model from others."""
    from unialign_jax import Pipeline, bundle
    from unialign_jax.training import runs

    folder = bundle.locate(folder)
    if bundle.is_bundle(folder) or not runs.is_run(folder):
        if weights:
            raise ValueError(f"--weights goes with a run's folder, and {folder} is none")
        return Pipeline.from_bundle(folder, max_batch=batch), {"bundle": str(folder)}
    run = runs.open_to_sample(folder, weights)
    return Pipeline.from_run(run, max_batch=batch), {"run": str(folder), "step": run.step, "weights": run.weights}


def evaluate_shapes(arguments) -> dict:
    """Writes the output folder; returns the content of its scores.json."""
    from tqdm import tqdm

    from unialign_jax import files
    from unialign_jax.evaluation import shapes, shapes_run

    files.refuse_existing(arguments.output, overwrite=arguments.overwrite, foreign=foreign_names)
    pipeline, model = open_model(Path(arguments.bundle), arguments.weights, arguments.batch)
    tasks = arguments.tasks or shapes_run.tasks_of(pipeline.config)
    image_options = given(steps=arguments.steps, guidance_scale=arguments.guidance_scale)
    text_options = given(decoding=arguments.decoding, temperature=arguments.temperature)
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
            print(shapes_run.table(task, content["scores"][task], time.monotonic() - began), flush=True)
        (folder / "scores.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def given(**options) -> dict:
    """The options that are; the pipeline knows the model's own for the others."""
    return {key: value for key, value in options.items() if value is not None}


def foreign_names(folder: Path) -> list[str]:
    """Names in a folder of scores that this command does not write."""
    from unialign_jax.evaluation.shapes_run import TASKS

    own = {"scores.json"} | {f"worst_{task}{end}" for task in TASKS for end in (".png", ".md")}
    return sorted(path.name for path in folder.iterdir() if path.name not in own or not path.is_file())


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        evaluate_shapes(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        from unialign_jax.files import first_line

        if arguments.traceback:
            raise
        hint = ": a smaller --batch takes less" if "RESOURCE_EXHAUSTED" in str(error) else ""
        print(f"error: {first_line(error, 500)}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
