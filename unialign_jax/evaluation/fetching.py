"""`launch/evaluate.py fetch`: downloads the files of a benchmark that anyone may have, and says where the others are.

A file is written as NAME.partial, from which an interrupted download resumes, and gets its name when its size and hash
are the official ones.
"""

import argparse
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from PIL import Image
from tqdm import tqdm

from unialign_jax.evaluation.official_files import ELSEWHERE, OfficialFile, of_suite
from unialign_jax.files import check_regular, first_line, make_folder, parse_json, shown

ATTEMPTS, REDIRECTS = 3, 5
MOST = 2**31  # bytes of a file whose size is not known
_CHUNK = 2**18


class Interrupted(Exception):
    """A download that broke off: another attempt may go on."""


class Unreachable(Interrupted):
    """The host did not answer at all."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What became of a file: a state for the table, and for a failure its reason."""

    file: OfficialFile
    state: str
    failure: str = ""


def add_arguments(parser: argparse.ArgumentParser, suites: Sequence[str]) -> None:
    """The options of the command."""
    parser.add_argument("suite", choices=suites, help="whose files")
    parser.add_argument("--data", required=True, metavar="DIR", type=Path, help="folder to put them into")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    parser.add_argument("--base-url", metavar="URL", help="a mirror, whose paths are those of the original hosts")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds without data (%(default)g)")


def run(arguments: argparse.Namespace) -> int:
    """Downloads the files. Returns 1 where one could not be had."""
    if not 0 < arguments.timeout < 1e6:
        raise ValueError(f"--timeout is {arguments.timeout:g}, expected seconds above 0")
    files = of_suite(arguments.suite)
    fetched = []
    if files:
        make_folder(arguments.data, "--data")
        how = {"mirror": arguments.base_url, "timeout": arguments.timeout, "overwrite": arguments.overwrite}
        fetched = fetch(files, arguments.data, **how)
        print("\n".join(table(fetched)))
    for line in ELSEWHERE.get(arguments.suite, ()):
        print(f"not fetched: {line}")
    for failure, files in failures(fetched).items():
        print(f"failed: {files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {failure}")
    return 1 if any(one.failure for one in fetched) else 0


def fetch(
    files: Sequence[OfficialFile], folder: Path, *, mirror: str | None, timeout: float, overwrite: bool = False
) -> list[Fetched]:
    """Downloads files into a folder, those that are there aside; a failure of one does not stop the others.

    Args:
      mirror: stands for the scheme and host of every address; None for the original.
      timeout: seconds without data after which a request is given up.
    """
    fetched: list[Fetched] = []
    unreachable: dict[str, str] = {}  # host -> how it failed: its other files would only be waited for in vain
    with requests.Session() as session, tqdm(total=len(files), desc="fetch", unit="file", disable=None) as bar:
        for file in files:
            target, url = folder / file.path, _mirrored(file.url, mirror)
            host = urlsplit(url).netloc
            try:
                if (state := _there(file, target, overwrite)) is None:
                    if host in unreachable:
                        raise Unreachable(unreachable[host])
                    state = _one(session, file, target, url, timeout, bar.set_postfix_str)
                failure = ""
            except (ValueError, OSError, Interrupted) as error:
                state, failure = "failed", first_line(error)
                if isinstance(error, Unreachable):
                    unreachable[host] = failure
            fetched.append(Fetched(file, state, failure))
            bar.update()
    return fetched


def _verified(file) -> str:
    return "" if file.is_hashed else ", not verified: its hash is not known here"


def _there(file, target, overwrite) -> str | None:
    """The state of a file that is there and whole; None where it is to be fetched."""
    if not os.path.lexists(target) or overwrite:
        return None
    try:
        check(file, target)
    except ValueError as error:
        raise ValueError(f"{error}; it is kept: move it away, or give --overwrite") from None
    return f"was there{_verified(file)}"


