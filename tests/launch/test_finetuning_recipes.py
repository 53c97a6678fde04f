"""The commands of docs/finetuning.md: each is one that its command takes at full size, and is executed in small."""

import base64
import functools
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from unialign_jax import Pipeline, bundle
from unialign_jax.data.records import open_records
from unialign_jax.models.lora import adapters_by_path, targets_of
from unialign_jax.training import runs
from unialign_jax.training.config import read_config
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.optimizer import freeze_labels
from unialign_jax.training.program import make_networks
from unialign_jax.training.state import abstract_transformer, init_params

ROOT = Path(__file__).resolve().parents[2]


def text_of_document() -> str:
    return (ROOT / "docs/finetuning.md").read_text()


@functools.cache
def commands() -> list[list[str]]:
    """[name, *arguments] of the document's commands, in order."""
    text = text_of_document().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    python launch/(.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("number", range(len(commands())))
def test_a_command_is_one_that_is_taken(number, launch_command, monkeypatch, tiny_bundle, tmp_path):
    """At full size, where nothing can be run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "BUNDLE").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    file, *arguments = commands()[number]
    module = launch_command(file.removesuffix(".py"))
    if file == "finetune.py":
        options, calls = module.parse_arguments(arguments), []
        if options.caption:
            draw_pictures(options.pictures)

        def run(name, *arguments):
            calls.append((name, *arguments))

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
def stage(desk):
    return f"--config={desk / 'configs/finetune.py'}"


@pytest.fixture(scope="module")
def desk(small_config, tiny_bundle, shapes_dir, tmp_path_factory):
    """The folder in which the document's commands are executed as they are printed, with these in place of large ones.

    BUNDLE and bundles/unialign are `tiny_bundle`; configs/finetune.py trains two steps at the smallest size; my_...
    are folders of four pictures; data/questions are those of the shapes world.
    """
    folder = tmp_path_factory.mktemp("desk")
    changes = {"num_steps": 2, "checkpoint__every": 2, "init_from": str(tiny_bundle), "lora__rank": 2}
    changes |= {"optimizer__learning_rate": 3e-2, "optimizer__warmup_steps": 1, "samples__count": 0}
    config = small_config("finetune", **changes | {"batch_size": 2, "samples__steps": 1, "samples__caption_steps": 1})
    for name in ("configs", "bundles", "data", "others"):
        (folder / name).mkdir()
    text = "from ml_collections import ConfigDict\n\ndef get_config(size):\n    return ConfigDict({!r})\n"
    (folder / "configs/finetune.py").write_text(text.format(config.to_dict()))
    for link, target in (
        ("BUNDLE", tiny_bundle),
        ("bundles/unialign", tiny_bundle),
        ("data/questions", shapes_dir / "vqa"),
    ):
        (folder / link).symlink_to(target)
    pair = '{"source": "{i}.png", "target": "{j}.png", "instruction": "make it blue", "caption": "a blue square"}'
    question = '{"image": "{i}.png", "question": "what color is it?", "answer": "blue"}'
    draw_pictures(folder / "my_pictures", texts=True, size=(260, 256))  # the least side that is taken by itself
    draw_pictures(folder / "my_scans", texts=True)
    draw_pictures(folder / "my_dog")
    draw_pictures(folder / "my_pairs", pair)
    draw_pictures(folder / "my_questions", question)
    return folder


def draw_pictures(folder, *lines, texts=False, size=(40, 36)):
    """Four pictures, and a metadata.jsonl of `lines` in which {i} and {j} are the numbers of two of them."""
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", size, (60 * i, 90, 200 - 60 * i)).save(folder / f"{i}.png")
        if texts:
            (folder / f"{i}.txt").write_text(f"a red circle {i}")
    rows = [line.replace("{i}", f"{i}").replace("{j}", f"{(i + 1) % 4}") for i in range(4) for line in lines]
    if rows:
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


# The tests' commands, by words of each. Two more tests have the rest: the server's, and the example of the hearts.
MINE = (
    ("finetune.py", "--workdir=runs/mine"),
    ("generate.py", "--lora=runs/mine:0.8"),
    ("export-lora", "--layout=diffusers"),
    ("export-lora", "--layout=kohya"),
    ("merge-lora",),
)
RECIPES = ("style", "subject", "edit", "captions", "answers")
WALKS = {recipe: [("finetune.py", recipe, "--bundle=BUNDLE")] for recipe in RECIPES}
WALKS["style"] = [("finetune.py", "--workdir=runs/style")]
WALKS |= {"both": [("prepare_data.py",), ("train.py", "--workdir=runs/both")]}
WALKS |= {"small": [("finetune.py", "--workdir=runs/small")], "text": [("train.py", "--workdir=runs/text")]}
SERVER = ("serve.py",)
# What is added to a printed command: less of it, and no folder of this user's.
ADDED = {
    "finetune.py": ["--config=configs/finetune.py", "--noprogress"],
    "generate.py": ["--compilation-cache=none"],
    "train.py": ["--noprogress"],
    "serve.py": ["--port=0", "--no-page", "--warm-up=none", "--compilation-cache=none"],
    "prepare_data.py": ["--processes=1"],
    "convert.py": [],
}


def printed(*words):
    """The one command of the document that has all the words."""
    (found,) = [command for command in commands() if set(words) <= set(command)]
    return found


def test_every_command_is_executed_or_says_why_not():
    text = (ROOT / "docs/finetuning.md").read_text()
    marked = re.findall(r"<!-- not run: .+ -->\n\n    python launch/(.*)\n", text)
    walked = [printed(*words) for walk in (MINE, *WALKS.values(), [SERVER]) for words in walk]
    expected = [*walked, *map(shlex.split, marked), *commands()[-3:]]
    assert sorted(expected) == sorted(commands()) and len(marked) == 1


@pytest.fixture
def execute(desk, launch_command, monkeypatch, one_device):
    """A function (command, *options) that executes a printed command in `desk`."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr("unialign_jax.parallel.compiled.keep_compiled", lambda directory: None)

    def execute(command, *options):
        file, *arguments = command
        module = launch_command(file.removesuffix(".py"))
        assert not module.main([*arguments, *ADDED[file], *options])

    return execute


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_commands_as_they_are_printed(name, execute, desk, command_refuses, capsys):
    """Every recipe, and what else trains."""
    more = {"subject": ["--class-pictures=2"], "edit": ["--config.samples.count=1"]}
    more["answers"] = more["edit"]
    for words in WALKS[name]:
        command = printed(*words)
        execute(command, *more.get(name, ()))
    workdir = desk / f"runs/{'dog' if name == 'subject' else name}"
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    written = {path.name for path in workdir.glob("samples/*")}
    streams = {row["stream"] for row in read_metrics(workdir)}
    if name == "text":
        base = flatten_dict(bundle.load(desk / "BUNDLE")[1]["transformer"], sep="/")
        leaves = dict(runs.open_run(workdir, "raw")["transformer"].leaves(list(base)))
        moved = {path for path, leaf in leaves.items() if np.abs(leaf - base[path]).max() > 0}
        assert streams == {"text_to_image"} and not (workdir / "base.json").exists()
        assert {"text_head/kernel", "blocks/joint/text/mlp_in/kernel"} <= moved
        assert not [path for path in moved if "image" in path or "embed" in path]
        return
    adapters = runs.open_adapters(workdir, "raw")
    assert ("text_head/kernel" in adapters_by_path(adapters.tree)) == (name in ("captions", "answers"))
    if name == "both":
        assert streams <= {"text_to_image", "vqa"} and len(open_records(desk / "data/captions")) == 4
        return
    made = ["launch/prepare_data.py", "launch/train.py"]
    if name == "subject":
        made[1:1] = ["launch/generate.py", "launch/prepare_data.py"]
        assert {record.caption for record in open_records(workdir / "data/records")} == {"a photo of zwx dog"}
        texts = {path.read_text() for path in workdir.glob("data/class/*.txt")}
        assert texts == {"a photo of a dog"} and len(list(workdir.glob("data/class/*.png"))) == 2
        assert streams == {"text_to_image", "class"}
    assert told == made
    if name in ("style", "subject"):
        assert written == {"prompts_000002.png"}
    elif name in ("edit", "answers"):
        assert written == {"pictures_000002.md"} | ({"pictures_000002.png"} if name == "edit" else set())
        assert "| before | after |" in (workdir / "samples/pictures_000002.md").read_text()
    else:
        assert written == set()
    if name == "small":
        assert adapters.lora.quantize_base == "int8"
    if name == "subject":  # the same command again makes what is missing alone
        first, second = (workdir / f"data/class/picture_{i}.png" for i in range(2))
        before, pixels = first.stat().st_mtime_ns, np.asarray(Image.open(second), int)
        second.unlink()
        for expected in (["launch/generate.py", "launch/train.py"], ["launch/train.py"]):
            execute(command, *more[name])
            again = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
            assert again == expected and first.stat().st_mtime_ns == before
            assert np.abs(np.asarray(Image.open(second), int) - pixels).max() <= 1  # alone it rounds otherwise
        (desk / "my_dog/3.png").unlink()
        command_refuses("finetune", [*command[1:], *ADDED["finetune.py"], *more[name]], "3.png is gone", "--workdir")


@pytest.fixture
def mine(execute, desk):
    """The document's first run."""
    if not (desk / "runs/mine/checkpoints/2").exists():
        execute(printed(*MINE[0]))
    return desk / "runs/mine"


@pytest.mark.slow
def test_adapters_from_training_to_python(mine, execute, desk):
    for words in MINE[1:]:
        execute(printed(*words))
    fox = Image.open(desk / "fox.png")
    assert json.loads(fox.info["parameters"])["loras"] == {"mine": 0.8}
    told = bundle.read_config(desk / "bundles/mine").provenance
    assert told["loras"] == [{"file": "mine.safetensors", "scale": 0.8}]
    shutil.copyfile(desk / "mine_comfy.safetensors", desk / "others/watercolor.safetensors")
    (block,) = re.findall(r"## Using them\n\n```python\n(.*?)```", text_of_document(), re.DOTALL)
    names = {}
    exec(compile(block, "docs/finetuning.md", "exec"), names)
    assert json.loads(names["fox"].info["parameters"])["loras"] == {"mine": 0.8, "water": 1.0}
    assert names["pipeline"].loras == {"mine": 0.8}
    (again,) = names["pipeline"].generate("a fox in the style of mine")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(fox))  # the command's, of the same seed


