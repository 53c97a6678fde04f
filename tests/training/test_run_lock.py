"""One run at a time in a folder."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unialign_jax.training import run_lock
from unialign_jax.training.run_lock import FILE, only_run_in

ROOT = Path(__file__).resolve().parents[2]
HOLD = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from unialign_jax.training.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A folder and its locked file, as another run's, whose name in it is the test's to write."""
    with open(tmp_path / FILE, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path, file


def name_holder(file, **holder):
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def test_a_killed_process_leaves_nothing_behind(tmp_path, refuses):
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            before = (tmp_path / "run" / FILE).read_bytes()
            told = refuses(
                lambda: only_run_in(tmp_path / "run").__enter__(),
                f"{tmp_path}/run is in use: process {process.pid} on host {socket.gethostname()}, since 20",
                "Wait for that run's end, stop it, or choose another --workdir",
            )
            assert told.count("since") == 1 and (tmp_path / "run" / FILE).read_bytes() == before
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    with only_run_in(tmp_path / "run"):  # at once
        assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / FILE).read_bytes() == b""


def test_the_end_of_a_run_frees_the_folder(tmp_path, refuses):
    with pytest.raises(FloatingPointError), only_run_in(tmp_path):
        refuses(lambda: only_run_in(tmp_path).__enter__(), "is in use")
        raise FloatingPointError
    with only_run_in(tmp_path):
        pass


def test_a_holder_on_another_host_is_waited_for(held, caplog, refuses):
    """Its host may be gone, and the server still keep its lock for a while."""
    folder, file = held
    name_holder(file, host="elsewhere", pid=7, since="2026-01-01")
    with caplog.at_level(logging.WARNING, "unialign_jax"):
        refuses(lambda: only_run_in(folder, 0.1).__enter__(), "process 7 on host elsewhere, since 2026-01-01,")
        assert caplog.text.count("waiting up to") == 1
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with only_run_in(folder, 60):
            assert json.loads((folder / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name", [b"", b"\xff\xfe\x00", b"[]", b"{}", b'{"pid": [1, "a\\nb"], "host": {}}', b"[" * 9000, b"x" * 20_000]
)
def test_a_holder_without_a_sound_name(held, name, refuses, monkeypatch):
    folder, file = held
    (folder / FILE).write_bytes(name)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: None)
    refuses(lambda: only_run_in(folder, 0).__enter__(), f"{folder} is in use: ", "choose another --workdir")
    assert (folder / FILE).read_bytes() == name


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog, reason):
    def flock(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "unialign_jax"), only_run_in(tmp_path):
        (line,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path} has no file locks" in line and "see to it that no second run uses it" in line


def test_a_disk_that_fails_is_not_taken_for_a_lock(tmp_path, monkeypatch, refuses):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    refuses(lambda: only_run_in(tmp_path).__enter__(), FILE, "cannot be locked (Input/output error)")


def place(kind, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / FILE)
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / FILE).symlink_to("/dev/zero")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / FILE).symlink_to(tmp_path / "nowhere" / "file")
    return tmp_path / kind


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "kind",
    ["file", "file/below", "folder", "pipe", "device", "dangling", "n\0ul", "x" * 300, "/proc/nowhere", "/sys/nowhere"],
)
def test_a_folder_that_cannot_be_had(tmp_path, refuses, kind):
    folder = place(kind, tmp_path)
    refuses(lambda: only_run_in(folder).__enter__(), "the run's folder", "cannot be made or written", "choose another")
    assert (tmp_path / "file").read_text() == "precious"
