"""The load benchmark: every request is counted, once, as what became of it."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest

from unialign_jax.benchmarks import serve


def options(*given):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.slow
def test_both_loops_of_a_server_that_runs(server):
    given = [f"--url={server}/v1", "--mix=text_to_image,caption", "--requests=20", "--clients=2"]
    figures = serve.benchmark_serve(options(*given, "--steps=2", "--side=32"))
    rows = figures["by loop and task"]
    assert [(row["loop"], row["task"]) for row in rows] == [
        ("closed", "text_to_image"), ("closed", "caption"), ("open", "text_to_image"), ("open", "caption"),
    ]  # fmt: skip
    assert all((row["answered"], row["rejected"], row["lost"]) == (10, 0, 0) for row in rows)
    assert all(0 < row["p50, s"] <= row["p95, s"] <= row["p99, s"] for row in rows)
    assert figures["lost"] == 0


def test_requests_without_an_answer_are_lost_and_memory_is_read_on_the_way(monkeypatch):
    monkeypatch.setattr(serve, "resident_mb", lambda process: process)
    outcomes = serve.Outcomes(10, 123)
    body = serve.make_body("text_to_image", options())
    serve.closed_loop("http://127.0.0.1:1/v1", [body], 10, 3, 60.0, outcomes)
    [row] = serve.table("closed", 1, 5.0, outcomes)
    assert (row["answered"], row["rejected"], row["lost"]) == (0, 0, 10)
    assert [row[f"MB at {count}"] for count in (1, 5, 10)] == [123] * 3


def test_sigterm_ends_the_benchmark_and_its_server(launch_command, monkeypatch, capsys):
    processes = []

    def measure(arguments):
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as server:
            processes.append(server)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            finally:
                server.terminate()

    monkeypatch.setattr(serve, "benchmark_serve", measure)
    with pytest.raises(SystemExit) as end:
        launch_command("benchmark").main(["serve"])
    assert end.value.code == 143 and processes[0].returncode == -signal.SIGTERM
    assert capsys.readouterr().err == "interrupted: nothing was measured\n"
