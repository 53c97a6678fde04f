"""Images and texts from a bundle: python launch/generate.py --help"""

import argparse
import functools
import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command, sigterm_interrupts

explain_missing_packages()

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from unialign_jax.data.kinds import TASKS, task_name
from unialign_jax.files import check_writable
from unialign_jax.inference import job_runner, jobs
from unialign_jax.inference.options import IMAGE_TASKS, OPTIONS, TEXT_TASKS, add_arguments, flag

log = logging.getLogger("generate")

DESCRIPTION = """\
Makes images and texts with the model of a bundle (a folder written by launch/convert.py), or of a training run's newest
checkpoint: one call of one task, or a file of many jobs of any tasks, in full batches.
"""

EXAMPLES = """\
tasks
  text_to_image    an image from --prompt
  edit             --image changed as --instruction says; it keeps its size and aspect unless told otherwise
  perception       a map of --image: --kind=canny, depth or pose
  personalization  a new image, from --prompt, of the subjects in one to four --image
  caption          --image described in words
  vqa              the answer to --question about --image

examples
  python launch/generate.py --bundle=DIR --task=text_to_image --prompt="a red fox in the snow" --output=fox.png
  python launch/generate.py --bundle=DIR --task=text_to_image --prompt="a red fox in the snow" --images-per-prompt=4 \\
      --negative-prompt="blurry" --height=768 --width=1024 --steps=20 --solver=unipc --output=foxes.png
  python launch/generate.py --bundle=DIR --task=edit --image=fox.png --instruction="make it summer" \\
      --guidance-scale=9 --output=summer.png
  python launch/generate.py --bundle=DIR --task=perception --kind=depth --image=fox.png --output=depth.png
  python launch/generate.py --bundle=DIR --task=personalization --image=dog.png --image=hat.png \\
      --prompt="the dog wears the hat" --output=dog_in_hat.png
  python launch/generate.py --bundle=DIR --task=caption --image=fox.png --max-tokens=64
  python launch/generate.py --bundle=DIR --task=vqa --image=fox.png --question="What animal is this?"
  python launch/generate.py --bundle=DIR --lora=style.safetensors:0.8 --task=text_to_image --prompt="a red fox" \\
      --output=fox.png
  python launch/generate.py --bundle=DIR --jobs=jobs.jsonl --output=results --batch=16

jobs
  A jobs file has one JSON object a line: "task", its "prompt", "instruction" or "question", its "image" or "images"
  (paths relative to the file), an "id" if you like, and any option of the task above, with _ for -:
    {"id": "fox", "task": "text_to_image", "prompt": "a red fox", "seed": 3, "guidance_interval": [0.2, 0.9]}
    {"task": "caption", "image": "photos/1.jpg"}
  The output folder gets ID.png for every image (an id such as animals/fox makes folders) and a line in results.jsonl
  for every job. A bad job is reported and passed over (the exit status is then 1). After an interruption the same
  command resumes, and tries failed jobs again; with --overwrite it redoes changed jobs. More: docs/inference.md.
"""


def parse_arguments(argv):
    parser = Parser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=118),
        allow_abbrev=False,
        usage="python launch/generate.py --bundle=DIR (--task=TASK [options] | --jobs=FILE) [--output=PATH]",
    )
    parser.add_argument("--bundle", required=True, metavar="DIR", help="the model: a bundle, or a run's folder")
    parser.add_argument("--jobs", metavar="FILE", help="a file of jobs, instead of --task and its options")
    parser.add_argument("--output", metavar="PATH", help="PNG file; text file (printed in any case); folder of --jobs")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, or what other jobs made")

    task = parser.add_argument_group("the task")
    task.add_argument("--task", choices=TASKS, type=task_name, metavar="TASK", help="see below")
    task.add_argument("--prompt", metavar="TEXT", help="of text_to_image and personalization")
    task.add_argument("--instruction", metavar="TEXT", help="of edit; of perception, instead of the kind's own")
    task.add_argument("--question", metavar="TEXT", help="of vqa")
    task.add_argument("--image", metavar="FILE", action="append", help="once for each image")
    add_arguments(parser)

    model = parser.add_argument_group("the machine")
    model.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        help="adapters of the model, once for each (docs/finetuning.md)",
    )
    model.add_argument("--batch", type=int, default=8, metavar="N", help="most samples at a time (default %(default)s)")
    model.add_argument(
        "--reproducible", action="store_true", help="a seed gives the same bytes alone and among others; no batches"
    )
    model.add_argument("--devices", type=int, metavar="N", help="of --jobs: default all GPUs or TPU chips, on a CPU 1")
    model.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    model.add_argument("--quantize", choices=["int8", "w8a8", "fp8"], help="weights of 8 bits; w8a8, fp8: inputs too")
    model.add_argument("--low-memory", action="store_true", help="on the device only what is in use; slower")
    model.add_argument("--attention", default="auto", metavar="NAME", help="auto, xla, cudnn (GPU) or splash (TPU)")
    model.add_argument("--weights", choices=["raw", "ema"], help="of a run: default its average, if it keeps one")
    model.add_argument(
        "--no-verify", dest="verify", action="store_false", help="read the bundle without checking its files' hashes"
    )
    model.add_argument(
        "--compilation-cache",
        metavar="DIR",
        default="",
        help="keeps compiled programs; none: nothing (default ~/.cache/unialign_jax/compiled)",
    )
    model.add_argument("--traceback", action="store_true", help="show where an error came from")

    options = parser.parse_args(argv)
    keys = ("prompt", "instruction", "question", "image", *OPTIONS)
    given = [key for key in keys if getattr(options, key) is not None]
    if not 1 <= options.batch <= 2**16:
        parser.error(f"--batch is {options.batch}, expected 1 to {2**16}")
    if options.devices is not None and not options.jobs:
        parser.error("--devices goes with --jobs")
    if options.jobs:
        if options.task or given:
            parser.error(f"{flag('task' if options.task else given[0])} goes into the lines of the jobs file")
        if not options.output:
            parser.error("--jobs needs --output, a folder")
    elif not options.task:
        parser.error("give --task, or --jobs for many")
    elif options.task in IMAGE_TASKS and Path(options.output or "").suffix.lower() != ".png":
        parser.error(f"{options.task} needs --output, a name that ends in .png")
    options.fields = {"task": options.task} | {key: getattr(options, key) for key in given}
    if "image" in options.fields:
        options.fields["images"] = options.fields.pop("image")
    return options


