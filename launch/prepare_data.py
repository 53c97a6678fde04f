"""Writes a data folder for training: python launch/prepare_data.py --help"""

import argparse
import glob
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from unialign_jax.data import jsonl, records, shapes
from unialign_jax.data.kinds import KINDS

DESCRIPTION = """\
Writes data folders (ArrayRecord files through TensorFlow Datasets, read by index) for launch/train.py.
"""

EXAMPLES = """\
formats
  shapes   the procedural world: all five streams, one folder each, with true targets and oracle teacher features
  jsonl    the released UniAlignment code's files: one JSON object per line, image paths relative to the file
  (webdataset, parquet and hf are to come)

rows of a jsonl file, by --stream
  text_to_image     {"image": ["a.jpg"], "conversations": [{"value": "caption"}]}
  edit, perception  {"image": ["source.jpg", "target.jpg"], "instruction": "...",
                     "conversations": [{"value": "the target's caption"}]}
  personalization   {"original_images": ["a.jpg", "b.jpg"], "generated_images": ["c.jpg"],
                     "edit_prompt": "...", "caption": "the target's caption"}
  vqa               {"image": "a.jpg", "conversations": [{"from": "human", "value": "question"},
                                                         {"from": "gpt", "value": "answer"}]}

examples
  python launch/prepare_data.py --format=shapes --output=data/shapes
  python launch/prepare_data.py --format=shapes --stream=vqa --num-records=100 --seed=1 --output=data/shapes_test
  python launch/prepare_data.py --format=jsonl --source=photos.jsonl --stream=text_to_image --output=data/photos
  python launch/prepare_data.py --format=jsonl --source='edits/*.jsonl' --stream=edit --max-side=768 --output=data/edits

A folder appears only when it is whole. A second run with the same shapes parameters finds the folders there and
ends well; any other existing output is refused unless --overwrite is given.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", required=True, choices=["shapes", "jsonl"], help="what to read or make")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write (shapes: a folder per stream)")
    parser.add_argument("--source", metavar="PATH", help="jsonl: a file, or a quoted pattern of files")
    parser.add_argument("--stream", choices=tuple(KINDS), help="the stream kind (shapes: only this one)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing data folders")
    parser.add_argument(
        "--num-records", type=int, metavar="N", help="shapes: records per stream (default 2000 to 4000)"
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
    arguments = parser.parse_args(argv)
    if arguments.format == "jsonl" and not (arguments.source and arguments.stream):
        parser.error("--format=jsonl needs --source and --stream")
    if arguments.format == "shapes" and arguments.source:
        parser.error("--format=shapes makes its data and takes no --source")
    for name, least in (("num_records", 1), ("seed", 0), ("image_size", 16), ("teacher_width", 0), ("max_side", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
    return arguments


def prepare_shapes(arguments: argparse.Namespace) -> None:
    """Writes the procedural world and says what was written."""
    began = time.monotonic()
    written = shapes.write_shapes(
        arguments.output,
        arguments.num_records,
        seed=arguments.seed,
        image_size=arguments.image_size,
        teacher_width=arguments.teacher_width,
        streams=(arguments.stream,) if arguments.stream else shapes.STREAMS,
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
    paths = sorted(glob.glob(arguments.source)) or [arguments.source]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"source {path} does not exist")
    report = jsonl.ReadReport()
    with tqdm(
        total=sum(map(os.path.getsize, paths)), desc=arguments.stream, unit="B", unit_scale=True, disable=None
    ) as bar:
        rows = jsonl.read_jsonl(
            paths,
            arguments.stream,
            report=report,
            max_bad_fraction=arguments.max_bad_fraction,
            max_side=arguments.max_side,
            num_threads=arguments.threads,
            on_bytes=bar.update,
        )
        try:
            records.write_records(
                arguments.output,
                rows,
                kind=arguments.stream,
                parameters={"source": [str(path) for path in paths], "format": "jsonl", "max_side": arguments.max_side},
                overwrite=arguments.overwrite,
            )
        finally:
            bar.close()
            _print_bad_rows(report)
    _print_folder(Path(arguments.output), "written")
    print(f"done in {time.monotonic() - began:.1f} s")


def _print_folder(folder: Path, state: str) -> None:
    metadata = records.read_metadata(folder)
    print(
        f"{folder}: {state}, {metadata.num_records} {metadata.kind} records, "
        f"{metadata.num_bytes / 1e6:.1f} MB in {len(metadata.shards)} file(s)"
    )


def _print_bad_rows(report: jsonl.ReadReport) -> None:
    if report.num_bad:
        print(f"skipped {report.num_bad} of {report.num_rows} rows:")
        for reason, count in report.reasons.most_common():
            print(f"  {count} x {reason}")
        print("first bad rows:")
        for line in report.first_bad:
            print(f"  {line}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        prepare_shapes(arguments) if arguments.format == "shapes" else prepare_jsonl(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left behind in the output folder")


if __name__ == "__main__":
    main()
