"""The table of images per second: every row is there and adds up. No time is held to."""

import json

import numpy as np
import pytest

from unialign_jax.benchmarks import data
from unialign_jax.data.records import open_records


@pytest.fixture
def figures(launch_command, tmp_path, capsys):
    """A function (*options) -> what the command measured."""

    def run(*options):
        output = tmp_path / "figures.json"
        small = ["--image-size=64", "--count=4", "--rounds=1", "--threads=1,2", "--text-length=16"]
        launch_command("benchmark").main(["data", *small, f"--scratch={tmp_path}", f"--output={output}", *options])
        assert "share" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("data-")] == []
        return json.loads(output.read_text())

    return run


def tables(found):
    return [value for value in found.values() if isinstance(value, list)]


def test_made_pictures(figures):
    decoders, (cached,), threads = tables(figures("--stored=64,96"))
    assert [row["stored"] for row in decoders] == ["shorter side 64", "shorter side 96"]
    missing = data.missing_decoders()
    for row in decoders:
        measured = {name: row[name] for name in ("Pillow", *data.MODULES) if row[name] != "not installed"}
        assert set(measured) == {"Pillow", *data.MODULES} - set(missing)
        assert row["fastest"] == max(measured, key=measured.get)
        assert row["share"] == f"{100 * row['stream'] / measured[row['fastest']]:.0f}%"
    assert (cached["latents, KB a record"], cached["teacher, KB a record"]) == (4.1, 14.3)
    kilobytes = cached["latents, KB a record"] + cached["teacher, KB a record"]
    assert cached["MB/s"] == pytest.approx(cached["examples/s"] * kilobytes / 1000, rel=0.02, abs=1)
    assert [row["threads"] for row in threads] == [1, 2] and threads[0]["times the first"] == 1
    for row in threads:
        assert row["examples/s"] == pytest.approx(row["cores busy"] * row["examples/s of a busy core"], rel=0.1)


def test_a_folder_of_ones_own(figures, shapes_dir):
    """PNG here, which only Pillow reads."""
    found = figures(f"--input={shapes_dir / 'edit'}")
    (row,), _, _ = tables(found)
    assert row["fastest"] == "Pillow" and row["stored"] == str(shapes_dir / "edit")
    assert found["pictures"] == f"the first 4 records of {shapes_dir / 'edit'}"


def test_rates():
    row = data.rates({"Pillow": 2.0, "simplejpeg": 1.0, "stream": 1.25}, 100)
    assert (row["Pillow"], row["simplejpeg"], row["stream"]) == (50, 100, 80)
    assert (row["fastest"], row["share"]) == ("simplejpeg", "80%")
    assert row["OpenCV"] == "not installed"


def test_decoders_agree():
    pixels = data.random_field(np.random.default_rng(0), 60, 80)
    jpeg = data.encode_jpeg(pixels)
    for name, decode in data.make_decoders().items():
        found = decode(jpeg).astype(int)
        assert found.shape == pixels.shape and np.abs(found - pixels).mean() < 12, name


def test_made_pictures_have_the_size_of_photographs(tmp_path):
    folder = data.write_pictures(tmp_path / "o", 512, 4)
    records = open_records(folder)
    bits = [8 * len(records[index].image) / (512 * size) for index, size in enumerate((683, 683, 768, 768))]
    assert 1.5 < np.mean(bits) < 2.5


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--stored=0", "--stored is '0', expected whole numbers of 8"),
        ("--stored=512,", "--stored is '512,'"),
        ("--threads=two", "--threads is 'two', expected whole numbers of 1 to 256"),
        ("--count=3", "--count"),
        ("--rounds=0", "--rounds"),
        ("--image-size=4", "--image-size"),
        ("--input=/nowhere", "data folder /nowhere does not exist"),
        ("--tokenizer=/nowhere", "/nowhere holds no tokenizer"),
        ("--config.seed=1", "data reads no stage"),
    ],
)
def test_bad_options(command_refuses, option, words):
    command_refuses("benchmark", ["data", option], words)


def test_numbers():
    assert data.parse_numbers("--x", "1,22", 1, 30) == [1, 22]
