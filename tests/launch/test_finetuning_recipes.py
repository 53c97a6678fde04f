"""The commands of docs/finetuning.md: each is one that its command takes, and those of the example are executed."""

import functools
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from unialign_jax.models.lora import targets_of
from unialign_jax.training.config import read_config
from unialign_jax.training.optimizer import freeze_labels
from unialign_jax.training.program import make_networks
from unialign_jax.training.state import abstract_transformer, init_params

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def commands() -> list[list[str]]:
    """[name, *arguments] of the document's commands, in order."""
    text = (ROOT / "docs/finetuning.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    python launch/(.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("number", range(len(commands())))
def test_a_command_is_one_that_is_taken(number, launch_command, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, *arguments = commands()[number]
    module = launch_command(file.removesuffix(".py"))
    if file != "train.py":
        module.parse_arguments(arguments)
        return
    options, changes = module.parse(arguments)
    config = read_config(options.config, changes)
    networks = make_networks(config, jax.devices()[:1])  # raises for a configuration that cannot run
    if networks.lora is None:
        params = jax.eval_shape(lambda: init_params(networks, jax.random.key(0)))
        assert set(jax.tree.leaves(freeze_labels(params, config.optimizer.freeze))) == {"freeze", "train"}
    else:
        assert targets_of(networks.lora, flatten_dict(abstract_transformer(networks), sep="/"))


def test_the_document_has_all_recipes():
    names = [name for name, *_ in commands()]
    assert names.count("train.py") == 7 and {"prepare_data.py", "generate.py", "convert.py"} <= set(names)


def test_pictures_are_a_dozen_and_the_sheet_asks_for_others(launch_command, tmp_path, command_refuses):
    module = launch_command("finetune_example")
    assert module.main(["pictures", f"--output={tmp_path / 'pictures'}"]) == 0
    texts = {path.read_text().strip() for path in tmp_path.glob("pictures/*.txt")}
    held_out = module.scenes()[module.COUNT :][: module.HELD_OUT]
    assert len(texts) == 12 and texts.isdisjoint(module.caption(*scene) for scene in held_out)
    assert Image.open(tmp_path / "pictures/heart_00.png").size == (64, 64)
    drawn, blank = Image.fromarray(module.draw(*held_out[0])), Image.new("RGB", (64, 64), held_out[0][2])
    assert module.overlap(drawn, held_out[0]) == 1 and module.overlap(blank, held_out[0]) == 0
    command_refuses("finetune_example", ["pictures", f"--output={tmp_path / 'pictures'}"], "has files already")


@pytest.mark.slow
def test_the_demo_model_learns_a_word_from_twelve_pictures(launch_command, tmp_path, monkeypatch, capsys):
    """The example as it is printed, with a third of its steps: the hearts must be better ones already."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    pictures, records, train, sheet = commands()[-4:]
    assert launch_command("finetune_example").main(pictures[1:]) == 0
    launch_command("prepare_data").main(records[1:])
    changes = ["--config.num_steps=100", "--config.samples.count=0", "--noprogress"]
    launch_command("train").main([*train[1:], *changes])
    capsys.readouterr()
    assert launch_command("finetune_example").main(sheet[1:]) == 0
    before, after = (float(score) for score in re.findall(r"asked for ([\d.]+),", capsys.readouterr().out))
    assert after > before + 0.05
    assert np.asarray(Image.open("hearts.png")).std() > 10
