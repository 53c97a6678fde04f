"""GenEval (arXiv 2310.11513): 553 prompts about objects, their numbers, colours and places, four images each."""

from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite
from unialign_jax.files import check_regular, parse_json, write_json

PROMPTS = "evaluation_metadata.jsonl"
SEED = 42  # of each prompt's first image


class GenEval(Suite):
    name = "geneval"
    title = "GenEval"
    summary = "objects, numbers, colours and places in images of 553 prompts"
    source = "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"
    tasks = ("text_to_image",)
    images = 2212
    leading = "overall"
    worst_by = "correct"

    def add_arguments(self, add: Callable) -> None:
        add("--images-per-prompt", type=int, default=4, metavar="N", help="the official number is 4 (%(default)s)")

    def files(self, request: Request) -> list[Path]:
        path = request.data / PROMPTS if request.data.is_dir() else request.data
        return [path]

    def items(self, request: Request) -> list[Item]:
        [path] = self.files(request)
        check_regular(path)
        items = []
        for number, line in enumerate(path.read_text().splitlines()):
            entry = parse_json(line, f"{path}, line {number + 1}")
            jobs = tuple(
                {
                    "id": f"{number:05d}/samples/{index:05d}",
                    "task": "text_to_image",
                    "prompt": entry["prompt"],
                    "seed": SEED + index,
                    "steps": 50,
                    "guidance_scale": 9.0,
                }
                for index in range(request.extra["images_per_prompt"])
            )
            items.append(Item(f"{number:05d}", entry["tag"], jobs, entry["prompt"], entry))
        return items

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        for item in items:
            folder = request.made / item.id
            if folder.is_dir():
                write_json(folder / "metadata.jsonl", item.facts, indent=None)

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        raise NotImplementedError

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        raise NotImplementedError
