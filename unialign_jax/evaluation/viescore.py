"""VIEScore (arXiv 2312.14867): two questions to a judge about an image, and how their answers are read.

SC asks how well the text is followed (of an edit also how little else changed), PQ how natural and how clean the image
is. Each answer is a list of scores from 0 to 10, of which the least counts; O is the root of SC * PQ.

The answers are read by the grammar of the official code (TIGER-AI-Lab/VIEScore, `mllm_output_to_dict`): a JSON object
with "score", also between two delimiters, also with bare keys; else "[6, 0]" or "7". The official code takes any
numbers; `read_scores`, by which the judge is asked, wants as many as the prompt asks for, each from 0 to 10. It takes
fractions, as no prompt forbids them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.data import images as image_files
from unialign_jax.evaluation import official_files
from unialign_jax.evaluation.judging import UNPARSED, Judgement, Question, Unparsed
from unialign_jax.files import check_regular, replacing_file

SOURCE = "viescore/prompts_raw of github.com/TIGER-AI-Lab/VIEScore"
CONTEXT = "context_no_delimit.txt"
# What the official code joins, by the task's name there.
PARTS = {
    "tie": (CONTEXT, "prompts_0shot/two_image_edit_rule.txt", "prompts_0shot/tie_rule_SC.txt"),
    "t2i": (CONTEXT, "prompts_0shot/one_image_gen_rule.txt", "prompts_0shot/t2i_rule_SC.txt"),
    "PQ": (CONTEXT, "prompts_0shot/rule_PQ.txt"),
}
_PLACES = {"tie": "<instruction>", "t2i": "<prompt>"}
COUNTS = {"tie": 2, "t2i": 1, "PQ": 2}  # scores of an answer
FILES = tuple(dict.fromkeys(name for names in PARTS.values() for name in names))
_DELIMITER = "||V^=^V||"
_LONGEST = 2**14  # characters of an answer that are read


# Prompts


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts as the official code joins them.

    Attributes:
      texts: {"tie", "t2i" or "PQ": prompt}, with a place for the item's text in the first two.
      hashes: {file: SHA-256}.
    """

    texts: dict[str, str]
    hashes: dict[str, str]

    @property
    def changed(self) -> list[str]:
        """The files that are not the official ones."""
        known = official_files.sha256_of("gedit")  # of which these prompts alone are free
        return [name for name, digest in self.hashes.items() if digest != known[Path(name).name]]


def read_prompts(folder: str | Path | None) -> Prompts:
    """The prompts of the user's copy. Raises FileNotFoundError or ValueError, in one line."""
    if folder is None:
        raise ValueError(f"the judge's prompts are not given: --viescore-prompts=DIR, the folder {SOURCE}")
    texts, hashes = {}, {}
    for name in FILES:
        path = Path(folder) / name
        if not path.exists():
            raise FileNotFoundError(
                f"--viescore-prompts={folder} has no {name}, expected a copy of the folder {SOURCE}"
            )
        check_regular(path, 2**20)
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text in UTF-8, expected a file of {SOURCE}") from None
    joined = {task: "\n".join(texts[name] for name in names) for task, names in PARTS.items()}
    for task, place in _PLACES.items():
        if place not in joined[task]:
            raise ValueError(f"{Path(folder) / PARTS[task][-1]} has no {place}, expected a file of {SOURCE}")
    return Prompts(joined, hashes)


def questions(
    prompts: Prompts, task: str, item: str, text: str, images: Sequence[Path], *, images_first: bool
) -> tuple[Question, Question]:
    """The questions SC and PQ on an item.

    Args:
      task: "tie" (text-guided image editing) or "t2i".
      text: the instruction or the prompt.
      images: of an edit source and result, else the image alone; PQ is asked of the last alone.
      images_first: whether they stand before the text, as official code of Qwen2.5-VL sends them; that of GPT does not.
    """
    semantics = prompts.texts[task].replace(_PLACES[task], text)
    make = functools.partial(Question, item, images_first=images_first)
    return (
        make("SC", semantics, tuple(images), read=functools.partial(read_scores, count=COUNTS[task])),
        make("PQ", prompts.texts["PQ"], tuple(images[-1:]), read=functools.partial(read_scores, count=COUNTS["PQ"])),
    )


def resized(edited: Path, source: Path, target: Path) -> Path:
    """The edited image at the size of its source, as the official code shows it; `target` where it must be resized."""
    with Image.open(source) as image:
        size = image.size
    image = image_files.load_rgb(edited)
    if image.size == size:
        return edited
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(target) as scratch:
        image.resize(size).save(scratch, "PNG")  # Pillow's own filter, bicubic, as there
    return target


# Answers


def official_scores(answer: str) -> list[float]:
    """The scores that the official code finds in an answer, whatever their number and size.

    Raises Unparsed where it would ask again (for ever, if the answer has braces and the judge is deterministic), and
    where it fails afterwards, since "score" is missing, empty, or not of numbers.
    """
    if len(answer) > _LONGEST:
        raise Unparsed(f"the answer has {len(answer):,} characters, expected at most {_LONGEST:,}")
    text = _json_part(answer)
    found = _bare_scores(answer) if text is None else _object_scores(text.strip().replace("\n", ""))
    if not isinstance(found, list) or not found:
        raise Unparsed('"score" of the answer is no list with a score')
    for score in found:
        if not isinstance(score, int | float):
            raise Unparsed('"score" of the answer holds what is no number')
        if isinstance(score, int) and abs(score) > 2**53:
            raise Unparsed('"score" of the answer holds a number that is too large')
    return found


