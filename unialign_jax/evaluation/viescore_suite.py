"""What suites share that a judge scores by VIEScore: the questions on their items, means, the official CSV files."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from unialign_jax.evaluation import viescore
from unialign_jax.evaluation.judging import Judgement, Question
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, first_line, replacing_file, shown

VALUES = ("SC", "PQ", "O")
# Columns of every official file, with the official spelling.
_SC, _PQ = "sementics_score", "quality_score"


class VIEScoreSuite(Suite):
    """A suite whose images a judge scores by VIEScore.

    Attributes:
      csv_folder, csv_ending: of the official files, OUTPUT/MODEL/FOLDER/MODEL_GROUP_ENDING.
      csv_columns: of these files.
      result_column: the one that names the model's image.
      images_first: whether the judge sees the images before the text.
      groups: in the official order.
    """

    needs = "a judge"
    leading = "O"
    worst_by = "O"
    scale = 10.0
    made_by_mode = True
    scoring_options = ("viescore_prompts", "results")

    csv_folder: ClassVar[str]
    csv_ending: ClassVar[str]
    csv_columns: ClassVar[tuple[str, ...]]
    result_column: ClassVar[str]
    images_first: ClassVar[bool]
    groups: ClassVar[tuple[str, ...]]

    def add_arguments(self, add: Callable) -> None:
        add("--viescore-prompts", type=Path, metavar="DIR", help=f"the judge's prompts: {viescore.SOURCE}")
        add("--results", type=Path, metavar="DIR", help="score by the CSV files of the official scorer instead")

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        """Without a judge the images are made, and scored by a later call."""
        if has_judge and not request.extra["results"]:
            viescore.read_prompts(request.extra["viescore_prompts"])

    def shown(self, request: Request, item: Item) -> tuple[str, list[Path]]:
        """("tie" or "t2i", the images that the judge sees). Raises OSError or ValueError for one that is damaged."""
        raise NotImplementedError

    def csv_row(self, request: Request, item: Item) -> dict[str, Any]:
        """A row of an official file, without its two scores."""
        raise NotImplementedError

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        if request.extra["results"]:
            return {"results": request.extra["results"]}
        return viescore.describe(viescore.read_prompts(request.extra["viescore_prompts"]))

    def notes_on_prompts(self, request: Request) -> list[str]:
        """Notes on the judge's prompts that are not the official files."""
        if not request.extra["viescore_prompts"] or request.extra["results"]:
            return []
        changed = viescore.read_prompts(request.extra["viescore_prompts"]).changed
        return [f"The judge's prompt {name} is not the official file." for name in changed]

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        if request.extra["results"]:
            scores = self._read(request, items)
        else:
            scores = self._judge(request, items, scorer)
        self._write(request, items, scores)
        return scores

    def _judge(self, request, items, scorer):
        judge = scorer.needed_judge(self, request)
        prompts = viescore.read_prompts(request.extra["viescore_prompts"])
        questions: list[Question] = []
        seen, broken, settled = {}, {}, 0
        for item in items:
            try:
                task, seen[item.id] = self.shown(request, item)
            except (OSError, ValueError) as error:
                broken[item.id] = first_line(error)
                scorer.progress(1)
            else:
                questions += viescore.questions(
                    prompts, task, item.id, item.text, seen[item.id], images_first=self.images_first
                )

        def count(judgement: Judgement) -> None:
            nonlocal settled
            settled += 1
            scorer.progress(1 - settled % 2)  # two questions are an item

        judgements = iter(judge.ask(questions, count))
        scores = []
        for item in items:
            values, failed, answer = {}, broken.get(item.id, ""), ""
            if not failed:
                semantics, quality = next(judgements), next(judgements)
                guess = scorer.official_guess
                values, failed = viescore.values_of(semantics, quality, request.mode, guess=guess)
                answer = viescore.said(semantics, quality)
            images = tuple(str(path.relative_to(request.output)) for path in seen.get(item.id, ()))
            scores.append(Score(item.id, item.group, values, item.text, images, answer, failed, facts=item.facts))
        return scores

    # Official files

    def _write(self, request, items, scores):
        """Writes the official CSV files into OUTPUT/MODE, so that those of the official scorer are not replaced."""
        folder = request.output / request.mode / request.model / self.csv_folder
        folder.mkdir(parents=True, exist_ok=True)
        rows = {group: [] for group in dict.fromkeys(item.group for item in items)}
        for item, score in zip(items, scores, strict=True):
            if score.values:  # the official scorer leaves out what failed
                values = {_SC: f"{score.values['SC']:g}", _PQ: f"{score.values['PQ']:g}"}
                rows[item.group].append(self.csv_row(request, item) | values)
        everything = [row for group in rows.values() for row in group]
        for name, content in (*rows.items(), ("combined", everything)):
            with replacing_file(folder / f"{request.model}_{name}_{self.csv_ending}") as scratch:
                with open(scratch, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, self.csv_columns)
                    writer.writeheader()
                    writer.writerows(content)

    def _read(self, request, items):
        """The scores of the official scorer's CSV files."""
        folder, rows = Path(request.extra["results"]), {}
        for group in dict.fromkeys(item.group for item in items):
            rows |= self._read_group(folder, group)
        scores = []
        for item in items:
            name = f"{item.jobs[0]['id']}.png"
            values, failed = rows.get(name, ({}, f"the files in {folder} have no row of {name}"))
            scores.append(Score(item.id, item.group, values, item.text, (f"{request.model}/{name}",), "", failed,
                                facts=item.facts))  # fmt: skip
        return scores

    def _read_group(self, folder, group):
        found = sorted(folder.glob(f"*_{group}_{self.csv_ending}"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"--results={folder} has {len(found)} files *_{group}_{self.csv_ending}, expected the folder of one "
                f"model's files, MODEL/{self.csv_folder}"
            )
        check_regular(found[0], 2**28)
        rows = {}
        with open(found[0], newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in (self.result_column, _SC, _PQ) if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{found[0]} has no column {missing[0]}, expected an official file of {self.title}")
            for row in reader:
                path = row[self.result_column] or ""
                name = "fullset/" + path.rpartition("fullset/")[2]
                if name in rows:
                    raise ValueError(f"{found[0]} has two rows of {name}: score it again by the official scorer")
                try:
                    rows[name] = viescore.scores_of(float(row[_SC]), float(row[_PQ]))
                except (TypeError, ValueError):
                    rows[name] = {}, f"{found[0]} has the scores {shown(row[_SC])} and {shown(row[_PQ])}"
        return rows


def means(scores: Sequence[Score], ending: str = "") -> dict[str, float]:
    """Means of SC, PQ and O in each group ("GROUP/SC"), and the unweighted means of those ("SC").

    Items that failed are left out, as the official scorers drop them; a group all of whose items failed is NaN, and so
    are then the means over groups.

    Args:
      ending: of the names.
    """
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score)
    figures = {}
    for group, members in groups.items():
        scored = [score.values for score in members if score.values]
        for value in VALUES:
            figures[f"{group}/{value}{ending}"] = mean([values[value] for values in scored])
    for value in VALUES:
        figures[f"{value}{ending}"] = mean([figures[f"{group}/{value}{ending}"] for group in groups])
    return figures


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG, which appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        image.save(scratch, "PNG")
