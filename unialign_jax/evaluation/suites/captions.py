"""Captions of a user's own images, by how like the references they are (CIDEr-D)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.evaluation.cider import cider_d, words
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer, Suite, mean
from unialign_jax.files import check_regular, parse_json, shown, write_json

CAPTIONS, REFERENCES = "captions.json", "references.json"  # in the run's folder, in the formats of COCO


class Captions(Suite):
    name = "captions"
    title = "Captions"
    summary = "CIDEr-D of captions of your own images with references"
    source = 'a JSONL file of your own, a line for each image: {"image": "photos/1.jpg", "references": ["a dog runs"]}'
    tasks = ("caption",)
    leading = "cider_d"
    worst_by = "cider_d"
    scale = 10.0

    def add_arguments(self, add: Callable) -> None:
        pass

    def files(self, request: Request) -> list[Path]:
        return [request.data]

    def items(self, request: Request) -> list[Item]:
        path = request.data
        check_regular(path)
        items = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            name = f"{path}, line {number}"
            entry = parse_json(line, name)
            image, references = entry.get("image"), entry.get("references")
            if not isinstance(image, str) or not image:
                raise ValueError(f"{name}: image is {shown(image)}, expected the path of an image file")
            is_list = isinstance(references, list) and all(isinstance(text, str) for text in references)
            if not is_list or not any(words(text) for text in references):
                raise ValueError(f"{name}: references is {shown(references)}, expected a list of texts")
            place = (path.parent / image).absolute()
            if not place.is_file():
                raise FileNotFoundError(f"{name}: there is no image {place}")
            job = {"id": f"{number - 1:06d}", "task": "caption", "image": str(place)}
            facts = {"references": references, "image": str(place)}
            items.append(Item(job["id"], "", (job,), " | ".join(references), facts))
        if not items:
            raise ValueError(f"{path} is empty, expected {self.source}")
        return items

    def arrange(self, request: Request, items: Sequence[Item], results: dict[str, dict]) -> None:
        done = [item for item in items if item.id in results]
        captions = [{"image_id": int(item.id), "caption": results[item.id]["text"]} for item in done]
        texts = [(int(item.id), text) for item in done for text in item.facts["references"]]
        references = {
            "info": {},
            "licenses": [],
            "type": "captions",
            "images": [{"id": int(item.id), "file_name": item.facts["image"]} for item in done],
            "annotations": [
                {"id": number, "image_id": image, "caption": text}
                for number, (image, text) in enumerate(texts, start=1)
            ],
        }
        write_json(request.output / CAPTIONS, captions)
        write_json(request.output / REFERENCES, references)

    def score(self, request: Request, items: Sequence[Item], results: dict[str, dict], scorer: Scorer) -> list[Score]:
        made = [results[item.id]["text"] for item in items]
        references = [[words(text) for text in item.facts["references"]] for item in items]
        scores = []
        for item, text, value in zip(items, made, cider_d([words(text) for text in made], references), strict=True):
            image = os.path.relpath(item.facts["image"], request.output)
            scores.append(Score(item.id, "", {"cider_d": value}, text=item.text, images=(image,), answer=text))
            scorer.progress(1)
        return scores

    def figures(self, scores: Sequence[Score], mode: str) -> dict[str, float]:
        """The mean over images; 1.0 is what papers write as 100."""
        return {"cider_d": mean([score.values["cider_d"] for score in scores if score.values])}

    def notes(self, request: Request) -> list[str]:
        return [
            "cider_d is CIDEr-D from 0 to 10 (papers write 100 times as much), with the n-grams' weights from the "
            "references of the images that were scored, so that figures of other images, or under --limit, are not "
            "comparable. Words are cut nearly as coco-caption cuts them: its figures may differ a little."
        ]

    def official_command(self, request: Request) -> str:
        output = request.output.absolute()
        code = f'c = COCO("{output / REFERENCES}"); e = COCOEvalCap(c, c.loadRes("{output / CAPTIONS}")); e.evaluate()'
        return f"python -c 'from pycocotools.coco import COCO; from pycocoevalcap.eval import COCOEvalCap; {code}'"
