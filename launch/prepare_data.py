"""Writes a data folder for training: python launch/prepare_data.py --help"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages

explain_missing_packages()

from tqdm import tqdm

from unialign_jax.data import jsonl, records
from unialign_jax.data.endpoint import Refused
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.preparation import beam, options, runner
from unialign_jax.data.preparation.pieces import Counts
from unialign_jax.data.shapes import tasks
from unialign_jax.data.sources import ALIASES, FORMATS, locations
from unialign_jax.files import one_line

DESCRIPTION = """\
Writes data folders (ArrayRecord files through TensorFlow Datasets, read by index) for launch/train.py.
"""

ROWS = "\n".join(f"  {kind}: {KINDS[kind].summary}\n    {reader.example}" for kind, reader in jsonl.READERS.items())
EXAMPLES = f"""\
formats (guessed from the source when --format is not given)
  shapes      the procedural world: all five streams, one folder each, with true targets and oracle teacher features
  json        one JSON object per line, or an array of them: the released UniAlignment code's rows, LLaVA's, plain ones;
              image paths are relative to the file, or to --image-root (jsonl is another name of it)
  folder      images with a .txt or .caption beside each; or metadata.jsonl, metadata.csv (Hugging Face's imagefolder)
  webdataset  tars of jpg, jpeg, png or webp with txt, json or cls; shards by pattern: 'data-{{000..127}}.tar'
  parquet     images as bytes, or as structs of bytes and path
  hf          a data set that save_to_disk wrote, or one by name (OWNER/NAME, OWNER/NAME:CONFIGURATION)
Sources and outputs may be URLs that fsspec opens (gs:// needs gcsfs, s3:// s3fs, hf:// huggingface_hub).

rows of the released code, by --stream
{ROWS}

columns of other rows, the first that is there; --image-key=NAME and so on name another
{options.KEYS}

texts
  What the model cannot read of a text is cut in training. --tokenizer=DIR --text-length=N counts it beforehand: give
  those of the run to come (a T5 tokenizer's folder, or "shapes" for the packaged one of the tiny configurations). With
  a text length, questions that leave no room for an answer are left out, as bad rows.

examples
  python launch/prepare_data.py --format=shapes --output=data/shapes
  python launch/prepare_data.py --format=shapes --stream=vqa --num-records=100 --seed=1 --output=data/shapes_test
  python launch/prepare_data.py --source=photos.jsonl --stream=text_to_image --output=data/photos
  python launch/prepare_data.py --source='edits/*.jsonl' --stream=edit --max-side=768 --output=data/edits
  python launch/prepare_data.py --source=my_pictures --stream=text_to_image --holdout=0.01 --output=data/mine
  python launch/prepare_data.py --source='cc12m-{{000..999}}.tar' --stream=text_to_image --output=data/cc12m
  python launch/prepare_data.py --source=my_pictures --stream=perception --maps=canny --max-side=768 --output=data/edges

two more commands, for a folder that was written (--help after the name says more)
  python launch/prepare_data.py caption --input=data/edits --endpoint=URL --model=NAME   captions of target images
  python launch/prepare_data.py encode --input=data/edits --teacher=DIR --bundle=DIR     teacher features, latents

A folder appears only when it is whole. After a kill the same command resumes. A second run with the same
shapes parameters finds the folders there and ends well; any other existing output is refused unless --overwrite is
given.
"""

LIMITS = {  # of the options that are numbers: the least and the most
    "num_records": (1, 10**9),
    "seed": (0, 2**63 - 1),
    "image_size": (tasks.MIN_IMAGE_SIZE, tasks.MAX_IMAGE_SIZE),
    "teacher_width": (0, 2**16),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--format", choices=["shapes", *ALIASES, *FORMATS], help="what to read or make (default: guessed)")
    add("--source", metavar="PATH", help="a file, a folder, a quoted pattern of them, a URL, or a data set's name (hf)")
    add("--stream", choices=tuple(KINDS), help="the kind of records (shapes: only this one)")
    add("--output", required=True, metavar="DIR", help="folder to write (shapes: a folder per stream)")
    add("--overwrite", action="store_true", help="replace existing data folders")

    group = parser.add_argument_group("shapes")
    add = group.add_argument
    add("--num-records", type=int, metavar="N", help="records per stream (default 15,000 to 60,000)")
    add("--seed", type=int, default=0, help="another seed is another world (default 0)")
    add("--image-size", type=int, default=64, help="pixels a side (default 64)")
    add("--teacher-width", type=int, default=64, help="oracle features (default 64, 0 for none)")

    options.add_arguments(parser)

    arguments = parser.parse_args(argv)
    if arguments.format == "shapes" and (arguments.source or arguments.tokenizer or arguments.text_length):
        parser.error("--format=shapes makes its data and takes no --source, --tokenizer and --text-length")
    if arguments.format != "shapes" and not (arguments.source and arguments.stream):
        name = f"--format={arguments.format}" if arguments.format else "a run without --format=shapes"
        parser.error(f"{name} needs --source and --stream")
    if arguments.text_length is not None and not arguments.tokenizer:
        parser.error("--text-length needs --tokenizer, whose tokens it counts")
    if arguments.runner_options is not None and not arguments.runner:
        parser.error("--runner-options needs --runner")
    for name, (least, most) in {**LIMITS, **options.LIMITS}.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {least} to {most}")
    return arguments


def prepare_shapes(arguments: argparse.Namespace) -> None:
    """Writes the procedural world and says what was written."""
    written = tasks.write_shapes(
        arguments.output,
        arguments.num_records,
        seed=arguments.seed,
        image_size=arguments.image_size,
        teacher_width=arguments.teacher_width,
        streams=(arguments.stream,) if arguments.stream else tasks.STREAMS,
        overwrite=arguments.overwrite,
        progress=lambda stream, total, items: tqdm(items, desc=stream, total=total, unit="record", disable=None),
    )
    for stream, is_new in written.items():
        _print_folder(Path(arguments.output) / stream, "written" if is_new else "already there")


def prepare_source(arguments: argparse.Namespace) -> None:
    """Writes one stream from a source and says what was written and what was skipped."""
    plan = options.make_plan(arguments)
    beam_options = None
    if arguments.runner:
        beam.check()
        beam_options = [f"--runner={arguments.runner}", *(arguments.runner_options or "").split()]
    # disable=None: no bar where nobody looks, in a file or a pipe
    with tqdm(desc=arguments.stream, unit="row", unit_scale=True, disable=None) as bar:

        def progress(counts: Counts) -> None:
            bar.set_postfix(bad=counts.num_bad, refresh=False)
            bar.update(counts.num_rows - bar.n)

        try:
            result = runner.prepare(plan, processes=arguments.processes, beam_options=beam_options, progress=progress)
        except runner.TooManyBadRows as error:
            bar.close()
            _print_counts(error.counts)
            raise
    _print_counts(result.counts)
    if result.resumed:
        print(f"{result.resumed} piece(s) were there of a run before")
    for folder, number in result.folders.items():
        if locations.is_url(folder):
            print(f"{folder}: written, {number} {arguments.stream} records")
        else:
            _print_folder(Path(folder), "written")
    for line in [*result.lengths.lines(), *result.lengths.cuts()]:
        print(f"  {one_line(line, 1000)}")


def _print_folder(folder: Path, state: str) -> None:
    metadata = records.read_metadata(folder)
    print(
        f"{folder}: {state}, {metadata.num_records} {metadata.kind} records, "
        f"{metadata.num_bytes / 1e6:.1f} MB in {len(metadata.shards)} file(s)"
    )


def _print_counts(counts: Counts) -> None:
    if counts.num_bad:
        print(f"skipped {counts.num_bad} of {counts.num_rows} rows:")
        for reason, count in counts.reasons.most_common():
            print(f"  {count} x {reason}")
        print("first bad rows:")
        for line in counts.first_bad:
            print(f"  {line}")
    if counts.num_records > counts.num_rows - counts.num_bad:
        print(f"{counts.num_rows - counts.num_bad} rows gave {counts.num_records} records")
    for note, count in counts.notes.most_common():
        print(f"{count} {note}")


def run_part(name: str, argv: list[str]) -> None:
    """`caption` or `encode`, which imports JAX."""
    if name == "encode":
        from unialign_jax.training import encode as part
    else:
        from unialign_jax.data.preparation import captions as part
    parser = Parser(
        prog=f"prepare_data.py {name}",
        description=part.DESCRIPTION,
        epilog=part.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    part.add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        part.run(arguments, os.environ.get("OPENAI_API_KEY", "")) if name == "caption" else part.run(arguments)
    except (ValueError, OSError, Refused) as error:
        sys.exit(f"error: {one_line(str(error), 1000)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command resumes")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    if argv and argv[0] in ("caption", "encode"):
        return run_part(argv[0], argv[1:])
    arguments = parse_arguments(argv)
    began = time.monotonic()
    try:
        prepare_shapes(arguments) if arguments.format == "shapes" else prepare_source(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(str(error), 1000)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the output folder is as it was; the same command resumes")
    print(f"done in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