@pytest.mark.slow
def test_a_server_as_it_is_printed_and_its_requests(mine, execute, desk, monkeypatch, caplog):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("openai", reason="openai is not installed")
    import uvicorn

    servers = []

    class Server(uvicorn.Server):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Server)
    caplog.set_level(logging.INFO, "serve")
    thread = threading.Thread(target=execute, args=(printed(*SERVER),))
    thread.start()
    try:
        while not (servers and servers[0].started):
            assert thread.is_alive()
            time.sleep(0.01)
        url = re.search(r'"url": "(http[^"]+)/v1"', caplog.text)[1]
        curl, client = (
            re.search(rf"<!-- test -->\n```{language}\n(.*?)```", text_of_document(), re.DOTALL)[1]
            for language in ("bash", "python")
        )
        names = {}
        exec(compile(client.replace("http://127.0.0.1:8000", url), "docs/finetuning.md", "exec"), names)
        content = names["made"].data[0].b64_json
        if shutil.which("curl"):
            subprocess.run(["bash", "-e", "-c", curl.replace("http://127.0.0.1:8000", url)], check=True, timeout=60)
            answer = json.loads((desk / "fox.json").read_text())
            assert answer["data"][0]["b64_json"] == content and answer["lora"] == {"mine": 0.8}
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(60)
    served = Image.open(io.BytesIO(base64.b64decode(content)))
    pipeline = Pipeline.from_bundle("bundles/unialign")
    pipeline.load_lora("runs/mine", 0.8)
    (expected,) = pipeline.generate("a fox in the style of mine", seed=7)
    np.testing.assert_array_equal(np.asarray(served), np.asarray(expected))


