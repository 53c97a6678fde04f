"""The user's files and folders: checked before they are read, written whole or not at all."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 2**26  # bytes of a JSON file that is read whole
_CLAIM = ".being-written"  # a file in an unfinished folder; the process that writes the folder holds a lock on it


def one_line(text: str, most: int = 300) -> str:
    """Untrusted text as one printable line of at most `most` characters, without line ends and terminal codes."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, or the name of its type; at most `most` characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def shown(value: Any, most: int = 60, show: Callable[[object], str] = repr) -> str:
    """A value for a message: its repr on one line, at most `most` characters."""
    try:
        text = " ".join(show(value).split())
    except (ValueError, RecursionError):  # a number of too many digits, or nested too deeply
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def check_regular(path: str | os.PathLike, most: int | None = None) -> int:
    """The size in bytes of a regular file, or of the one that a link points to.

    Opens nothing, since opening a pipe would block. Raises FileNotFoundError when there is no file, and ValueError for
    a folder, device or pipe, for an impossible path, and for a file of more than `most` bytes.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{shown(str(path), 200)} cannot be opened: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device, pipe or socket"
        raise ValueError(f"{path} is a {kind}, expected a file")
    if most is not None and found.st_size > most:
        raise ValueError(f"{path} has {found.st_size:,} bytes, expected at most {most:,}")
    return found.st_size


def parse_json(text: str | bytes, name: str, expected: type | None = dict):
    """The JSON value of `text`, which must be of the type `expected` (any type when None).

    Raises ValueError with one line that begins with `name` when it is not, or cannot be parsed.
    """
    kinds = {dict: "an object", list: "an array", str: "a string"}
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not readable as JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not JSON: it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # also for a number with more digits than Python converts
        raise ValueError(f"{name} is not JSON: {first_line(error)}") from None
    if expected is not None and not isinstance(value, expected):
        raise ValueError(f"{name} holds a JSON {type(value).__name__}, expected {kinds[expected]}")
    return value


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object as a dictionary, for `json.loads`. Raises ValueError for a key that comes twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in names if names.count(key) > 1)!r} twice")
    return fields


def read_json(path: str | os.PathLike, expected: type | None = dict):
    """The value in a JSON file. Raises as `check_regular` and `parse_json` do."""
    check_regular(path, MAX_JSON)
    return parse_json(Path(path).read_bytes(), str(path), expected)


def make_folder(path: Path, option: str) -> None:
    """Makes the folder that an option names, with its parents. Raises OSError in one line when that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}={path} cannot be a folder: {error.strerror}") from None


def check_writable(folder: Path) -> None:
    """Makes the folder where it is not there. Raises OSError when nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"cannot write into {folder}: {reason}".replace("\0", "\\0")) from None


def check_json_output(path: str | os.PathLike) -> None:
    """Checks before a command's work that it can write its JSON result to `path` afterwards.

    An existing file may be replaced only if it holds JSON. Raises OSError or ValueError where it cannot.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output={path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--output={path}: the folder {path.parent} cannot be written to")
    if os.path.lexists(path):
        try:
            read_json(path, expected=None)
        except (ValueError, OSError) as error:
            raise ValueError(f"--output is there already and is not replaced: {error}") from None


def check_inside(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Raises ValueError when `path` is a link to a file outside `folder`.

    Links of Hugging Face's cache are allowed: a snapshot's files point into the `blobs` of the same model.
    """
    folder, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    caches = [parent / "blobs" for parent in folder.parents if parent.name.startswith("models--")]
    if not any(target.is_relative_to(root) for root in (folder, *caches)):
        raise ValueError(f"{path} is a link out of {folder}, which is not followed: put a copy of the file there")


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a scratch file beside `path`, which is renamed to `path` when the block ends without an error.

    After an error or a kill `path` is as it was before. A kill leaves the scratch file behind, hidden, under a unique
    name, `.NAME.*.partial`. Raises OSError when the folder cannot be written.
    """
    path = Path(path).absolute()
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or first_line(error)}") from None
    os.close(handle)
    try:
        os.chmod(scratch, 0o666 & ~_umask())  # mkstemp makes private files
        yield Path(scratch)
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Writes `content` as a JSON file, by `replacing_file`."""
    with replacing_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent) + "\n")


@contextlib.contextmanager
def replacing_folder(
    directory: str | os.PathLike, *, overwrite: bool = False, foreign: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Yields an empty scratch folder, which is renamed to `directory` when the block ends without an error.

    After an error or a kill `directory` is as it was before. The next writer of the same folder removes the scratch
    folder of a killed process, and leaves that of a running one alone.

    Args:
      directory: the folder to write; its parents are created.
      foreign: lists the names in an existing folder that a writer of this kind does not write. If there are any, the
        folder is never replaced, even with `overwrite`.

    Raises OSError, before and after the block, when `directory` may not be replaced or cannot be written.
    """
    directory = Path(directory).absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        refuse_existing(directory, overwrite=overwrite, foreign=foreign)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        if isinstance(error, FileExistsError) and error.errno is None:  # raised by `refuse_existing`
            raise
        raise OSError(f"cannot write {directory}: {error.strerror or first_line(error)}") from None
    try:
        with open(scratch / _CLAIM, "w") as claim:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
            yield scratch
            refuse_existing(directory, overwrite=overwrite, foreign=foreign)
            (scratch / _CLAIM).unlink()
            if os.path.lexists(directory):
                _swap(scratch, directory)
            else:
                os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, directory: Path) -> None:
    """Renames the finished `scratch` to `directory`, and removes the older folder of that name."""
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".replaced", dir=directory.parent))
    with open(aside / _CLAIM, "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(directory, aside / directory.name)
        try:
            os.replace(scratch, directory)
        except OSError:
            os.replace(aside / directory.name, directory)
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(aside)


def refuse_existing(
    directory: str | os.PathLike, *, overwrite: bool = False, foreign: Callable[[Path], list[str]] | None = None
) -> None:
    """Raises FileExistsError when `replacing_folder` with the same arguments would not replace `directory`.

    An empty folder may always be replaced, but a link or a mount point never.
    """
    directory = Path(directory)
    if not os.path.lexists(directory):
        return
    if directory.is_symlink():
        raise FileExistsError(f"{directory} is a link, which is not replaced; choose another --output")
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is there and is not a folder; choose another --output")
    if os.path.ismount(directory):
        raise FileExistsError(f"{directory} is a mount point, which cannot be replaced; name a folder inside it")
    if not any(directory.iterdir()):
        return
    names = foreign(directory) if foreign else []
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise FileExistsError(
            f"{directory} holds what was not written by this command ({shown}), so it is not replaced; "
            "choose another --output, or move that away"
        )
    if not overwrite:
        raise FileExistsError(f"{directory} exists already; choose another --output, or give --overwrite")


def _clean(directory: Path) -> None:
    """Removes what killed writers left beside a folder, and restores a folder whose replacement was interrupted."""
    name = glob.escape(directory.name)
    for left in [*directory.parent.glob(f".{name}.*.partial"), *directory.parent.glob(f".{name}.*.replaced")]:
        try:
            with open(left / _CLAIM, "r+") as claim:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.suffix == ".replaced" and not os.path.lexists(directory):
                    os.replace(left / directory.name, directory)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # a file, someone else's folder, or one that is being written
            continue


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
