"""One run at a time in a folder: a lock on a file in it, which the kernel releases when its process ends.

So nothing is left to clean up, not even after `kill -9`. Between hosts it works where the file system shares locks
(NFS, Lustre mounted with -o flock, CephFS); elsewhere it excludes only runs on the same host. When a host is lost,
NFSv4 releases its locks after their lease; NFSv3 keeps them until the host starts again, or the file is removed.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from unialign_jax.files import check_regular, first_line, one_line, parse_json
from unialign_jax.parallel import processes

log = logging.getLogger(__name__)

FILE = "run.lock"  # holds who has it; empty when nobody does
LEASE = 120  # seconds; an NFSv4 server keeps the locks of a lost host for about 90, NFSv3 for ever
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
            found = parse_json(file.read(10_000), FILE)
            host, pid, since = (one_line(str(found.get(key)), 100) for key in ("host", "pid", "since"))
            return host, f"process {pid} on host {host}, since {since},"
        time.sleep(0.05)
    return "", "another process"  # which may be on another host: it is waited for
