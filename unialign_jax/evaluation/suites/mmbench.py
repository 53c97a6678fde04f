"""MMBench (arXiv 2307.06281): questions of choice, each asked with its options rotated, right only if always right."""

import csv
import hashlib
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unialign_jax.evaluation import questions
from unialign_jax.evaluation.judging import Question, Unparsed
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import replacing_file, shown

ROTATION = 1_000_000  # rotation k of question g has the index g + k * ROTATION
REFERENCE = 64  # an image's cell of at most so many characters is the index of the row that holds the image
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
# MD5 of the files at opencompass.openxlab.space/utils/benchmarks/MMBench, by VLMEvalKit.
MD5 = {
    "MMBench_DEV_EN": "b6caf1133a01c6bb705cf753bb527ed8",
    "MMBench_TEST_EN": "6939fadb0ce626fefc0bdc9c64efc528",
    "MMBench_DEV_EN_V11": "30c05be8f2f347a50be25aa067248184",
    "MMBench_TEST_EN_V11": "26f0f15381a21720255091d3e0316ce6",
}
SERVER = "mmbench.opencompass.org.cn"
TRIES = 3  # of the judge
JUDGE_PROMPT = """\
A model answered a question by one of several options, in its own words. Say which option it chose.
Reply with the letter of the option alone. Reply Z if the answer means none of the options.

Question: {}
{}
Answer of the model: {}
Letter: """
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_STOPS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class MMBench(Suite):
    name = "mmbench"
    title = "MMBench"
    summary = "questions of choice under CircularEval; English dev set, 1,164 questions in 4,329 rotations"
    source = "opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN.tsv, or another of its TSV files"
    tasks = ("vqa",)
    texts = 4329
    judge_calls = 4329  # at most: of the answers that name no option
    needs = "nothing more; a judge for answers that name no option"
    leading = "overall"
    worst_by = "correct"
    scoring_options = ("judge_prompt",)

    def add_arguments(self, add: Callable) -> None:
        add(
            "--results",
            metavar="FILE",
            type=Path,
            help="score this file of VLMEvalKit: a table with the columns index and prediction, or hit",
        )
        add(
            "--judge-prompt",
            metavar="FILE",
            type=Path,
            help="what the judge is asked: a text with three {}, for question, options and answer, or your copy of "
            "VLMEvalKit's vlmeval/dataset/utils/multiple_choice.py (default: a prompt of this program)",
        )

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        if has_judge and not request.extra.get("results"):
            self._template(request)

    # Data

    def files(self, request: Request) -> list[Path]:
        if not request.data.is_dir():
            return [request.data]
        found = sorted(request.data.glob("*.tsv"))
        if len(found) != 1:
            count = f"{len(found)} .tsv files" if found else "no .tsv file"
            raise ValueError(f"{request.data} has {count}: name one by --data ({self.source})")
        return found

    def items(self, request: Request) -> list[Item]:
        [path] = self.files(request)
        groups: dict[int, list[dict]] = {}
        heads, references, seen = {}, {}, set()
        for number, row in questions.read_table(path, ("index", "question", "A", "B", "image")):
            place = f"{path}, row {number}"
            index = _index(row.get("index"), place)
            if index in seen:
                raise ValueError(f"{place} has the index {index} again")
            seen.add(index)
            choices = {letter: row[letter] for letter in string.ascii_uppercase if letter in row}
            if "question" not in row or len(choices) < 2:
                raise ValueError(f"{place} (index {index}) has {len(choices)} options, expected a question and two")
            if (answer := row.get("answer")) is not None and answer not in choices:
                raise ValueError(
                    f"{place} (index {index}): answer is {shown(answer)}, expected one of {', '.join(choices)}"
                )
            image = row.get("image", "")
            if len(image) > REFERENCE:
                heads[index] = questions.decode_base64(image[:64], place)
                if len(image) % 4:
                    raise ValueError(f"{place}: its image is cut short; get the file again")
            else:
                references[index] = _index(image, f"{place}, image")
            kept = {name: row[name] for name in ("hint", "answer", "category", "l2-category", "split") if name in row}
            entry = {"index": index, "question": row["question"], "choices": choices} | kept
            groups.setdefault(index % ROTATION, []).append(entry)
        owner = {index: index for index in heads}
        for index, other in references.items():
            if other not in heads:
                raise ValueError(f"{path}: the image of index {index} is that of {other}, which has none; get it again")
            owner[index] = other
        rows = [row for rows in groups.values() for row in rows]
        unanswered = [row["index"] for row in rows if "answer" not in row]
        if unanswered and len(unanswered) < len(rows):
            raise ValueError(f"{path}: index {unanswered[0]} has no answer, others have; get it again")
        found = []
        for group, rows in groups.items():
            if rows[0]["index"] != group:
                rows.sort(key=lambda row: row["index"])
            if rows[0]["index"] != group:
                raise ValueError(
                    f"{path} has index {rows[0]['index']}, a rotation of {group}, which it lacks; get it again"
                )
            found.append(self._item(request, rows, owner, heads))
        return found

    def _item(self, request, rows, owner, heads) -> Item:
        jobs, turns = [], []
        for row in rows:
            index = row["index"]
            image = questions.image_name(str(owner[index]), heads[owner[index]])
            prompt = question_prompt(row)
            stored = str((request.output / image).resolve())
            jobs.append({"id": str(index), "task": "vqa", "image": stored, "question": prompt})
            turns.append({**row, "image": image})
        main = turns[0]
        facts = {"turns": turns, "l2-category": main.get("l2-category", ""), "split": main.get("split", "none")}
        return Item(str(main["index"]), main.get("category", ""), tuple(jobs), jobs[0]["question"], facts)

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        [path] = self.files(request)
        wanted = {int(Path(turn["image"]).stem): turn["image"] for item in items for turn in item.facts["turns"]}
        for number, row in questions.read_table(path, ("index", "image")):
            place = f"{path}, row {number}"
            name = wanted.get(_index(row["index"], place))
            if name and not (request.output / name).exists():
                questions.save_image(request, name, questions.decode_base64(row["image"], place), place)

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        columns = ("index", "question", "hint", *string.ascii_uppercase)
        rows = []
        for item in items:
            for turn in item.facts["turns"]:
                if str(turn["index"]) in results:
                    row = {name: turn[name] for name in turn if name not in ("choices", "image")}
                    rows.append(row | turn["choices"] | {"prediction": results[str(turn["index"])]["text"]})
        rows.sort(key=lambda row: row["index"])
        columns = [name for name in (*columns, "answer", "category", "l2-category", "split") if _is_used(name, rows)]
        for suffix in (".tsv", ".xlsx"):
            questions.write_table(self._made(request, suffix), [*columns, "prediction"], rows)

    def _made(self, request: Request, ending: str) -> Path:
        """A file of the official name: MODEL_DATASET and an ending."""
        return request.made / f"{request.model}_{self.files(request)[0].stem}{ending}"

    # Scores

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        [path] = self.files(request)
        if not any("answer" in turn for item in items for turn in item.facts["turns"]):
            raise ValueError(
                f"{path.name} has no answers, so no score can be given here: upload "
                f"{self._made(request, '.xlsx').name} (or .tsv) to {SERVER}"
            )
        if request.extra.get("results"):
            hits, answers = self._read(Path(request.extra["results"]))
        else:
            hits, answers = {}, {int(name): entry["text"] for name, entry in results.items()}
        read = {index: None for index in answers}
        for item in items:
            for turn in item.facts["turns"]:
                if turn["index"] in answers:
                    read[turn["index"]] = inferred_option(answers[turn["index"]], turn["choices"])
        judged = self._ask(request, items, read, answers, scorer) if scorer.judge else {}
        scores = [self._score(item, hits, answers, read, judged, scorer) for item in items]
        request.made.mkdir(parents=True, exist_ok=True)
        write_accuracies(self._made(request, "_acc.csv"), scores)
        return scores

    def _score(self, item, hits, answers, read, judged, scorer) -> Score:
        turns = [turn for turn in item.facts["turns"] if turn["index"] in answers]
        main = item.facts["turns"][0]
        said = "\n".join(f"{turn['answer']}: {answers[turn['index']]}" for turn in turns)
        facts = {"l2-category": item.facts["l2-category"], "split": item.facts["split"]}
        values, failed = {}, ""
        if main["index"] in hits:
            values = {"correct": hits[main["index"]]}
        elif main["index"] not in answers:
            failed = "the file of --results has no answer to it"
        else:
            chosen = {turn["index"]: read[turn["index"]] for turn in turns}
            is_wrong = any(chosen[turn["index"]] not in (None, turn["answer"]) for turn in turns)
            for turn in [] if is_wrong else turns:
                judgement = judged.get(turn["index"])
                if judgement is not None and judgement.is_parsed:
                    chosen[turn["index"]] = judgement.value
                elif judgement is not None and judgement.status == "failed":
                    failed = f"the judge gave no answer: {judgement.reason}"
                elif chosen[turn["index"]] is None and scorer.judge and scorer.official_guess:
                    letters = [*turn["choices"], "Z"]
                    chosen[turn["index"]] = random.Random(f"MMBench {turn['index']}").choice(letters)
            is_right = all(chosen[turn["index"]] == turn["answer"] for turn in turns)
            failed = "" if is_wrong else failed
            facts["unread"] = any(letter is None for letter in chosen.values())
            values = (
                {} if failed else {"correct": float(is_right), "first": float(chosen[main["index"]] == main["answer"])}
            )
        return Score(item.id, item.group, values, item.text, (main["image"],), said, failed, facts)

    def _ask(self, request, items, read, answers, scorer):
        """The judgements of answers that name no option, of questions that may still be right, by index."""
        template = self._template(request)
        asked, last = {}, set()
        for item in items:
            turns = [turn for turn in item.facts["turns"] if turn["index"] in answers]
            if all(read[turn["index"]] in (None, turn["answer"]) for turn in turns):
                for turn in turns:
                    if read[turn["index"]] is None:
                        asked[turn["index"]] = judge_question(turn, answers[turn["index"]], template)
                last |= set(list(asked)[-1:])  # an item is done with the last question about it
        scorer.progress(len(items) - len(last))
        done = scorer.judge.ask(list(asked.values()), lambda judgement: scorer.progress(int(judgement.item) in last))
        return dict(zip(asked, done, strict=True))

    def _template(self, request: Request) -> str:
        if not request.extra.get("judge_prompt"):
            return JUDGE_PROMPT
        path = Path(request.extra["judge_prompt"])
        template = questions.read_prompt(path, "tmpl", "build_prompt")
        if template.count("{}") != 3:
            raise ValueError(f"{path} has {template.count('{}')} times {{}}, expected 3: question, options and answer")
        return template

    def _read(self, path: Path) -> tuple[dict[int, float], dict[int, str]]:
        """(hits, predictions) of a table of VLMEvalKit, by index."""
        hits, answers = {}, {}
        for number, row in questions.read_table(path, ("index",)):
            index = _index(row.get("index"), f"{path}, row {number}")
            answers[index] = row.get("prediction", "").strip()
            if "hit" in row:
                if row["hit"] not in ("0", "1", "0.0", "1.0"):
                    raise ValueError(f"{path}, row {number}: hit is {shown(row['hit'])}, expected 0 or 1")
                hits[index] = float(row["hit"])
        if not hits and not any(answers.values()):
            raise ValueError(f"{path} has neither a column prediction nor a column hit")
        return hits, answers

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        return {"judge_prompt_sha256": hashlib.sha256(self._template(request).encode()).hexdigest()}

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        scored = [score for score in scores if score.values]
        figures = {"overall": mean([score.values["correct"] for score in scored])}
        for name, inside in _abilities(scored).items():
            figures[f"{name}/accuracy"] = mean([score.values["correct"] for score in inside])
        first = [score.values["first"] for score in scored if "first" in score.values]
        if first:
            figures["without rotations"] = mean(first)
        figures["unread"] = mean([float(score.facts.get("unread", False)) for score in scored])
        return figures

    def notes(self, request: Request) -> list[str]:
        [path] = self.files(request)
        items = self.items(request)
        turns = sum(len(item.facts["turns"]) for item in items)
        notes = [
            "A question is right if the answers to all its rotations are (CircularEval). Both modes are the same.",
            "An answer names an option if the option's letter is the only one among its words, and one of the last "
            "four; or else if it contains the option's text and is at most twice as long as all options together. "
            "About other answers the judge is asked; without a judge they are wrong. unread is the share of questions "
            "with such an answer.",
            "An option such as None or NA is left out, since the official reader takes it for an empty cell.",
        ]
        if not request.extra.get("judge_prompt"):
            notes.append("A judge is asked by a prompt of this program; --judge-prompt takes VLMEvalKit's.")
        if path.stem in MD5:
            same = f"has the MD5 that VLMEvalKit names, {MD5[path.stem]}"
            other = f"is not the file that VLMEvalKit names: its MD5 differs from {MD5[path.stem]}"
            notes.append(f"{path.name} {same if _md5(path) == MD5[path.stem] else other}.")
        if turns == len(items):
            notes.append(f"{path.name} has no rotations: CircularEval is then the share of right answers.")
        if request.extra.get("results"):
            notes.append(f"The answers are those in {request.extra['results']}.")
        return notes

    def official_command(self, request: Request) -> str | None:
        [path] = self.files(request)
        return (
            f"mkdir -p WORK/{request.model} && cp {self._made(request, '.tsv').resolve()} WORK/{request.model} && "
            f"LMUData={path.parent.resolve()} PRED_FORMAT=tsv python run.py --data {path.stem} --model {request.model} "
            "--work-dir WORK --mode eval --reuse --judge exact_matching  # in VLMEvalKit"
        )


def _index(text, place: str) -> int:
    try:
        value = float(text)  # Excel and pandas may have made 12.0 of 12
        if value != int(value) or value < 0:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{place}: index is {shown(text)}, expected a whole number") from None
    return int(value)


def _is_used(name, rows) -> bool:
    return any(name in row for row in rows)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def question_prompt(row: dict) -> str:
    """What the model is asked, in VLMEvalKit's words."""
    hint = f"Hint: {row['hint']}\n" if "hint" in row else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in row["choices"].items())
    asks = "Please select the correct answer from the options above. \n"
    return f"{hint}Question: {row['question']}\nOptions:\n{options}{asks}"


def inferred_option(answer: str, choices: dict[str, str]) -> str | None:
    """The letter of the option that an answer names, "Z" where it refuses, None where that needs a judge."""
    return named_option(answer, choices) or quoted_option(answer, choices)


def named_option(answer: str, choices: dict[str, str]) -> str | None:
    """The only option whose letter is a word of the answer, if it comes first among the last four words."""
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(_STOPS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    return "Z" if not named and "Z" in words else None


def quoted_option(answer: str, choices: dict[str, str]) -> str | None:
    """The only option whose text is in the answer, which may be twice as long as all options together."""
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    quoted = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return quoted[0] if len(quoted) == 1 else None


def judge_question(turn: dict, answer: str, template: str) -> Question:
    """Asks a judge which option an answer means."""
    choices = turn["choices"]
    listed = "There are several options: \n" + "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    before, between, last, after = template.split("{}")

    def read(text):
        if (letter := inferred_option(text, choices)) is None:
            raise Unparsed(f"names none of {', '.join(choices)} and Z")
        return letter

    text = before + turn["question"] + between + listed + last + answer + after
    return Question(str(turn["index"]), "option", text, read=read, tries=TRIES)


def write_accuracies(path: Path, scores: Sequence[Score]) -> None:
    """Writes the official table: a line for each split, with Overall, the abilities of level 2 and the categories."""
    scored = [score for score in scores if score.values]
    splits = sorted({score.facts["split"] for score in scored})
    columns = {"split": splits}
    for name, inside in {"Overall": scored, **_abilities(scored)}.items():
        hits = [[score.values["correct"] for score in inside if score.facts["split"] == split] for split in splits]
        columns[name] = [mean(values) if values else "" for values in hits]
    with replacing_file(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _abilities(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores of each ability of level 2, by its short name, then of each category."""
    found: dict[str, list[Score]] = {}
    for key in (lambda score: score.facts["l2-category"], lambda score: score.group):
        for name in sorted({key(score) for score in scores} - {""}):
            found[ABILITIES.get(name, name)] = [score for score in scores if key(score) == name]
    return found
