"""MMMU (arXiv 2311.16502), validation: 900 questions of college exams in 30 subjects, most of multiple choice."""

import ast
import contextlib
import hashlib
import io
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.data.images import decode_rgb
from unialign_jax.evaluation import questions
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, first_line, read_json, sha256, shown, write_json

# The official order of subjects, in which answers are guessed, and their domains in the order of the official table.
SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design", "Diagnostics_and_Laboratory_Medicine",
    "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage",
    "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
ANSWERS = "answer_dict_val.json"
CHOICE, OPEN = "multiple-choice", "short-answer"
TOTAL, OUTPUT = "total_val_output.json", "output.json"
PER_SUBJECT = 30
SEED = 42  # of the official guesses
ASKS = {
    CHOICE: "Answer with the option's letter from the given choices directly.",
    OPEN: "Answer the question using a single word or phrase.",
}
SEVERAL = ("first", "tiled")


class MMMU(Suite):
    name = "mmmu"
    title = "MMMU (validation)"
    summary = "900 questions of college exams, parsed as the official code does"
    source = f"huggingface.co/datasets/MMMU/MMMU and mmmu/{ANSWERS} of github.com/MMMU-Benchmark/MMMU"
    tasks = ("vqa",)
    texts = 900
    leading = "overall"
    worst_by = "correct"

    def add_arguments(self, add: Callable) -> None:
        add("--answers", metavar="FILE", type=Path, help=f"{ANSWERS}; default: the one in --data, if any")
        add(
            "--several-images",
            choices=SEVERAL,
            default="first",
            help="of a question with several images the model sees the first, or all side by side (%(default)s)",
        )
        add(
            "--results",
            metavar="PATH",
            type=Path,
            help=f"score these answers: a folder of SUBJECT/{OUTPUT}, or a JSON file as {TOTAL} (with --answers)",
        )

    # Data

    def files(self, request: Request) -> list[Path]:
        answers = self._answers_file(request)
        found = [answers] if answers else []
        if request.extra.get("results"):
            return found
        return [*found, *(path for subject in SUBJECTS for path in _subject_files(request.data, subject))]

    def items(self, request: Request) -> list[Item]:
        known = self._known(request)
        if results := request.extra.get("results"):
            return list(_answered(Path(results), known))
        found = []
        for subject in SUBJECTS:
            for row in _rows(request.data, subject):
                found.append(self._item(request, subject, row, known))
        return found

    def _item(self, request, subject, row, known) -> Item:
        name, choices = row["id"], row["options"]
        kind = CHOICE if row["question_type"] == CHOICE else OPEN
        answer = row["answer"]
        if known is not None:
            if name not in known:
                raise ValueError(f"{self._answers_file(request)} has no answer of {name}: it is of another split")
            answer = known[name]["ground_truth"]
        listed = "".join(f"({letter}) {text}\n" for letter, text in choices.items())
        prompt = f"{row['question']}\n" + (f"{listed}\n" if kind == CHOICE else "") + ASKS[kind]
        image = f"{questions.IMAGES}/{name}.png"
        job = {"id": name, "task": "vqa", "image": str((request.output / image).resolve()), "question": prompt}
        facts = {"kind": kind, "answer": answer, "choices": choices, "image": image, "images": row["images"]}
        return Item(name, subject, (job,), prompt, facts | {"differs": answer != row["answer"]})

    def _answers_file(self, request) -> Path | None:
        if request.extra.get("answers"):
            return Path(request.extra["answers"])
        beside = request.data / ANSWERS if request.data.is_dir() else request.data
        return beside if beside.name == ANSWERS and beside.is_file() else None

    def _known(self, request) -> dict | None:
        """The official answers; None where the user has no such file."""
        path = self._answers_file(request)
        if path is None:
            return None
        known = read_json(path)
        for name, entry in known.items():
            if not isinstance(entry, dict) or not {"question_type", "ground_truth"} <= set(entry):
                raise ValueError(
                    f"{path}: {shown(name)} lacks question_type or ground_truth; expected MMMU's {ANSWERS}"
                )
        return known

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        stored = {item.id: item.facts["image"] for item in items}
        tiled = request.extra["several_images"] == "tiled"
        for subject in dict.fromkeys(item.group for item in items):
            for row in _rows(request.data, subject, images=True):
                name, images = stored.get(row["id"]), row["images"]
                if name and not (request.output / name).exists():
                    data = side_by_side(images, row["id"]) if tiled and len(images) > 1 else images[0]
                    questions.save_image(request, name, data, f"{subject}, {row['id']}")

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        guess, outputs, total = random.Random(SEED), {}, {}
        for item in items:
            if item.id not in results:
                continue
            facts, response = item.facts, results[item.id]["text"]
            entry = {"id": item.id, "question_type": facts["kind"], "answer": facts["answer"]}
            if facts["kind"] == CHOICE:
                letters = list(facts["choices"])
                entry |= {"all_choices": letters, "index2ans": facts["choices"]}
                total[item.id] = chosen_letter(response, facts["choices"]) or guess.choice(letters)
            else:
                total[item.id] = response
            outputs.setdefault(item.group, []).append(entry | {"response": response})
        for subject, entries in outputs.items():
            (request.made / subject).mkdir(parents=True, exist_ok=True)
            write_json(request.made / subject / OUTPUT, entries)
        write_json(request.made / TOTAL, total)

    # Scores

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        guess, scores = random.Random(SEED), []
        for item in items:
            facts = item.facts
            response = facts["response"] if "response" in facts else results[item.id]["text"]
            unread = False
            if facts["kind"] != CHOICE:
                correct = open_is_correct(facts["answer"], response)
            elif "choices" not in facts:  # of a file of parsed answers
                correct, unread = response == facts["answer"], not response
            else:
                letter = chosen_letter(response, facts["choices"])
                unread = letter is None
                if unread and request.mode == "official":
                    letter = guess.choice(list(facts["choices"]))
                correct = letter == facts["answer"]
            images = (facts["image"],) if "image" in facts else ()
            kept = {"kind": facts["kind"], "answer": facts["answer"], "unread": unread}
            values = {"correct": float(correct)}
            scores.append(Score(item.id, item.group, values, item.text, images, response, facts=kept))
            scorer.progress(1)
        folder = request.output / request.mode
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "official_table.json", official_table(scores))
        return scores

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        if not request.extra.get("results"):
            return {}
        digests = "".join(sha256(path) for path in _output_files(Path(request.extra["results"])))
        return {"results_sha256": hashlib.sha256(digests.encode()).hexdigest()}

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        by_subject = {}
        for score in scores:
            by_subject.setdefault(score.group, []).append(score.values["correct"])
        figures = {"overall": mean([score.values["correct"] for score in scores])}
        for domain, subjects in DOMAINS.items():
            inside = [value for subject in subjects for value in by_subject.get(subject, ())]
            if inside:
                figures[f"{domain}/accuracy"] = mean(inside)
        for subject in SUBJECTS:
            if subject in by_subject:
                figures[f"{subject}/accuracy"] = mean(by_subject[subject])
        for kind in (CHOICE, OPEN):
            inside = [score.values["correct"] for score in scores if score.facts["kind"] == kind]
            if inside:
                figures[f"{kind}/accuracy"] = mean(inside)
        figures["unread"] = mean([float(score.facts["unread"]) for score in scores])
        return figures

    def notes(self, request: Request) -> list[str]:
        unread = "unread is the share of multiple-choice answers that name no option. "
        if request.mode == "official":
            unread += f"Official mode guesses one for them (random.choice, seed {SEED}): about one in four is right."
        else:
            unread += "Corrected mode counts them as wrong; the official code guesses an option for them."
        notes = [
            unread,
            "Open answers are read as the official code reads them: it splits them into sentences at line ends alone, "
            "and takes an answer for right that contains the wanted text.",
        ]
        answers = self._answers_file(request)
        if answers is None:
            notes.append(f"The answers are those in the data files: there was no {ANSWERS} to compare them with.")
        if request.extra.get("results"):
            notes.append(f"The answers are those in {request.extra['results']}.")
        items = self.items(request)
        differ = [item.id for item in items if item.facts.get("differs")]
        if differ:
            notes.append(
                f"{len(differ)} answers of the data files are not those of {ANSWERS}, which were used "
                f"({', '.join(differ[:5])})."
            )
        several = sum(item.facts.get("images", 1) > 1 for item in items)
        if several:
            seen = "their first alone" if request.extra["several_images"] == "first" else "all side by side"
            notes.append(f"{several} questions have several images, of which the model sees {seen}.")
        counts = {subject: sum(item.group == subject for item in items) for subject in SUBJECTS}
        odd = [f"{subject} {count}" for subject, count in counts.items() if count != PER_SUBJECT]
        if odd:
            notes.append(f"The validation set has {PER_SUBJECT} questions a subject, these data: {', '.join(odd)}.")
        return notes

    def official_command(self, request: Request) -> str | None:
        made = request.extra.get("results") or request.made.resolve()
        answers = self._answers_file(request) or ANSWERS
        if Path(made).is_file():
            return f"python main_eval_only.py --output_path {made} --answer_path {answers}"
        return f"python main_parse_and_eval.py --path {made} --subject ALL && python print_results.py --path {made}"


