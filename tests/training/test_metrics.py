"""metrics.jsonl: rows that an interrupted run would write twice are written once; means, rates, records replaced."""

import json
import os
import types

import numpy as np
import pytest

from unialign_jax.training import metrics as metrics_module
from unialign_jax.training.metrics import (
    BadRecords,
    MetricsWriter,
    Throughput,
    keep_rows_until,
    read_metrics,
    to_means,
)


def write(workdir, start, steps):
    writer = MetricsWriter(workdir, start)
    for step in steps:
        writer.write(step, "edit", {"loss": step / 10})
    writer.close()


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, "edit", {"loss": 0.25, "edit/share": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "stream": "edit", "loss": 0.25, "edit/share": 1.0}]
    writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_going_on_from_an_earlier_step_drops_the_rows_to_be_done_again(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 4, range(5, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("torn", ['{"step": 4, "str', "", "\n", "null\n", "\x00\x00\x00"])
def test_a_torn_last_row_is_dropped(tmp_path, torn):
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + torn)
    keep_rows_until(path, 10)
    assert path.read_text() == whole
    assert not list(tmp_path.glob("*.tmp"))


ROWS = [b'{"step": %d, "stream": "edit"}' % step for step in (1, 2, 3, 4, 5)]
BROKEN = {
    "a flipped bit": b'{"step": 2, "stream: "edit"}',
    "not UTF-8": b'{"step": 2, "stream": "\xff"}',
    "NUL": b"\0" * 30,
    "no object": b"[1, 2]",
    "null": b"null",
    "no step": b'{"stream": "edit"}',
    "a step of text": b'{"step": "2"}',
    "a step that is no number": b'{"step": NaN}',
    "half a step": b'{"step": 2.5}',
    "true": b'{"step": true}',
    "two rows in one": b'{"step": 2}{"step": 3}',
    "deep": b"[" * 100_000,
    "many digits": b'{"step": ' + b"1" * 5000 + b"}",
    "a step out of order": b'{"step": 2000, "stream": "edit"}',
}


@pytest.mark.bad_input
@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_row_is_kept_aside_and_said(tmp_path, caplog, row):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([ROWS[0], row, *ROWS[2:]]) + b"\n")
    keep_rows_until(path, 4)
    assert path.read_bytes().splitlines() == [ROWS[0], ROWS[2], ROWS[3]]
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == row + b"\n"
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"{path}: 1 rows cannot be read (lines 2); they are kept in metrics.jsonl.broken"
    keep_rows_until(path, 3)  # and once only
    assert len(caplog.records) == 1 and path.read_bytes().splitlines() == [ROWS[0], ROWS[2]]


@pytest.mark.bad_input
def test_broken_rows_of_several_resumes_are_all_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for broken in (b"first", b"second"):
        path.write_bytes(b"\n".join([ROWS[0], broken]) + b"\n")
        keep_rows_until(path, 1)
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == b"first\nsecond\n"


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_metrics_that_are_no_file(tmp_path, refuses, kind):
    path = tmp_path / "metrics.jsonl"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    refuses(lambda: keep_rows_until(path, 3), str(path), "expected a file")


@pytest.mark.bad_input
@pytest.mark.parametrize("row", [BROKEN["not UTF-8"], BROKEN["no object"], BROKEN["deep"]])
def test_reading_names_the_file_and_the_line(tmp_path, refuses, row):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([ROWS[0], row]) + b"\n")
    refuses(lambda: read_metrics(tmp_path), f"{tmp_path}/metrics.jsonl line 2")


def test_a_missing_file_is_fine(tmp_path):
    keep_rows_until(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_means_leave_out_what_nothing_fell_into():
    means = to_means({"a": np.array([3.0, 4.0], np.float32), "b": np.array([0.0, 0.0], np.float32)})
    assert means == {"a": 0.75}
    assert json.dumps(means) == '{"a": 0.75}'


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    # Of a mesh of four, where JAX sees the eight devices of these tests.
    throughput = Throughput(4, peak_flops_per_device=1e12)
    assert throughput.report() == {}
    for _ in range(5):
        throughput.add_wait(0.1)
        throughput.add_step(samples=8, flops=4e12)
    now[0] += 10
    values = throughput.report()
    expected = {
        "images_per_second": 4.0,
        "seconds_per_step": 2.0,
        "tflops_per_second_per_device": 0.5,
        "data_wait_share": 0.05,
        "mfu": 0.5,
    }
    assert {name: pytest.approx(values[name]) for name in expected} == expected
    assert throughput.report() == {}  # each report covers what came after the one before


@pytest.mark.parametrize(("platform", "expected"), [("linux", 3_000_000 * 1024), ("darwin", 3_000_000)])
def test_peak_memory_is_in_the_units_of_the_system(platform, expected, monkeypatch):
    monkeypatch.setattr(metrics_module.sys, "platform", platform)
    assert metrics_module.peak_bytes(types.SimpleNamespace(ru_maxrss=3_000_000)) == expected


def test_too_many_bad_records_stop_the_run():
    """1 % of 1000 samples may be bad before the share of those seen is asked."""
    bad = BadRecords(0.01)
    for _ in range(10):
        bad.count(1, 8)
    with pytest.raises(
        ValueError, match=r"11 of 88 records could not be decoded, more than data.max_bad_fraction 0.01"
    ):
        bad.count(1, 8)
    seen_much = BadRecords(0.01)
    seen_much.count(0, 10_000)
    seen_much.count(100, 0)
    with pytest.raises(ValueError, match="101 of 10000"):
        seen_much.count(1, 0)


def rows(*steps):
    return b"".join(b'{"step": %d}\n' % step for step in steps)


def test_a_wrong_step_costs_its_own_row_alone(tmp_path):
    """The rows whose steps rise are sound: one digit changed moves no other row."""
    path = tmp_path / "metrics.jsonl"
    for wrong, kept, aside in ((rows(1, 2, 3, 4, 5, 2), (1, 2, 3, 4, 5), b""), (rows(1, 9, 3, 4), (1, 3, 4), rows(9))):
        path.write_bytes(wrong)
        keep_rows_until(path, 5 if aside == b"" else 4)
        assert path.read_bytes() == rows(*kept)
        broken = tmp_path / "metrics.jsonl.broken"
        assert (broken.read_bytes() if broken.exists() else b"").endswith(aside or rows(2))
        broken.unlink(missing_ok=True)


def test_a_torn_row_of_the_past_is_kept_aside(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(1, 2) + b'{"ste')
    keep_rows_until(path, 3)
    assert path.read_bytes() == rows(1, 2)
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == b'{"ste\n' and "lines 3" in caplog.text