SUBJECT = ["--caption=a photo of zwx dog", "--class-prompt=a photo of a dog"]


@pytest.fixture
def subject(launch_command, monkeypatch, tiny_bundle, tmp_path):
    """(a function (*options) -> the commands that a recipe executes, without their work; its module, pictures, run)."""
    module, calls = launch_command("finetune"), []
    pictures, workdir = draw_pictures(tmp_path / "pictures"), tmp_path / "run"

    def run(name, *arguments):
        calls.append(name)
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        if name == "prepare_data":
            Path(options["output"]).mkdir(parents=True)
            names = sorted(path.name for path in Path(options["source"]).iterdir())
            (Path(options["output"]) / "records.json").write_text(" ".join(names))
        if name == "generate":
            jobs = [json.loads(line) for line in Path(options["jobs"]).read_text().splitlines()]
            folder = Path(options["output"])
            missing = [job for job in jobs if not (folder / f"{job['id']}.png").exists()]
            calls.append([job["seed"] for job in missing])
            for job in missing:
                (folder / f"{job['id']}.png").write_text(job["prompt"])

    def recipe(*options):
        calls.clear()
        options = [*SUBJECT, "--class-pictures=3", *options]
        command = ["subject", f"--pictures={pictures}", f"--workdir={workdir}", f"--bundle={tiny_bundle}", *options]
        assert module.main(command) == 0
        return list(calls)

    monkeypatch.setattr(module, "run", run)
    return recipe, module, pictures, workdir


