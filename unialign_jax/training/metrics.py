"""The metrics of a run: metrics.jsonl (one JSON object a line), TensorBoard events, progress bar, throughput."""

import bisect
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from unialign_jax.files import check_regular, parse_json, replacing_file
from unialign_jax.models.flops import peak_flops
from unialign_jax.training.trackers import Tracker

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl`, TensorBoard and a tracker; it does nothing on hosts but the first.

    Opening drops the rows after `start_step`, whose steps are done again: the file reads as if nothing had stopped.
    """

    def __init__(self, workdir: str | Path, start_step: int, tracker: Tracker | None = None):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._tracker = tracker
        path = Path(workdir) / "metrics.jsonl"
        keep_rows_until(path, start_step)
        self._file = open(path, "a", buffering=1)
        self._board = summary_writer()(str(workdir), purge_step=start_step + 1, flush_secs=30)

    def write(self, step: int, stream: str, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, "stream": stream} | values) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stream}/{name}", value, step)
        if self._tracker:
            self._tracker.log(step, {f"{stream}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            if self._tracker:
                self._tracker.close()


def summary_writer() -> type:
    """TensorBoard's writer of scalars, imported without what it has no use for here, which takes two seconds.

    tensorboardX imports PyTorch for tensors and Google's storage for buckets where they are installed, and does
    without where they are not.
    """
    hidden = [name for name in ("torch", "google.cloud.storage") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # importing a module that is None raises ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter


def keep_rows_until(path: Path, step: int) -> None:
    """Rewrites a metrics file without the rows after `step` and without a torn last line; a missing file is fine.

    A row up to `step` that cannot be read is moved to a file beside it (".broken" after the name), with a warning that
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
    """The longest subsequence of rows whose steps never fall, as row numbers: a row out of that order is damaged."""
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


def read_metrics(workdir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, oldest first. Raises ValueError that names the line that is no row."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    return [parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def to_means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The step's sums and counts -> means; a metric of count 0 is left out."""
    return {name: float(total / count) for name, (total, count) in metrics.items() if count > 0}


class Throughput:
    """Steps, samples and FLOPs since the last report, and the share of the time that went into waiting for data.

    Args:
      num_devices: those of the mesh, which need not be all that JAX sees.
    """

    def __init__(self, num_devices: int, peak_flops_per_device: float | None):
        self._devices, self._peak = num_devices, peak_flops_per_device
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._steps, self._samples, self._flops = time.perf_counter(), 0.0, 0, 0, 0.0

    def add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def add_step(self, samples: int, flops: float) -> None:
        self._steps, self._samples, self._flops = self._steps + 1, self._samples + samples, self._flops + flops

    def report(self) -> dict[str, float]:
        """The rates since the last call; empty when there was no step."""
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
    """Peak memory in GB (1e9 bytes): of the first local device, where the backend reports it, and of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    device = {"device_peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
    return device | {"host_peak_gb": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / 1e9}


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The peak memory of a process in bytes, from `resource` or `os.wait4`: they give bytes on macOS, elsewhere KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Recorder:
    """Records each step's metrics one step late: whether they are finite, progress bar, files, throughput."""

    def __init__(self, trainer, workdir: Path, start: int, progress: bool, tracker: Tracker | None = None):
        """Opens the files. `start` is the step that the run resumes from; a bar is drawn on a terminal alone."""
        self._trainer, self._writer = trainer, MetricsWriter(workdir, start, tracker)
        self._pending = None
        self._losses = {}
        self._bad = BadRecords(trainer.config.data.max_bad_fraction)
        device = trainer.mesh.devices.flat[0]
        self.throughput = Throughput(trainer.mesh.size, peak_flops(device.device_kind))
        self._bar = tqdm(
            total=trainer.config.num_steps,
            initial=start,
            unit="step",
            disable=None if progress and jax.process_index() == 0 else True,  # None: not into files and pipes
            dynamic_ncols=True,
        )

    def next_batch(self, batches: Iterator[tuple[int, str, dict]]) -> tuple[str, dict[str, np.ndarray]]:
        """(stream's name, the next batch); the time until it is there counts as waiting for data."""
        began = time.perf_counter()
        _, name, batch = next(batches)
        self.throughput.add_wait(time.perf_counter() - began)
        return name, batch

    def add(self, step: int, stream: str, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of the step that was just started, and records those of the step before."""
        self.flush()
        self._pending = (step, stream, metrics)

    def flush(self) -> None:
        """Waits for the step under way and records its metrics.

        Raises FloatingPointError when one is not finite, ValueError when too many records could not be decoded.
        """
        if self._pending is None:
            return
        step, stream, metrics = self._pending
        self._pending = None
        values = to_means(jax.device_get(metrics))
        config = self._trainer.config
        self.throughput.add_step(config.batch_size, config.batch_size * self._trainer.sample_flops[stream])
        for name in ("loss", "gradient_norm", "parameter_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"{name} is {values[name]} at step {step + 1} in stream {stream}; losses: "
                    + ", ".join(f"{key} {values[key]:.4g}" for key in config.loss_weights if key in values)
                    + ". The last checkpoint is from before; lower optimizer.learning_rate or look at that batch"
                )
        self._bad.count(int(values["replaced_records"]), config.batch_size)
        self._losses[stream] = values["loss"]
        self._bar.update()
        self._show()
        _, index = self._trainer.mixture.schedule(step)
        # Rows of steps with replaced records are never left out, so that the file's sum is their number.
        if index % config.log_every == 0 or step + 1 == config.num_steps or values["replaced_records"]:
            self._writer.write(step + 1, stream, values | self.throughput.report())

    def add_validation(
        self,
        step: int,
        rows: dict[str, dict[str, float]],
        shown: dict[str, float] | None = None,
        prefix: str = "validation",
    ) -> None:
        """Records the rows of a validation after `step` steps; its time does not count as training.

        Raises FloatingPointError for a loss that is not finite.

        Args:
          shown: the figures for the progress bar.
          prefix: of the streams' names in the rows.
        """
        for name, values in rows.items():
            if not math.isfinite(values.get("loss", 0)):
                raise FloatingPointError(
                    f"the {prefix} loss is {values['loss']} at step {step} in stream {name}. The last checkpoint is "
                    "from before; lower optimizer.learning_rate"
                )
            self._writer.write(step, f"{prefix}/{name}", values)
        self._losses |= shown or {}
        self._show()
        self.throughput.restart()

    def _show(self) -> None:
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._losses.items()}, refresh=False)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


class BadRecords:
    """Counts the records that could not be decoded. Raises ValueError when they become too many."""

    def __init__(self, max_fraction: float, patience: int = 1000):
        self._max_fraction, self._patience = max_fraction, patience
        self._bad = self._seen = 0

    def count(self, replaced: int, samples: int) -> None:
        self._bad += replaced
        self._seen += samples
        # A few early ones say nothing about the share; from `patience` samples on they do.
        if self._bad > self._max_fraction * max(self._seen, self._patience):
            raise ValueError(
                f"{self._bad} of {self._seen} records could not be decoded, more than data.max_bad_fraction "
                f"{self._max_fraction} allows; the log names them. Mend the data, or raise data.max_bad_fraction"
            )
