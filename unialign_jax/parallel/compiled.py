"""Where compiled programs are kept between processes, so that only the first start of a program compiles it.

The cache is JAX's own: a key covers the program, the devices and the versions, so that a changed program is another
entry, and of several hosts the first writes. What is here chooses the folder and its bound, and sees to it that the
folder can be used at all.
"""

import logging
import os
from pathlib import Path

from unialign_jax.files import check_writable, first_line

log = logging.getLogger(__name__)

NONE = "none"
MAX_BYTES = 2 * 10**9  # the programs used longest ago are removed beyond; one of full size has at most 0.1e9
LEAST_SECONDS = 0.2  # of compiling; what takes less is not kept
_LOCK, _PROGRAM, _TIME = ".lockfile", "-cache", "-atime"  # JAX's names (jax/_src/lru_cache.py)


def default_folder() -> Path:
    """The user's own: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unialign_jax" / "compiled"


def keep_compiled(folder: str | os.PathLike = "") -> None:
    """Keeps the programs that this process compiles, and loads those that others kept, at most MAX_BYTES of them.

    A folder that JAX has been given already, such as by JAX_COMPILATION_CACHE_DIR, is left as it is. Where the folder
    cannot be used, a warning says why, and nothing is kept.

    Args:
      folder: made where it is not there; "" is the user's own, "none" keeps nothing.
    """
    import jax

    if folder == NONE or jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        path = Path(folder).expanduser() if str(folder) else default_folder()
        check_writable(path)
        _remove_unfinished(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home, or a file system without locks
        log.warning("compiled programs are not kept: %s", first_line(error))
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _remove_unfinished(folder: Path) -> None:
    """Removes programs without a time of use, which JAX writes last: a process was killed while it wrote them.

    JAX could not read them, nor ever again write beside them. Raises filelock.Timeout where the lock, which JAX takes
    for every program, cannot be had.
    """
    from filelock import FileLock

    with FileLock(folder / _LOCK, timeout=10):
        for program in folder.glob(f"*{_PROGRAM}"):
            if not program.with_name(program.name.removesuffix(_PROGRAM) + _TIME).exists():
                program.unlink(missing_ok=True)
