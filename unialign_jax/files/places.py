"""The place of a run: a folder on a mounted file system, or one in a Google Cloud Storage bucket (`gs://`)."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from unialign_jax import files

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Place = Path | PurePath  # in a bucket it is an `etils.epath.Path`, which has the methods of a Path


def is_url(name: str | os.PathLike) -> bool:
    return _URL.match(str(name)) is not None


def is_remote(path: Place) -> bool:
    """Whether a path that `place` gave lies in a bucket."""
    return not isinstance(path, Path)


def place(name: str | os.PathLike) -> Place:
    """A run's folder as an object that Orbax takes: a local path, made absolute, or one in a bucket.

    Raises ValueError for other URLs, for Orbax writes checkpoints to file systems and to gs:// alone, and where the
    package for gs:// is not installed.
    """
    name = os.fspath(name)
    if name and not is_url(name):
        return Path(name).absolute()
    bucket, _, folder = name.removeprefix("gs://").partition("/")
    folders = folder.rstrip("/").split("/")
    if not name.startswith("gs://") or not bucket or {"", ".", ".."} & set(folders) or "\0" in name:
        raise ValueError(
            f"the run's folder is {files.shown(name, 200)}, expected a path or gs://BUCKET/FOLDER; other object stores "
            "must be mounted first"
        )
    os.environ.setdefault("EPATH_USE_TF", "false")  # fsspec reads and writes, also where TensorFlow is installed
    try:
        import fsspec
        from etils import epath

        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise ValueError(f"the run's folder {name} cannot be opened without gcsfs: pip install gcsfs") from None
    for scheme in ("gs", "gcs"):  # Orbax writes to the bucket by a client of its own, so none may keep listings
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(name.rstrip("/"))


def client(path: Place):
    """The bucket's client, an fsspec file system."""
    import fsspec

    return fsspec.filesystem("gs")


@contextlib.contextmanager
def reaching(path: Place) -> Iterator[None]:
    """Turns any error of a bucket's client in the block into an OSError in one line; does nothing for a local path."""
    if not is_remote(path):
        yield
        return
    try:
        yield
    except Exception as error:  # of many kinds: no such bucket, no rights, no network
        reason = files.one_line(files.first_line(error))
        raise OSError(f"{path} cannot be reached ({reason}): look at the bucket's name and rights") from error


def move(folder: Place, to: Place) -> None:
    """Gives a folder another name. In a bucket its objects are copied by the store, and then removed."""
    if not is_remote(folder):
        folder.rename(to)
        return
    with reaching(folder):
        client(folder).copy(str(folder), str(to), recursive=True)
        client(folder).rm(str(folder), recursive=True)


def read_json(path: Place) -> dict:
    """The JSON object in a file. Raises as `files.read_json` does, and OSError when a bucket cannot be reached."""
    if not is_remote(path):
        return files.read_json(path)
    with reaching(path):
        size = client(path).info(str(path))["size"] if path.exists() else None
        data = path.read_bytes() if size is not None and size <= files.MAX_JSON else b""
    if size is None:
        raise FileNotFoundError(f"{path}: there is no such file")
    if size > files.MAX_JSON:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {files.MAX_JSON:,}")
    return files.parse_json(data, str(path))
