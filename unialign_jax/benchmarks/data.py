"""The `data` part of launch/benchmark.py: images per second of one core, from a data folder to an example.

    python launch/benchmark.py data
    python launch/benchmark.py data --input=data/mine --tokenizer=T5_FOLDER

Decoders and `Stream[i]` are measured side by side in processor time (time.process_time) of one thread, so that other
work on the machine counts little; of --rounds passes the fastest counts. `stream` is all of an example: record,
decode, resize, crop, tokens. `cached` reads latents and teacher features, of random numbers, in place of images.
`Mixture.batches` is measured by number of threads, in wall time: there other work counts, and `cores busy` tells it.

Without --input the pictures are made: smooth random fields with texture as JPEGs of quality 90, at 512 pixels
of about 2 bits a pixel as photographs are, of 4:3 and 3:2, upright and wide, with the shorter side of --stored pixels.
"""

import argparse
import functools
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

MISSING = {"OpenCV": "opencv-python-headless", "simplejpeg": "simplejpeg", "PyTurboJPEG": "PyTurboJPEG"}
MODULES = {"OpenCV": "cv2", "simplejpeg": "simplejpeg", "PyTurboJPEG": "turbojpeg"}
SHAPES = ((3, 4), (4, 3), (2, 3), (3, 2))  # height to width
TEACHER_WIDTH = 3584
LATENT_CHANNELS = 16
PIXELS_OF_A_LATENT = 8  # a side
WORDS = "a small red yellow blue green circle square triangle star left right above below of the two three on".split()


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--input", type=Path, metavar="DIR", help="a data folder of your own; default: made pictures")
    parser.add_argument("--image-size", type=int, default=512, help="pixels a side of an example, default %(default)s")
    parser.add_argument("--stored", default="512,1024", help="shorter sides of made pictures, default %(default)s")
    parser.add_argument("--count", type=int, default=32, help="pictures, default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="passes of which the fastest counts, default %(default)s")
    parser.add_argument("--threads", default="1,2,4", help="threads of the mixture, default %(default)s")
    parser.add_argument("--tokenizer", metavar="DIR", help="a T5 tokenizer's folder; default: the packaged one")
    parser.add_argument("--text-length", type=int, default=256, help="tokens a text, default %(default)s")
    parser.add_argument("--scratch", type=Path, help="where folders are made, default the system's")


def benchmark_data(arguments: argparse.Namespace) -> dict:
    """{figure: value}, three tables among them. Raises ValueError, OSError for bad options and folders."""
    from unialign_jax.data.records import read_metadata
    from unialign_jax.data.tokenizer import load_tokenizer
    from unialign_jax.inference.options import check_whole

    for name, least, most in (("image_size", 8, 4096), ("count", 4, 4096), ("rounds", 1, 1000)):
        check_whole(f"--{name.replace('_', '-')}", getattr(arguments, name), least, most)
    check_whole("--text-length", arguments.text_length, 2, 4096)
    sides = parse_numbers("--stored", arguments.stored, 8, 8192)
    threads = parse_numbers("--threads", arguments.threads, 1, 256)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.input:
        read_metadata(arguments.input)  # raises for what is no data folder
    if arguments.scratch:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="data-", dir=arguments.scratch) as scratch:
        folders = {str(arguments.input): arguments.input} if arguments.input else {}
        for side in () if arguments.input else sides:
            folders[f"shorter side {side}"] = write_pictures(Path(scratch) / str(side), side, arguments.count)
        rows, streams = [], []
        for label, folder in folders.items():
            streams.append(open_stream(folder, tokenizer, arguments))
            rows.append({"stored": label} | measure_decoders(streams[-1], arguments))
        cached = measure_cache(Path(scratch) / "cached", tokenizer, arguments)
        mixture = measure_mixture(streams[0], threads, arguments)
    made = f"{arguments.count} made: smooth random fields with texture, JPEG of quality 90"
    return {
        "pictures": f"the first {arguments.count} records of {arguments.input}" if arguments.input else made,
        "examples": f"{arguments.image_size} pixels a side, {arguments.text_length} tokens",
        "not installed": ", ".join(MISSING[name] for name in missing_decoders()) or "none",
        "images/s of one core, and the stream's share of the fastest decoder": rows,
        "cached latents and teacher features, of one core": [cached],
        f"Mixture.batches, {next(iter(folders))}, wall time": mixture,
    }


