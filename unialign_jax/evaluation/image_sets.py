"""The `fid` and `clipscore` parts of launch/evaluate.py: figures of whole folders of images. They need PyTorch."""

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unialign_jax.data.images import load_rgb, open_image, read_bytes
from unialign_jax.evaluation.suite import mean
from unialign_jax.evaluation.torch_models import Clip, need_torch
from unialign_jax.files import check_json_output, first_line, write_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP = "openai/clip-vit-base-patch16"
FEW = 2048  # images; with fewer the covariance of Inception's 2,048 features has no full rank
# Of torch-fidelity: Inception's weights, which it downloads where they are not given.
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


def add_fid_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate.py fid`."""
    parser.add_argument(
        "folders", nargs=2, metavar="DIR", type=Path, help="two folders of images, with their subfolders"
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help=f"of Inception: {WEIGHTS}; default downloaded")
    _add_common(parser)


def add_clipscore_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate.py clipscore`."""
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        help="images with their prompts: as this package wrote them, or with a NAME.txt beside each",
    )
    parser.add_argument("--model", default=CLIP, metavar="NAME", help="a CLIP of transformers (%(default)s)")
    _add_common(parser)


def _add_common(parser):
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON file to write besides")


def run(arguments: argparse.Namespace) -> int:
    """Prints the figures, and writes them. Raises ValueError or OSError, in one line, where they cannot be had."""
    if arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}, expected at least 1")
    if arguments.output:
        check_json_output(arguments.output)
    if arguments.command == "fid":
        sets = [images_of(folder) for folder in arguments.folders]
        found = {
            "fid": fid(*sets, open_fid(arguments.weights), arguments.batch),
            "images": [len(each) for each in sets],
        }
        found |= {"folders": [str(folder) for folder in arguments.folders]}
        if min(found["images"]) < FEW:
            found["note"] = f"fewer than {FEW:,} images: the number of images moves the figure"
    else:
        pairs = [(path, prompt_of(path)) for path in images_of(arguments.folder)]
        found = clipscore(pairs, Clip("--model", arguments.model), arguments.batch)
        found |= {"folder": str(arguments.folder), "model": arguments.model}
    print(json.dumps(found, indent=2))
    if arguments.output:
        write_json(arguments.output, found)
    return 0


def images_of(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, in order. Raises ValueError where there are fewer than two."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < 2:
        raise ValueError(f"{folder} has {len(found)} images ({', '.join(SUFFIXES)}), expected at least 2")
    return found


def prompt_of(path: Path) -> str:
    """The prompt of an image: the text beside it, or what the job runner wrote into it. Raises ValueError."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace").strip()
    with open_image(read_bytes(path), str(path)) as image:
        try:
            prompt = json.loads(image.info["parameters"])["prompt"]
        except (KeyError, TypeError, ValueError):
            prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f"{path} has no prompt, neither in its PNG parameters nor in {beside.name}")
    return prompt


def open_fid(weights: Path | None = None):
    """torchmetrics' FrechetInceptionDistance, with the Inception of the original code.

    Raises ValueError, in one line, without the packages or the weights.
    """
    need_torch("fid")
    for name in ("torchmetrics", "torch_fidelity", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"fid needs {name}, which is not installed here: pip install 'torchmetrics[image]' torchvision"
            )
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(weights) if weights else None)
    except Exception as error:  # no network, a damaged file, ...
        raise ValueError(f"fid cannot load Inception ({first_line(error)}): give --weights=FILE, {WEIGHTS}") from None
    return metric.to("cuda" if torch.cuda.is_available() else "cpu")


def fid(first: Sequence[Path], second: Sequence[Path], metric: Any, batch: int = 32) -> float:
    """The Fréchet distance of two sets of images (arXiv 1706.08500).

    Args:
      metric: torchmetrics' FrechetInceptionDistance.
    """
    import torch

    metric.set_dtype(torch.float64)
    with tqdm(total=len(first) + len(second), desc="fid", unit="image", disable=None) as bar:
        for paths, is_first in ((first, True), (second, False)):
            for pixels in batches(paths, batch):
                metric.update(torch.from_numpy(pixels).to(metric.device), real=is_first)
                bar.update(len(pixels))
    return float(metric.compute())


def batches(paths: Sequence[Path], batch: int) -> Iterator[np.ndarray]:
    """uint8 [images, 3, height, width] of neighbours of one size, `batch` at most."""
    waiting: list[np.ndarray] = []
    for path in paths:
        pixels = np.asarray(load_rgb(path)).transpose(2, 0, 1)
        if waiting and (len(waiting) == batch or waiting[0].shape != pixels.shape):
            yield np.stack(waiting)
            waiting = []
        waiting.append(pixels)
    yield np.stack(waiting)


def clipscore(
    pairs: Sequence[tuple[Path, str]], clip: Clip, batch: int = 32, load: Callable[[Path], Image.Image] = load_rgb
) -> dict[str, float]:
    """CLIPScore (arXiv 2104.08718) as torchmetrics has it: 100 times the cosine of image and prompt, at least 0.

    Returns the mean, its standard error, the number of images, and of prompts that are longer than CLIP reads.
    """
    scores: list[float] = []
    with tqdm(total=len(pairs), desc="clipscore", unit="image", disable=None) as bar:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            images, texts = clip.images([load(path) for path, _ in part]), clip.texts([text for _, text in part])
            scores += (100 * np.maximum((images * texts).sum(1), 0)).tolist()
            bar.update(len(part))
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else float("nan")
    cut = sum(clip.is_cut(text) for _, text in pairs)
    return {"clipscore": mean(scores), "standard_error": error, "images": len(scores), "cut_prompts": cut}
