"""ImgEdit-Bench, Basic (arXiv 2505.20275): 737 edits of nine types, each rated by a judge in three respects."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.evaluation.judging import Question, Unparsed
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, read_json, shown, write_json

COUNT = 737
TYPES = ("extract", "style", "add", "adjust", "background", "replace", "remove", "action", "compose")
SEED = 42
PLACE = "<edit_prompt>"
RESULT = "result.json"  # beside the images: what step1_get_avgscore.py reads
LOWEST, HIGHEST = 1, 5


class ImgEdit(Suite):
    name = "imgedit"
    title = "ImgEdit-Bench"
    summary = "737 edits of nine types, rated by a judge from 1 to 5"
    source = "Benchmark/Basic of github.com/PKU-YuanGroup/ImgEdit, its images in Benchmark.tar of sysuyy/ImgEdit"
    tasks = ("edit",)
    images = COUNT
    judge_calls = COUNT
    needs = "a judge"
    leading = "overall"
    worst_by = "score"
    scale = 5.0
    scoring_options = ("results",)

    def add_arguments(self, add: Callable) -> None:
        add("--results", type=Path, metavar="FILE", help="result.json of the official basic_bench.py, instead")

    def files(self, request: Request) -> list[Path]:
        folder = basic(request.data)
        return [folder / "basic_edit.json", folder / "prompts.json"]

    def items(self, request: Request) -> list[Item]:
        edits, rubrics = read_edits(*self.files(request))
        sources = photos(request.data)
        names = sorted({entry["id"] for entry in edits.values()})
        missing = [name for name in names if not (sources / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{sources} lacks {len(missing)} of {len(names)} source images, the first {missing[0]}: get "
                "Benchmark.tar of the data set sysuyy/ImgEdit again"
            )
        items = []
        for name, entry in edits.items():
            source = sources / entry["id"]
            job = {
                "id": name,
                "task": "edit",
                "image": str(source.absolute()),
                "instruction": entry["prompt"],
                "seed": SEED,
                "steps": 50,
                "guidance_scale": 9.0,
            }
            rubric = rubrics[entry["edit_type"]]
            facts = {
                "source": str(source.absolute()),
                "asked": rubric.replace(PLACE, entry["prompt"]),
                "respects": respects(rubric),
            }
            items.append(Item(name, entry["edit_type"], (job,), entry["prompt"], facts))
        return items

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        if not request.extra.get("results") and not has_judge:
            raise ValueError(
                "imgedit needs --judge=URL and --judge-model=NAME, or, after generate, --results=FILE, the result.json "
                "of the official basic_bench.py"
            )

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        self.check_scoring(request, scorer.judge is not None)
        if request.extra.get("results"):
            texts, reasons = read_result(Path(request.extra["results"]), items), {}
        else:
            texts, reasons = self._ask(request, items, scorer)
            write_json(request.made / RESULT, texts, indent=4)
        return [self._score(request, item, texts.get(item.id), reasons.get(item.id, "")) for item in items]

    def _ask(self, request, items, scorer) -> tuple[dict[str, str], dict[str, str]]:
        """({item: what the judge said}, {item: why it said nothing})."""
        questions = [
            Question(
                item.id,
                item.group,
                item.facts["asked"],
                (Path(item.facts["source"]), request.made / f"{item.id}.png"),
                read=functools.partial(readable, names=item.facts["respects"]),
            )
            for item in items
        ]
        judgements = scorer.judge.ask(questions, lambda judgement: scorer.progress(1))
        texts, reasons = {}, {}
        for item, judgement in zip(items, judgements, strict=True):
            if judgement.answer:
                texts[item.id] = judgement.answer
            else:
                reasons[item.id] = judgement.reason
        return texts, reasons

    def _score(self, request, item, text, reason) -> Score:
        score = None
        if text is not None:
            score = (
                official_score(text) if request.mode == "official" else corrected_score(text, item.facts["respects"])
            )
            reason = f"no scores can be read in {shown(text, 100)}"
        return Score(
            item.id,
            item.group,
            {} if score is None else {"score": score},
            text=item.text,
            images=(os.path.relpath(item.facts["source"], request.output), f"{request.model}/{item.id}.png"),
            answer=text or "",
            failed="" if score is not None else reason or "the judge has no answer about it",
        )

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """Means by type, their mean, and BAGEL's mean over all items; official mode rounds the types' as step2 does."""
        by_type = {
            kind: [score.values["score"] for score in scores if score.group == kind and score.values] for kind in TYPES
        }
        means = {kind: mean(values) for kind, values in by_type.items() if values}
        if mode == "official":
            means = {kind: round(value, 2) for kind, value in means.items()}
        return {
            "overall": mean(list(means.values())),
            **{f"{kind}/score": value for kind, value in means.items()},
            "items": mean([value for values in by_type.values() for value in values]),
        }

    def notes(self, request: Request) -> list[str]:
        notes = [
            "overall is the mean of the types' means, as papers report it (the official code has no overall); items is "
            "the mean over all edits, which BAGEL reports."
        ]
        if request.extra.get("results"):
            notes.append(f"Judged by the official code: {Path(request.extra['results']).name}.")
        else:
            notes.append(
                "The judge is asked at temperature 0, again where no score can be read (officially once, at its own "
                "temperature). Judges differ: the paper's is gpt-4o-2024-08-06, the leaderboard's gpt-4.1, BAGEL's "
                "gpt-4o-2024-11-20."
            )
        if request.mode == "official":
            notes.append(
                "Official mode reproduces step1 and step2: only lines that are a name, a colon and a whole number "
                "count, also those of the reasoning; an edit's mean is over the lines that do, and is rounded to 2 "
                "digits, as the types' means are; an edit without such a line is left out."
            )
        else:
            notes.append(
                f"Corrected mode reads the last score of each respect that the rubric names, also 4., 4.5, 3/5 and "
                f"**4**; it needs all of them, from {LOWEST} to {HIGHEST}, and rounds nothing."
            )
        notes.append("50 steps, guidance 9 and seed 42 are this project's choice; the benchmark sets none.")
        return notes

    def official_command(self, request: Request) -> str:
        edits, rubrics = (path.absolute() for path in self.files(request))
        made, output = request.made.absolute(), request.output.absolute()
        judged = made / RESULT
        return (
            f"python basic_bench.py --result_img_folder {made} --edit_json {edits} --origin_img_root "
            f"{photos(request.data).absolute()} --prompts_json {rubrics} && python step1_get_avgscore.py --result_json "
            f"{judged} --average_score_json {output / 'average.json'} && python step2_typescore.py "
            f"--average_score_json {output / 'average.json'} --basic_edit {edits} --typescore_json "
            f"{output / 'types.json'}"
        )


def basic(data: Path) -> Path:
    """The folder of basic_edit.json and prompts.json in a user's copy."""
    for folder in (data, data / "Basic", data / "Benchmark" / "Basic"):
        if (folder / "basic_edit.json").exists():
            return folder
    raise FileNotFoundError(f"{data} has no Basic/basic_edit.json: expected {ImgEdit.source}")


def photos(data: Path) -> Path:
    """The folder that the images' names begin in."""
    folder = basic(data)
    for found in (folder / "singleturn", folder.parent / "singleturn"):
        if found.is_dir():
            return found
    raise FileNotFoundError(f"{folder.parent} has no folder singleturn, the source images: expected {ImgEdit.source}")


def read_edits(edits: Path, rubrics: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """({key: edit}, {type: rubric}), checked. Raises FileNotFoundError or ValueError in one line."""
    found, texts = read_json(edits), read_json(rubrics)
    for name, entry in found.items():
        fields = entry if isinstance(entry, dict) else {}
        if not all(isinstance(fields.get(key), str) and fields[key].strip() for key in ("id", "prompt", "edit_type")):
            raise ValueError(f"{edits}: {shown(name)} is no edit, expected id, prompt and edit_type ({ImgEdit.source})")
        if fields["edit_type"] not in TYPES:
            other = " (GenEditEvalKit's copy has other prompts)" if fields["edit_type"] == "alter" else ""
            raise ValueError(
                f"{edits}: {shown(name)} is of the type {shown(fields['edit_type'])}, expected one of "
                f"{', '.join(TYPES)}{other}"
            )
    if len(found) != COUNT:
        raise ValueError(f"{edits} has {len(found)} edits, expected {COUNT}: get it again ({ImgEdit.source})")
    for kind in TYPES:
        if not isinstance(texts.get(kind), str) or PLACE not in texts[kind]:
            raise ValueError(f"{rubrics} has no rubric of {kind} with {PLACE} in it: get it again ({ImgEdit.source})")
    return found, texts


def respects(rubric: str) -> list[str]:
    """What a rubric asks scores for: the names before ": A number from 1 to 5" in its example of an answer."""
    return [name.strip() for name in re.findall(r"(?m)^(.+?): A number from 1 to 5", rubric)]


def official_score(text: str) -> float | None:
    """As step1_get_avgscore.py: the mean of the lines "X: <digits>", rounded to 2 digits; None without one."""
    found = []
    for line in text.splitlines():
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdecimal():
            found.append(int(parts[1]))
    return round(mean(found), 2) if found else None


def corrected_score(text: str, names: Sequence[str]) -> float | None:
    """The mean of the last score of each name; None where one is missing or out of range.

    A score may be 4, 4., 4.5, 4/5 or in asterisks. Without names, as from a rubric of another form, every line that is
    a name and a score counts, except those that begin with "reasoning" or "brief reasoning".
    """
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"[-*#\s]*(.+?)[*\s]*:[*\s]*(\d+(?:\.\d+)?)\s*(?:/\s*5)?[.*\s]*", line.strip())
        if match:
            found[match[1].strip().lower()] = float(match[2])
    wanted = [name.lower() for name in names] or [name for name in found if "reasoning" not in name]
    scores = [found[name] for name in wanted if name in found and LOWEST <= found[name] <= HIGHEST]
    return mean(scores) if scores and len(scores) == len(wanted) else None


def readable(text: str, names: Sequence[str]) -> str:
    """The text itself. Raises Unparsed where `corrected_score` finds none."""
    if corrected_score(text, names) is None:
        raise Unparsed(f"the answer lacks scores of {', '.join(names) or 'anything'}: {shown(text, 100)}")
    return text


def read_result(path: Path, items: Sequence[Item]) -> dict[str, str]:
    """{item: what the judge said} of the official result.json; its errors are left out.

    Raises FileNotFoundError or ValueError, in one line, for another file.
    """
    check_regular(path)
    known = {item.id for item in items}
    found = {name: text for name, text in read_json(path).items() if name in known and isinstance(text, str)}
    if not found:
        raise ValueError(f"{path} has no result of this run: expected the result.json of ImgEdit's basic_bench.py")
    return found
