"""What adapters are called, where files of different folders have the same name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from unialign_jax import Pipeline, bundle
from unialign_jax.inference.opening import ModelSource
from unialign_jax.models.lora import LoraConfig, init_adapters
from unialign_jax.training import base_model
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.state import TrainState

FILES = (
    "style-1.0/pytorch_lora_weights.safetensors",
    "style-1.5/pytorch_lora_weights.safetensors",
    "v2/style-1.5.safetensors",
    "v3/style-1.5.safetensors",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FILES, each a LoRA of `tiny_bundle` of its own."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, file in enumerate(FILES):
        generator = np.random.default_rng(seed)
        key = "transformer.transformer_blocks.0.attn.to_q"
        tensors = {f"{key}.lora_{part}.weight": shape for part, shape in {"A": (2, 32), "B": (32, 2)}.items()}
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({k: generator.normal(size=shape).astype(np.float32) for k, shape in tensors.items()}, folder / file)
    return folder


def test_other_adapters_are_never_replaced(folder, tiny_bundle, monkeypatch):
    pipeline = Pipeline.from_bundle(tiny_bundle)
    monkeypatch.chdir(folder / "style-1.0")
    assert pipeline.load_lora("pytorch_lora_weights.safetensors") == "style-1.0"
    assert pipeline.load_lora(folder / FILES[1], 0.5) == "style-1.5"
    assert pipeline.load_lora(folder / FILES[2], 0.25) == "style-1.5-2"
    assert pipeline.load_lora(folder / "style-1.5", 2.0) == "style-1.5-3"  # the folder is another path than its file
    assert pipeline.load_lora(folder / FILES[2], -1.0) == "style-1.5-2"  # the same path again
    assert pipeline.load_lora(".") == "style-1.0-2"
    scales = {"style-1.0": 1.0, "style-1.5": 0.5, "style-1.5-3": 2.0, "style-1.5-2": -1.0, "style-1.0-2": 1.0}
    assert pipeline.loras == scales
    pipeline.load_lora(folder / FILES[3], name="style-1.0")  # a name that is given is meant
    assert pipeline.loras.keys() == scales.keys()
    assert pipeline.load_lora(folder / FILES[3], 3.0) == "style-1.0"  # the same path, by whatever name
    pipeline.unload_lora("style-1.5")
    assert pipeline.load_lora(folder / FILES[2], 0.5) == "style-1.5-2"
    assert pipeline.loras == {"style-1.0": 3.0, "style-1.5-3": 2.0, "style-1.5-2": 0.5, "style-1.0-2": 1.0}


@pytest.mark.slow
def test_equal_file_names_of_a_command_are_both_in_the_model_and_its_images(
    folder, tiny_bundle, tmp_path, monkeypatch, launch_command
):
    monkeypatch.setattr("unialign_jax.parallel.compiled.keep_compiled", lambda directory: None)
    references = [f"{folder / FILES[i]}:{scale}" for i, scale in ((2, 0.5), (3, -1.0), (2, 0.125))]
    scales = {"style-1.5": 0.5, "style-1.5-2": -1.0, "style-1.5-3": 0.125}
    source = ModelSource(tiny_bundle, loras=references)
    pipeline, expected = source.open(), Pipeline.from_bundle(tiny_bundle)
    assert source.stamp(None, None)["loras"] == pipeline.loras == scales
    expected.load_lora(folder / FILES[2], 0.5, "a")
    expected.load_lora(folder / FILES[3], -1.0, "b")
    expected.load_lora(folder / FILES[2], 0.125, "c")
    weights = [each._weights.get("transformer")["transformer"] for each in (pipeline, expected)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    options = ["--task=text_to_image", "--prompt=a red circle", "--seed=1", "--steps=2", "--compilation-cache=none"]
    output = tmp_path / "circle.png"
    command = [f"--bundle={tiny_bundle}", *(f"--lora={reference}" for reference in references), f"--output={output}"]
    assert launch_command("generate").main([*command, *options]) == 0
    made = Image.open(output)
    (again,) = expected.generate("a red circle", seed=1, steps=2)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(again))
    assert json.loads(made.info["parameters"])["loras"] == scales


def test_a_run_is_called_by_its_whole_name(folder, tiny_bundle, small_config, tmp_path):
    """A version in a folder's name is no ending."""
    config = small_config("finetune", init_from=str(tiny_bundle), lora__rank=2)
    abstract = bundle.abstract_params(bundle.read_config(tiny_bundle), ["transformer"])["transformer"]
    adapters = init_adapters(LoraConfig.of(config.lora.to_dict()), abstract, jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "style-1.0")
    checkpoints.save(TrainState(jnp.int32(3), {"transformer": adapters}, {}, {"count": jnp.int32(3)}), 3)
    checkpoints.close()
    (tmp_path / "style-1.0/config.json").write_text(config.to_json_best_effort())
    base_model.write_base(base_model.find_base(str(tiny_bundle), "raw", -1), tmp_path / "style-1.0")
    shutil.copytree(tmp_path / "style-1.0", tmp_path / "style-1.5")
    pipeline = Pipeline.from_bundle(tiny_bundle)
    assert [pipeline.load_lora(tmp_path / name) for name in ("style-1.0", "style-1.5")] == ["style-1.0", "style-1.5"]