def test_records_are_of_the_pictures_as_they_are(subject, capsys, refuses):
    recipe, module, pictures, workdir = subject
    assert recipe() == ["prepare_data", "generate", [0, 1, 2], "prepare_data", "train"]
    assert recipe() == recipe("--config.num_steps=7") == ["train"]
    Image.new("RGB", (40, 36)).save(pictures / "4.png")
    (pictures / "1.txt").write_text("zwx dog asleep")
    assert recipe() == ["prepare_data", "prepare_data", "train"]  # the pictures of the class stay
    assert "1.txt is new, 4.png is new" in capsys.readouterr().out
    assert (workdir / "data/pictures/4.txt").read_text() == "a photo of zwx dog"
    assert (workdir / "data/pictures/1.txt").read_text() == "zwx dog asleep"
    (pictures / "4.png").unlink()
    assert "prepare_data" in recipe() and not (workdir / "data/pictures/4.png").exists()
    assert recipe("--caption=zwx dog") == ["prepare_data", "prepare_data", "train"]
    assert recipe("--class-prompt=a dog")[:3] == ["prepare_data", "generate", [0, 1, 2]]
    assert (workdir / "data/class/picture_0.png").read_text() == "a dog"
    assert (workdir / "data/class/picture_0.txt").read_text() == "a dog"
    # Steps are saved: nothing is made again behind them.
    recipe()
    (workdir / "checkpoints/2").mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert recipe() == ["train"]
    (pictures / "1.txt").write_text("zwx dog awake")
    (pictures / "2.png").unlink()
    for options, words in (
        ([], ["1.txt has changed", "2.png is gone", "--workdir", "undo"]),
        (["--class-prompt=a dog", "--caption=it"], ["2.png is gone, --caption has changed", "and 2 more"]),
    ):
        arguments = [f"--pictures={pictures}", f"--workdir={workdir}", "--config=finetune:tiny", *SUBJECT, *options]
        parsed = module.parse_arguments(["subject", "--class-pictures=3", *arguments])
        refuses(lambda parsed=parsed: module.finetune(parsed), "trained with other pictures or texts", *words)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_pictures_of_the_class_that_are_there_are_not_drawn_again(subject):
    recipe, _, _, workdir = subject
    recipe()
    (workdir / "data/class/picture_1.png").unlink()  # as an interruption leaves it
    (workdir / "data/class_records/records.json").unlink()
    (workdir / "data/class_records").rmdir()
    assert recipe() == ["generate", [1], "prepare_data", "train"]
    assert recipe("--class-pictures=5")[:4] == ["prepare_data", "generate", [3, 4], "prepare_data"]
    assert recipe("--class-pictures=2") == ["prepare_data", "prepare_data", "train"]
    assert sorted(path.name for path in workdir.glob("data/class/*.png")) == ["picture_0.png", "picture_1.png"]
    listed = (workdir / "data/class_records/records.json").read_text()
    assert listed == "picture_0.png picture_0.txt picture_1.png picture_1.txt"


@pytest.mark.bad_input
def test_bad_recipes_are_one_line(stage, command_refuses, tmp_path):
    command = [f"--pictures={tmp_path}", f"--workdir={tmp_path / 'run'}", stage]
    command_refuses("finetune", ["subject", *command], "--class-prompt")
    command_refuses("finetune", ["style", *command, "--config.lora.ranks=4"], "lora.ranks", "lora.rank")
    command_refuses("finetune", ["style", *command], "no image")
    command_refuses("finetune", ["style", *command, "--caption=a dog"], "holds no pictures")
    own = tmp_path / "run/data/pictures"
    command_refuses("finetune", ["style", *command[1:], f"--pictures={own}"], "lies in", "the run's own")
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
