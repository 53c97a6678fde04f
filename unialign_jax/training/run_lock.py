"""One run at a time in a folder: a lock on a file in it, which the kernel releases when its process ends.

So nothing is left to clean up, not even after `kill -9`. Between hosts it works where the file system shares locks
(NFS, Lustre mounted with -o flock, CephFS); elsewhere it excludes only runs on the same host. When a host is lost,
NFSv4 releases its locks after their lease; NFSv3 keeps them until the host starts again, or the file is removed.

A bucket has no such locks. There the file is an object that its holder rewrites every half minute; one that stays as it
is for two minutes is that of a run that was killed, and is taken.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from unialign_jax.files import check_regular, first_line, one_line, parse_json
from unialign_jax.files.places import Place, client, reaching
from unialign_jax.parallel import processes

log = logging.getLogger(__name__)

FILE = "run.lock"  # holds who has it; empty when nobody does
LEASE = 120  # seconds; an NFSv4 server keeps the locks of a lost host for about 90, NFSv3 for ever
BEAT = 30  # seconds between two writes of a lock in a bucket
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def only_run_in(workdir: Path, patience: float = LEASE) -> Iterator[None]:
    """Makes the run's folder, and keeps other runs out of it in the block. All processes of the run take part.

    Raises OSError, in all processes and before any change, when another run is in it or it cannot be written.

    Args:
      patience: seconds to wait for a holder on another host, which may be gone. With one on this host there is no wait.
    """
    file, refusal = None, ""
    if jax.process_index() == 0:
        try:
            file = _take(workdir, patience)
        except OSError as error:
            refusal = str(error)
    if refusal := processes.text_from_first(refusal):
        raise OSError(refusal)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.close()


def _take(workdir: Path, patience: float) -> IO[str]:
    """The open, locked file. Raises OSError in one line."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(workdir / FILE):
            check_regular(workdir / FILE)
        file = open(workdir / FILE, "a+", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"{error.strerror}: {error.filename}" if getattr(error, "strerror", None) else first_line(error)
        folder = one_line(str(workdir))
        raise OSError(f"the run's folder {folder} cannot be made or written ({reason}): choose another") from error
    deadline, waiting = time.monotonic() + patience, False
    while not _locked(file, workdir):
        host, holder = _holder(file)
        if host == socket.gethostname() or time.monotonic() >= deadline:
            file.close()
            elsewhere = "" if host == socket.gethostname() else f". If that host is gone, remove {workdir / FILE}"
            raise OSError(
                f"{workdir} is in use: {holder} is training in it. Wait for that run's end, stop it, or choose another "
                f"--workdir{elsewhere}"
            )
        if not waiting:
            log.warning("%s is in use by %s; waiting up to %.0f s for its end", workdir, holder, patience)
        waiting = True
        time.sleep(min(1, patience))
    with contextlib.suppress(OSError):  # the lock holds without it
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}))
        file.flush()
        os.fsync(file.fileno())  # over NFS, other hosts read it only then
    return file


def _locked(file, workdir) -> bool:
    """Whether the lock is ours now. Where there are no locks it counts as ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(f"{workdir / FILE} cannot be locked ({error.strerror}): look at the disk") from error
        log.warning("%s has no file locks (%s): see to it that no second run uses it", workdir, error.strerror)
    return True


def _holder(file) -> tuple[str, str]:
    """(host, description) of the process that holds the lock."""
    for _ in range(20):  # it writes its name once it has the lock
        file.seek(0)
        with contextlib.suppress(ValueError):
            return _described(parse_json(file.read(10_000), FILE))
        time.sleep(0.05)
    return "", "another process"  # which may be on another host: it is waited for


class ObjectLock:
    """A lock on a folder in a bucket: an object that holds who has it, and counts on while its process lives."""

    def __init__(self, path: Place):
        self._path, self._token, self._beats = path, secrets.token_hex(8), 0
        self._since = time.strftime("%F %T %z")

    @classmethod
    @contextlib.contextmanager
    def held(cls, path: Place, patience: float = LEASE, interval: float = 5) -> Iterator["ObjectLock"]:
        """Keeps other runs out of the folder in the block. All processes of the run take part, the first one has it.

        Raises OSError, in all processes, when another run is in the folder or it cannot be written.

        Args:
          patience: seconds after which a holder that has written nothing is held to be gone.
          interval: seconds between two looks at it.
        """
        lock, refusal, is_first = cls(path), "", jax.process_index() == 0
        if is_first:
            try:
                with reaching(path.parent):
                    refusal = lock._take(patience, interval)
            except OSError as error:
                refusal = str(error)
        if refusal := processes.text_from_first(refusal):
            raise OSError(refusal)
        try:
            yield lock
        finally:
            if is_first:
                with contextlib.suppress(Exception):  # the next run takes it after `patience` all the same
                    if lock._read().get("token") == lock._token:
                        client(path).rm_file(str(path))

    def beat(self) -> None:
        """Says that the process lives. Raises OSError when another run has the folder now."""
        with reaching(self._path.parent):
            found = self._read()
            if found.get("token") in (self._token, None):
                self._write()
                return
        raise OSError(
            f"{self._path.parent} was taken by {_described(found)[1]} since this process was silent for long: it ends, "
            "and saves nothing more"
        )

    def _take(self, patience: float, interval: float) -> str:
        """Takes the lock; returns why it cannot, or ""."""
        deadline, first = time.monotonic() + patience, self._read()
        host, holder = _described(first)
        if first and not (host == socket.gethostname() and not _is_alive(first.get("pid"))):
            log.warning("%s: %s is in it; waiting up to %.0f s for a sign of life", self._path.parent, holder, patience)
            while (found := self._read()) == first and time.monotonic() < deadline:
                time.sleep(min(interval, patience))
            if found and found != first:
                return (
                    f"{self._path.parent} is in use: {_described(found)[1]} is training in it. Wait for that run's "
                    "end, stop it, or choose another --workdir"
                )
        if first:
            with contextlib.suppress(FileNotFoundError):
                client(self._path).rm_file(str(self._path))
        try:
            self._write(mode="create")
        except FileExistsError:
            pass
        if (found := self._read()).get("token") != self._token:
            return f"{self._path.parent} is in use: {_described(found)[1]} took it at the same moment. Start again"
        return ""

    def _read(self) -> dict:
        try:
            return parse_json(client(self._path).cat_file(str(self._path)), FILE)
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"token": ""}  # of nobody

    def _write(self, mode: str = "overwrite") -> None:
        self._beats += 1
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": self._since}
        content |= {"token": self._token, "beats": self._beats}
        client(self._path).pipe_file(str(self._path), json.dumps(content).encode(), mode=mode)


def _described(content: dict) -> tuple[str, str]:
    """(host, description) of the process that wrote this into the file."""
    host, pid, since = (one_line(str(content.get(key)), 100) for key in ("host", "pid", "since"))
    return host, f"process {pid} on host {host}, since {since},"


def _is_alive(pid) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except OSError:
        return True
    return True
