"""DPG-Bench (arXiv 2403.05135): 1,065 long prompts, four images each in a grid, questions about every one of them."""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation.answering import LocalJudge
from unialign_jax.evaluation.judging import FAILED, Journal, Judgement, Question, Unparsed
from unialign_jax.evaluation.running import JUDGEMENTS
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, read_json, replacing_file, sha256, shown

COUNT = 1065
SEED = 42  # of each prompt's first image
SAMPLES = 4
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
ASKED = "{question} Answer yes or no."


class Dpg(Suite):
    name = "dpg"
    title = "DPG-Bench"
    summary = "questions about images of 1,065 long prompts"
    source = "dpg_bench/prompts and dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA"
    tasks = ("text_to_image",)
    images = COUNT * SAMPLES
    judge_calls = COUNT * SAMPLES * 13  # about: the number of questions differs by prompt
    leading = "dpg"
    worst_by = "score"
    scale = 100.0
    needs = "dpg_bench.csv, and a judge, a VQA model or the official scorer"
    scoring_options = ("dpg_csv", "vqa", "results")

    def add_arguments(self, add: Callable) -> None:
        add("--dpg-csv", type=Path, metavar="FILE", help="your copy of dpg_bench.csv: the questions")
        add("--vqa", metavar="NAME", help="a model of transformers that answers them, instead of a judge")
        add(
            "--results",
            type=Path,
            metavar="FILE",
            help="the official scorer's results or their _detail.txt, instead",
        )

    def files(self, request: Request) -> list[Path]:
        data = request.data
        if not data.is_dir():
            return [data]
        for folder in (data, data / "prompts", data / "dpg_bench" / "prompts"):
            if texts := sorted(folder.glob("*.txt")):
                return texts
        if (data / "prompts.json").exists():
            return [data / "prompts.json"]
        raise FileNotFoundError(f"{data} has no prompts, neither *.txt nor prompts.json (expected {self.source})")

    def items(self, request: Request) -> list[Item]:
        options = request.options
        if options.get("height", request.image_size) != options.get("width", request.image_size):
            raise ValueError("dpg needs square images, since the official scorer cuts its grids into squares")
        prompts = read_prompts(request.data, self.files(request))
        items = []
        for name, prompt in prompts.items():
            jobs = tuple(
                {
                    "id": f"{name}/{index}",
                    "task": "text_to_image",
                    "prompt": prompt,
                    "seed": SEED + index,
                    "steps": 50,
                    "guidance_scale": 7.0,
                }
                for index in range(SAMPLES)
            )
            items.append(Item(name, "", jobs, prompt))
        return items

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        table, vqa, results = (request.extra.get(name) for name in self.scoring_options)
        if results and not results.endswith("_detail.txt"):
            return
        if not table:
            raise ValueError(f"dpg needs --dpg-csv=FILE, the questions: your copy of dpg_bench.csv ({self.source})")
        check_regular(table)
        if vqa and has_judge:
            raise ValueError("--vqa and --judge are both given, expected one of them")
        if not (results or vqa or has_judge):
            raise ValueError(
                "dpg needs --judge=URL and --judge-model=NAME, or --vqa=NAME, or, after generate, --results=FILE of "
                f"the official scorer: {self.official_command(request)}"
            )

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        folder = grids(request)
        whole = [item for item in items if all(job["id"] in results for job in item.jobs)]
        if whole:
            folder.mkdir(parents=True, exist_ok=True)
        for item in tqdm(whole, desc="dpg, grids", unit="grid", disable=None):
            paths = [request.made / f"{job['id']}.png" for job in item.jobs]
            grid = folder / f"{item.id}.png"
            if not grid.exists() or grid.stat().st_mtime_ns < max(path.stat().st_mtime_ns for path in paths):
                with replacing_file(grid) as scratch:
                    tiled([load_rgb(path) for path in paths]).save(scratch, "PNG")

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        self.check_scoring(request, scorer.judge is not None)
        table, official = request.extra.get("dpg_csv"), request.extra.get("results")
        if official and not official.endswith("_detail.txt"):
            means = read_means(Path(official), {item.id for item in items})
            return [self._of_mean(request, item, means) for item in items]
        asked = read_questions(Path(table), request.mode)
        if official:
            answers = read_answers(Path(official), asked if request.mode == "official" else read_questions(Path(table)))
        else:
            answers = self._ask(request, items, asked, scorer)
        return [self._score(request, item, asked.get(item.id, {}), answers.get(item.id)) for item in items]

    def _ask(self, request, items, asked, scorer) -> dict[str, list[dict[int, Judgement]]]:
        """{item: for each of its images, a judgement of each question}."""
        places, questions, left = [], [], {}
        for item in items:
            for index, job in enumerate(item.jobs):
                for number, question in asked.get(item.id, {}).items():
                    image = request.made / f"{job['id']}.png"
                    text = ASKED.format(question=question.text)
                    places.append((item.id, index, number))
                    questions.append(Question(item.id, f"{index}/{number}", text, (image,), read=yes_or_no))
            left[item.id] = SAMPLES * len(asked.get(item.id, {}))
            if not left[item.id]:
                scorer.progress(1)

        def progress(judgement):
            left[judgement.item] -= 1
            if left[judgement.item] == 0:
                scorer.progress(1)

        if vqa := request.extra.get("vqa"):
            from unialign_jax.evaluation.torch_models import open_answerer

            with contextlib.closing(Journal(request.output / JUDGEMENTS)) as journal:
                judgements = LocalJudge(open_answerer(vqa), vqa, journal).ask(questions, progress)
        else:
            judgements = scorer.judge.ask(questions, progress)
        answers = {item.id: [{} for _ in range(SAMPLES)] for item in items}
        for (name, index, number), judgement in zip(places, judgements, strict=True):
            answers[name][index][number] = judgement
        return answers

    def _of_mean(self, request, item, means) -> Score:
        values = {"score": means[item.id]} if item.id in means else {}
        failed = "" if values else "the official scorer has no result of it"
        return Score(item.id, "", values, text=item.text, images=shown_images(request, item), failed=failed)

    def _score(self, request, item, asked, answers) -> Score:
        score = Score(item.id, "", {}, text=item.text, images=shown_images(request, item))
        if not asked or not answers:
            return dataclasses.replace(score, failed="it has no answers" if asked else "no questions are about it")
        said = []
        for index, crop in enumerate(answers):
            for number in asked:
                answer = crop.get(number)
                # In official mode whatever is not "yes" is no, if there is an answer at all.
                if answer is None or answer.status == FAILED or not (answer.is_parsed or request.mode == "official"):
                    why = answer.reason if answer is not None else "it was not asked"
                    return dataclasses.replace(score, failed=f"image {index}, question {number}: {why}")
            said.append({number: crop[number].value if crop[number].is_parsed else "" for number in asked})
        try:
            crops, categories = aggregate(asked, said, request.mode)
        except KeyError as error:
            why = f"question {error.args[0]}, on which others depend, was not read: the official code drops the item"
            return dataclasses.replace(score, failed=why)
        no = [f"{index}: {asked[n].text}" for index, crop in enumerate(said) for n in asked if crop[n] != "yes"]
        return dataclasses.replace(
            score, values={"score": mean(crops)}, answer="; ".join(no), facts={"categories": categories}
        )

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        table = request.extra.get("dpg_csv")
        return {"dpg_csv_sha256": sha256(Path(table))} if table else {}

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """100 times the mean over items, and the means over answers of each category, as the official code has them."""
        second: dict[str, list[float]] = {}
        for score in scores:
            for category, values in score.facts.get("categories", {}).items():
                second.setdefault(category, []).extend(values)
        first: dict[str, list[float]] = {}
        for category, values in second.items():
            first.setdefault(category.split("-")[0].strip(), []).extend(values)
        return {
            "dpg": 100 * mean([score.values["score"] for score in scores if score.values]),
            **{f"L1/{category}": 100 * mean(first[category]) for category in sorted(first)},
            **{f"L2/{category}": 100 * mean(second[category]) for category in sorted(second)},
        }

    def notes(self, request: Request) -> list[str]:
        extra = request.extra
        notes = []
        if extra.get("results"):
            notes.append(f"Answered by the official scorer: {Path(extra['results']).name}.")
        else:
            who = f"by {extra['vqa']}" if extra.get("vqa") else "by the judge"
            notes.append(
                f"Questions are answered {who}; the official scorer's mPLUG-large answers otherwise, and figures of "
                "different answerers are not comparable."
            )
        if request.mode == "official":
            notes.append(
                "Official mode reproduces: the first row of the table is not read, and an item is dropped where a "
                "question depends on it; of an item with rows in two places the last place counts; categories (L1, L2) "
                "are of the last image of each grid alone, before what depends on a no is set to no; an answer that is "
                "not yes is no."
            )
        else:
            notes.append(
                "Corrected mode reads the first row and all rows of an item, leaves out a dependency on a question "
                "that is not there, takes the categories (L1, L2) from all four images after what depends on a no is "
                "set to no, and gives no score to an item with an answer that is neither yes nor no."
            )
        notes.append("50 steps, guidance 7 and seeds 42 to 45 are this project's choice; the benchmark sets none.")
        return notes

    def official_command(self, request: Request) -> str:
        size = request.options.get("height", request.image_size)
        return f"PIC_NUM={SAMPLES} bash dpg_bench/dist_eval.sh {grids(request).absolute()} {size}"


