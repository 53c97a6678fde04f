"""Writes a data folder for training: python launch/prepare_data.py --help"""

import argparse
import glob
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import explain_missing_packages

explain_missing_packages()

from tqdm import tqdm

from unialign_jax.data import jsonl, records
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.shapes import tasks
from unialign_jax.data.text_lengths import TextLengths
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.files import one_line, refuse_existing

DESCRIPTION = """\
Writes data folders (ArrayRecord files through TensorFlow Datasets, read by index) for launch/train.py.
"""

ROWS = "\n".join(f"  {kind}: {KINDS[kind].summary}\n    {reader.example}" for kind, reader in jsonl.READERS.items())

EXAMPLES = f"""\
formats
  shapes   the procedural world: all five streams, one folder each, with true targets and oracle teacher features
  jsonl    the released UniAlignment code's files: one JSON object per line, image paths relative to the file
  (webdataset, parquet and hf are to come)

rows of a jsonl file, by --stream
{ROWS}

texts
  What the model cannot read of a text is cut in training. --tokenizer=DIR --text-length=N counts it beforehand: give
  those of the run to come (a T5 tokenizer's folder, or "shapes" for the packaged one of the tiny configurations). With
  a text length, questions that leave no room for an answer are left out, as bad rows.

examples
  python launch/prepare_data.py --format=shapes --output=data/shapes
  python launch/prepare_data.py --format=shapes --stream=vqa --num-records=100 --seed=1 --output=data/shapes_test
  python launch/prepare_data.py --format=jsonl --source=photos.jsonl --stream=text_to_image --output=data/photos
  python launch/prepare_data.py --format=jsonl --source='edits/*.jsonl' --stream=edit --max-side=768 --output=data/edits

A folder appears only when it is whole. A second run with the same shapes parameters finds the folders there and
ends well; any other existing output is refused unless --overwrite is given.
"""

LIMITS = {  # of the options that are numbers: the least and the most
    "num_records": (1, 10**9),
    "seed": (0, 2**63 - 1),
    "image_size": (tasks.MIN_IMAGE_SIZE, tasks.MAX_IMAGE_SIZE),
    "teacher_width": (0, 2**16),
    "max_side": (1, 2**16),
    "threads": (1, 256),
    "max_bad_fraction": (0, 1),
    "text_length": (2, 4096),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", required=True, choices=["shapes", "jsonl"], help="what to read or make")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write (shapes: a folder per stream)")
    parser.add_argument("--source", metavar="PATH", help="jsonl: a file, or a quoted pattern of files")
    parser.add_argument("--stream", choices=tuple(KINDS), help="the kind of records (shapes: only this one)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing data folders")
    parser.add_argument(
        "--num-records", type=int, metavar="N", help="shapes: records per stream (default 15,000 to 60,000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="shapes: another seed is another world (default 0)")
    parser.add_argument("--image-size", type=int, default=64, help="shapes: pixels a side (default 64)")
    parser.add_argument(
        "--teacher-width", type=int, default=64, help="shapes: oracle features (default 64, 0 for none)"
    )
    parser.add_argument("--max-side", type=int, metavar="N", help="jsonl: shrink images to at most N pixels a side")
    parser.add_argument("--threads", type=int, default=4, help="jsonl: images decoded at the same time (default 4)")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="jsonl: fail, and write nothing, when more than this share of the rows is bad (default 0.1)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help='jsonl: count tokens with this one (a folder, or "shapes")')
    parser.add_argument("--text-length", type=int, metavar="N", help="jsonl: count the texts that N tokens would cut")
    arguments = parser.parse_args(argv)
    if arguments.format == "jsonl" and not (arguments.source and arguments.stream):
        parser.error("--format=jsonl needs --source and --stream")
    if arguments.format == "shapes" and (arguments.source or arguments.tokenizer or arguments.text_length):
        parser.error("--format=shapes makes its data and takes no --source, --tokenizer and --text-length")
    if arguments.text_length is not None and not arguments.tokenizer:
        parser.error("--text-length needs --tokenizer, whose tokens it counts")
    for name, (least, most) in LIMITS.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {least} to {most}")
    return arguments


def prepare_shapes(arguments: argparse.Namespace) -> None:
    """Writes the procedural world and says what was written."""
    began = time.monotonic()
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
        folder = Path(arguments.output) / stream
        _print_folder(folder, "written" if is_new else "already there")
    print(f"done in {time.monotonic() - began:.1f} s")


def prepare_jsonl(arguments: argparse.Namespace) -> None:
    """Writes one stream from JSONL files and says what was written and what was skipped.

    Raises:
      ValueError, OSError: as `records.write_records` and `jsonl.read_jsonl`; the output folder is then not there.
    """
    began = time.monotonic()
    paths = find_sources(arguments.source)
    size = sum(map(jsonl.check_source, paths))
    refuse_existing(arguments.output, overwrite=arguments.overwrite, foreign=records.foreign_names)
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer(None if arguments.tokenizer == "shapes" else arguments.tokenizer)
    lengths = TextLengths(arguments.stream, tokenizer, arguments.text_length)
    report = jsonl.ReadReport()
    # disable=None: no bar where nobody looks, in a file or a pipe
    with tqdm(total=size, desc=arguments.stream, unit="B", unit_scale=True, disable=None) as bar:
        rows = jsonl.read_jsonl(
            paths,
            arguments.stream,
            report=report,
            max_bad_fraction=arguments.max_bad_fraction,
            max_side=arguments.max_side,
            num_threads=arguments.threads,
            on_bytes=bar.update,
            check=lengths.check,
        )
        try:
            records.write_records(
                arguments.output,
                rows,
                kind=arguments.stream,
                parameters={
                    "source": [one_line(str(path)) for path in paths],
                    "format": "jsonl",
                    "max_side": arguments.max_side,
                },
                overwrite=arguments.overwrite,
            )
        finally:
            bar.close()
            _print_report(report)
    _print_folder(Path(arguments.output), "written")
    for line in [*lengths.lines(), *lengths.cuts()]:
        print(f"  {one_line(line, 1000)}")
    print(f"done in {time.monotonic() - began:.1f} s")


def find_sources(pattern: str) -> list[str]:
    """The files that `--source` names, in order. Raises FileNotFoundError when a pattern finds none."""
    if os.path.lexists(pattern):
        return [pattern]
    paths = sorted(glob.glob(pattern))
    if not paths and glob.has_magic(pattern):
        raise FileNotFoundError(f"no file matches the pattern {pattern}")
    return paths or [pattern]


def _print_folder(folder: Path, state: str) -> None:
    metadata = records.read_metadata(folder)
    print(
        f"{folder}: {state}, {metadata.num_records} {metadata.kind} records, "
        f"{metadata.num_bytes / 1e6:.1f} MB in {len(metadata.shards)} file(s)"
    )


def _print_report(report: jsonl.ReadReport) -> None:
    if report.num_bad:
        print(f"skipped {report.num_bad} of {report.num_rows} rows:")
        for reason, count in report.reasons.most_common():
            print(f"  {count} x {reason}")
        print("first bad rows:")
        for line in report.first_bad:
            print(f"  {line}")
    if report.num_records > report.num_rows - report.num_bad:
        print(f"{report.num_rows - report.num_bad} rows of one or several turns gave {report.num_records} records")
    for note, count in report.notes.most_common():
        print(f"{count} {note}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        prepare_shapes(arguments) if arguments.format == "shapes" else prepare_jsonl(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(str(error), 1000)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left behind in the output folder")


if __name__ == "__main__":
    main()
