"""The `serve` part of launch/benchmark.py: a server under load, its clients on the same machine.

    python launch/benchmark.py serve
    python launch/benchmark.py serve --bundle=BUNDLE --batches=1,8,16 --side=512 --steps=28

For each of --batches a server of its own is started (launch/serve.py) and driven twice. Closed loop: --clients clients,
each of which asks again as soon as it has its answer: the throughput. Open loop: requests at random times (a Poisson
process) at --load of that throughput, whoever has answered: the times that users see. Tasks take turns in the shares
of --mix. A request that got no answer counts as lost, one that was answered with 429 as rejected.
The server's resident memory is read after a tenth of each loop's requests, after half of them and at the end.
"""

import argparse
import base64
import collections
import contextlib
import io
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("text_to_image", "edit", "caption", "vqa")
LIMIT = 600.0  # seconds that a request may take


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--bundle", default="demo", metavar="DIR", help="what is served, default %(default)s")
    parser.add_argument("--url", help="of a server that runs already, up to /v1; then --batches is not read")
    parser.add_argument("--process", type=int, metavar="ID", help="of that server, on this machine, for its memory")
    parser.add_argument("--batches", default="1,8", help="the server's largest batch, default %(default)s")
    parser.add_argument("--requests", type=int, default=200, help="of each loop, default %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop, default %(default)s")
    parser.add_argument(
        "--load", type=float, default=0.7, help="of the open loop, default %(default)s of the throughput"
    )
    parser.add_argument("--mix", default="text_to_image", help=f"some of {','.join(TASKS)}, default %(default)s")
    parser.add_argument("--side", type=int, help="pixels a side, default the model's")
    parser.add_argument("--steps", type=int, help="of the sampler, default the model's")
    parser.add_argument("--seconds", type=float, default=300.0, help="a loop ends after so long, default %(default)s")
    parser.add_argument("--reproducible", action="store_true", help="start the servers with --reproducible")


def benchmark_serve(arguments: argparse.Namespace) -> dict:
    """{figure: value}, a table among them. Raises ValueError for bad options, OSError where no server starts."""
    from unialign_jax.benchmarks.data import parse_numbers
    from unialign_jax.inference.options import check_range, check_whole

    check_whole("--requests", arguments.requests, 1, 10**6)
    check_whole("--clients", arguments.clients, 1, 1000)
    check_range("--load", arguments.load, 0.01, 10.0)
    mix = arguments.mix.split(",")
    if unknown := [name for name in mix if name not in TASKS]:
        raise ValueError(f"--mix names {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    rows = []
    for batch in [None] if arguments.url else parse_numbers("--batches", arguments.batches, 1, 1024):
        with serving(arguments, batch) as (url, process):
            rows += drive(url, process, batch, mix, arguments)
    return {
        "served": arguments.url or arguments.bundle,
        "requests": f"{arguments.requests} of {arguments.mix} in each loop, {arguments.clients} clients",
        "lost": sum(row["lost"] for row in rows),
        "by loop and task": rows,
    }


@contextlib.contextmanager
def serving(arguments: argparse.Namespace, batch: int | None) -> Iterator[tuple[str, int | None]]:
    """(URL, process id) of a server that ends with the block."""
    if batch is None:
        yield arguments.url.rstrip("/"), arguments.process
        return
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"--bundle={arguments.bundle}", "--port=0"]
    command += [f"--batch={batch}", f"--max-samples={batch}", "--queue=4096", "--max-side=4096", "--no-page"]
    command += [f"--time-limit={LIMIT}", "--warm-up=none", *["--reproducible"] * arguments.reproducible]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line.rstrip())
                if match := re.search(r'"url": "(http[^"]+)"', line):
                    break
            else:
                raise OSError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")
            drain = threading.Thread(target=collections.deque, args=(process.stderr, 0), daemon=True)
            drain.start()
            yield match[1], process.pid
        finally:
            process.terminate()
            process.wait(60)


def drive(
    url: str, process: int | None, batch: int | None, mix: list[str], arguments: argparse.Namespace
) -> list[dict]:
    """A row for each loop and task."""
    bodies = [make_body(task, arguments) for task in mix]
    warm(url, bodies, batch or arguments.clients)
    closed = Outcomes(arguments.requests, process)
    began = time.monotonic()
    closed_loop(url, bodies, arguments.requests, arguments.clients, arguments.seconds, closed)
    rate = len(closed.all) / (time.monotonic() - began)
    rows = table("closed", batch, rate, closed)
    opened = Outcomes(arguments.requests, process)
    began = time.monotonic()
    open_loop(url, bodies, arguments.requests, rate * arguments.load, arguments.seconds, opened)
    return rows + table("open", batch, len(opened.all) / (time.monotonic() - began), opened)


