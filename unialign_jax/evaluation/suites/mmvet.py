"""MM-Vet (arXiv 2308.02490): 218 open questions about images, whose answers a judge grades from 0 to 1."""

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from unialign_jax.evaluation import questions
from unialign_jax.evaluation.judging import PARSED, UNPARSED, Judgement, Question, Unparsed
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, read_json, replacing_file, shown, write_json

QUESTIONS = "mm-vet.json"
COUNT = 218
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
RUNS = 1
TRIES = 5  # answers of the judge that are no score, after which the official score is 0
HEAD = "Question | Ground truth | Prediction | Correctness"
AGAIN = "\nPredict the correctness of the answer (digit): "  # ends the question after an answer that is no score


class MMVet(Suite):
    name = "mmvet"
    title = "MM-Vet"
    summary = "218 open questions about images, graded by a judge"
    source = "mm-vet.zip of github.com/yuweihao/MM-Vet/releases (CC BY-NC 4.0)"
    tasks = ("vqa",)
    texts = COUNT
    judge_calls = COUNT
    needs = "a judge"
    leading = "total"
    worst_by = "score"
    scale = 100.0
    scoring_options = ("judge_prompt", "runs")

    def add_arguments(self, add: Callable) -> None:
        add(
            "--judge-prompt",
            metavar="FILE",
            type=Path,
            help="your copy of mm-vet_evaluator.py of github.com/yuweihao/MM-Vet, whose prompt with graded examples is "
            "read, or a text file of that prompt; the judge needs it",
        )
        add("--runs", type=int, metavar="N", help=f"gradings of each answer; the paper's number is 5 ({RUNS})")
        add(
            "--results",
            metavar="FILE",
            type=Path,
            help="score these: answers as {id: text}, or the official evaluator's MODEL_JUDGE-grade-Nruns.json",
        )

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        """Without a judge the answers are made, and graded by a later call."""
        if has_judge and not request.extra.get("results"):
            self._prompt(request)

    # Data

    def files(self, request: Request) -> list[Path]:
        return [request.data / QUESTIONS if request.data.is_dir() else request.data]

    def items(self, request: Request) -> list[Item]:
        [path] = self.files(request)
        if path.name == QUESTIONS and not path.exists():
            raise FileNotFoundError(f"{path.parent} has no {QUESTIONS}: unpack {self.source} there")
        found, missing = [], []
        for name, entry in read_json(path).items():
            place = f"{path}, {shown(name)}"
            if not isinstance(entry, dict):
                raise ValueError(f"{place} is no question; expected MM-Vet's {QUESTIONS}")
            for key in ("imagename", "question", "answer"):
                if not isinstance(entry.get(key), str) or not entry[key]:
                    raise ValueError(f"{place} has no {key}; expected MM-Vet's {QUESTIONS}")
            can = entry.get("capability")
            if not isinstance(can, list) or not can or not all(isinstance(c, str) for c in can):
                raise ValueError(f"{place} has no list capability; expected MM-Vet's {QUESTIONS}")
            image = Path(entry["imagename"]).name
            source = path.parent / "images" / image
            if not source.is_file():
                missing.append(f"images/{image}")
            stored = f"{questions.IMAGES}/{image}"
            job = {
                "id": name,
                "task": "vqa",
                "image": str((request.output / stored).resolve()),
                "question": entry["question"],
            }
            facts = {
                "question": entry["question"],
                "answer": entry["answer"],
                "capability": sorted(set(can), key=_place),
            }
            found.append(Item(name, "", (job,), entry["question"], facts | {"image": stored, "source": str(source)}))
        if not found:
            raise ValueError(f"{path} has no questions")
        if missing and self.needs_results(request):
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise FileNotFoundError(
                f"{path.parent} lacks {len(missing)} of {len(found)} images ({listed}): {self.source}"
            )
        return found

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        for item in items:
            questions.copy_image(request, item.facts["image"], Path(item.facts["source"]))

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        answers = {item.id: results[item.id]["text"] for item in items if item.id in results}
        write_json(request.made / f"{request.model}.json", answers, indent=4)

    # Scores

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        answers = {name: entry["text"] for name, entry in results.items()}
        runs, grades = RUNS if request.extra.get("runs") is None else request.extra["runs"], None
        if runs < 1:
            raise ValueError(f"--runs is {runs}, expected at least 1")
        if name := request.extra.get("results"):
            answers, grades = read_results(Path(name), request.extra.get("runs"))
        is_asked = grades is None
        if is_asked:
            grades = self._grade(request, items, answers, runs, scorer)
        scores = [self._score(request, item, answers, grades) for item in items]
        if is_asked:
            self._write_official(request, scores, grades, scorer.judge.endpoint.model, runs)
        return scores

    def _grade(self, request, items, answers, runs, scorer) -> dict[str, list[Judgement]]:
        """The judgements of each answer, one a run."""
        if not scorer.judge:
            raise ValueError(
                "MM-Vet is scored by a judge: give --judge=URL, --judge-model=NAME and --judge-prompt=FILE, or run the "
                "official evaluator on the answers and read its grades by --results"
            )
        prompt = self._prompt(request)
        asked = [
            grade_question(item, answers[item.id], prompt, run)
            for item in items
            if item.id in answers
            for run in range(runs)
        ]
        found: dict[str, list[Judgement]] = {}
        for judgement in scorer.judge.ask(asked, lambda judgement: scorer.progress(judgement.name == f"run {runs}")):
            found.setdefault(judgement.item, []).append(judgement)
        return found

    def _prompt(self, request: Request) -> str:
        if not request.extra.get("judge_prompt"):
            raise ValueError(
                "the judge's prompt is not given: download mm-vet_evaluator.py of github.com/yuweihao/MM-Vet and name "
                "it by --judge-prompt"
            )
        path = Path(request.extra["judge_prompt"])
        prompt = questions.read_prompt(path, "prompt")
        if HEAD not in prompt:
            raise ValueError(f"{path} has no prompt with the line {HEAD!r}; expected mm-vet_evaluator.py or its prompt")
        return prompt

    def _score(self, request, item, answers, grades) -> Score:
        facts = {"capability": item.facts["capability"], "scores": [], "unread": 0}
        failed = "" if item.id in grades else "the file of --results has no answer to it"
        for judgement in grades.get(item.id, ()):
            if judgement.status == PARSED:
                facts["scores"].append(judgement.value)
            elif judgement.status == UNPARSED and request.mode == "official":
                facts["scores"].append(0.0)
                facts["unread"] += 1
            else:
                failed = f"the judge gave no score: {judgement.reason}"
        values = {} if failed else {"score": mean(facts["scores"])}
        text = f"{item.text} (wanted: {item.facts['answer']})"
        return Score(item.id, "", values, text, (item.facts["image"],), answers.get(item.id, ""), failed, facts)

    def _write_official(self, request, scores, grades, judge, runs) -> None:
        """Writes the official evaluator's files: grades, and the tables of capabilities and of their combinations."""
        request.made.mkdir(parents=True, exist_ok=True)
        graded = {}
        for score in scores:
            if score.values:
                said = [judgement.answer for judgement in grades[score.item]]
                graded[score.item] = {"model": [judge] * runs, "content": said, "score": score.facts["scores"]}
        stem = f"{request.model}_{judge.replace('/', '_')}"
        write_json(request.made / f"{stem}-grade-{runs}runs.json", graded, indent=4)
        scored = [score for score in scores if score.values]
        totals = [mean([score.facts["scores"][run] for score in scored]) * 100 for run in range(runs)]
        end = {"total": round(mean(totals), 1), "std": round(pstdev(totals), 1), "runs": [round(t, 1) for t in totals]}
        for name, key in (("cap", lambda can: can), ("cap-int", lambda can: ["_".join(can)])):
            count = Counter(part for score in scored for part in key(score.facts["capability"]))
            row = {
                part: round(mean([s.values["score"] for s in scored if part in key(s.facts["capability"])]) * 100, 1)
                for part, _ in count.most_common()
            }
            path = request.made / f"{stem}-{name}-score-{runs}runs.csv"
            with replacing_file(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["", *row, *end])
                writer.writerow([request.model, *row.values(), *end.values()])

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        facts = {"temperature": "0, again 0, then 0.5 more for each answer that is no grade", "max_tokens": 3}
        if request.extra.get("judge_prompt"):
            facts["judge_prompt_sha256"] = hashlib.sha256(self._prompt(request).encode()).hexdigest()
        return facts

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        scored = [score for score in scores if score.values]
        figures = {"total": 100 * mean([score.values["score"] for score in scored])}
        runs = min((len(score.facts["scores"]) for score in scored), default=0)
        if runs > 1:
            totals = [100 * mean([score.facts["scores"][run] for score in scored]) for run in range(runs)]
            figures["std of runs"] = pstdev(totals)
        for can in sorted({can for score in scored for can in score.facts["capability"]}, key=_place):
            inside = [score.values["score"] for score in scored if can in score.facts["capability"]]
            figures[f"{can}/score"] = 100 * mean(inside)
        combined = Counter(tuple(score.facts["capability"]) for score in scored)
        for cans, _ in combined.most_common():
            inside = [score.values["score"] for score in scored if tuple(score.facts["capability"]) == cans]
            figures[f"only {'+'.join(cans)}/score"] = 100 * mean(inside)
        figures["unread"] = float(sum(score.facts["unread"] for score in scored))
        return figures

    def notes(self, request: Request) -> list[str]:
        notes = [
            f"The score is the first word of the judge's answer. After {TRIES} answers without one "
            + ("the score is 0, as in the official code" if request.mode == "official" else "there is no score")
            + "; unread is the number of such gradings.",
            "The benchmark's judge is gpt-4-0613, in 5 runs; scores of other judges are not comparable.",
            "A judge's answer that begins with a space is read; the official code asks again.",
        ]
        count = len(self.items(request))
        if count != COUNT:
            notes.append(f"MM-Vet has {COUNT} questions, these data have {count}.")
        if request.extra.get("results"):
            notes.append(f"The answers, or the grades, are those in {request.extra['results']}.")
        return notes

    def official_command(self, request: Request) -> str | None:
        return (
            "OPENAI_BASE_URL=URL OPENAI_API_KEY=KEY python mm-vet_evaluator.py "
            f"--mmvet_path {self.files(request)[0].parent.resolve()} --result_path {request.made.resolve()} "
            f"--model {request.model} --gpt_model JUDGE --num_run {request.extra.get('runs') or RUNS}"
        )


