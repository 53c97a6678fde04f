"""docs/data.md's commands, from each format to a running stage, on small data of each layout."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unialign_jax.data.records import open_records
from unialign_jax.training.config import read_config
from unialign_jax.training.loop import train
from unialign_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- walks: .*?-->\n```bash\n(.*?)```", re.DOTALL)
COMMANDS = [
    line
    for block in BLOCK.findall((ROOT / "docs" / "data.md").read_text())
    for line in block.splitlines()
    if not line.startswith("#")
]
PREPARE = [command for command in COMMANDS if "prepare_data.py" in command]
# What each makes of the data below: records of the folder, those held out besides.
EXPECTED = {"pictures": 160, "pairs": 3, "alt": 3, "llava": 3, "edits": 2, "cc": 6, "ultraedit": 4, "saved": 3}


@pytest.fixture
def home(tmp_path, monkeypatch, picture):
    """A folder with data of every layout, as the commands name them."""
    monkeypatch.chdir(tmp_path)
    large = {"size": (320, 256)}
    for folder in ("pictures", "images/coco", "released", "shards", "parquet"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(160):
        Path(f"pictures/{number}.jpg").write_bytes(picture(number, **large))
        Path(f"pictures/{number}.txt").write_text(f"picture {number}")
    Path("images/coco/a.jpg").write_bytes(picture(1))
    rows = [
        {"image": "images/coco/a.jpg", "caption": f"c {n}", "file": "images/coco/a.jpg", "alt": f"a {n}"}
        for n in range(3)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": "1", "image": "coco/a.jpg", "conversations": turns * 2}, {"id": "2", "conversations": turns}]
    Path("llava_mix.json").write_text(json.dumps([*rows, rows[0] | {"conversations": turns}]))
    turns = [{"from": "human", "value": "the target"}]
    row = {"image": ["../images/coco/a.jpg"] * 2, "instruction": "change", "conversations": turns}
    for number in range(2):
        Path(f"released/{number}.jsonl").write_text(json.dumps(row))
    for shard in range(3):
        with tarfile.open(f"shards/cc-{shard:03d}.tar", "w") as tar:
            for number in range(2):
                for ending, data in (("jpg", picture(number, size=(128, 128))), ("txt", b"a text")):
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    image = {"bytes": picture(1, **large), "path": None}
    edit = {"source_image": image, "edited_image": image, "edit_prompt": "change", "target_caption": "after"}
    for number in range(2):
        pq.write_table(pa.Table.from_pylist([edit] * 2), f"parquet/{number}.parquet")
    Path("saved/train").mkdir(parents=True)
    table = pa.Table.from_pylist([{"image": image, "question": "q", "answer": "a"}] * 3)
    with (
        pa.OSFile("saved/train/data-00000-of-00001.arrow", "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    Path("saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    Path("saved/train/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    return tmp_path


def run(launch_command, command):
    python, script, *arguments = shlex.split(command)
    assert python == "python" and script.startswith("launch/")
    return launch_command(Path(script).stem).main, arguments


def test_every_format_has_a_walk():
    assert len(PREPARE) == len(EXPECTED) and len(COMMANDS) == len(PREPARE) + 1


@pytest.mark.parametrize("command", PREPARE, ids=[command.rpartition("/")[2] for command in PREPARE])
def test_a_source_becomes_a_stream(home, launch_command, command):
    main, arguments = run(launch_command, command)
    main([*arguments, "--processes=1"])
    folder = next(argument for argument in arguments if argument.startswith("--output=")).removeprefix("--output=")
    found = open_records(folder)
    held = len(open_records(f"{folder}-holdout")) if "--holdout" in command else 0
    assert len(found) + held == EXPECTED[Path(folder).name]
    assert all(Image.open(io.BytesIO(found[number].image)) for number in range(len(found)))
    assert (home / folder / "report.html").is_file()


@pytest.mark.slow
def test_a_stream_trains_a_stage(home, launch_command, small_config):
    """The configuration of the walk, at the suite's size: it trains, and validates on what was held out."""
    main, arguments = run(launch_command, PREPARE[0])
    main([*arguments, "--processes=1"])
    _, arguments = run(launch_command, COMMANDS[-1])
    arguments = [argument.replace("configs/", f"{ROOT}/configs/") for argument in arguments]
    options, changes = launch_command("train").parse(arguments)
    asked = read_config(options.config, changes)
    config = small_config("stage1", num_steps=2, validation__every=2, validation__records=8)
    config.loss_weights.intrinsic_modal = asked.loss_weights.intrinsic_modal
    config.streams = asked.streams
    train(config, home / options.workdir, progress=False, devices=jax.devices()[:1])
    rows = read_metrics(home / options.workdir)
    assert rows and all(0 < row["loss"] < 100 for row in rows if "loss" in row)
