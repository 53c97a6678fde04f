"""Figures of folders of images: the distance of two sets in closed form, and CLIPScore by exact vectors."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unialign_jax.evaluation import image_sets


def fill(folder, greys, sizes=((8, 8),)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, grey in enumerate(greys):
        Image.new("RGB", sizes[number % len(sizes)], (grey, 0, 0)).save(folder / f"{number:03d}.png")
    return image_sets.images_of(folder)


def test_images_of_subfolders_in_batches_of_one_size(tmp_path):
    paths = fill(tmp_path / "a" / "00000" / "samples", range(5))
    (tmp_path / "a" / "results.jsonl").write_text("")
    assert image_sets.images_of(tmp_path / "a") == paths
    assert [batch.shape for batch in image_sets.batches(paths, 2)] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    paths = fill(tmp_path / "b", range(4), sizes=((8, 8), (8, 8), (4, 6), (8, 8)))
    found = list(image_sets.batches(paths, 3))
    assert [batch.shape for batch in found] == [(2, 3, 8, 8), (1, 3, 6, 4), (1, 3, 8, 8)]
    assert [int(grey) for batch in found for grey in batch[:, 0, 0, 0]] == [0, 1, 2, 3]


def test_the_distance_of_two_sets(tmp_path):
    """In one dimension it is the square of the difference of means, and of that of deviations: 10 and 0, 2 and 4."""
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Red(torch.nn.Module):
        num_features = 1

        def forward(self, images):
            return images[:, 0].double().mean((1, 2))[:, None]

    first, second = fill(tmp_path / "a", [98, 102] * 8), fill(tmp_path / "b", [106, 114] * 8)
    metric = fid.FrechetInceptionDistance(feature=Red(), input_img_size=(3, 8, 8))
    expected = 10**2 + (np.sqrt(16 / 15) * (4 - 2)) ** 2  # torchmetrics' deviations are of samples
    assert image_sets.fid(first, second, metric, batch=3) == pytest.approx(expected, rel=1e-6)


class Vectors:
    """In place of CLIP: red images are (1, 0), others (0, 1); a text gives its own."""

    TEXTS = {"red": (1.0, 0.0), "half": (0.6, 0.8), "against": (-1.0, 0.0)}

    def images(self, images):
        return np.array([(1.0, 0.0) if image.getpixel((0, 0))[0] else (0.0, 1.0) for image in images])

    def texts(self, texts):
        return np.array([self.TEXTS[text] for text in texts])

    def is_cut(self, text):
        return text == "half"


def test_clipscore(tmp_path):
    """100, 60 and, for a cosine of -1, 0."""
    paths = fill(tmp_path, [255, 255, 255])
    found = image_sets.clipscore(list(zip(paths, ["red", "half", "against"], strict=True)), Vectors(), batch=2)
    assert found["clipscore"] == pytest.approx(160 / 3, abs=1e-9)
    assert found["standard_error"] == pytest.approx(np.std([100, 60, 0], ddof=1) / np.sqrt(3), abs=1e-9)
    assert (found["images"], found["cut_prompts"]) == (3, 1)


def test_prompts_lie_beside_images_or_in_them(tmp_path):
    info = PngInfo()
    info.add_text("parameters", json.dumps({"task": "text_to_image", "prompt": "from the image"}))
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert image_sets.prompt_of(path) == "from the image"
    (tmp_path / "a.txt").write_text("from the text\n")
    assert image_sets.prompt_of(path) == "from the text"


@pytest.mark.bad_input
def test_folders_without_images_or_prompts(tmp_path, command_refuses):
    command_refuses("evaluate", ["fid", tmp_path / "none", tmp_path], "none", "no such folder")
    command_refuses("evaluate", ["fid", tmp_path, tmp_path], "has 0 images", "at least 2")
    fill(tmp_path, [1, 2])
    command_refuses("evaluate", ["clipscore", tmp_path], "000.png has no prompt", "000.txt")
    command_refuses("evaluate", ["clipscore", tmp_path, "--batch=0"], "--batch is 0")


@pytest.mark.bad_input
@pytest.mark.parametrize("package", ["torch", "torchmetrics", "torch_fidelity"])
def test_without_a_package(tmp_path, command_refuses, monkeypatch, package):
    fill(tmp_path, [1, 2])
    there = lambda name: None if name == package else object()  # noqa: E731
    monkeypatch.setattr(image_sets.importlib.util, "find_spec", there)
    named = "PyTorch" if package == "torch" else package
    command_refuses("evaluate", ["fid", tmp_path, tmp_path], f"fid needs {named}", "pip install")
