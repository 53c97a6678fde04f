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

from unialign_jax.data.records import open_records
from unialign_jax.models.lora import adapters_by_path, targets_of
from unialign_jax.training import runs
from unialign_jax.training.config import read_config
from unialign_jax.training.metrics import read_metrics
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
def test_a_command_is_one_that_is_taken(number, launch_command, monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    file, *arguments = commands()[number]
    module = launch_command(file.removesuffix(".py"))
    if file == "finetune.py":
        options, calls = module.parse_arguments(arguments), []
        if options.caption:
            draw_pictures(options.pictures)

        def run(name, *arguments):
            calls.append((name, *arguments))
            if name == "generate":
                (options.workdir / "data/class").mkdir()

        monkeypatch.setattr(module, "run", run)
        module.finetune(options)
        names = [name for name, *_ in calls]
        assert names[0] == "prepare_data" and names.count("generate") == (options.recipe == "subject")
        file, *arguments = calls[-1]
        module = launch_command(file)
    elif file != "train.py":
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


def test_the_document_has_all_recipes(launch_command):
    recipes = {arguments[0] for name, *arguments in commands() if name == "finetune.py"}
    assert recipes == launch_command("finetune").RECIPES.keys()
    assert {"train.py", "prepare_data.py", "generate.py", "convert.py"} <= {name for name, *_ in commands()}


@pytest.fixture
def one_device(monkeypatch):
    """Commands train on the first of the virtual devices: their programs compile faster."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


@pytest.fixture
def stage(small_config, tiny_bundle, tmp_path):
    """A stage file: configs/finetune.py at the smallest size, two steps."""
    changes = {"num_steps": 2, "checkpoint__every": 2, "init_from": str(tiny_bundle), "lora__rank": 2}
    changes |= {"optimizer__learning_rate": 3e-2, "optimizer__warmup_steps": 1, "samples__count": 1}
    config = small_config("finetune", **changes | {"batch_size": 2, "samples__steps": 1, "samples__caption_steps": 1})
    file = tmp_path / "small.py"
    text = "from ml_collections import ConfigDict\n\ndef get_config(size):\n    return ConfigDict({!r})\n"
    file.write_text(text.format(config.to_dict()))
    return f"--config={file}"


def draw_pictures(folder, *lines, texts=False):
    """Four pictures, and a metadata.jsonl of `lines` in which {i} and {j} are the numbers of two of them."""
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 36), (60 * i, 90, 200 - 60 * i)).save(folder / f"{i}.png")
        if texts:
            (folder / f"{i}.txt").write_text(f"a red circle {i}")
    rows = [line.replace("{i}", f"{i}").replace("{j}", f"{(i + 1) % 4}") for i in range(4) for line in lines]
    if rows:
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


RECIPES = {
    "subject": ["--caption=a photo of zwx dog", "--class-prompt=a photo of a dog", "--class-pictures=2"],
    "edit": ['{"source": "{i}.png", "target": "{j}.png", "instruction": "make it blue", "caption": "a blue square"}'],
    "captions": ["--config.samples.count=0"],
    "answers": ['{"image": "{i}.png", "question": "what color is it?", "answer": "blue"}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_one_command(recipe, stage, one_device, launch_command, tmp_path, capsys):
    lines = [line for line in RECIPES[recipe] if line.startswith("{")]
    pictures = draw_pictures(tmp_path / "pictures", *lines, texts=recipe == "captions")
    options = [option for option in RECIPES[recipe] if option.startswith("--")]
    if recipe == "subject":
        options += ["--prompt=zwx dog in the snow", "--config.samples.count=0"]
    workdir = tmp_path / "run"
    command = [recipe, f"--pictures={pictures}", f"--workdir={workdir}", stage, "--noprogress", *options]
    assert launch_command("finetune").main(command) == 0
    written = {path.name for path in workdir.glob("samples/*")}
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    made = ["launch/prepare_data.py", "launch/train.py"]
    if recipe == "subject":
        made[1:1] = ["launch/generate.py", "launch/prepare_data.py"]
        assert written == {"prompts_000002.png"}
        assert {record.caption for record in open_records(workdir / "data/records")} == {"a photo of zwx dog"}
        texts = {path.read_text() for path in workdir.glob("data/class/*.txt")}
        assert texts == {"a photo of a dog"} and len(list(workdir.glob("data/class/*.png"))) == 2
        streams = {row["stream"] for row in read_metrics(workdir)}
        assert streams == {"text_to_image", "class"}
    elif recipe == "captions":
        assert written == set()
    else:
        assert written == {"pictures_000002.md"} | ({"pictures_000002.png"} if recipe == "edit" else set())
        assert "| before | after |" in (workdir / "samples/pictures_000002.md").read_text()
    assert told == made
    adapters = runs.open_adapters(workdir, "raw")
    assert ("text_head/kernel" in adapters_by_path(adapters.tree)) == (recipe in ("captions", "answers"))
    if recipe == "subject":  # the same command again finds all there
        assert launch_command("finetune").main(command) == 0
        again = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
        assert again == ["launch/train.py"]


@pytest.mark.bad_input
def test_bad_recipes_are_one_line(stage, command_refuses, tmp_path):
    command = [f"--pictures={tmp_path}", f"--workdir={tmp_path / 'run'}", stage]
    command_refuses("finetune", ["subject", *command], "--class-prompt")
    command_refuses("finetune", ["style", *command, "--config.lora.ranks=4"], "lora.ranks", "lora.rank")
    command_refuses("finetune", ["style", *command], "no image")
    command_refuses("finetune", ["style", *command, "--caption=a dog"], "holds no pictures")
    assert not (tmp_path / "run/checkpoints").exists()


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
def test_the_demo_model_learns_a_word_from_twelve_pictures(one_device, launch_command, tmp_path, monkeypatch, capsys):
    """The example as it is printed, with a fifth of its steps: the hearts must be better ones already."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    pictures, train, sheet = commands()[-3:]
    assert launch_command("finetune_example").main(pictures[1:]) == 0
    changes = ["--config.num_steps=60", "--config.samples.count=0", "--noprogress"]
    assert launch_command("finetune").main([*train[1:], *changes]) == 0
    capsys.readouterr()
    example = launch_command("finetune_example")
    example.HELD_OUT = 8
    assert example.main(sheet[1:]) == 0
    before, after = (float(score) for score in re.findall(r"asked for ([\d.]+),", capsys.readouterr().out))
    assert after > before + 0.05
    assert np.asarray(Image.open("hearts.png")).std() > 10