def _one(session, file, target, url, timeout, tell) -> str:
    """The state of a file after it was fetched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    for attempt in range(ATTEMPTS):
        try:
            _download(
                session, url, partial, file.size or MOST, timeout, lambda count: tell(f"{file.path} {count:,} bytes")
            )
            break
        except Interrupted as error:
            if attempt + 1 == ATTEMPTS:
                raise type(error)(f"{error} ({ATTEMPTS} attempts; the same command resumes there)") from None
            time.sleep(min(2**attempt, timeout))
    try:
        check(file, partial)
    except ValueError as error:
        partial.unlink()  # going on from it could only fail again
        raise ValueError(f"{error}; {url} does not give the official file, and it is not kept") from None
    os.replace(partial, target)
    return f"fetched{_verified(file)}"


def _mirrored(url: str, mirror: str | None) -> str:
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def _download(session, url: str, partial: Path, most: int, timeout: float, tell: Callable[[int], None]) -> None:
    """Appends to `partial` what it lacks. Raises Interrupted where another attempt may help, else ValueError."""
    have = check_regular(partial) if os.path.lexists(partial) else 0
    if have >= most:  # whole already, or another file
        return
    try:
        with _get(session, url, have, timeout) as answer:
            if answer.status_code == 416:  # nothing follows what is there: the check tells whether it is the file
                return
            resumes = answer.status_code == 206
            if resumes and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise ValueError(f"{url} answered with another part of the file than was asked for")
            with open(partial, "ab" if resumes else "wb") as out:
                have = have if resumes else 0
                for chunk in answer.iter_content(_CHUNK):
                    have += len(chunk)
                    if have > most:
                        raise ValueError(f"{url} gives more than the {most:,} bytes of the file")
                    out.write(chunk)
                    tell(have)
    except requests.RequestException as error:
        raise Interrupted(f"{url} cannot be read: {_reason(error)}") from None


def _get(session, url: str, have: int, timeout: float) -> requests.Response:
    """The answer, after redirects within the host."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    first = urlsplit(url)
    for _ in range(REDIRECTS + 1):
        try:
            answer = session.get(url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise Unreachable(f"{url} cannot be read: {_reason(error)}") from None
        if not answer.is_redirect:
            break
        answer.close()
        url = urljoin(url, answer.headers["Location"])
        if (urlsplit(url).scheme, urlsplit(url).netloc) != (first.scheme, first.netloc):
            raise ValueError(f"{first.geturl()} leads to another host, {shown(url, 100)}, which is not followed")
    else:
        raise ValueError(f"{first.geturl()} redirects more than {REDIRECTS} times")
    if answer.status_code >= 500 or answer.status_code == 429:
        answer.close()
        raise Interrupted(f"{url} answers with status {answer.status_code}")
    if answer.status_code not in (200, 206, 416):
        answer.close()
        raise ValueError(f"{url} answers with status {answer.status_code}")
    return answer


def _reason(error: requests.RequestException) -> str:
    """Why a request failed, without the names of Python's objects."""
    if isinstance(error, requests.Timeout):
        return "no data came in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "the certificate of the host is not accepted"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "there is no connection, or it was cut"
    return first_line(error)


def check(file: OfficialFile, path: Path) -> None:
    """Raises ValueError, in one line, where a file of this machine cannot be the official one."""
    size = check_regular(path)
    if file.size is not None and size != file.size:
        raise ValueError(f"{path} has {size:,} bytes, expected {file.size:,}")
    for name, wanted in (("sha256", file.sha256), ("md5", file.md5), ("git_blob", file.git_blob)):
        if wanted and not (found := digest(path, name, size)).startswith(wanted):
            raise ValueError(f"{path} has {name} {found}, expected {wanted}")
    if not file.is_hashed:
        check_format(path)


def digest(path: Path, name: str, size: int) -> str:
    """The SHA-256, MD5 or Git blob hash of a file."""
    made = hashlib.new("sha1" if name == "git_blob" else name, usedforsecurity=False)
    if name == "git_blob":
        made.update(b"blob %d\0" % size)
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            made.update(chunk)
    return made.hexdigest()


def check_format(path: Path) -> None:
    """Raises ValueError where a file cannot be read as what its name says, such as a page of an error."""
    ending = path.name.removesuffix(".partial").rpartition(".")[2]
    if ending == "json":
        parse_json(path.read_bytes(), str(path), None)
    elif ending == "jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            parse_json(line, f"{path}, line {number}")
    elif ending == "py" and path.read_bytes().lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a page of the web, expected Python")
    elif ending == "jpg":
        try:
            Image.open(path).verify()
        except Exception:  # PIL's readers raise many kinds on damaged bytes
            raise ValueError(f"{path} is no picture") from None


def failures(fetched: Sequence[Fetched]) -> dict[str, list[str]]:
    """{why: the files that failed so}."""
    found: dict[str, list[str]] = {}
    for one in fetched:
        if one.failure:
            found.setdefault(one.failure, []).append(one.file.path)
    return found


def table(fetched: Sequence[Fetched]) -> list[str]:
    """Lines on what became of the files; many of one folder and state are one line."""
    groups: dict[tuple, list[Fetched]] = {}
    for one in fetched:
        groups.setdefault((os.path.dirname(one.file.path), one.state, one.file.licence), []).append(one)
    lines = []
    for (folder, state, licence), members in groups.items():
        if len(members) > 10:
            lines.append((f"{folder}/ ({len(members)} files)", state, licence))
        else:
            lines += [(one.file.path, state, licence) for one in members]
    width = max(len(name) for name, *_ in lines)
    return [f"{name:<{width}}  {state}  ({licence})" for name, state, licence in lines]
