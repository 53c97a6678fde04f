"""The notebooks of launch/colab, executed as a user would run them, but small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax import bundle
from unialign_jax.conversion.exporting import export
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoderConfig

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "launch/colab").glob("*.ipynb"))
NAMES = ("quickstart.ipynb", "unialign_tpu.ipynb")
SHEETS = ("generate", "caption", "edit", "perceive", "personalize", "conversation")
# The tiny networks, smaller still and from random weights: they compile in seconds.
SMALLER = ["batch_size=2", "image_size=32", "text_length=24", "frozen_from=", "autoencoder.kind=space_to_depth"]
SMALLER += [f"{group}.latent_channels=48" for group in ("model", "autoencoder")] + ["autoencoder.downsample_factor=4"]
SMALLER += ["model.depth=1", "model.tap_depth=1", "model.num_heads=2", "model.head_width=16", "model.text_width=32"]
SMALLER += [f"text_encoder.{key}" for key in ("depth=1", "width=32", "mlp_width=32", "num_heads=2", "head_width=16")]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function (notebook, parameters, names) -> (the executed notebook, its variables of those names).

    The notebook runs in an empty folder, `tmp_path`, on one CPU device.
    """
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(name, parameters, names):
        notebook = nbformat.read(ROOT / "launch/colab" / name, as_version=4)
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
        known = {line.split(" = ")[0] for line in cell.source.splitlines()}
        assert parameters.keys() <= known
        cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        dump = f"json.dump({{name: globals()[name] for name in {names}}}, open('variables.json', 'w'))"
        notebook.cells.append(nbformat.v4.new_code_cell("import json\n" + dump))
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        return notebook, json.loads((tmp_path / "variables.json").read_text())

    return run


def sheets(notebook):
    """How many pictures each code cell shows, by the cell's id, where it shows any."""
    counts = {
        cell.id: sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    return {id: count for id, count in counts.items() if count}


def pictures(folder, name):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "results").glob(f"{name}_*.png"))]


def difference(folder, a, b):
    a, b = (np.asarray(Image.open(folder / f"results/{name}.png"), np.float32) for name in (a, b))
    return np.abs(a - b).max()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.accelerator == "TPU"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert cell.source.strip() and set(cell.metadata) <= {"tags"}


