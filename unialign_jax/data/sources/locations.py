"""Local paths and fsspec URLs (`gs://`, `s3://`, `hf://`, `memory://`): listed, read and written by the same calls."""

import contextlib
import glob
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec

from unialign_jax.files import check_regular, first_line, one_line
from unialign_jax.files.places import is_url

MAX_NAMES = 1_000_000  # files that one brace pattern may name

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WEB = ("http://", "https://", "ftp://", "data:")


def is_web(path: str) -> bool:
    """Whether it is an address that preparation does not fetch from."""
    return path.lower().startswith(_WEB)


def local(path: str | os.PathLike) -> str:
    """The path without `file://`."""
    return str(path).removeprefix("file://")


def join(base: str, *names: str) -> str:
    """`base/name`; a name that is absolute or a URL replaces the base."""
    path = str(base)
    for name in names:
        path = str(name) if is_url(name) or name.startswith("/") else f"{path.rstrip('/')}/{name}" if path else name
    return path


def parent(path: str) -> str:
    """The folder of a file, or the URL of one."""
    if is_url(path):
        return path.rstrip("/").rpartition("/")[0]
    return os.path.dirname(path) or "."


def name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and its path there.

    Raises ValueError for a URL of an unknown kind, or one whose package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"{path} cannot be opened: {first_line(error)}") from None
    except Exception as error:  # each file system raises its own: no account, no such bucket
        raise ValueError(f"{path} cannot be opened: {first_line(error)}") from None


def expand(pattern: str) -> list[str]:
    """The files and folders that a pattern of braces (`{000..127}`, `{a,b}`) and of `*?[` names, in order, once each.

    Raises FileNotFoundError when a pattern finds none. A path without a pattern is returned as it is.
    """
    pattern = local(pattern)
    if not is_url(pattern) and os.path.lexists(pattern):
        return [pattern]
    found = []
    for name in itertools.islice(_expand_braces(pattern), MAX_NAMES):
        if not glob.has_magic(name):
            found.append(name)
        elif is_url(name):
            fs, inner = filesystem(name)
            found += sorted(fs.unstrip_protocol(match) for match in fs.glob(inner))
        else:
            found += sorted(glob.glob(name, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches the pattern {pattern}")
    return list(dict.fromkeys(found))


def _expand_braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    span = _RANGE.fullmatch(found[1])
    if span:
        low, high = int(span[1]), int(span[2])
        choices = (str(number).zfill(len(span[1])) for number in range(low, high + 1))
    elif "," in found[1]:
        choices = found[1].split(",")
    else:  # no pattern: a name with braces
        choices = [found[0].replace("{", "\0").replace("}", "\1")]
    for choice in choices:
        for whole in _expand_braces(pattern[: found.start()] + choice + pattern[found.end() :]):
            yield whole.replace("\0", "{").replace("\1", "}")


def is_folder(path: str) -> bool:
    if not is_url(path):
        return os.path.isdir(path)
    fs, inner = filesystem(path)
    return fs.isdir(inner)


def exists(path: str) -> bool:
    if not is_url(path):
        return os.path.lexists(path)
    fs, inner = filesystem(path)
    return fs.exists(inner)


def size(path: str) -> int:
    """The bytes of a file. Raises FileNotFoundError, and ValueError for what is none."""
    if not is_url(path):
        return check_regular(path)
    fs, inner = filesystem(path)
    found = fs.info(inner)
    if found["type"] != "file":
        raise ValueError(f"{path} is a folder, expected a file")
    return found["size"] or 0


def open_file(path: str):
    """A file opened for its bytes. Raises as `size`."""
    if not is_url(path):
        check_regular(path)
        return open(path, "rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def read_bytes(path: str, most: int) -> bytes:
    """The bytes of a file. Raises as `size`, and ValueError for more than `most` bytes."""
    if size(path) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    try:
        with open_file(path) as file:
            data = file.read(most + 1)  # a file may grow, or not tell its size, as in /proc
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or first_line(error)}") from None
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return data


def walk(folder: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each folder below `folder`, itself first: its path, that from `folder` on, and the sorted names of its files.

    What is hidden is left out, and links to folders are not followed.
    """
    if is_url(folder):
        fs, inner = filesystem(folder)
        for place, folders, files in fs.walk(inner):
            inside = place[len(inner.rstrip("/")) :].strip("/")
            yield join(folder, inside) if inside else folder, inside, _shown(files)
            if isinstance(folders, list):
                folders.sort()
        return
    for place, folders, files in os.walk(folder):
        folders[:] = _shown(folders)
        yield place, os.path.relpath(place, folder) if place != folder else "", _shown(files)


def _shown(names) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def listing(folder: str) -> list[str]:
    """The sorted names in a folder; none where it does not exist."""
    if not exists(folder):
        return []
    if not is_url(folder):
        return sorted(os.listdir(folder))
    fs, inner = filesystem(folder)
    return sorted(name_of(name) for name in fs.ls(inner, detail=False, refresh=True))


def is_inside(path: str, root: str) -> bool:
    """Whether a file lies below `root`; a local link counts for where it leads."""
    if is_url(path) or is_url(root):
        return ".." not in path.split("/") and path.startswith(root.rstrip("/") + "/")
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError):  # no path: opening it says why
        return True


def make_folder(folder: str) -> None:
    fs, inner = filesystem(folder)
    try:
        fs.makedirs(inner, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror or first_line(error)}") from None


def remove_folder(folder: str) -> None:
    if is_url(folder):
        fs, inner = filesystem(folder)
        if fs.exists(inner):
            fs.rm(inner, recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_file(path: str) -> None:
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(inner)


def move(source: str, target: str) -> None:
    """A file to another name of the same file system."""
    if is_url(target):
        fs, inner = filesystem(target)
        fs.mv(filesystem(source)[1], inner)
    else:
        os.replace(source, target)


@contextlib.contextmanager
def writing(path: str) -> Iterator[str]:
    """Gives a local path to write to; what was written takes the name, whole, when the block ends well."""
    at = tempfile.gettempdir() if is_url(path) else os.path.dirname(path) or "."
    handle, scratch = tempfile.mkstemp(prefix=".", suffix=".partial", dir=at)
    os.close(handle)
    try:
        yield scratch
        if is_url(path):
            fs, inner = filesystem(path)
            fs.put_file(scratch, inner)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(scratch, 0o666 & ~mask)  # mkstemp makes private files
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


@contextlib.contextmanager
def reading(path: str) -> Iterator[str]:
    """Gives a local path that holds the file's bytes, for what reads local files alone."""
    if not is_url(path):
        yield path
        return
    fs, inner = filesystem(path)
    with tempfile.TemporaryDirectory() as folder:
        scratch = os.path.join(folder, "file")
        fs.get_file(inner, scratch)
        yield scratch


def raise_if_remote(error: Exception, path: str) -> None:
    """Raises OSError for a failure of a network, after which the same command resumes, and not for a damaged file."""
    if is_url(path) and isinstance(error, OSError):
        raise OSError(f"{path}: {first_line(error)}") from error


def shown(path: str) -> str:
    return one_line(str(path))