# The user's files


def _subject_files(data: Path, subject: str) -> list[Path]:
    """The files of a subject's validation set: Parquet, or Arrow of `save_to_disk`."""
    folder = data / subject
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{data} has no folder {subject}; expected one for each of {len(SUBJECTS)} subjects, as in {MMMU.source}"
        )
    if (folder / "dataset_dict.json").exists():
        folder /= "validation"
    if (folder / "state.json").exists():
        listed = read_json(folder / "state.json").get("_data_files")
        if not isinstance(listed, list) or not all(isinstance(file, dict) and "filename" in file for file in listed):
            raise ValueError(f"{folder / 'state.json'} names no data files")
        return [folder / Path(str(file["filename"])).name for file in listed]
    found = sorted(folder.glob("validation*.parquet"))
    if not found:
        raise FileNotFoundError(f"{folder} has no validation*.parquet, and nothing that save_to_disk wrote")
    return found


def _rows(data: Path, subject: str, *, images: bool = False) -> Iterator[dict]:
    """The questions of a subject, checked, with the bytes of their images, or else their number."""
    for path in _subject_files(data, subject):
        for number, row in enumerate(_read_rows(path, images), start=1):
            name = f"{path}, row {number}"
            lacks = [key for key in ("id", "question", "question_type", "answer") if not isinstance(row[key], str)]
            if lacks:
                raise ValueError(f"{name} has no {lacks[0]}")
            if not re.fullmatch(rf"\w+_{subject}_\d+", row["id"]):
                raise ValueError(f"{name} is {shown(row['id'])}, expected a question of {subject}")
            options = _literal(row["options"])
            if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
                raise ValueError(f"{name}: options is {shown(row['options'])}, expected a list of texts")
            if not row["images"]:
                raise ValueError(f"{name} has no image")
            if row["question_type"] == CHOICE and not 1 < len(options) <= 26:
                raise ValueError(f"{name} is of multiple choice and has {len(options)} options")
            answer = _literal(row["answer"]) if row["answer"].startswith("[") else None
            yield row | {
                "options": dict(zip(string.ascii_uppercase, options, strict=False)),
                "answer": answer if isinstance(answer, list) else row["answer"],
            }


