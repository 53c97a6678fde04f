"""From a row to records: which column is the image, which one the caption; the layouts that people's data have."""

import collections
from collections.abc import Iterable

from unialign_jax.data import jsonl
from unialign_jax.data.jsonl import IMAGE_MARK, MAX_CONDITIONS, BadRow, checked_text
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import Record
from unialign_jax.data.sources.parts import Row, SourceOptions
from unialign_jax.data.sources.pictures import ImageRules, Picture, check_image, read_image
from unialign_jax.files import first_line, one_line

_IMAGE = "image jpg jpeg png webp img image_path file_name filename image_file picture output_image images"
_CAPTION = "caption text txt description prompt captions recaption re_caption long_caption input_prompt cls label"
_INSTRUCTION = (
    "instruction edit_prompt edit_instruction edited_prompt_list edit instructions input_prompt prompt text txt"
)
_TARGET_CAPTION = "caption target_caption edited_caption output_caption target_prompt edited_prompt output"
_CHANGED = {
    "image": "target_img edited_img edited_image edited_file target_image output_image target after image output",
    "source": "source_img src_img source_image input_image original_image image_file source before input",
    "instruction": _INSTRUCTION,
    "caption": _TARGET_CAPTION,
}
# Of each kind the columns of each field, the first that a row has.
FIELDS = {
    kind: {field: tuple(names.split()) for field, names in fields.items()}
    for kind, fields in {
        "text_to_image": {"image": _IMAGE, "caption": _CAPTION},
        "edit": _CHANGED,
        "perception": _CHANGED
        | {"image": f"map conditioning_image {_CHANGED['image']}", "source": f"{_CHANGED['source']} image"},
        "personalization": {
            "image": "generated_images target_img target_image output_image target image",
            "source": "original_images references reference_images input_images subject_images source input_image",
            "instruction": _INSTRUCTION,
            "caption": _TARGET_CAPTION,
        },
        "vqa": {
            "image": _IMAGE,
            "question": "question query problem instruction",
            "answer": "answer multiple_choice_answer answers response solution output",
        },
    }.items()
}
_TALKS = ("conversations", "messages", "texts")  # LLaVA's, the chat templates', FineVision's and the Cauldron's
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def find_column(field: str, names: Iterable[str], options: SourceOptions) -> str | None:
    """The column of a field among `names`: the one that the user named, or else the first that is known."""
    if field in options.columns:
        return options.columns[field] if options.columns[field] in names else None
    return next((name for name in FIELDS[options.kind][field] if name in names), None)


def wanted_columns(names: Iterable[str], options: SourceOptions) -> list[str]:
    """The columns of a table that its rows are made of, so that nothing else is read."""
    known = {name for field in FIELDS[options.kind].values() for name in field} | set(options.columns.values())
    known |= {*_TALKS, "original_images", "generated_images", options.key}
    return [name for name in names if name in known]


def check_columns(names: Iterable[str], options: SourceOptions) -> None:
    """Raises BadRow for a table of which no row can become a record."""
    named = [column for column in options.columns.values() if column not in names]
    if named:
        raise BadRow("columns missing", f"there is no column {', '.join(named)}, found {_listed(names)}")
    talks = any(name in names for name in _TALKS)
    for field in FIELDS[options.kind]:
        is_text = field not in ("image", "source")
        if find_column(field, names, options) or (
            is_text and (talks or (field == "caption" and options.caption_optional))
        ):
            continue
        if field == "source" and talks:  # the released code has both images in one field
            continue
        raise BadRow("columns missing", f"there is none for the {field}, found {_listed(names)}; see --{field}-key")


def _listed(names) -> str:
    names = list(names)
    return ", ".join(map(str, names[:12])) + (" ..." if len(names) > 12 else "") if names else "none"


