"""Files and folders of users: read with care, and written whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_JSON = 2**26  # bytes of a JSON file that is read whole
_CLAIM = ".being-written"  # in an unfinished folder, locked by the process that writes it


def one_line(text: str, most: int = 300) -> str:
    """A stranger's text as one printable line of at most `most` characters: no line ends, no terminal codes."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else line[: most - 1] + "…"


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, or its type where it has none; at most `most` characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def shown(value, most: int = 60) -> str:
    """A value in a message: its repr on one line, at most `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a number of too many digits, or nested too deeply
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def check_regular(path: str | os.PathLike, most: int | None = None) -> int:
    """The size in bytes of a regular file, which a link may lead to.

    Raises FileNotFoundError where nothing is, ValueError for anything else (a folder, a device, a pipe), for a path
    that cannot be one, and for a file of more than `most` bytes. Nothing is opened: a pipe would wait for its writer.
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
    """The JSON value of `text`, of the type `expected` (any when None).

    Raises ValueError in one line that begins with `name`, also for JSON that is nested too deeply.
    """
    kinds = {dict: "an object", list: "an array", str: "a string"}
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not readable as JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not JSON: it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a number of more digits than Python converts is one too
        raise ValueError(f"{name} is not JSON: {first_line(error)}") from None
    if expected is not None and not isinstance(value, expected):
        raise ValueError(f"{name} holds a JSON {type(value).__name__}, expected {kinds[expected]}")
    return value


def read_json(path: str | os.PathLike, expected: type | None = dict):
    """The value that a JSON file holds; errors as `check_regular` and `parse_json`."""
    check_regular(path, MAX_JSON)
    return parse_json(Path(path).read_bytes(), str(path), expected)


def check_json_output(path: str | os.PathLike) -> None:
    """Raises OSError or ValueError, before the work, where a command could not write its JSON after it.

    A file that is there may be replaced when it holds JSON too; another of the user's is kept.
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
    """Raises ValueError for a file that a link takes out of `folder`.

    Hugging Face's cache is known: a snapshot's files are links into the `blobs` of the same model.
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
    """Gives a path beside `path` to write to; what was written takes the name when the block ends well.

    An error, or a kill, leaves what was there before. The scratch file's name is its own: no file of the user has it.
    A kill leaves it there, hidden, as `.NAME.*.partial`. Raises OSError where the folder cannot be written.
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


def write_json(path: str | os.PathLike, content, indent: int = 2) -> None:
    """Writes `content` as a JSON file, by `replacing_file`."""
    with replacing_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent) + "\n")


@contextlib.contextmanager
def replacing_folder(
    directory: str | os.PathLike, *, overwrite: bool = False, foreign: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Gives an empty folder beside `directory` to fill; it takes the name when the block ends well.

    An error, or a kill, leaves what was there before. What a killed process left unfinished is removed by the next
    that writes the same folder; a running process's is not touched.

    Args:
      directory: the folder to write; its parents are made.
      overwrite: whether it may replace what is there.
      foreign: of an existing folder, the names in it that a writer of this kind does not write. When there are any the
        folder is not replaced, `overwrite` or not.

    Raises FileExistsError, before and after the block, for an existing `directory` that may not be replaced, and
    OSError for one that cannot be written.
    """
    directory = Path(directory).absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        refuse_existing(directory, overwrite=overwrite, foreign=foreign)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        if isinstance(error, FileExistsError) and error.errno is None:  # what `refuse_existing` says
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
    """The finished `scratch` takes the name of the older `directory`, which is then removed."""
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

    An empty folder may always be replaced, but not a link to one, nor a mount point.
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
    """Removes what dead writers left beside a folder, and puts it back where its replacement was cut off."""
    name = _escaped(directory.name)
    for left in [*directory.parent.glob(f".{name}.*.partial"), *directory.parent.glob(f".{name}.*.replaced")]:
        try:
            with open(left / _CLAIM, "r+") as claim:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.suffix == ".replaced" and not os.path.lexists(directory):
                    os.replace(left / directory.name, directory)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # a file, someone else's folder, or one that is being written
            continue


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
