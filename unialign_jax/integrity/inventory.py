"""The inventory of a folder: size and hashes of each of its files, taken when it is written, checked when it is read.

SHA-256 is for checks with other tools. While a folder is read, the checksum is compared (see `checksums`), at a sixth
of the cost. Both find damage by disks and by copying, not forgery: a forger can write another inventory.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from unialign_jax import files
from unialign_jax.integrity import checksums

THREADS = 4  # hashing releases the GIL; four threads keep up with a fast disk
SEAL = "config_sha256"  # a key in a JSON file; its value is the file's hash, taken with zeros in place of the value
_ZEROS = "0" * 64


def take(folder: Path, parts: Iterable[str]) -> dict[str, dict]:
    """{path relative to `folder`: {"size": bytes, "sha256": ..., "checksum": ...}} of all files under `parts` of it."""
    paths = sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(THREADS) as threads:
        entries = list(threads.map(_entry, paths))
    return dict(zip(names, entries, strict=True))


def _entry(path: Path) -> dict:
    size, checksum = checksums.digest(path)
    return {"size": size, "sha256": files.sha256(path), "checksum": checksum}


def check_form(inventory: Any, where: str) -> dict[str, dict]:
    """The inventory itself. Raises ValueError for anything else, in one line that begins with `where`."""
    if not isinstance(inventory, dict):
        raise ValueError(f"{where}: files is a JSON {type(inventory).__name__}, expected an object")
    for name, entry in inventory.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"{where}: files names {name!r}, which is not inside the folder")
        entry = entry if isinstance(entry, dict) else {}
        hashes = [entry.get("sha256"), entry.get("checksum", _ZEROS)]  # older bundles have no checksums
        are_hashes = all(isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in hashes)
        if not is_whole(entry.get("size"), 0) or not are_hashes:
            raise ValueError(f"{where}: files has no size and hashes of {files.shown(name)}")
    return inventory


def is_whole(value: Any, low: int, high: float = float("inf")) -> bool:
    """Whether a JSON value is a whole number from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def at_a_glance(folder: Path, inventory: dict, parts: Iterable[str]) -> dict[str, str]:
    """{file: its problem} of the files under `parts`, without reading them: missing, no file, wrong size, or extra."""
    found = {}
    for part in parts:
        for name, entry in _under(inventory, part).items():
            try:
                size = files.check_regular(folder / name)
            except FileNotFoundError:
                found[name] = f"{name} is missing"
            except ValueError as error:
                found[name] = str(error).replace(str(folder / name), name)
            else:
                if size != entry["size"]:
                    found[name] = f"{name} has {size:,} bytes, expected {entry['size']:,}"
        found |= {name: f"{name} is not in the inventory" for name in additional(folder, inventory, part)}
    return found


def additional(folder: Path, inventory: dict, part: str = "") -> list[str]:
    """Files under a part of the folder that the inventory lacks, except hidden ones such as .DS_Store."""
    found = (path for path in (folder / part).rglob("*") if not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in found if not path.name.startswith("."))
    return [name for name in names if name not in inventory]


def changed(folder: Path, inventory: dict, names: Iterable[str]) -> list[str]:
    """The files of `names` whose SHA-256 has changed, one line for each."""
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _changed(folder, {name: inventory[name] | {"checksum": None}}, name), names)
        return [line for line in found if line]


def _changed(folder: Path, inventory: dict, name: str) -> str | None:
    """The problem of a file, if any, by its checksum, or by SHA-256 if it has none."""
    entry, path = inventory[name], folder / name
    try:
        if (size := files.check_regular(path)) != entry["size"]:
            return f"{name} has {size:,} bytes, expected {entry['size']:,}"
        if entry.get("checksum"):
            is_same = checksums.digest(path) == (entry["size"], entry["checksum"])
        else:
            is_same = files.sha256(path) == entry["sha256"]
        if not is_same:
            return f"{name} has been changed (its hash differs)"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({getattr(error, 'strerror', None) or files.first_line(error)})"
    return None


def _under(inventory: dict, part: str) -> dict[str, dict]:
    return {name: entry for name, entry in inventory.items() if name.startswith(f"{part}/")}


@contextlib.contextmanager
def checked(folder: Path, inventory: dict, part: str, share: slice = slice(None)) -> Iterator[None]:
    """Hashes the files of a part while the block reads them, and raises ValueError at its end for changed files.

    The block does not start if files are missing, truncated or extra. If the block raises an error and files have
    changed, the error is about the files. An empty inventory checks nothing.

    Args:
      share: the slice of the files to hash, for several processes that read the same files.
    """
    if not inventory:
        yield
        return
    refuse(folder, list(at_a_glance(folder, inventory, [part]).values()))
    largest_first = sorted(_under(inventory, part), key=lambda name: -inventory[name]["size"])
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(_changed, folder, inventory, name) for name in largest_first[share]]
        try:
            yield
        except Exception as error:
            refuse(folder, [line for future in futures if (line := future.result())], error)
            raise
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        refuse(folder, [line for future in futures if (line := future.result())])


def refuse(folder: Path, problems: list[str], cause: BaseException | None = None) -> None:
    """Raises ValueError with the first of the problems, if there are any."""
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(
            f"{folder} is not as it was written: {problems[0]}{more}; bring it back (generate.py --no-verify, or "
            "verify=False, reads it as it is)"
        ) from cause


def sealed(content: dict) -> str:
    """JSON text of `content` with the hash of the text under SEAL."""
    text = json.dumps(content | {SEAL: _ZEROS}, indent=2) + "\n"
    head, _, tail = text.rpartition(_ZEROS)
    return head + hashlib.sha256(text.encode()).hexdigest() + tail


def seal_is_broken(raw: bytes, content: dict) -> bool:
    """Whether a text by `sealed` has been changed; False for a text without a seal."""
    if SEAL not in content:
        return False
    seal = content[SEAL]
    if not isinstance(seal, str) or not re.fullmatch("[0-9a-f]{64}", seal):
        return True
    head, _, tail = raw.rpartition(seal.encode())
    return hashlib.sha256(head + _ZEROS.encode() + tail).hexdigest() != seal
