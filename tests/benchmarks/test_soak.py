"""The soak's arithmetic: which run counts as flat."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unialign_jax.benchmarks.soak import summary, watch

ROOT = Path(__file__).resolve().parents[2]


def looks(memory=0.0, descriptors=0.0, threads=0.0):
    """A run of 100 steps, looked at 5 times a step, which grows by so much a step after warming up for 10 steps."""
    found = [(0, 500.0, 10, 5)]
    for step in range(1, 101):
        after = max(0, step - 10)
        for look in range(5):
            busy = look == 2  # a save under way
            found.append(
                (step, 1000 + memory * after, 20 + 3 * busy + int(descriptors * after), 8 + busy + int(threads * after))
            )
    return found


def test_a_run_that_leaves_nothing_behind_is_flat():
    figures = summary(looks(), 100)
    assert figures["flat"] == "yes"
    assert figures["growth from the third tenth to the last"] == "0 MB, 0 descriptors, 0 threads"
    rows = figures["by tenth of the run"]
    assert [row["steps"] for row in rows][:2] == ["1-10", "11-20"] and len(rows) == 10
    assert rows[-1] == {"steps": "91-100", "memory, median MB": 1000, "descriptors, most": 23, "threads, most": 9}


@pytest.mark.parametrize("grows", [{"memory": 0.5}, {"descriptors": 0.3}, {"threads": 0.1}], ids=str)
def test_a_run_that_does_is_not(grows):
    assert summary(looks(**grows), 100)["flat"] == "no"


def test_a_run_that_was_not_looked_at_says_so():
    with pytest.raises(ValueError, match="no checkpoint was seen between steps 50 and 60"):
        summary([look for look in looks() if not 50 < look[0] <= 60], 100)


def test_watching_a_process_until_it_ends(tmp_path):
    script = "import os, sys; os.pipe(); print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        process.stdout.readline()
        (tmp_path / "checkpoints" / "7").mkdir(parents=True)
        (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
        threading.Timer(0.3, process.stdin.close).start()
        found = list(watch(process, tmp_path, interval=0.05))
    step, memory, descriptors, threads = found[0]
    assert step == 7 and 1 < memory < 500 and descriptors == 5 and threads == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--saves=0"], "--saves is 0, expected 10 to --steps"),
        (["--saves=9"], "--saves is 9"),
        (["--steps=5"], "expected 10 to --steps, 5"),
        (["--steps=-1"], "--saves is 200"),
        (["--config=nowhere.py"], "there is no stage file nowhere.py"),
        (["--config.batchsize=3"], "unknown key batchsize"),
        (["--config.batchsize", "3"], "unknown key batchsize"),
        (["--set=batchsize=3"], "unknown key batchsize"),  # an older spelling
        (["--scratch=/proc/nowhere"], "/proc/nowhere"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_soak_that_cannot_be(command_refuses, monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = [f"--config={ROOT}/configs/stage1.py:tiny"]
    monkeypatch.chdir(os.sep)
    command_refuses("benchmark", ["soak", *config, *arguments], words)
