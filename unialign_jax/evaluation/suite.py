"""What every benchmark is made of: items that a model answers, scores of its answers, and figures over the scores.

A run of a suite is a folder:

    settings.json       the suite, the model, its options, the data and their hashes; written first
    jobs.jsonl          the jobs of launch/generate.py's runner
    MODEL/              what the model made, in the official layout, and the runner's results.jsonl
    judgements.jsonl    every answer of a judge, where the suite has one
    MODE/               scores.jsonl, a line for each item, and report.json, .md and .html
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from unialign_jax.evaluation.judging import Judge
from unialign_jax.files import check_regular, parse_json, replacing_file, sha256

MODES = ("official", "corrected")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks of a suite; settings.json has all of it.

    Attributes:
      data: the user's copy of the suite's data.
      output: folder of the run.
      model: the name under which the official layouts file the images.
      mode: "official" reproduces the official code with its defects, "corrected" mends them.
      limit: so many items of each group at most; None for all.
      options: of the sampler, which replace the suite's own (`inference.options`).
      extra: options of the suite alone (`Suite.add_arguments`), by name: what JSON can hold, paths as absolute texts.
      image_size: pixels a side that the model was trained for.
    """

    data: Path
    output: Path
    model: str = "model"
    mode: str = "official"
    limit: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int = 512

    @property
    def made(self) -> Path:
        """The folder of what the model made: the job runner's output, in the official layout."""
        return self.output / self.model


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: unique in the suite.
      group: what the official code means over; "" where it has no groups.
      jobs: fields of the jobs that answer it (`inference.jobs`), with their `id`s, which are paths below `Request.made`
        without their ending; image paths are absolute.
      text: what a reader of the report sees of it: the prompt, the instruction, the question.
      facts: what scoring needs besides.
    """

    id: str
    group: str
    jobs: tuple[dict, ...]
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """What an item got; a line of scores.jsonl.

    Attributes:
      item, group: of the item.
      values: named figures; empty where it could not be scored.
      text: the item's text.
      images: files to show, relative to the run's folder: sources first, the model's last.
      answer: the model's text, or what the judge said of its image.
      failed: why it has no values, one line; "" where it has.
      facts: what the suite's `figures` needs besides.
    """

    item: str
    group: str
    values: dict[str, float]
    text: str = ""
    images: tuple[str, ...] = ()
    answer: str = ""
    failed: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Suite:
    """A benchmark. Each has a module in `evaluation/suites/`, and one instance in `suites.SUITES`.

    Attributes:
      name: on the command line.
      title: as the paper calls it.
      summary: one line for `evaluate.py list`.
      source: where its data come from, one line.
      tasks: of the model that it uses (`data.kinds.TASKS`).
      images, texts: how many the whole suite asks of the model.
      judge_calls: how many the whole suite asks of a judge; 0 without one.
      needs: what scoring needs, in a few words.
      leading: the figure that a table of runs shows.
      worst_by: the value of a score that orders the worst and the best items.
      scale: the highest that `leading` can be.
      made_by_mode: whether `Request.mode` changes what is made, and not only how it is scored. A folder that was made
        in one mode can be scored in both all the same.
      scoring_options: the names of those in `Request.extra` that may change from one call on a folder to the next: what
        scoring alone reads, and where files lie. Scoring takes them from its own command line.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    images: ClassVar[int] = 0
    texts: ClassVar[int] = 0
    judge_calls: ClassVar[int] = 0
    needs: ClassVar[str] = "nothing more"
    leading: ClassVar[str]
    worst_by: ClassVar[str]
    scale: ClassVar[float] = 1.0
    made_by_mode: ClassVar[bool] = False
    scoring_options: ClassVar[tuple[str, ...]] = ()

    def add_arguments(self, add: Callable) -> None:
        """Adds the options of this suite alone by `add`, which is a parser's `add_argument`.

        Each must have a default, which may be None, and a name that no other option of the command has. Paths are of
        the type Path, and become absolute texts in `Request.extra`.
        """

    def files(self, request: Request) -> list[Path]:
        """The files of the data whose content decides the items: settings.json has their hashes."""
        raise NotImplementedError

    def items(self, request: Request) -> list[Item]:
        """All items, in the official order, whatever `request.limit` says.

        Raises FileNotFoundError or ValueError, in one line, for data that are missing, cut short or of another suite.
        """
        raise NotImplementedError

    def check_scoring(self, request: Request, has_judge: bool) -> None:
        """Raises ValueError, in one line, where `score` would need what is not given; asked before anything is made."""

    def prepare(self, request: Request, items: Sequence[Item]) -> None:
        """Writes what the jobs read, such as source images, into the run's folder; what is there already stays."""

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        """Writes what the official scorer reads besides the images: grids, metadata, files of answers.

        Args:
          results: the lines of the runner's results.jsonl of jobs that are done, by their ids.
        """

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: "Scorer") -> list[Score]:
        """A score for every item, also for those that failed.

        Raises ValueError or OSError, in one line, where nothing can be scored, as without a judge that is needed.
        """
        raise NotImplementedError

    def needs_results(self, request: Request) -> bool:
        """Whether `score` needs the model's results: not where it reads a file of the user's (option `--results`)."""
        return not request.extra.get("results")

    def describe_scoring(self, request: Request) -> dict[str, Any]:
        """What settings.json says of scoring besides the judge, such as the hashes of prompts; called after `score`."""
        return {}

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """The suite's figures by name, "GROUP/NAME" for those of a group: a pure function of the scores.

        The report calls it again on resampled items for intervals, a thousand times; there an item may come several
        times, and counts as often. Scores that failed are among them; what they count for is the suite's matter. NaN
        where nothing was scored.
        """
        raise NotImplementedError

    def notes(self, request: Request) -> list[str]:
        """Sentences for the report: what differs from the official protocol, and what official mode reproduces."""
        return []

    def official_command(self, request: Request) -> str | None:
        """The command of the official scorer over this run's folder, for the report."""
        return None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What scoring may use besides the model's answers.

    Attributes:
      judge: None where no endpoint was named.
      official_guess: give what a judge did not answer a random score, as some official code does.
      progress: called after every item.
    """

    judge: Judge | None = None
    official_guess: bool = False
    progress: Callable[[int], None] = lambda count: None

    def needed_judge(self, suite: Suite, request: Request) -> Judge:
        """The judge. Raises ValueError that says how to score with one where there is none."""
        if self.judge is None:
            raise ValueError(
                f"{suite.title} is scored by a judge and none is named: python launch/evaluate.py {suite.name} score "
                f"--output={request.output} --judge=URL --judge-model=NAME"
            )
        return self.judge


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each group, in their order."""
    if limit is None:
        return list(items)
    taken: dict[str, int] = {}
    chosen = []
    for item in items:
        taken[item.group] = taken.get(item.group, 0) + 1
        if taken[item.group] <= limit:
            chosen.append(item)
    return chosen


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Writes scores.jsonl."""
    with replacing_file(path) as scratch:
        lines = (json.dumps(dataclasses.asdict(score), ensure_ascii=True) for score in scores)
        scratch.write_text("".join(line + "\n" for line in lines))


def read_scores(path: Path) -> list[Score]:
    """Reads scores.jsonl. Raises FileNotFoundError or ValueError, in one line."""
    check_regular(path)
    scores = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        entry = parse_json(line, f"{path}, line {number}")
        try:
            scores.append(Score(**entry | {"images": tuple(entry["images"])}))
        except (TypeError, KeyError):
            raise ValueError(f"{path}, line {number} is no score: move the file away and score again") from None
    return scores


def hashes(request: Request, files: Sequence[Path]) -> dict[str, str]:
    """{path below `request.data`, or name: SHA-256} of files. Raises FileNotFoundError or ValueError, in one line.

    A file that lies elsewhere is called by its whole path where another has its name.
    """
    found = {}
    for path in files:
        check_regular(path)
        inside = path.is_relative_to(request.data) and path != request.data
        name = str(path.relative_to(request.data)) if inside else path.name
        found[str(path) if name in found else name] = sha256(path)
    return found


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan
