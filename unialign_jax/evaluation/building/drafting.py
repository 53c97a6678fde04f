"""Fifth stage: a model behind an OpenAI-compatible endpoint writes four prompts for each image.

Its templates are the text files in `templates/`, or yours of the same names (--templates); every draft carries the
SHA-256 of its own. Answers are asked for as JSON objects. All of them are kept in OUTPUT/answers.jsonl.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from unialign_jax.data.endpoint import Refused
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows
from unialign_jax.evaluation.judging import FAILED, Judge, Judgement, Question, Unparsed
from unialign_jax.files import check_regular, parse_json, shown

GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")
SLOTS = ("count", "color", "relation", "background")
TEMPLATES = (*GROUPS, "rubric", "retry")
ANSWERS = "answers.jsonl"
JSON_MODE = {"response_format": {"type": "json_object"}}
MAX_TOKENS = 1024  # of an answer
MAX_PROMPT = 8000  # characters
MOST_CAPTIONS = 5


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt of an image: a line of drafts.jsonl.

    Attributes:
      item: "IMAGE_ID/GROUP".
      text: "" where no answer could be read.
      parts: of t2i_complex the quoted slots, of edit_multi the three edits, of edit_complex the reasoning.
      draft_id: stands for the image and the text; a review is of one draft.
      attempt: 0 for the first draft, and one more each time that it was turned down.
      reason: why there is no text.
    """

    item: str
    group: str
    key: str
    text: str
    parts: dict
    draft_id: str
    template_sha256: str
    attempt: int = 0
    reason: str = ""


def parameters(build: Build) -> dict:
    digests = {name: template_digest(text) for name, text in read_templates(build.settings.templates).items()}
    drafting = {name: digests[name] for name in GROUPS}
    return build.settings.part("judge_model", "temperature") | {"templates": drafting}


def work(build: Build, folder: Path) -> dict:
    images = build.rows("select/images.jsonl")
    with Drafter(build) as drafter:
        drafts = drafter.draft([(image, group, None) for image in images for group in GROUPS], "draft")
    write_rows(folder / "drafts.jsonl", (dataclasses.asdict(draft) for draft in drafts))
    empty = [draft for draft in drafts if not draft.text]
    said = f"{len(drafts) - len(empty)} drafts of {len(images)} images by {build.settings.judge_model}"
    if empty:
        said += f"; {len(empty)} answers could not be read, such as {empty[0].item}: {empty[0].reason}"
    return {"said": said, "drafts": len(drafts), "unreadable": len(empty)}


STAGE = Stage("draft", ("select/images.jsonl",), parameters, work)


class Drafter:
    """Asks for drafts, and other questions. The journal of answers is open until the block ends."""

    def __init__(self, build: Build):
        self._build, self.templates = build, read_templates(build.settings.templates)
        self._judge: Judge | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._judge is not None:
            self._judge.journal.close()

    def ask(self, questions: Sequence[Question], title: str) -> list[Judgement]:
        """A judgement for every question.

        Raises ValueError, in one line, where some have no answer at all; the others are kept.
        """
        if not questions:
            return []
        if self._judge is None:
            if self._build.make_judge is None:
                raise ValueError("the model that drafts is not named: give --judge=URL and --judge-model=NAME")
            self._judge = self._build.make_judge()
        with tqdm(total=len(questions), desc=title, unit="question", disable=None) as bar:
            try:
                found = self._judge.ask(questions, lambda judgement: bar.update())
            except Refused as error:
                raise ValueError(f"--judge: {error}") from None
        failed = [judgement for judgement in found if judgement.status == FAILED]
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(found)} questions got no answer ({failed[0].item}: {failed[0].reason}); the "
                "other answers are kept, and the same command resumes"
            )
        return found

    def draft(self, wanted: Sequence[tuple[dict, str, tuple[Draft, str] | None]], title: str) -> list[Draft]:
        """A draft for each (image, group, None or (the draft that was turned down, why))."""
        questions = [self._question(*one) for one in wanted]
        drafts = []
        for (image, group, before), answer in zip(wanted, self.ask(questions, title), strict=True):
            value = answer.value if answer.is_parsed else {"text": "", "parts": {}}
            drafts.append(
                Draft(
                    f"{image['image_id']}/{group}",
                    group,
                    image["key"],
                    value["text"],
                    value["parts"],
                    draft_id(image["sha256"], group, value["text"]),
                    template_digest(self.templates[group]),
                    attempt=before[0].attempt + 1 if before else 0,
                    reason=answer.reason,
                )
            )
        return drafts

    def _question(self, image, group, before) -> Question:
        captions = " / ".join(image["captions"][:MOST_CAPTIONS]) or "(no captions)"
        text = self.templates[group].replace("<captions>", captions)
        if before:
            draft, reason = before
            again = self.templates["retry"].replace("<draft>", draft.text or "(could not be read)")
            text += again.replace("<reason>", reason)
        more = JSON_MODE | {"temperature": self._build.settings.temperature}
        return Question(
            f"{image['image_id']}/{group}",
            "draft",
            text,
            (Path(image["file"]),),
            images_first=True,
            read=READERS[group],
            max_tokens=MAX_TOKENS,
            more=more,
        )


def draft_id(image_sha256: str, group: str, text: str) -> str:
    """12 hexadecimal digits that stand for a prompt of an image."""
    return hashlib.sha256("\n".join((image_sha256, group, text)).encode()).hexdigest()[:12]


def read_templates(folder: str) -> dict[str, str]:
    """The templates. Raises ValueError or OSError, in one line, for a folder that lacks one, or a mark in it."""
    where, texts = Path(folder) if folder else Path(__file__).parent / "templates", {}
    marks = {"rubric": ("<instruction>",), "retry": ("<draft>", "<reason>")}
    for name in TEMPLATES:
        path = where / f"{name}.txt"
        check_regular(path, 2**16)
        texts[name] = path.read_text(encoding="utf-8")
        for mark in marks.get(name, ()):
            if mark not in texts[name]:
                raise ValueError(f"{path} lacks the mark {mark}, which stands for what is put in")
    return texts


def template_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Reading answers


def read_object(answer: str) -> dict:
    """The JSON object of an answer, which may stand in a fence or between other words. Raises Unparsed."""
    begin, end = answer.find("{"), answer.rfind("}")
    if begin < 0 or end < begin:
        raise Unparsed("it holds no JSON object")
    try:
        return parse_json(answer[begin : end + 1], "the answer")
    except ValueError as error:
        raise Unparsed(str(error)) from None


def read_string(found: dict, name: str) -> str:
    """A string of an answer, its runs of white space as one space. Raises Unparsed."""
    value = found.get(name)
    if not isinstance(value, str):
        raise Unparsed(f"`{name}` is {shown(value)}, expected a string")
    try:
        return clean(value)
    except ValueError as error:
        raise Unparsed(f"`{name}` {error}") from None


def clean(text: str) -> str:
    """A prompt on one line. Raises ValueError for one that is empty, too long, or no text."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("is empty")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"has {len(text):,} characters, expected at most {MAX_PROMPT:,}")
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    if text[0] in "=+-@":
        raise ValueError(f"begins with {text[0]}, which a spreadsheet takes for a formula")
    return text


def join_edits(edits: Sequence[str]) -> str:
    """Edits as one text; each ends as a sentence does."""
    return " ".join(edit if edit[-1] in ".!?" else f"{edit}." for edit in edits)


def _read_long(answer: str) -> dict:
    return {"text": read_string(read_object(answer), "prompt"), "parts": {}}


def _read_complex(answer: str) -> dict:
    found = read_object(answer)
    slots = {name: " ".join(found[name].split()) for name in SLOTS if isinstance(found.get(name), str)}
    return {"text": read_string(found, "prompt"), "parts": {"slots": slots}}


def _read_multi(answer: str) -> dict:
    edits = read_object(answer).get("edits")
    if not isinstance(edits, list) or len(edits) != 3:
        raise Unparsed(f"`edits` is {shown(edits)}, expected a list of three strings")
    edits = [join_edits([read_string({"edits": edit}, "edits")]) for edit in edits]
    return {"text": join_edits(edits), "parts": {"edits": edits}}


def _read_reasoned(answer: str) -> dict:
    found = read_object(answer)
    reasoning = found.get("reasoning")
    parts = {"reasoning": " ".join(reasoning.split())} if isinstance(reasoning, str) else {}
    return {"text": read_string(found, "instruction"), "parts": parts}


READERS: dict[str, Callable[[str], dict]] = {
    "t2i_long": _read_long,
    "t2i_complex": _read_complex,
    "edit_multi": _read_multi,
    "edit_complex": _read_reasoned,
}


def read_rubric(answer: str) -> dict:
    """What the rubric call says. Raises Unparsed."""
    found = read_object(answer)
    if not isinstance(found.get("needs_reasoning"), bool):
        raise Unparsed(f"`needs_reasoning` is {shown(found.get('needs_reasoning'))}, expected true or false")
    why = found.get("why")
    return {"needs_reasoning": found["needs_reasoning"], "why": why if isinstance(why, str) else ""}