class GradeQuestion(Question):
    """A question whose temperature and words after an answer that is no score are the official evaluator's."""

    def body(self, endpoint: Any, unread: Any):
        body = super().body(endpoint, unread)
        if unread:
            body["messages"][-1]["content"] += AGAIN
        return body | {"temperature": min(2.0, 0.5 * max(0, unread - 1))}


def grade_question(item: Item, answer: str, prompt: str, run: int) -> Question:
    """Asks a judge how right an answer is."""
    wanted = item.facts["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = f"{prompt}\n{' | '.join([item.facts['question'], wanted, answer, ''])}"
    return GradeQuestion(item.id, f"run {run + 1}", text, read=read_grade, max_tokens=3, tries=TRIES)


def read_grade(text: str) -> float:
    """The score that a judge's answer begins with. Raises Unparsed where it is no number from 0 to 1."""
    word = (text.split() or [""])[0]
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise Unparsed(f"begins with {shown(word)}, expected a number from 0 to 1")
    return value


def read_results(path: Path, runs: int | None) -> tuple[dict[str, str], dict[str, list[Judgement]] | None]:
    """(answers, None) of a file of answers, ({}, grades) of the official evaluator's file of grades.

    Raises FileNotFoundError or ValueError, in one line, for another file, and for fewer grades than `runs`.
    """
    check_regular(path)
    content = read_json(path)
    if content and all(isinstance(value, str) for value in content.values()):
        return content, None
    grades = {}
    for name, entry in content.items():
        scores = entry.get("score") if isinstance(entry, dict) else None
        if not isinstance(scores, list) or not scores or not all(isinstance(value, int | float) for value in scores):
            raise ValueError(f"{path}: {shown(name)} is neither an answer nor grades of mm-vet_evaluator.py")
        if runs and len(scores) < runs:
            raise ValueError(f"{path}: {shown(name)} has {len(scores)} grades, --runs asks for {runs}")
        grades[name] = [Judgement("", name, "", PARSED, float(value)) for value in scores[:runs]]
    if not grades:
        raise ValueError(f"{path} has neither answers nor grades")
    return {}, grades


def _place(capability: str) -> tuple[int, str]:
    """Sorts capabilities as the paper's table does."""
    order = CAPABILITIES.index(capability) if capability in CAPABILITIES else len(CAPABILITIES)
    return order, capability
