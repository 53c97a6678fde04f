"""The folder of the web page's files: pictures that were uploaded, results, and what Gradio makes of both."""

import contextlib
import os
import shutil
import stat
import threading
import time
from pathlib import Path

MOST_BYTES = 2 * 10**9
KEPT_SECONDS = 24 * 3600  # of a file that nobody uses
SWEEP_SECONDS = 60  # between two looks for old files, while files come
EMPTY_SECONDS = 3600  # of a folder without files, in which one may be about to be written


class Folder:
    """Keeps the folder below a number of bytes, but for what is being written: the oldest files go first. Those that
    nobody used for a day go too.

    Attributes:
      path: of the folder, links followed.
      most: its bytes at most: MOST_BYTES, or half of what is free on its disk if that is less.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.most = min(MOST_BYTES, shutil.disk_usage(path).free // 2)
        self._lock, self._stays = threading.Lock(), set()
        self._used, self._kept, self._swept = 0, 0, time.monotonic()

    def keep_all(self) -> None:
        """What the folder has now stays as long as the server: the examples."""
        with self._lock:
            files = [path for path in self.path.rglob("*") if path.is_file()]
            self._stays, self._kept = {str(path) for path in files}, sum(path.stat().st_size for path in files)
            self._sweep(self.most)

    def make_room(self, size: int) -> bool:
        """Whether a file of `size` bytes may be written; old files are removed where that makes the room for it."""
        with self._lock:
            if self._kept + size > self.most:  # even of a folder of nothing else
                return False
            if self._used + size > self.most or time.monotonic() > self._swept + SWEEP_SECONDS:
                # Room for more files than this one, so that the next look is not at the next file.
                self._sweep(self.most - max(size, self.most // 16))
            if self._used + size > self.most:
                return False
            self._used += size
            return True

    def sweep(self) -> None:
        """Removes files that nobody used for a day, and the oldest where there are too many bytes."""
        with self._lock:
            self._sweep(self.most)

    def _sweep(self, most: int) -> None:
        now, self._swept, self._used, found = time.time(), time.monotonic(), 0, []
        for folder, _, names in os.walk(self.path, topdown=False):
            for path in (os.path.join(folder, name) for name in names):
                with contextlib.suppress(OSError):
                    facts = os.lstat(path)
                    self._used += facts.st_size
                    if stat.S_ISREG(facts.st_mode) and path not in self._stays:
                        found.append((facts.st_mtime, facts.st_size, path))
            with contextlib.suppress(OSError):  # it has files
                if folder != str(self.path) and os.stat(folder).st_mtime < now - EMPTY_SECONDS:
                    os.rmdir(folder)
        for changed, size, path in sorted(found):
            if self._used <= most and changed > now - KEPT_SECONDS:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                self._used -= size
