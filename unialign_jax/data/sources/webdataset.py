"""WebDataset's tars, read in a stream: members of one name up to the first dot make a row (`0001.jpg`, `0001.json`)."""

import itertools
import tarfile
import zlib
from collections.abc import Iterator

from unialign_jax.data.images import MAX_BYTES
from unialign_jax.data.jsonl import MAX_LINE, BadRow
from unialign_jax.data.sources import locations
from unialign_jax.data.sources.parts import Part, Row, SourceOptions, make_key
from unialign_jax.data.sources.rows import FIELDS
from unialign_jax.files import first_line, one_line, parse_json

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "cls")
MAX_MEMBERS = 64  # of one row


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """As tarfile's own, which takes a header that is cut short for the end."""
        try:
            return super().fromtarfile(tar)
        except tarfile.TruncatedHeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it has no end mark") from None


def list_parts(path: str, label: str, options: SourceOptions) -> Iterator[Part]:
    """A tar is one part: what is in it is known when it is read."""
    if locations.is_folder(path):
        names = [name for name in locations.listing(path) if is_tar(name)]
        if not names:
            raise ValueError(f"source {path} is a folder without a tar")
        for name in names:
            yield Part(locations.join(path, name), f"{label}/{name}")
        return
    try:
        locations.size(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"source {path} does not exist") from None
    yield Part(path, label)


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def read_part(part: Part, options: SourceOptions) -> Iterator[Row]:
    """A tar that is cut short gives the rows before, and one bad row for the rest."""
    count = 0
    try:
        with locations.open_file(part.path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            for name, members in itertools.groupby(_members(tar), key=lambda member: member[0]):
                count += 1
                yield _row(part, name, members)
        if not count:
            raise tarfile.ReadError("it holds no file")
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        locations.raise_if_remote(error, part.path)
        fault = BadRow("tar cut short or broken", f"after {count} rows: {first_line(error)}")
        yield Row(make_key(part.label, f"after {count} rows"), {}, fault=fault, place=locations.shown(part.path))


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | BadRow | None]]:
    """(name up to the first dot, ending, content); content None for what is not read."""
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        ending = ending.lower()
        if not member.isreg() or not stem or not dot:
            continue
        known = ending in IMAGES or ending.rpartition(".")[2] in IMAGES or ending in TEXTS or ending == "json"
        most = MAX_BYTES if "." in ending or ending in IMAGES else MAX_LINE
        if not known:
            content = None
        elif member.size > most:
            content = BadRow("file too large", f"{one_line(member.name)} has {member.size:,} bytes")
        else:
            content = tar.extractfile(member).read()
            if len(content) < member.size:
                raise tarfile.ReadError(f"{one_line(member.name)} is cut short")
        tar.members.clear()  # tarfile keeps a list of all
        yield folder + slash + stem, ending, content


def _row(part: Part, name: str, members) -> Row:
    """Its image is the field `jpg` or so, its text `txt`; what `json` holds stands beside them."""
    key = make_key(part.label, one_line(name.encode("utf-8", "backslashreplace").decode()), "/")
    fields, loose, fault = {}, {}, None
    for number, (_, ending, content) in enumerate(members):
        try:
            if number >= MAX_MEMBERS:
                raise BadRow("too many files in a row", f"{one_line(name)} has more than {MAX_MEMBERS}")
            if isinstance(content, BadRow):
                raise content
            if content is None:
                continue
            if ending in fields:
                raise BadRow("duplicate key", f"{one_line(name)}.{ending} is there twice in a row")
            if ending == "json":
                try:
                    loose = parse_json(content, f"{one_line(name)}.json")
                except ValueError as error:
                    raise BadRow("not a JSON object", str(error)) from None
            elif ending in TEXTS:
                try:
                    fields[ending] = content.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    detail = f"{one_line(name)}.{ending}: {error.reason} at byte {error.start}"
                    raise BadRow("text is not Unicode", detail) from None
            else:
                fields[ending] = content
        except BadRow as error:
            fault = fault or error
    if any(isinstance(value, bytes) for value in fields.values()):
        # An image's path in the JSON is one on the machine that wrote the tar.
        loose = {field: value for field, value in loose.items() if field not in FIELDS["text_to_image"]["image"]}
    return Row(
        key,
        {**loose, **fields} if fault is None else {},
        fault=fault,
        place=f"{locations.shown(part.path)}: {one_line(name)}",
    )
