"""GenEval 2 (arXiv 2512.16853): 800 prompts, a question about the image for each atom of them."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.evaluation.judging import Question
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, parse_json, read_json, shown, write_json

DATA = "geneval2_data.jsonl"
COUNT = 800
SEED = 42
PATHS = "image_paths.json"  # in the run's folder: what the official evaluation.py reads
ASKED = "{question} Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class GenEval2(Suite):
    name = "geneval2"
    title = "GenEval 2"
    summary = "questions about every object, number, attribute and relation of 800 prompts"
    source = f"{DATA} of github.com/facebookresearch/GenEval2 (CC BY-NC 4.0)"
    tasks = ("text_to_image",)
    images = COUNT
    judge_calls = COUNT * 6  # about: the number of questions differs by prompt
    leading = "gm"
    worst_by = "am"
    scale = 100.0
    needs = "a judge or the official scorer"
    scoring_options = ("results",)

    def add_arguments(self, add: Callable) -> None:
        add("--results", type=Path, metavar="FILE", help="score_lists.json of the official evaluation.py, instead")

    def files(self, request: Request) -> list[Path]:
        return [request.data / DATA if request.data.is_dir() else request.data]

    def items(self, request: Request) -> list[Item]:
        [path] = self.files(request)
        entries = read_entries(path)
        if path.name == DATA and len(entries) != COUNT:
            raise ValueError(f"{path} has {len(entries)} prompts, expected {COUNT}: get it again ({self.source})")
        items = []
        for number, entry in enumerate(entries):
            job = {
                "id": f"{number:05d}",
                "task": "text_to_image",
                "prompt": entry["prompt"],
                "seed": SEED,
                "steps": 50,
                "guidance_scale": 9.0,
            }
            facts = {key: entry[key] for key in ("atom_count", "vqa_list", "skills")}
            items.append(Item(job["id"], f"{entry['atom_count']} atoms", (job,), entry["prompt"], facts))
        return items

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        if not request.extra.get("results") and not has_judge:
            raise ValueError(
                "geneval2 needs --judge=URL and --judge-model=NAME, or, after generate, --results=FILE of the official "
                f"code: {self.official_command(request)}"
            )

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        made = {item.text: str((request.made / f"{item.id}.png").absolute()) for item in items if item.id in results}
        write_json(request.output / PATHS, made)

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        self.check_scoring(request, scorer.judge is not None)
        if request.extra.get("results"):
            atoms, said = read_lists(Path(request.extra["results"]), items), {}
        else:
            atoms, said = self._ask(request, items, scorer)
        scores = []
        for item in items:
            found = atoms.get(item.id)
            values = {"am": mean(found), "gm": geometric_mean(found)} if found else {}
            image = f"{request.model}/{item.id}.png"
            facts = {"atoms": found, "skills": item.facts["skills"]} if found else {}
            text, failed = said.get(item.id, ""), "" if found else "not all of its questions have an answer"
            scores.append(Score(item.id, item.group, values, item.text, (image,), text, failed, facts))
        return scores

    def _ask(self, request, items, scorer) -> tuple[dict[str, list[float]], dict[str, str]]:
        """({item: 1 for each right answer and 0 for others}, {item: what was said})."""
        questions = [
            Question(item.id, str(number), ASKED.format(question=text), (request.made / f"{item.id}.png",))
            for item in items
            for number, (text, _) in enumerate(item.facts["vqa_list"])
        ]
        left = {item.id: len(item.facts["vqa_list"]) for item in items}

        def progress(judgement):
            left[judgement.item] -= 1
            if left[judgement.item] == 0:
                scorer.progress(1)

        judgements = iter(scorer.judge.ask(questions, progress))
        atoms, said = {}, {}
        for item in items:
            answers = [(text, wanted, next(judgements)) for text, wanted in item.facts["vqa_list"]]
            if all(judgement.is_parsed for _, _, judgement in answers):
                atoms[item.id] = [float(is_right(judgement.value, wanted)) for _, wanted, judgement in answers]
            said[item.id] = "; ".join(f"{text} {judgement.answer}" for text, _, judgement in answers)
        return atoms, said

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """100 times the means over prompts, over the atoms of each skill, and of gm over prompts of as many atoms."""
        scored = [score for score in scores if score.values]
        skills: dict[str, list[float]] = {}
        groups: dict[str, list[float]] = {}
        for score in scored:
            groups.setdefault(score.group, []).append(score.values["gm"])
            for skill, value in zip(score.facts["skills"], score.facts["atoms"], strict=True):
                skills.setdefault(skill, []).append(value)
        return {
            "gm": 100 * mean([score.values["gm"] for score in scored]),
            "am": 100 * mean([score.values["am"] for score in scored]),
            **{f"{skill}/am": 100 * mean(skills[skill]) for skill in sorted(skills)},
            **{
                f"{group}/gm": 100 * mean(groups[group])
                for group in sorted(groups, key=lambda name: int(name.split()[0]))
            },
        }

    def notes(self, request: Request) -> list[str]:
        means = (
            "gm is 100 times the mean over prompts of the geometric mean over their questions, am of the arithmetic "
            "one; SKILL/am is over the questions of a skill, N atoms/gm over prompts of N atoms. Both modes are alike."
        )
        if request.extra.get("results"):
            name = Path(request.extra["results"]).name
            return [means, f"Soft-TIFA: the probabilities of the right answers, by the official code ({name})."]
        return [
            means,
            "Answers of the judge are right or wrong (TIFA). The official figure is Soft-TIFA, by the probability that "
            "its Qwen3-VL gives the right answer: gm here is the share of prompts with all answers right, and not "
            "comparable with it.",
        ]

    def official_command(self, request: Request) -> str:
        output = request.output.absolute()
        [data] = (path.absolute() for path in self.files(request))
        return (
            f"python evaluation.py --benchmark_data {data} --image_filepath_data {output / PATHS} --method "
            f"soft_tifa_gm --output_file {output / 'score_lists.json'}"
        )


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers from 0 on; 0 where one of them is."""
    return math.exp(mean([math.log(value) for value in values])) if min(values) > 0 else 0.0


