"""The `soak` part of launch/benchmark.py: a long run of launch/train.py, watched from outside.

    python launch/benchmark.py soak --config=configs/stage1.py:tiny --steps=2000 --saves=200

Trains in a folder of its own with many saves, and samples the process's memory, file descriptors and threads several
times a second: a leak of a step or a save shows only in a long run. The run is flat when from its third tenth to its
last the median memory grew by less than 2%, and the largest counts of descriptors and of threads by less than 4 each.
The exit status is 1 when it is not. Linux only.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--config", default="configs/stage1.py:tiny", help="stage file, default %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the run, default %(default)s")
    parser.add_argument("--saves", type=int, default=200, help="saves of the run, default %(default)s")
    parser.add_argument("--scratch", type=Path, help="where the run's folder is made, default the system's")


def benchmark_soak(arguments: argparse.Namespace) -> dict:
    """{figure: value}, of which `by tenth of the run` is a table. Raises ValueError, OSError when the run fails."""
    from unialign_jax.files import make_folder
    from unialign_jax.training.config import read_config

    if not 10 <= arguments.saves <= arguments.steps:
        raise ValueError(f"--saves is {arguments.saves}, expected 10 to --steps, {arguments.steps}")
    if not Path("/proc/self/fd").is_dir():
        raise OSError("the soak reads /proc, which only Linux has")
    changes = [
        *arguments.changes,
        f"num_steps={arguments.steps}",
        f"checkpoint.every={arguments.steps // arguments.saves}",
        "samples.every=0",
        "samples.count=0",
        "validation.every=0",
    ]
    read_config(arguments.config, changes)  # raises here for a bad configuration
    if arguments.scratch:
        make_folder(arguments.scratch, "--scratch")
    with tempfile.TemporaryDirectory(prefix="soak-", dir=arguments.scratch) as scratch:
        command = [sys.executable, LAUNCH / "train.py", "--noprogress", f"--config={arguments.config}"]
        command += [f"--workdir={scratch}/run", *(f"--config.{change}" for change in changes)]
        began = time.perf_counter()
        with open(Path(scratch) / "log", "w+") as log:
            with subprocess.Popen(command, stdout=log, stderr=log) as process:
                looks = list(watch(process, Path(scratch) / "run"))
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1]
        if process.returncode:
            step = looks[-1][0] if looks else 0
            last = last.removeprefix("error: ")
            raise ValueError(f"train.py ended with status {process.returncode} after step {step}: {last}")
        seconds = time.perf_counter() - began
    return {
        "config": " ".join([arguments.config, *arguments.changes]),
        "steps, saves": f"{arguments.steps}, {arguments.steps // (arguments.steps // arguments.saves)}",
        "seconds, start and compiling included": seconds,
    } | summary(looks, arguments.steps)


def watch(process: subprocess.Popen, workdir: Path, interval: float = 0.2) -> Iterator[tuple]:
    """(step of the newest checkpoint, memory in MB, descriptors, threads) of a process, until it ends."""
    step = 0
    while process.poll() is None:
        saved = (path.name for path in (workdir / "checkpoints").glob("*"))
        step = max([step, *(int(name) for name in saved if name.isdecimal())])
        folder = Path(f"/proc/{process.pid}")
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            descriptors = len(list((folder / "fd").iterdir()))
            yield step, int(status["VmRSS"].split()[0]) * 1024 / 1e6, descriptors, int(status["Threads"])
        except (OSError, KeyError):  # it ended meanwhile
            break
        time.sleep(interval)


def summary(looks: list[tuple], steps: int, tenths: int = 10) -> dict:
    """The table of a run's tenths, and whether it is flat. Raises ValueError for a tenth without a sample."""
    rows = []
    for number in range(tenths):
        low, high = steps * number // tenths, steps * (number + 1) // tenths
        inside = [look for look in looks if low < look[0] <= high or (number == 0 and look[0] == 0)]
        if not inside:
            raise ValueError(f"no checkpoint was seen between steps {low} and {high}: take more steps")
        _, memory, descriptors, threads = zip(*inside, strict=True)
        rows.append(
            {
                "steps": f"{low + 1}-{high}",
                "memory, median MB": round(statistics.median(memory)),
                "descriptors, most": max(descriptors),
                "threads, most": max(threads),
            }
        )
    early, late = rows[2], rows[-1]
    growth = {name: late[name] - early[name] for name in early if name != "steps"}
    memory, descriptors, threads = growth.values()
    flat = memory < 0.02 * early["memory, median MB"] and descriptors < 4 and threads < 4
    return {
        "growth from the third tenth to the last": f"{memory} MB, {descriptors} descriptors, {threads} threads",
        "flat": "yes" if flat else "no",
        "by tenth of the run": rows,
    }