def warm(url: str, bodies: list, batch: int) -> None:
    """Has the server compile what the loops ask for, in batches of 1, 2, 4, ... and of `batch`."""
    import requests

    with requests.Session() as session:
        for size in sorted({min(batch, 1 << power) for power in range((batch - 1).bit_length() + 1)}):
            for task, path, body in bodies:
                if task in ("caption", "vqa"):  # one text a request: those that come while it works are a batch
                    closed_loop(url, [(task, path, body)], 3 * size, size, LIMIT, Outcomes(3 * size))
                else:
                    send(session, url, (task, path, body | {"n": size}), 0)


class Outcomes:
    """What came of a loop's requests, and the server's memory on the way.

    Attributes:
      all: (task, what came of it, seconds) of each.
      memory: {requests done: MB in RAM}.
    """

    def __init__(self, count: int, process: int | None = None):
        self.all: list[tuple[str, str, float]] = []
        self.memory: dict[int, int | None] = dict.fromkeys(sorted({max(1, count // 10), max(1, count // 2), count}))
        self._lock, self._process = threading.Lock(), process

    def add(self, outcome: tuple[str, str, float]) -> None:
        with self._lock:
            self.all.append(outcome)
            if len(self.all) in self.memory:
                self.memory[len(self.all)] = resident_mb(self._process)


def make_body(task: str, arguments: argparse.Namespace) -> tuple[str, str, dict]:
    """(task, path, body) of a request."""
    from PIL import Image

    side = arguments.side or 64
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side // 8 or 1, side // 8 or 1, 3), np.uint8)
    Image.fromarray(noise).resize((side, side)).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    options = {"steps": arguments.steps} if arguments.steps else {}
    if task == "text_to_image":
        size = {"size": f"{side}x{side}"} if arguments.side else {}
        return task, "images/generations", {"prompt": "a large red circle", **size, **options}
    if task == "edit":
        return task, "images/edits", {"prompt": "make it green", "image": uri, **options}
    text = [{"type": "text", "text": "What colour is it?"}] if task == "vqa" else []
    content = [{"type": "image_url", "image_url": {"url": uri}}, *text]
    return task, "chat/completions", {"messages": [{"role": "user", "content": content}], **options}


def send(session: Any, url: str, request: tuple, seed: int) -> tuple[str, str, float]:
    """(task, what came of it, seconds)."""
    import requests

    task, path, body = request
    began = time.monotonic()
    try:
        answer = session.post(f"{url}/{path}", json=body | {"seed": seed}, timeout=LIMIT)
        outcome = {200: "answered", 429: "rejected"}.get(answer.status_code, "lost")
    except requests.exceptions.RequestException:
        outcome = "lost"
    return task, outcome, time.monotonic() - began


def closed_loop(url: str, bodies: list, count: int, clients: int, seconds: float, outcomes: Outcomes) -> None:
    """`count` requests of clients that each wait for their answer; what comes of them goes into `outcomes`."""
    import requests

    numbers, ends = itertools.count(), time.monotonic() + seconds

    def work():
        with requests.Session() as session:
            while (number := next(numbers)) < count and time.monotonic() < ends:
                outcomes.add(send(session, url, bodies[number % len(bodies)], number))

    threads = [threading.Thread(target=work) for _ in range(min(clients, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def open_loop(url: str, bodies: list, count: int, rate: float, seconds: float, outcomes: Outcomes) -> None:
    """`count` requests that begin at random times, `rate` a second; what comes of them goes into `outcomes`."""
    import requests

    generator, threads = random.Random(0), []
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=256))
    ends = due = time.monotonic()
    ends += seconds
    for number in range(count):
        due += generator.expovariate(rate)
        if due > ends:
            break
        time.sleep(max(0.0, due - time.monotonic()))
        body = bodies[number % len(bodies)]
        threads.append(
            threading.Thread(target=lambda body=body, number=number: outcomes.add(send(session, url, body, number)))
        )
        threads[-1].start()
    for thread in threads:
        thread.join()


def table(loop: str, batch: int | None, rate: float, outcomes: Outcomes) -> list[dict]:
    """A row for each task."""
    rows = []
    for task in dict.fromkeys(task for task, _, _ in outcomes.all):
        mine = [(outcome, seconds) for name, outcome, seconds in outcomes.all if name == task]
        counts = collections.Counter(outcome for outcome, _ in mine)
        taken = [seconds for outcome, seconds in mine if outcome == "answered"]
        quantiles = np.quantile(taken, (0.5, 0.95, 0.99)) if taken else (float("nan"),) * 3
        row = {"batch": batch or "-", "loop": loop, "task": task, "requests/s in all": round(rate, 2)}
        row |= {f"p{name}, s": round(float(value), 3) for name, value in zip((50, 95, 99), quantiles, strict=True)}
        row |= {name: counts[name] for name in ("answered", "rejected", "lost")}
        rows.append(row | {f"MB at {count}": memory for count, memory in outcomes.memory.items()})
    return rows


def resident_mb(process: int | None) -> int | None:
    """The memory of a process that lies in RAM; None where it cannot be read."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