def test_outputs_are_stored_where_there_is_something_to_see():
    quickstart, full_size = (nbformat.read(ROOT / "launch/colab" / name, as_version=4) for name in NAMES)
    assert all(cell.get("outputs", []) == [] for cell in full_size.cells)
    assert "No outputs are stored below" in full_size.cells[0].source

    assert sheets(quickstart) == dict.fromkeys(SHEETS, 1)
    assert (ROOT / "launch/colab/quickstart.ipynb").stat().st_size < 2**20
    outputs = [output for cell in quickstart.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    texts = "".join(output.get("text", "") for output in outputs)
    assert "flow_matching" in texts and "model:" in texts
    assert not re.search(r"\r|(?<![\w.])/(tmp|root|home|work|usr)/", texts)  # no machine's own folders


@pytest.mark.parametrize("name", NAMES)
def test_the_code_is_found_in_a_checkout_and_asked_for_elsewhere(name, monkeypatch, tmp_path):
    cells = {cell.id: cell for cell in nbformat.read(ROOT / "launch/colab" / name, as_version=4).cells}
    finding = cells["setup"].source.split("# What it needs.")[0]
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(folder, **others):
        monkeypatch.chdir(folder)
        names = {}
        exec(cells["parameters"].source, names)
        exec(finding, names | others, names)
        return names["code"]

    assert run(ROOT / "launch/colab") == run(ROOT) == ROOT

    def clone(command, check):
        assert command[:3] == ["git", "clone", "--depth=1"] and check
        assert command[3:] == ["--", "https://example.org/code.git", "unialign-jax"]

    monkeypatch.setattr(subprocess, "run", clone)
    found = run(tmp_path, input=lambda question: " https://example.org/code.git\n")
    assert found == tmp_path / "unialign-jax"


def test_one_version_of_cuda_everywhere():
    texts = [
        *ROOT.glob("*.txt"),
        *ROOT.glob("launch/**/*.txt"),
        *NOTEBOOKS,
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
    ]
    assert {found for path in texts for found in re.findall(r"jax\[(cuda\d+)", path.read_text())} == {"cuda13"}


def test_quickstart(execute, tmp_path):
    parameters = {"CODE": str(ROOT), "DATA_OPTIONS": ["--num-records=60"], "CHANGES": SMALLER, "SAMPLING_STEPS": 2}
    parameters |= {
        "START": "",
        "STAGE1_STEPS": 2,
        "STAGE2_STEPS": 4,
        "STAGE2_STREAMS": ("edit",),
    }  # a program more a stream
    notebook, found = execute("quickstart.ipynb", parameters, ["captions"])

    assert len(found["captions"]) == 4 and all(isinstance(caption, str) for caption in found["captions"])
    assert sheets(notebook) == dict.fromkeys(SHEETS, 1)
    for name, count in (("generated", 8), ("edited", 4), ("map", 4), ("personalized", 2)):
        made = pictures(tmp_path, name)
        assert [picture.shape for picture in made] == [(32, 32, 3)] * count
        assert len({picture.tobytes() for picture in made}) == count  # of other prompts and seeds
    talk = json.loads((tmp_path / "results/conversation/conversation.json").read_text())
    assert [step["steps"] for step in talk["edits"]] == [2, 2]

    for stage, steps in (("stage1", 2), ("stage2", 4)):
        rows = [json.loads(line) for line in (tmp_path / f"runs/{stage}/metrics.jsonl").read_text().splitlines()]
        assert rows and rows[-1]["step"] <= steps
        config = bundle.read_config(tmp_path / "bundles" / stage)
        assert config.provenance["step"] == steps and config.provenance["weights"] == "ema"
        assert (config.image_size, config.text_length) == (32, 24)


@pytest.fixture
def released(tmp_path):
    """A small random model in the files of the release, for pictures of 512 pixels as the release has them."""
    vocabulary = load_tokenizer().vocab_size
    config = bundle.BundleConfig(
        transformer=MMDiTConfig(
            depth=2, num_heads=2, head_width=16, latent_channels=4, text_width=32, vocab_size=vocabulary, tap_depth=1,
            max_patches=16, base_patches=8,
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=vocabulary, width=32, mlp_width=48, num_heads=2, head_width=16, depth=1
        ),
        autoencoder=AutoencoderConfig(
            latent_channels=4, downsample_factor=32, block_widths=(4,) * 6, blocks_per_level=1, norm_groups=2
        ),
    )  # fmt: skip
    generator = np.random.default_rng(0)

    def random(leaf):
        return (0.2 * generator.normal(size=leaf.shape)).astype(np.float32)

    import jax

    params = jax.tree.map(random, bundle.abstract_params(config))
    bundle.save(tmp_path / "model", config, params, tokenizer=load_tokenizer())
    export(tmp_path / "release", format="unialign", source=tmp_path / "model")
    return tmp_path / "release"


def test_unialign_tpu(execute, released, tmp_path):
    parameters = {"CODE": str(ROOT), "SOURCE": str(released), "MEMORY": "int8_low_memory"}
    parameters |= {"STEPS": 2, "EDIT_STEPS": 2, "TEXT_STEPS": 2}
    notebook, found = execute("unialign_tpu.ipynb", parameters, ["captions", "answers"])

    assert [len(found["captions"]), len(found["answers"])] == [2, 2]
    assert all(isinstance(text, str) and text for text in found["captions"] + found["answers"])
    assert sheets(notebook) == dict.fromkeys(("generate", "edit", "perceive", "personalize", "conversation"), 1)
    for name, count in (("generated", 2), ("edited", 1), ("map", 3), ("personalized", 1)):
        made = pictures(tmp_path, name)
        assert [picture.shape for picture in made] == [(512, 512, 3)] * count
        assert len({picture.tobytes() for picture in made}) == count
    assert difference(tmp_path, "generated_0", "edited_0") > 10
    assert bundle.verify(tmp_path / "bundles/unialign") == []
    conversation = json.loads((tmp_path / "results/conversation/conversation.json").read_text())
    assert [step["instruction"] for step in conversation["edits"]] == ["make it night", "add falling snow"]
    assert difference(tmp_path, "conversation/1", "conversation/2") > 10
