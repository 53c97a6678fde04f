"""The `caption` part of launch/prepare_data.py: captions of target images that lack one.

python launch/prepare_data.py caption --input=data/edits --endpoint=http://localhost:8000/v1 --model=NAME
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from unialign_jax.data import caches
from unialign_jax.data.buckets import data_folders
from unialign_jax.data.captioning import PROMPT, Captioner, Journal, Progress, caption_images, image_digest
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import REPORT_FILES, Record, open_records, write_records
from unialign_jax.files import one_line

DESCRIPTION = """\
Asks an OpenAI-compatible endpoint for captions of the target images that have none (rows kept by --missing-captions),
and writes the folder anew with them. Every answer is kept in a journal at once: after a kill, or a failure, the same
command asks only for what is left, and never twice about one image.
"""
EXAMPLES = """\
examples
  python launch/prepare_data.py --source='omniedit/*.parquet' --stream=edit --missing-captions --output=data/edits
  python launch/prepare_data.py caption --input=data/edits --endpoint=http://localhost:8000/v1 --model=Qwen2.5-VL-7B
The key of an endpoint that wants one is read from the environment variable OPENAI_API_KEY.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="DIR", type=Path, help="a data folder, or a folder of aspect buckets")
    add("--endpoint", required=True, metavar="URL", help="of the API, such as http://localhost:8000/v1")
    add("--model", required=True, metavar="NAME", help="the endpoint's name of the model")
    add("--prompt", default=PROMPT, help="what is asked of each image")
    add("--concurrency", type=int, default=16, help="requests at once (default 16)")
    add("--max-tokens", type=int, default=256, help="of a caption; a longer one counts as failed (default 256)")
    add("--max-side", type=int, default=1024, help="pixels a side of the images that are sent (default 1024)")
    add("--timeout", type=float, default=120.0, help="seconds that a request may take (default 120)")
    add("--attempts", type=int, default=6, help="requests for one image at most (default 6)")
    add("--input-price", type=float, default=0.0, help="for a million tokens read, to show the cost")
    add("--output-price", type=float, default=0.0, help="for a million tokens written, to show the cost")
    add("--journal", metavar="FILE", type=Path, help="where answers are kept (default: INPUT.captions.jsonl)")


def run(arguments: argparse.Namespace, key: str = "") -> None:
    """Raises ValueError when captions are still missing at the end, and for options or folders that do not fit;
    endpoint.Refused when the endpoint refuses every request.
    """
    for name in ("concurrency", "max_tokens", "max_side", "timeout", "attempts"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected a number above 0")
    endpoint = Captioner(
        url=arguments.endpoint,
        model=arguments.model,
        key=key,
        prompt=arguments.prompt,
        max_tokens=arguments.max_tokens,
        max_side=arguments.max_side,
        timeout=arguments.timeout,
        attempts=arguments.attempts,
    )
    folders = [folder for folder, _ in data_folders(arguments.input)]
    for folder in folders:
        check_folder(folder)
    total = sum(1 for folder in folders for _ in without_caption(folder))
    if not total:
        print(f"{arguments.input}: every record has a caption")
        return
    path = arguments.journal or arguments.input.parent / f"{arguments.input.name}.captions.jsonl"
    journal = Journal(path, endpoint)
    prices = arguments.input_price, arguments.output_price
    with tqdm(desc="captions", total=total, unit="image", disable=None) as bar:
        images = (record.image for folder in folders for _, record in without_caption(folder))

        def show(done: Progress) -> None:
            cost = {"cost": f"{done.cost(*prices):.2f}"} if any(prices) else {}
            bar.set_postfix(failed=done.failed, retries=done.retries, **cost, refresh=False)
            bar.update(done.answered + done.failed - bar.n)

        try:
            done = caption_images(images, endpoint, journal, concurrency=arguments.concurrency, progress=show)
        finally:
            journal.close()
    missing = sum(fill_folder(folder, journal, endpoint) for folder in folders)
    cost = f", {done.cost(*prices):.2f} in all" if any(prices) else ""
    print(
        f"{arguments.input}: {done.answered} images captioned ({done.prompt_tokens:,} tokens read, "
        f"{done.answer_tokens:,} written{cost}), {done.failed} failed, {done.retries} requests repeated"
    )
    for reason, count in done.reasons.most_common(10):
        print(f"  {count} x {one_line(reason, 200)}")
    if missing:
        raise ValueError(f"{missing} records of {arguments.input} have no caption yet: the same command asks again")


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder whose records have no captions by their kind, or with caches of their texts."""
    kind = open_records(folder).metadata.kind
    if "caption" not in find_kind(kind).fields:
        raise ValueError(f"{folder} holds {kind} records, which have no captions")
    if any((folder / name).exists() for name in caches.NAMES):
        found = ", ".join(name for name in caches.NAMES if (folder / name).exists())
        raise ValueError(
            f"{folder} has caches of its records as they are ({found}): remove them, and encode afterwards"
        )


def without_caption(folder: Path) -> Iterator[tuple[int, Record]]:
    """(index, record) of the records of a data folder whose caption is empty."""
    source = open_records(folder)
    for index in range(len(source)):
        record = source[index]
        if not record.caption:
            yield index, record


def fill_folder(folder: Path, journal: Journal, endpoint: Captioner) -> int:
    """Writes a folder anew with the journal's captions. Returns how many records still have none."""
    source, missing = open_records(folder), 0
    reports = {name: (folder / name).read_bytes() for name in REPORT_FILES if (folder / name).is_file()}

    def records() -> Iterator[Record]:
        nonlocal missing
        for index in range(len(source)):
            record = source[index]
            if not record.caption and (digest := image_digest(record.image)) in journal:
                record = dataclasses.replace(record, caption=journal[digest])
            missing += not record.caption
            yield record

    made = {"captions": {"model": endpoint.model, "prompt": endpoint.prompt}}
    write_records(
        folder,
        records(),
        kind=source.metadata.kind,
        parameters=source.metadata.parameters | made,
        overwrite=True,
        optional=("caption",),
    )
    for name, content in reports.items():
        (folder / name).write_bytes(content)
    return missing