class Model:
    """The model of a command line: checked at once, opened when it is needed."""

    def __init__(self, options):
        from unialign_jax.inference.opening import ModelSource

        self._options = options
        source = {"weights": options.weights, "verify": options.verify, "loras": options.lora or ()}
        self._source = ModelSource(options.bundle, **source)
        self._source.check_complete()
        self.stamp = self._source.stamp(options.dtype, options.quantize, options.reproducible)
        # All of it that changes results.
        self.identity = f"{self._source.digest} {options.dtype} {options.quantize}"
        if options.reproducible:
            self.identity += " reproducible"

    def open(self, devices: int | None = 1) -> list:
        """A pipeline for each of so many devices; None is all."""
        from unialign_jax.inference.opening import devices_to_use
        from unialign_jax.parallel.compiled import keep_compiled

        options = self._options
        keep_compiled(options.compilation_cache)
        places = devices_to_use(devices)
        log.info("opening %s%s", options.bundle, f" on {len(places)} devices" if len(places) > 1 else "")
        how = {
            name: getattr(options, name) for name in ("dtype", "quantize", "low_memory", "attention", "reproducible")
        }
        return [self._source.open(max_batch=options.batch, device=place, **how) for place in places]


def generate(options) -> int:
    """One call of one task."""
    began = time.monotonic()
    job = jobs.make_job(options.fields, Path(), named=flag)
    model = Model(options)
    paths = output_paths(options, job)
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
        if os.path.lexists(path) and not options.overwrite:
            raise FileExistsError(f"{path} is there already; choose another --output, or give --overwrite")
        check_writable(path.parent)
    made = job_runner.make(job, model.open()[0], options.batch)
    if job.task in TEXT_TASKS:
        print(made[0])
        for path in paths:
            job_runner.save_text(made[0] + "\n", path)
        return 0
    for number, (path, image) in enumerate(zip(paths, made, strict=True)):
        job_runner.save_png(image, path, job_runner.describe(image, job_runner.Sample(job, number), model.stamp))
        print(f"wrote {path}")
    print(f"done in {time.monotonic() - began:.1f} s")
    return 0


def output_paths(options, job) -> list[Path]:
    """The files that a call writes: --output, or NAME_0.png, NAME_1.png, ... for several images."""
    if not options.output:
        return []
    output, count = Path(options.output), job.images_per_prompt
    return [output] if count == 1 else [output.with_stem(f"{output.stem}_{i}") for i in range(count)]


def run_jobs(options) -> int:
    """A file of jobs."""
    model = Model(options)
    read = jobs.read_jobs(options.jobs, model.identity)
    results = job_runner.Results(options.output, model.stamp)
    todo = results.begin(read, overwrite=options.overwrite)
    if results.earlier:
        print(f"{results.earlier} of {len(read)} jobs are done already")
    try:
        if todo:
            pipelines = model.open(options.devices)
            if not options.low_memory:
                for pipeline in pipelines:
                    pipeline.load()  # damaged weights are one error, not one for each job
            with tqdm(total=len(read), initial=len(read) - len(todo), unit="job", disable=None) as bar:
                job_runner.run(todo, pipelines, results, options.batch, bar.update)
    except KeyboardInterrupt as stop:
        done = results.earlier + results.done
        raise type(stop)(f"{done} of {len(read)} jobs are done and kept; the same command resumes there") from None
    print(f"{results.earlier + results.done} of {len(read)} jobs are done, {results.failed} failed: {results.path}")
    return 1 if results.failed else 0


def main(argv=None) -> int:
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("unialign_jax").setLevel(logging.INFO)  # what is being read, compiled and sampled
    log.setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # the storage library logs its own tracebacks; the error raised says it all
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def work():
        with sigterm_interrupts(), logging_redirect_tqdm():
            return run_jobs(options) if options.jobs else generate(options)

    hint = "; try a smaller --batch, --low-memory or --quantize=int8"
    return run_command(work, traceback=options.traceback, hint=hint)


if __name__ == "__main__":
    sys.exit(main())