def read_scores(answer: str, count: int) -> list[float]:
    """`count` scores from 0 to 10 of an answer. Raises Unparsed."""
    found = official_scores(answer)
    if len(found) != count:
        raise Unparsed(f"the answer has {len(found)} scores, expected {count}")
    if not all(type(score) in (int, float) and 0 <= score <= 10 for score in found):  # NaN is not either
        raise Unparsed("the answer has a score that is not from 0 to 10")
    return found


def has_json(answer: str) -> bool:
    """Whether the official code takes the answer for JSON, and never guesses for it."""
    return _json_part(answer) is not None


def _json_part(answer):
    """What lies between two delimiters, or from the first brace to the last; None without either."""
    if answer.count(_DELIMITER) == 2:
        return answer.split(_DELIMITER)[1]
    start, end = answer.find("{"), answer.rfind("}")
    return None if start < 0 or end < 0 else answer[start : end + 1]


def _bare_scores(answer):
    start, end = answer.find("["), answer.rfind("]")
    inner = answer[start + 1 : end] if 0 <= start < end else ""
    try:
        if re.fullmatch(r"\d+, ?\d+", inner):
            return json.loads(f"[{inner}]")
        if 0 <= int(answer) <= 10:
            return [int(answer)]
    except ValueError:
        pass
    raise Unparsed("the answer has neither JSON nor a list of two whole numbers nor one number")


def _object_scores(text):
    try:
        value = json.loads(text)
        score = value["score"]
        return score if isinstance(score, list) else [score]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    try:
        return json.loads(_quoted(text))["score"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unparsed('the answer is no JSON object with "score"') from None


def _quoted(text):
    """The official repair: quotes around bare keys and around values that are no numbers, brackets around numbers."""
    text = re.sub(r"(?<!\w)(\w+):", r'"\1":', text)
    pieces, done = [], 0
    while True:
        key = text.find('"', done)
        colon = text.find('":', key + 1) if key >= 0 else -1
        end = re.compile("[,}]").search(text, colon + 2) if colon >= 0 else None
        if end is None:
            return "".join([*pieces, text[done:]])
        value = text[colon + 2 : end.start()].strip()
        if re.fullmatch(r"-?\d+(\.\d+)?", value):
            value = f"[{value}]"
        elif value.lower() not in ("true", "false", "null"):
            value = f'"{value}"'
        pieces.append(f"{text[done : colon + 1]}: {value}{end[0]}")
        done = end.end()


# Scores


def settle(judgement: Judgement, mode: str, *, guess: bool = False) -> tuple[float | None, str]:
    """(the score of a question, "") or (None, why there is none).

    Official mode takes the first of the judge's answers that the official code can read, corrected mode the one that
    passed `read_scores`.

    Args:
      guess: in official mode, where no answer holds JSON, a whole number from 0 to 10 as the official code draws one;
        it depends on the item and the question alone.
    """
    if mode == "official":
        for answer in judgement.answers:
            try:
                return min(official_scores(answer)), ""
            except Unparsed:
                continue
        if guess and judgement.status == UNPARSED and not has_json(judgement.answer):
            return random.Random(f"{judgement.item} {judgement.name}").randint(0, 10), ""
    elif judgement.is_parsed:
        return min(judgement.value), ""
    return None, f"{judgement.name}: {judgement.reason or 'no answer could be read'}"


def values_of(semantics: Judgement, quality: Judgement, mode: str, *, guess: bool = False) -> tuple[dict, str]:
    """({"SC", "PQ", "O"}, "") of an item's two judgements, or ({}, why it has none)."""
    found = [settle(judgement, mode, guess=guess) for judgement in (semantics, quality)]
    problems = [why for _, why in found if why]
    if problems:
        return {}, "; ".join(problems)
    return scores_of(*(float(score) for score, _ in found))


def scores_of(semantics: float, quality: float) -> tuple[dict[str, float], str]:
    """({"SC", "PQ", "O"}, "") of two scores, or ({}, why they have no root)."""
    product = semantics * quality
    if not 0 <= product < math.inf:  # the official code ends here with an error, or goes on with NaN
        return {}, f"SC {semantics:g} and PQ {quality:g} have no overall score"
    return {"SC": semantics, "PQ": quality, "O": math.sqrt(product)}, ""


def said(semantics: Judgement, quality: Judgement) -> str:
    """What the judge said, for a report."""
    return "\n".join(f"{judgement.name}: {judgement.answer}" for judgement in (semantics, quality) if judgement.answer)


def describe(prompts: Prompts) -> dict[str, Any]:
    """What settings.json says of the prompts."""
    return {"viescore_prompts": prompts.hashes, "viescore_prompts_changed": prompts.changed}