def is_right(answer: str, wanted: str) -> bool:
    """Whether the first word of an answer is the one that is wanted; "4" is "four"."""
    found = re.search(r"\w+", answer.lower())
    word = found[0] if found else ""
    if word.isdecimal() and int(word) < len(NUMBERS):
        word = NUMBERS[int(word)]
    return word == wanted.lower()


def read_entries(path: Path) -> list[dict]:
    """The lines of geneval2_data.jsonl, checked. Raises FileNotFoundError or ValueError in one line."""
    check_regular(path)
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        name = f"{path}, line {number}"
        entry = parse_json(line, name)
        pairs, skills = entry.get("vqa_list"), entry.get("skills")
        is_whole = (
            isinstance(entry.get("prompt"), str)
            and type(entry.get("atom_count")) is int
            and isinstance(pairs, list)
            and bool(pairs)
            and all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs)
            and isinstance(skills, list)
            and len(skills) == len(pairs)
            and all(isinstance(skill, str) for skill in skills)
        )
        if not is_whole:
            raise ValueError(
                f"{name} is no prompt of GenEval 2: expected prompt, atom_count, vqa_list and as many skills "
                f"({GenEval2.source})"
            )
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path} is empty, expected {GenEval2.source}")
    return entries


def read_lists(path: Path, items: Sequence[Item]) -> dict[str, list[float]]:
    """{item: the scores of its questions} of the official evaluation.py: a list for each prompt, in their order.

    Raises FileNotFoundError or ValueError, in one line, for another file.
    """
    lists = read_json(path, list)
    found = {}
    for item in items:
        number, wanted = int(item.id), len(item.facts["vqa_list"])
        scores = lists[number] if number < len(lists) else None
        is_list = isinstance(scores, list) and all(type(score) in (int, float) and score >= 0 for score in scores)
        if not is_list or len(scores) != wanted:
            raise ValueError(
                f"{path} has {shown(scores)} for prompt {number}, expected {wanted} scores: it is no score_lists.json "
                "of these prompts"
            )
        found[item.id] = [float(score) for score in scores]
    return found