def grids(request: Request) -> Path:
    """The folder of grids that the official scorer reads; nothing else may be in it."""
    return request.output / f"{request.model}_grids"


def shown_images(request: Request, item: Item) -> tuple[str, ...]:
    return tuple(f"{request.model}/{job['id']}.png" for job in item.jobs)


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Four square images of one size as a grid of two by two without padding: above left, above right, below.

    Raises ValueError for images of other shapes.
    """
    side = images[0].width
    if any(image.size != (side, side) for image in images):
        raise ValueError(
            f"the images of a grid are {', '.join(map(str, (image.size for image in images)))}, not squares"
        )
    grid = Image.new("RGB", (2 * side, 2 * side))
    for index, image in enumerate(images):
        grid.paste(image, (index % 2 * side, index // 2 * side))
    return grid


def read_prompts(data: Path, files: Sequence[Path]) -> dict[str, str]:
    """{item: prompt} of a folder of texts or a JSON file. Raises FileNotFoundError or ValueError in one line."""
    if files[0].suffix == ".txt":
        for path in files:
            check_regular(path)
        prompts = {path.stem: path.read_text(encoding="utf-8", errors="replace").strip() for path in files}
    else:
        prompts = read_json(files[0])
    for name, prompt in prompts.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{data}: the prompt of {shown(name)} is {shown(prompt)}, expected a text ({Dpg.source})")
    if len(prompts) != COUNT:
        raise ValueError(f"{data} has {len(prompts)} prompts, expected {COUNT}: get them again ({Dpg.source})")
    return prompts


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
      parents: numbers of the questions of the same item that must be answered with yes; 0 for none.
      category: level 2, such as "entity - whole".
    """

    text: str
    parents: tuple[int, ...]
    category: str


def read_questions(path: Path, mode: str = "official") -> dict[str, dict[int, Asked]]:
    """{item: {number: question}} of dpg_bench.csv, in its order.

    Official mode leaves out the first row, and what an item has before its last run of rows, as the official code does.

    Raises FileNotFoundError or ValueError, in one line, for another file.
    """
    check_regular(path)
    questions: dict[str, dict[int, Asked]] = {}
    before = None
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            lacking = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if lacking:
                raise ValueError(f"{path} has no column {', '.join(lacking)}: expected dpg_bench.csv ({Dpg.source})")
            for index, row in enumerate(rows):
                if index == 0 and mode == "official":
                    continue
                item, number = row["item_id"], int(row["proposition_id"])
                parents = tuple(int(part) for part in row["dependency"].split(","))
                category = row["tuple"].split("(")[0].strip()
                if mode == "official" and item != before:
                    questions[item] = {}
                questions.setdefault(item, {})[number] = Asked(row["question_natural_language"], parents, category)
                before = item
        except (TypeError, AttributeError):
            raise ValueError(f"{path}, line {rows.line_num} is cut short: get the file again ({Dpg.source})") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {rows.line_num} cannot be read: {error}") from None
        except ValueError as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}, line {rows.line_num}: expected whole numbers ({error})") from None
    return questions


