"""The `encode` part of launch/prepare_data.py: teacher features and latents of a data folder, stored in it.

python launch/prepare_data.py encode --input=data/photos --teacher=bundles/teacher
python launch/prepare_data.py encode --input=data/photos --bundle=bundles/unialign --image-size=512
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.data import caches
from unialign_jax.data.buckets import data_folders
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.records import read_metadata
from unialign_jax.data.streams import TEACHER_TOKENS, Stream, StreamConfig
from unialign_jax.data.tokenizer import load_backend, load_tokenizer
from unialign_jax.models.autoencoder import make_autoencoder
from unialign_jax.models.teacher import pooled_features
from unialign_jax.training import caching

DESCRIPTION = """\
Runs frozen networks over the records of a data folder and stores what they give in the folder: with --teacher the
features that the intrinsic-modal term wants, with --bundle the autoencoder's moments, by which a run reads no images
(--config.data.cached_latents=True). After a kill the same command resumes. Uses all devices of this machine.
"""
EXAMPLES = """\
examples
  python launch/prepare_data.py encode --input=data/photos --teacher=bundles/teacher
  python launch/prepare_data.py encode --input=data/edits --teacher=bundles/teacher --bundle=bundles/unialign
  python launch/prepare_data.py encode --input=data/large --teacher=bundles/teacher --part=3/8    # on one of 8 machines
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="DIR", type=Path, help="a data folder, or a folder of aspect buckets")
    add("--teacher", metavar="DIR", help="the teacher's bundle (launch/convert.py teacher): store its features")
    add("--bundle", metavar="DIR", help='a bundle with an autoencoder, or "demo": store its moments')
    add(
        "--teacher-grid",
        type=int,
        default=0,
        metavar="PIXELS",
        help="store the teacher's mean of each cell of an image too, for --config.teacher.grid: PIXELS a side, a "
        "multiple of a token's 16, such as 32 (default 0: none)",
    )
    add("--image-size", type=int, default=512, help="pixels a side, of the run to come (default 512)")
    add("--num-conditions", type=int, metavar="K", help="condition images of a record (default: the kind's)")
    add("--batch-size", type=int, default=32, help="images at once over all devices (default 32)")
    add("--threads", type=int, default=0, help="that decode images (default: one for each core)")
    add("--part", default="1/1", metavar="I/N", help="the I-th of N shares of the work, for several machines")
    add("--overwrite", action="store_true", help="replace what another network or other settings have stored")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, FileNotFoundError or OSError for folders and options that do not fit."""
    if not arguments.teacher and not arguments.bundle:
        raise ValueError("nothing to store: name a teacher by --teacher, a bundle with an autoencoder by --bundle")
    part, parts = _share(arguments.part)
    for name in ("image_size", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1")
    if arguments.teacher_grid < 0 or (arguments.teacher_grid and not arguments.teacher):
        raise ValueError(f"--teacher-grid is {arguments.teacher_grid}, expected 0 or more, and --teacher with it")
    mesh = caching.local_mesh()
    batch_size = math.ceil(arguments.batch_size / mesh.size) * mesh.size
    folders = list(data_folders(arguments.input))
    for job in _jobs(arguments, mesh):
        for folder in folders:
            _fill(arguments, folder, job, mesh, batch_size, (part, parts))


def _share(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--part is {text!r}, expected such as 1/4 to 4/4")
    return int(part) - 1, int(parts)


class _Job(NamedTuple):
    """One cache: its network's digest, the arrays of an example that it reads, and the function that fills it."""

    name: str
    network: str
    inputs: tuple[str, ...]
    function: Callable
    params: dict
    tokenizer: Backend | None = None


def _jobs(arguments, mesh) -> Iterator[_Job]:
    if arguments.teacher:
        config = bundle.read_config(arguments.teacher).teacher
        if config is None:
            raise ValueError(f"{arguments.teacher} holds no teacher: convert one with launch/convert.py teacher")
        _, params = bundle.load(arguments.teacher, components=["teacher"], mesh=mesh, dtype=config.dtype)
        tokenizer = bundle.read_tokenizer(arguments.teacher, load=load_backend)
        function = functools.partial(pooled_features, config=config, cell=arguments.teacher_grid)
        inputs = ("image", "teacher_ids", "teacher_is_token")
        yield _Job(
            "teacher",
            caching.network_digest(arguments.teacher, "teacher"),
            inputs,
            function,
            params["teacher"],
            tokenizer,
        )
    if arguments.bundle:
        directory = bundle.locate(arguments.bundle)
        config, params = bundle.load(directory, components=["autoencoder"], mesh=mesh)
        function = functools.partial(caching.image_moments, autoencoder=make_autoencoder(config.autoencoder))
        digest = caching.network_digest(directory, "autoencoder")
        yield _Job("latents", digest, ("image", "conditions"), function, params["autoencoder"])


def _fill(arguments, folder, job: _Job, mesh, batch_size, share) -> None:
    directory, bucket = folder
    metadata = read_metadata(directory)
    conditions = KINDS[metadata.kind].num_conditions
    if arguments.num_conditions is not None:
        conditions = arguments.num_conditions
    config = StreamConfig(
        name=directory.name,
        kind=metadata.kind,
        path=str(directory),
        num_conditions=conditions,
        image_size=arguments.image_size,
        bucket=bucket,
        use_teacher=False,
    )
    cell = arguments.teacher_grid if job.tokenizer else 0
    if cell and any(side % cell for side in config.size):
        raise ValueError(f"--teacher-grid={cell} does not divide images of {caches.size_name(config.size)} pixels")
    stream = Stream(config, load_tokenizer(), job.tokenizer)
    read = caching.Examples(stream, job.inputs)
    arrays = caching.row_shapes(job.function, job.params, stream_example(stream, job.inputs))
    description = caches.Description(
        name=job.name,
        records=caches.records_digest(directory),
        num_records=metadata.num_records,
        size=config.size,
        network=job.network,
        arrays=arrays,
        rows=caches.rows_of_a_file(arrays),
        options=({"text_tokens": TEACHER_TOKENS} if job.tokenizer else {}) | ({"cell": cell} if cell else {}),
    )
    writer = caches.Writer(directory, description, overwrite=arguments.overwrite)
    total = sum(len(description.part(number)) for number in writer.missing(share))
    if not total:
        print(f"{writer.directory}: already there")
        return
    with tqdm(desc=f"{directory.name}/{job.name}", total=total, unit="record", disable=None) as bar:
        bad = caching.fill_cache(
            writer,
            read,
            job.function,
            job.params,
            mesh,
            batch_size=batch_size,
            num_threads=arguments.threads,
            share=share,
            progress=bar.update,
        )
    size = sum(math.prod(shape) for shape in arrays.values()) * 2
    left = f", {bad} cannot be decoded" if bad else ""
    print(f"{writer.directory}: {total} records of {size:,} bytes by {jax.device_count()} device(s){left}")


def stream_example(stream: Stream, names: tuple[str, ...]) -> dict:
    """Some arrays of the first example that can be decoded."""
    example = stream[0]
    return {name: example[name] for name in names if name in example}
