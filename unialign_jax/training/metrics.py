"""What a run measures and where it goes: metrics.jsonl (one JSON object a line) and TensorBoard events."""

import bisect
import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter

from unialign_jax.files import check_regular, parse_json, replacing_file

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl` and to TensorBoard; on hosts other than the first it does nothing.

    On opening, rows after `start_step` are dropped: the steps they tell of are about to be done again, with the same
    numbers, so that the file of an interrupted run reads like that of an uninterrupted one.
    """

    def __init__(self, workdir, start_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = Path(workdir) / "metrics.jsonl"
        keep_rows_until(path, start_step)
        self._file = open(path, "a", buffering=1)
        self._board = SummaryWriter(str(workdir), purge_step=start_step + 1, flush_secs=30)

    def write(self, step: int, stream: str, values: dict[str, float]):
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, "stream": stream} | values) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stream}/{name}", value, step)

    def close(self):
        if self._active:
            self._file.close()
            self._board.close()


def keep_rows_until(path: Path, step: int):
    """Rewrites a metrics file without the rows after `step` and without a torn last line; a missing file is fine.

    A row before those that cannot be read is moved to a file beside it (".broken" after the name), with a warning that
    names the line. Raises ValueError when `path` is no file.
    """
    if not os.path.lexists(path):
        return
    check_regular(path)
    *lines, torn = path.read_bytes().split(b"\n")
    if _row_step(torn) is not None:  # whole but for its end
        lines.append(torn)
    steps = [_row_step(line) for line in lines]
    in_order = _longest_rise(steps)
    later = [number for number in in_order if steps[number] > step]
    kept = [lines[number] for number in in_order if steps[number] <= step]
    sound, past = set(in_order), later[0] if later else len(lines)
    broken = {n + 1: lines[n] for n in range(past) if lines[n].strip() and n not in sound}
    if torn.strip() and lines[-1:] != [torn] and not later and (not kept or _row_step(kept[-1]) < step):
        broken[len(lines) + 1] = torn  # it may have been a row of the past
    if broken:
        aside = path.with_name(path.name + ".broken")
        with open(aside, "ab") as file:
            file.writelines(line + b"\n" for line in broken.values())
        numbers = ", ".join(map(str, list(broken)[:10])) + (", ..." if len(broken) > 10 else "")
        log.warning(
            "%s: %d rows cannot be read (lines %s); they are kept in %s", path, len(broken), numbers, aside.name
        )
    with replacing_file(path) as scratch:
        scratch.write_bytes(b"".join(line + b"\n" for line in kept))


def _longest_rise(steps: list[int | None]) -> list[int]:
    """Numbers of the rows whose steps never fall, as many as there can be: a row out of that order is damaged."""
    tails, ends, before = [], [], {}  # the least last step of a rise of each length, its row, and the row before a row
    for number, step in enumerate(steps):
        if step is None:
            continue
        length = bisect.bisect_right(tails, step)
        before[number] = ends[length - 1] if length else None
        tails[length : length + 1], ends[length : length + 1] = [step], [number]
    rise, number = [], ends[-1] if ends else None
    while number is not None:
        rise.append(number)
        number = before[number]
    return rise[::-1]


def _row_step(line: bytes) -> int | None:
    """The step of a row, or None for a line that is no row."""
    try:
        step = parse_json(line, "row").get("step")
    except ValueError:
        return None
    return step if type(step) is int else None


def read_metrics(workdir) -> list[dict]:
    """The rows of a run's metrics.jsonl, oldest first. Raises ValueError that names the line that is no row."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    return [parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def to_means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The step's sums and counts -> means, without those that nothing fell into."""
    return {name: float(total / count) for name, (total, count) in metrics.items() if count > 0}


class Throughput:
    """Steps, samples and FLOPs since the last report, and the share of the time that went into waiting for data."""

    def __init__(self, num_devices: int, peak_flops_per_device: float | None):
        """Args: `num_devices` of the mesh that the steps run on, which need not be all that JAX sees."""
        self._devices, self._peak = num_devices, peak_flops_per_device
        self.restart()

    def restart(self):
        self._start, self._waited, self._steps, self._samples, self._flops = time.perf_counter(), 0.0, 0, 0, 0.0

    def add_wait(self, seconds: float):
        self._waited += seconds

    def add_step(self, samples: int, flops: float):
        self._steps, self._samples, self._flops = self._steps + 1, self._samples + samples, self._flops + flops

    def report(self) -> dict[str, float]:
        """What happened since the last call; empty when no step did."""
        seconds = time.perf_counter() - self._start
        if not self._steps:
            return {}
        per_device = self._flops / seconds / self._devices
        values = {
            "images_per_second": self._samples / seconds,
            "seconds_per_step": seconds / self._steps,
            "tflops_per_second_per_device": per_device / 1e12,
            "data_wait_share": self._waited / seconds,
        } | memory_use()
        if self._peak:
            values["mfu"] = per_device / self._peak
        self.restart()
        return values


def memory_use() -> dict[str, float]:
    """Peak memory in GB (1e9 bytes): of the first local device where the backend tells, and of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    device = {"device_peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
    return device | {"host_peak_gb": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / 1e9}


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The most memory that a process has had, of what `resource` or `os.wait4` tells: bytes on macOS, elsewhere KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