def aggregate(
    asked: dict[int, Asked], said: Sequence[dict[int, str]], mode: str
) -> tuple[list[float], dict[str, list[float]]]:
    """(score of each image, values by category of level 2).

    A question one of whose parents has the value 0 gets 0 too, in the order of the questions: where a child comes
    before its parent, the parent's own parents do not count for it.

    Args:
      said: for each image, the answers by number; "yes" is 1, all else 0.

    Raises KeyError, in official mode, where a parent is looked up that is not there.
    """
    scores, categories = [], {}
    for answers in said:
        values = {number: float(answers[number] == "yes") for number in asked}
        plain = dict(values)
        for number, question in asked.items():
            for parent in question.parents:
                if parent == 0 or (mode == "corrected" and parent not in values):
                    continue
                if values[parent] == 0:
                    values[number] = 0.0
                    break
        scores.append(sum(values.values()) / len(values))
        if mode == "official":
            categories = {}
        for number, question in asked.items():
            value = plain[number] if mode == "official" else values[number]
            categories.setdefault(question.category, []).append(value)
    return scores, categories


def yes_or_no(text: str) -> str:
    """The answer that a text begins with. Raises Unparsed for any other."""
    match = re.match(r"\W*(yes|no)\b", text.lower())
    if not match:
        raise Unparsed(f"the answer is {shown(text)}, expected yes or no")
    return match[1]


def read_means(path: Path, items: set[str]) -> dict[str, float]:
    """{item: mean over its images} of the official scorer's results, one line "PATH, SCORE, ..., MEAN" for each.

    Raises FileNotFoundError or ValueError, in one line, for another file.
    """
    check_regular(path)
    means = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"(.+?)((?:, \d+(?:\.\d+)?(?:e-?\d+)?){2,})", line)
        if match:
            name = re.split(r"[/\\]", match[1])[-1].split(".")[0]
            if name in items:
                means[name] = float(match[2].split(", ")[-1])
    if not means:
        raise ValueError(f"{path} has no result of this run: expected the results of DPG-Bench's compute_dpg_bench.py")
    return means


def read_answers(path: Path, asked: dict[str, dict[int, Asked]]) -> dict[str, list[dict[int, Judgement]]]:
    """{item: for each image of its grid, its answers} of the official scorer's _detail.txt.

    A line is "PATH, (LEFT, TOP, RIGHT, BOTTOM), QUESTION, ANSWER". The questions come in the order of official mode.

    Raises FileNotFoundError or ValueError, in one line, for another file, or answers to other questions.
    """
    check_regular(path)
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = re.fullmatch(r"(.+?), (\(\d+, \d+, \d+, \d+\)), (.*), ([^,]*)", line)
        if not match:
            raise ValueError(f"{path}, line {number} is no answer of DPG-Bench's compute_dpg_bench.py: {shown(line)}")
        name = re.split(r"[/\\]", match[1])[-1].split(".")[0]
        found.setdefault(name, {}).setdefault(match[2], []).append((match[3], match[4]))
    answers = {}
    for name, crops in found.items():
        questions = asked.get(name, {})
        answers[name] = []
        for crop in crops.values():
            if [text for text, _ in crop] != [question.text for question in questions.values()]:
                raise ValueError(f"{path} answers other questions about {name} than the table has")
            answers[name].append(
                {
                    number: Judgement("", name, str(number), "parsed", value=answer, answer=answer)
                    for number, (_, answer) in zip(questions, crop, strict=True)
                }
            )
    return answers