def parse_numbers(option: str, text: str, least: int, most: int) -> list[int]:
    """Numbers with commas between. Raises ValueError for others."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and least <= int(part) <= most for part in parts):
        raise ValueError(f"{option} is {text!r}, expected whole numbers of {least} to {most} with commas between")
    return [int(part) for part in parts]


# Pictures


def write_pictures(folder: Path, side: int, count: int) -> Path:
    """A text_to_image data folder of made pictures, `side` pixels at the shorter side."""
    from unialign_jax.data.records import Record, write_records

    generator = np.random.default_rng(side)

    def records():
        for number in range(count):
            height, width = SHAPES[number % len(SHAPES)]
            scale = side / min(height, width)
            data = encode_jpeg(random_field(generator, round(height * scale), round(width * scale)))
            yield Record(key=str(number), image=data, caption=" ".join(generator.choice(WORDS, 60)))

    write_records(folder, records(), kind="text_to_image")
    return folder


def random_field(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: grey whose amplitudes fall as 1/f^1.5, with colours that change more slowly."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    planes = []
    for power, contrast in ((1.5, 40), (1.8, 12), (1.8, 12)):
        noise = np.fft.rfft2(generator.standard_normal((height, width)))
        field = np.fft.irfft2(noise / np.maximum(frequency, 1) ** power * (frequency > 0), (height, width))
        planes.append(field / field.std() * contrast)
    grey, first, second = planes
    return np.clip(np.stack([grey + first, grey, grey + second], -1) + 128, 0, 255).astype(np.uint8)


def encode_jpeg(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# One core


def missing_decoders() -> list[str]:
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]


def make_decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Name -> a function from JPEG bytes to uint8 [height, width, 3] in RGB, of those that are installed."""
    from PIL import Image

    decoders = {"Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))}
    missing = missing_decoders()
    if "OpenCV" not in missing:
        import cv2

        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoders["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if "simplejpeg" not in missing:
        import simplejpeg

        decoders["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
    if "PyTurboJPEG" not in missing:
        import turbojpeg

        turbo = turbojpeg.TurboJPEG()
        decoders["PyTurboJPEG"] = lambda data: turbo.decode(data, pixel_format=turbojpeg.TJPF_RGB)
    return decoders


def open_stream(folder: Path, tokenizer: Any, arguments: argparse.Namespace, **options):
    """The folder's first --count records as a stream."""
    from unialign_jax.data.kinds import find_kind
    from unialign_jax.data.records import read_metadata
    from unialign_jax.data.streams import Stream, StreamConfig

    kind = read_metadata(folder).kind
    config = StreamConfig(
        name=kind,
        kind=kind,
        path=str(folder),
        num_conditions=find_kind(kind).num_conditions,
        image_size=arguments.image_size,
        text_length=arguments.text_length,
        **({"use_teacher": False} | options),
    )
    stream = Stream(config, tokenizer)
    return stream.part(0, min(arguments.count, len(stream)))


def call_each(function: Callable, values: Iterable) -> None:
    """Keeps no result: memory that is asked for anew would count."""
    for value in values:
        function(value)


def fastest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of each function: the least of some rounds, in each of which all take their turn."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    return {name: min(found) for name, found in seconds.items()}


def measure_decoders(stream: Any, arguments: argparse.Namespace) -> dict:
    """A row: images/s of each decoder and of the stream, and the stream's share of the fastest.

    The images of a record are its target and as many references as the stream takes.
    """
    count = stream.config.num_conditions
    records = [stream.records[index] for index in range(len(stream))]
    pictures = [data for record in records for data in (record.image, *record.conditions[:count])]
    decoders = make_decoders()
    if not all(data.startswith(b"\xff\xd8") for data in pictures):
        decoders = {"Pillow": decoders["Pillow"]}  # the others read JPEG alone
    work = {name: functools.partial(call_each, decode, pictures) for name, decode in decoders.items()}
    work["stream"] = functools.partial(call_each, stream.__getitem__, range(len(stream)))
    seconds = fastest(work, arguments.rounds)
    return {"KB": round(sum(map(len, pictures)) / len(pictures) / 1000)} | rates(seconds, len(pictures))


def rates(seconds: dict[str, float], count: int) -> dict:
    """Images/s by name; the fastest decoder; the share of its speed that `stream` reaches."""
    found = {name: "not installed" for name in MODULES} | {
        name: round(count / taken, 1) for name, taken in seconds.items()
    }
    best = min((name for name in seconds if name != "stream"), key=seconds.get)
    row = {name: found.get(name, "-") for name in ("Pillow", *MODULES, "stream")}
    return row | {"fastest": best, "share": f"{100 * seconds[best] / seconds['stream']:.0f}%"}


def measure_cache(folder: Path, tokenizer: Any, arguments: argparse.Namespace) -> dict:
    """A row: examples/s of a stream that reads caches, and the bytes that each takes."""
    from unialign_jax.data import caches

    write_pictures(folder, 64, arguments.count)
    latent = (arguments.image_size // PIXELS_OF_A_LATENT,) * 2
    shapes = {
        "latents": {"image_moments": (*latent, 2 * LATENT_CHANNELS)},
        "teacher": {"teacher_image": (TEACHER_WIDTH,), "teacher_text": (TEACHER_WIDTH,)},
    }
    generator = np.random.default_rng(0)
    for name, arrays in shapes.items():
        description = caches.Description(
            name=name,
            records=caches.records_digest(folder),
            num_records=arguments.count,
            size=(arguments.image_size,) * 2,
            network="random numbers",
            arrays=arrays,
            rows=caches.rows_of_a_file(arrays),
            options={},
        )
        writer = caches.Writer(folder, description)
        for part in writer.missing():
            rows = len(description.part(part))
            writer.write(
                part,
                {
                    key: generator.standard_normal((rows, *shape), np.float32).astype(np.float16)
                    for key, shape in arrays.items()
                },
            )
    stream = open_stream(folder, tokenizer, arguments, use_teacher=True, use_latents=True)
    work = {"cached": functools.partial(call_each, stream.__getitem__, range(len(stream)))}
    seconds = fastest(work, arguments.rounds)["cached"]
    sizes = {name: 2 * sum(int(np.prod(shape)) for shape in arrays.values()) for name, arrays in shapes.items()}
    return {
        "latents, KB a record": round(sizes["latents"] / 1000, 1),
        "teacher, KB a record": round(sizes["teacher"] / 1000, 1),
        "examples/s": round(len(stream) / seconds, 1),
        "MB/s": round(sum(sizes.values()) * len(stream) / seconds / 1e6),
    }


# Threads


class Repeated:
    """A stream's examples over and over, as a set of the usual length.

    grain's shuffle takes 0.8 ms for each record of 32, 8 us in a set of more than 60,000.
    """

    def __init__(self, stream, length: int = 2**18):
        self.config, self._stream, self._length = stream.config, stream, length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._stream[index % len(self._stream)]


def measure_mixture(stream: Any, threads: list[int], arguments: argparse.Namespace) -> list[dict]:
    """A row for each number of threads: examples/s in wall time, the cores that were busy, and examples/s of a core."""
    from unialign_jax.data.mixture import Mixture

    mixture = Mixture([Repeated(stream)], seed=0, global_batch=16)
    batches = -(-arguments.count // 16)
    best = {number: (float("inf"), 0.0) for number in threads}
    for _ in range(arguments.rounds):
        for number in threads:
            iterator = mixture.batches(num_threads=number, prefetch=2)
            for _ in range(4):  # those that are read ahead, and those in the making
                next(iterator)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(batches):
                next(iterator)
            best[number] = min(best[number], (time.perf_counter() - began, time.process_time() - used))
            iterator.close()
    return [thread_row(number, batches * 16, *best[number], best[threads[0]][0]) for number in threads]


def thread_row(threads: int, count: int, wall: float, used: float, first: float) -> dict:
    return {
        "threads": threads,
        "examples/s": round(count / wall, 1),
        "times the first": round(first / wall, 2),
        "cores busy": round(used / wall, 2),
        "examples/s of a busy core": round(count / used, 1) if used else None,
    }