class RowReader:
    """The fields of a row as texts and images, each checked; what `jsonl.READERS` ask for."""

    def __init__(self, row: Row, options: SourceOptions, rules: ImageRules):
        self.row, self.options, self.rules = row, options, rules
        self.fields = row.fields
        self.key = row.key
        if options.key is not None:
            value = row.fields.get(options.key)
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                raise BadRow("key missing", f'expected a text or a number in "{options.key}", found {value!r:.100}')
            self.key = one_line(str(value))
        self.pictures: list[Picture] = []

    # --- as jsonl.READERS ask ---

    def images(self, name: str, first: int = 0, at_most: int = 1) -> list[bytes]:
        """At least one and up to `at_most` of the images of a field, from number `first` on."""
        found = self.fields.get(name)
        found = found if isinstance(found, list | tuple) else [found]
        if len(found) <= first or found[first] is None:
            raise BadRow(
                "images missing", f'expected "{name}" with at least {first + 1} image(s), found {_brief(found)}'
            )
        options, taken = self.options, []
        for value in found[first : first + at_most]:
            data, name = read_image(value, self.row.base, options.image_root, options.free_paths)
            taken.append(check_image(data, name, self.rules))
        self.pictures += taken
        return [picture.data for picture in taken]

    def text(self, name: str) -> str:
        return checked_text(self.fields.get(name), f'"{name}"')

    def turns(self) -> list[dict]:
        """The turns of the conversation, without those of a system."""
        found = self.fields.get("conversations")
        if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
            raise BadRow("text missing", f'expected a list of turns in "conversations", found {_brief(found)}')
        return [turn for turn in found if turn.get("from") != "system"]

    # --- plain rows ---

    def column(self, field: str, taken: tuple[str | None, ...] = ()) -> str | None:
        filled = [name for name, value in self.fields.items() if value not in (None, "", []) and name not in taken]
        return find_column(field, filled, self.options)

    def expected(self, field: str) -> str:
        names = [self.options.columns[field]] if field in self.options.columns else FIELDS[self.options.kind][field]
        return f"expected the {field} in {' or '.join(names[:4])}, found {_listed(self.fields)}"

    def some_images(self, field: str, at_most: int = 1, taken: tuple[str | None, ...] = ()) -> list[bytes]:
        name = self.column(field, taken)
        if name is None:
            raise BadRow("images missing", self.expected(field))
        return self.images(name, at_most=at_most)

    def some_text(self, field: str, taken: tuple[str | None, ...] = ()) -> str:
        """The text of a field; of a list the first, of answers the most frequent."""
        name = self.column(field, taken)
        value = None if name is None else self.fields[name]
        if isinstance(value, list):
            texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in value]
            texts = [text for text in texts if isinstance(text, str) and text.strip()]
            if field == "answer" and texts:
                texts = [collections.Counter(texts).most_common(1)[0][0]]
            value = texts[0] if texts else None
        if field == "caption" and name in ("cls", "label") and name not in self.options.columns.values():
            value = self._class_name(value)
        if value is None:
            if field == "caption" and self.options.caption_optional:
                return ""
            raise BadRow("text missing", self.expected(field))
        return checked_text(value, f'"{name}"').replace(IMAGE_MARK, "").strip()

    def _class_name(self, value) -> str | None:
        names = self.options.class_names
        if isinstance(value, str) and not value.strip().isdigit():
            return value
        if isinstance(value, bool) or not names:
            return None
        try:
            number = int(value)
        except (TypeError, ValueError):
            return None
        if not 0 <= number < len(names):
            raise BadRow("unknown class", f"{number}, expected 0 to {len(names) - 1}")
        return names[number]


def _brief(value) -> str:
    """A value in a message; never the bytes of an image."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_brief, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    return f"{value!r:.200}"


def read_row(
    row: Row, options: SourceOptions, rules: ImageRules
) -> tuple[list[tuple[Record, Picture]], list[str], str]:
    """The records of a row with the pictures of their targets, notes for the report, and the row's own key.

    Raises BadRow, whatever is wrong with the row; OSError alone for a network that fails.
    """
    if row.fault:
        raise row.fault
    try:
        reader = RowReader(row, options, rules)
        talk = _conversation(reader)
        read = jsonl.READERS[options.kind].read if talk or _is_composed(reader) else _READERS[options.kind]
        if talk is not None:
            reader.fields = {**row.fields, "conversations": talk}
            if "image" not in reader.fields and (name := reader.column("image")):
                reader.fields["image"] = row.fields[name]
            _check_one_image(reader)
        records, notes = read(reader)
    except (BadRow, OSError):
        raise
    except Exception as error:  # no row may end the preparation of the others
        raise BadRow("cannot be read", f"{type(error).__name__}: {first_line(error)}") from error
    by_image = {id(picture.data): picture for picture in reader.pictures}
    return [(record, by_image[id(record.image)]) for record in records], notes, reader.key


def _check_one_image(reader: RowReader) -> None:
    """A question about several images is not one about the first of them."""
    images = reader.fields.get("image")
    if reader.options.kind == "vqa" and isinstance(images, list) and len(images) > 1:
        raise BadRow("several images", f"a question about {len(images)} images, expected one")


def _conversation(reader: RowReader) -> list[dict] | None:
    """The turns of a row that has some, as LLaVA writes them; None where the columns say all."""
    fields, options = reader.fields, reader.options
    texts = [field for field in FIELDS[options.kind] if field not in ("image", "source")]
    if any(field in options.columns for field in texts if field != "instruction"):
        return None
    name = next((name for name in _TALKS if isinstance(fields.get(name), list)), None)
    if name is None:
        # The released code's rows are told by their list of images: a missing text is then said as it says it.
        return [] if options.kind != "personalization" and "conversations" in fields else None
    turns = []
    for turn in fields[name]:
        if name == "conversations":
            turns.append(turn)
        elif not isinstance(turn, dict):
            raise BadRow("text missing", f'expected a list of turns in "{name}", found {_brief(fields[name])}')
        elif name == "texts":
            turns += [{"from": "human", "value": turn.get("user")}, {"from": "gpt", "value": turn.get("assistant")}]
        else:
            turns.append(
                {"from": _SPEAKERS.get(turn.get("role"), turn.get("role")), "value": _said(turn.get("content"))}
            )
    return turns


def _said(content):
    """The text of a message: its own, or that of its parts, with marks for images."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict)]
    said = [IMAGE_MARK if part.get("type") == "image" else part.get("text") for part in parts]
    return "\n".join(text for text in said if isinstance(text, str))


def _is_composed(reader: RowReader) -> bool:
    return reader.options.kind == "personalization" and "edit_prompt" in reader.fields and not reader.options.columns


def _read_captioned(row: RowReader):
    image = row.column("image")
    return [Record(row.key, row.some_images("image")[0], caption=row.some_text("caption", (image,)))], []


def _read_changed(row: RowReader):
    source = row.column("source")
    image = row.column("image", (source,))
    instruction = row.column("instruction", (source, image))
    texts = row.some_text("instruction", (source, image)), row.some_text("caption", (source, image, instruction))
    (target,) = row.some_images("image", taken=(source,))
    value = row.fields.get(source)
    if isinstance(value, list | tuple) and len(value) > MAX_CONDITIONS:
        raise BadRow("too many images", f'"{source}" has {len(value)}, expected at most {MAX_CONDITIONS}')
    sources = row.some_images("source", at_most=MAX_CONDITIONS)
    return [Record(row.key, target, tuple(sources), instruction=texts[0], caption=texts[1])], []


def _read_question(row: RowReader):
    image = row.column("image")
    _check_one_image(row)
    value = row.fields.get(image)
    if isinstance(value, list | tuple) and len(value) > 1:
        raise BadRow("several images", f"a question about {len(value)} images, expected one")
    question = row.some_text("question", (image,))
    if not question:
        raise BadRow("text missing", row.expected("question"))
    answer = row.some_text("answer", (image, row.column("question")))
    return [Record(row.key, row.some_images("image")[0], question=question, answer=answer)], []


_READERS = {
    "text_to_image": _read_captioned,
    "edit": _read_changed,
    "perception": _read_changed,
    "personalization": _read_changed,
    "vqa": _read_question,
}


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind whose rows nobody has a reader for."""
    find_kind(kind)
    if kind not in _READERS:
        raise ValueError(f"{kind} records cannot be read from files: make them in Python, see records.write_records")
