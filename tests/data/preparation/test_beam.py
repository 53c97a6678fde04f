"""The same preparation as a pipeline of Apache Beam, where that is installed."""

import json

import pytest

from unialign_jax.data.preparation import beam
from unialign_jax.data.records import open_records


@pytest.fixture
def rows(tmp_path, picture):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    for name in "xy":
        lines = [{"image": f"{n % 5}.jpg" if n % 50 else "gone.jpg", "caption": f"{name} {n}"} for n in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"{tmp_path}/[xy].jsonl"


def records(folder):
    found = open_records(folder)
    return [found[number] for number in range(len(found))]


def test_a_pipeline_writes_what_processes_write(prepare, rows):
    pytest.importorskip("apache_beam")
    options = ["--holdout=0.1", "--near-duplicates=0", "--tokenizer=shapes", "--text-length=32"]
    local = prepare(rows, "text_to_image", *options)
    piped = prepare(
        rows,
        "text_to_image",
        *options,
        "--runner=DirectRunner",
        "--runner-options=--direct_num_workers=1",
        output="piped",
    )
    assert piped.records == local.records and len(local.records) > 1
    held = [records(folder.with_name(f"{folder.name}-holdout")) for folder in (local.folder, piped.folder)]
    assert held[0] == held[1]
    lines = [found.said.replace("piped", "out").split("done in")[0] for found in (local, piped)]
    assert lines[0] == lines[1], "the same counts, reasons and lengths"


def test_a_pipeline_goes_on(prepare, rows, monkeypatch, tmp_path):
    """Pieces that are there are not made again, and those of another run's parts are not taken."""
    pytest.importorskip("apache_beam")
    pack = beam.pack_shards
    monkeypatch.setattr(beam, "pack_shards", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(rows, "text_to_image", "--runner=DirectRunner")
    pieces = tmp_path / ".out.preparing" / "pieces"
    times = {path.name: path.stat().st_mtime_ns for path in pieces.iterdir()}
    (pieces / "00000000-00000009-00000000.json").write_text("{}")
    monkeypatch.setattr(beam, "pack_shards", pack)
    seen = {}

    def look(*arguments):
        seen.update({path.name: path.stat().st_mtime_ns for path in pieces.iterdir()})
        return pack(*arguments)

    monkeypatch.setattr(beam, "pack_shards", look)
    assert len(prepare(rows, "text_to_image", "--runner=DirectRunner").records) == 294
    assert times.items() <= seen.items()


def test_without_the_package(rows, tmp_path, monkeypatch, command_refuses):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    arguments = [f"--source={rows}", "--stream=text_to_image", f"--output={tmp_path / 'o'}", "--runner=DataflowRunner"]
    command_refuses("prepare_data", arguments, "--runner needs Apache Beam: pip install")
    command_refuses("prepare_data", [*arguments[:3], "--runner-options=--x"], "--runner-options needs --runner")