def _literal(text):
    """A Python literal, as the data hold lists; None for anything else."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _read_rows(path: Path, images: bool) -> Iterator[dict]:
    """The columns that are needed of each row of a Parquet or Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ("id", "question", "options", "question_type", "answer")
    try:
        with contextlib.ExitStack() as stack:
            if path.suffix == ".parquet":
                file = stack.enter_context(pq.ParquetFile(path))
                schema, batches = file.schema_arrow, None
            else:
                opened = stack.enter_context(pa.memory_map(str(path)))
                batches = stack.enter_context(pa.ipc.open_stream(opened))
                schema = batches.schema
            lacks = [name for name in (*texts, "image_1") if name not in schema.names]
            if lacks:
                raise ValueError(f"{path} has no column {', '.join(lacks)}: it is no file of MMMU")
            pictures = [name for name in schema.names if re.fullmatch(r"image_\d", name)]
            if batches is None:
                # Without the pictures' bytes a file is read in no time.
                is_struct = all(pa.types.is_struct(schema.field(name).type) for name in pictures)
                columns = pictures if images or not is_struct else [f"{name}.path" for name in pictures]
                batches = file.iter_batches(batch_size=16, columns=[*texts, *columns])
            for batch in batches:
                for position in range(batch.num_rows):
                    row = {name: batch.column(name)[position].as_py() for name in texts}
                    there = [name for name in pictures if batch.column(name)[position].is_valid]
                    if images:
                        values = [batch.column(name)[position].as_py() for name in there]
                        values = [value.get("bytes") if isinstance(value, dict) else value for value in values]
                        if not all(isinstance(value, bytes) for value in values):
                            raise ValueError(f"{path}, {row['id']}: its images are not stored in the file")
                        yield row | {"images": values}
                    else:
                        yield row | {"images": len(there)}
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged or cut short, get it again: {first_line(error)}") from None


def side_by_side(images: Sequence[bytes], name: str) -> bytes:
    """Images from left to right in one, as high as the highest, on white, as a PNG."""
    pictures = [decode_rgb(data, name) for data in images]
    height, gap = max(picture.height for picture in pictures), 16
    canvas = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, height), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def _output_files(results: Path) -> list[Path]:
    """The files of answers of `--results`."""
    if not results.is_dir():
        check_regular(results)
        return [results]
    found = [results / subject / OUTPUT for subject in SUBJECTS if (results / subject / OUTPUT).is_file()]
    if not found:
        raise FileNotFoundError(f"{results} has no SUBJECT/{OUTPUT}, as Accounting/{OUTPUT}")
    return found


