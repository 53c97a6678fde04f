"""A run's folder where it lies: on a file system, or in a bucket, where files cannot be appended to.

In a bucket the checkpoints are written by Orbax, and every other file in a local folder first, from where the first
process uploads it whole: before each checkpoint, at the end, and every half minute if it has changed. The upload of an
object happens or does not, so a killed run has lost at most what came after the last one, and never a row of its
metrics that is older than its last checkpoint.
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from unialign_jax.files import first_line
from unialign_jax.files.places import client, is_remote, place, reaching
from unialign_jax.training.run_lock import BEAT, FILE, ObjectLock, only_run_in

log = logging.getLogger(__name__)

WAIT = 60  # seconds for an upload under way, at the end of a run


class RunFolder:
    """A run's folder. All processes open it; those but the first write no files but checkpoints.

    Attributes:
      place: where the run lies, with its checkpoints and its configuration.
      local: where its other files are written; the same folder on a file system.
    """

    def __init__(self, workdir: str | os.PathLike, stack: contextlib.ExitStack):
        """Raises ValueError for a URL that no run can lie on.

        Args:
          stack: its end removes the local folder of a run in a bucket.
        """
        self.place = self.local = place(workdir)
        self._lock: ObjectLock | None = None
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> time and size of the file that was uploaded
        self._busy = threading.Lock()
        if is_remote(self.place):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="unialign-run-"))
            self.local = Path(folder) / self.place.name
            self.local.mkdir()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Keeps other runs out of the folder in the block. In a bucket it brings the files here, and uploads them.

        Raises OSError, in all processes and before any change, when another run is in it or it cannot be written.
        """
        if not is_remote(self.place):
            with only_run_in(self.place):
                yield
            return
        with ObjectLock.held(self.place / FILE) as self._lock:
            if jax.process_index() != 0:
                yield
                return
            with reaching(self.place):
                self._fetch()
            done = threading.Event()
            thread = threading.Thread(target=self._keep_uploading, args=(done,), daemon=True, name="upload")
            thread.start()
            try:
                yield
            except BaseException:
                self._end(done, thread, self._try_to_upload)
                raise
            else:
                self._end(done, thread, self.upload)

    @staticmethod
    def _end(done: threading.Event, thread: threading.Thread, upload: Callable[[], None]) -> None:
        done.set()
        thread.join(WAIT)
        upload()

    def upload(self) -> None:
        """Uploads the files that have changed; on a file system, or in another process than the first, does nothing.

        Raises OSError when that fails, or when another run has taken the folder.
        """
        if not is_remote(self.place) or jax.process_index() != 0:
            return
        with self._busy, reaching(self.place):
            self._lock.beat()
            for path in self._files():
                name, found = path.relative_to(self.local).as_posix(), path.stat()
                signature = found.st_mtime_ns, found.st_size
                if self._uploaded.get(name) != signature:
                    client(self.place).pipe_file(str(self.place / name), path.read_bytes())
                    self._uploaded[name] = signature

    def _keep_uploading(self, done: threading.Event) -> None:
        while not done.wait(BEAT):
            self._try_to_upload()  # the next one may succeed; the one before a checkpoint must

    def _try_to_upload(self) -> None:
        try:
            self.upload()
        except OSError as error:
            log.warning("%s", first_line(error))

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.local):
            paths = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
            yield from (path for path in paths if path.is_file() and not path.is_symlink())

    def _fetch(self) -> None:
        """Brings what a resumed run reads or adds to: the files beside the checkpoints, and the texts of samples.

        TensorBoard's files stay: each start writes one of its own.
        """
        fs = client(self.place)
        found = [entry["name"] for entry in _entries(fs, self.place) if "events.out.tfevents" not in entry["name"]]
        found += [entry["name"] for entry in _entries(fs, self.place / "samples") if entry["name"].endswith(".md")]
        root = str(self.place).removeprefix("gs://") + "/"
        for name in (name.removeprefix(root) for name in found):
            if name == FILE:
                continue
            path = self.local / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(fs.cat_file(root + name))
            status = path.stat()
            self._uploaded[name] = status.st_mtime_ns, status.st_size


def _entries(fs, folder) -> list[dict]:
    """The files in a folder of a bucket; none where it does not exist."""
    try:
        return [entry for entry in fs.ls(str(folder), detail=True) if entry["type"] == "file" and entry["size"]]
    except FileNotFoundError:
        return []