def _answered(results: Path, known: dict | None) -> Iterator[Item]:
    """An item for each answer of `--results`, in the official order."""
    if results.is_dir():
        for path in _output_files(results):
            for number, entry in enumerate(read_json(path, list), start=1):
                yield _answer(entry, path.parent.name, f"{path}, entry {number}")
        return
    check_regular(results)
    if known is None:
        raise ValueError(f"{results} holds answers alone: name the right ones by --answers={ANSWERS}")
    answers = read_json(results)
    for subject in SUBJECTS:
        for name, response in answers.items():
            if "_".join(name.split("_")[1:-1]) == subject:
                if name not in known:
                    raise ValueError(f"{results}: {shown(name)} is not in the file of --answers")
                if not isinstance(response, str):
                    raise ValueError(f"{results}: the answer of {name} is {shown(response)}, expected a text")
                kind = CHOICE if known[name]["question_type"] == CHOICE else OPEN
                facts = {"kind": kind, "answer": known[name]["ground_truth"], "response": response}
                yield Item(name, subject, (), name, facts)


def _answer(entry, subject, place) -> Item:
    keys = {"id", "question_type", "answer", "response"}
    if isinstance(entry, dict) and entry.get("question_type") == CHOICE:
        keys |= {"all_choices", "index2ans"}
    if not isinstance(entry, dict) or not keys <= set(entry):
        raise ValueError(f"{place} lacks {', '.join(sorted(keys - set(entry if isinstance(entry, dict) else ())))}")
    if not isinstance(entry["response"], str):
        raise ValueError(f"{place}: response is {shown(entry['response'])}, expected a text")
    facts = {"kind": OPEN, "answer": entry["answer"], "response": entry["response"]}
    if entry["question_type"] == CHOICE:
        if not isinstance(entry["index2ans"], dict) or list(entry["index2ans"]) != entry["all_choices"]:
            raise ValueError(f"{place}: all_choices and index2ans are not of the same letters")
        facts |= {"kind": CHOICE, "choices": entry["index2ans"]}
    return Item(str(entry["id"]), subject, (), str(entry["id"]), facts)


# The official reading of answers


def chosen_letter(response: str, choices: dict[str, str]) -> str | None:
    """The option that an answer names, or None where the official code guesses.

    It looks for "(A)", then for " A ", then, in an answer of more than five words, for an option's text; of several
    that are there the one whose last place is last is taken.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)  # each mark once, in this order
    response = f" {response} "
    low = response.lower()
    ways = [
        {letter: response.rfind(f"({letter})") for letter in choices},
        {letter: response.rfind(f" {letter} ") for letter in choices},
    ]
    if len(response.split()) > 5:
        ways.append({letter: low.rfind(text.lower()) for letter, text in choices.items()})
    for places in ways:
        found = {letter: place for letter, place in places.items() if place >= 0}
        if found:
            return max(found, key=found.get)
    return None


_SAYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_answers(response: str) -> list[str | float]:
    """What an answer to an open question may mean: its telling parts and their numbers, normalised.

    A telling part is what follows the last "is", "so", "answer" ... of a line, the shortest of these, and in the last
    line also what follows "=". Without any the whole answer is one.
    """
    response = response.strip().strip(".").lower()
    lines, parts = response.split("\n"), []
    for number, line in enumerate(lines, start=1):
        words = (*_SAYS, "=") if number == len(lines) else _SAYS
        shortest = ""
        for word in words:
            tail = line.split(word)[-1].strip()
            if word in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            parts.append(shortest)
    parts = parts or [response]
    numbers = [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return [value for text in (*parts, *numbers) for value in normalised(text)]


def normalised(text: str) -> list[str | float]:
    """A number as a float of two decimals; another text in small letters, a single letter with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_correct(answer: str | list[str], response: str) -> bool:
    """Whether an open answer has a number that is wanted, or a text that holds a wanted one."""
    wanted = [value for text in ([answer] if isinstance(answer, str) else answer) for value in normalised(text)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(text in found for text in texts) if isinstance(found, str) else found in wanted
        for found in open_answers(response)
    )


def official_table(scores: Sequence[Score]) -> dict[str, dict]:
    """The official table: number of questions and accuracy, of three decimals, by domain, subject and overall."""
    subjects: dict[str, list[float]] = {}
    for score in scores:
        subjects.setdefault(score.group, []).append(score.values["correct"])

    def line(names):
        inside = [subjects[name] for name in names if name in subjects]
        count = sum(map(len, inside))
        hits = sum(sum(values) / len(values) * len(values) for values in inside)
        return {"num": count, "acc": round(hits / count, 3) if count else 0}

    table = {}
    for domain, names in DOMAINS.items():
        table[f"Overall-{domain}"] = line(names)
        table |= {name: line([name]) for name in names if name in subjects}
    return table | {"Overall": line(SUBJECTS)}
