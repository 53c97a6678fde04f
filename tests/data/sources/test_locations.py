"""Paths, patterns and URLs."""

import json

import fsspec
import pytest

from unialign_jax.data.sources import guess_format, labels, locations


def test_braces_and_stars(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "b-00.tar", "x{1}.tar"):
        (tmp_path / name).write_bytes(b"")
    names = lambda pattern: [path.removeprefix(f"{tmp_path}/") for path in locations.expand(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("{a,b}-{00..01}.tar") == ["a-00.tar", "a-01.tar", "b-00.tar", "b-01.tar"]
    assert names("{a,b}-0?.tar") == ["a-00.tar", "a-01.tar", "b-00.tar"], "those that are there"
    assert names("{a,a}-00.tar") == ["a-00.tar"], "once each"
    assert names("x{1}.tar") == ["x{1}.tar"], "a name as it is"
    assert names("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert locations.expand(f"file://{tmp_path}/a-00.tar") == [f"{tmp_path}/a-00.tar"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        locations.expand(f"{tmp_path}/*.zip")


def test_labels_tell_files_apart():
    assert labels(["/x/a.json"]) == ["a.json"]
    assert labels(["/x/a.json", "/x/b.json"]) == ["a.json", "b.json"]
    assert labels(["/x/1/a.json", "/x/2/a.json"]) == ["1/a.json", "2/a.json"]
    assert labels(["s3://b/1/a.json", "/1/a.json"]) == ["b/1/a.json", "1/a.json"]


def test_formats_are_guessed(tmp_path):
    """By the name, by the first bytes, by what a folder holds."""
    (tmp_path / "rows").write_bytes(b'\xef\xbb\xbf [{"a": 1}]')
    (tmp_path / "table").write_bytes(b"PAR1....")
    (tmp_path / "shard").write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 300)
    for name, file in (("tars", "0.tar"), ("tables", "0.parquet"), ("saved", "state.json"), ("images", "a.png")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"")
    (tmp_path / "images" / "metadata.jsonl").write_bytes(b"")
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_bytes(b"")
    expected = {
        "rows": "json",
        "table": "parquet",
        "shard": "webdataset",
        "tars": "webdataset",
        "tables": "parquet",
        "saved": "hf",
        "images": "folder",
        "deep": "folder",
        "a.jsonl": "json",
    }
    assert {name: guess_format(str(tmp_path / name)) for name in expected} == expected


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, words",
    [
        ("gone", ["gone does not exist"]),
        ("owner/name", ["owner/name does not exist", "--format=hf"]),
        ("page.html", ["page.html is in no known format, it is a web page", "--format"]),
        ("a.zip", ["it is a zip file"]),
        ("lists", ["is a folder", "it holds rows.jsonl"]),
        ("nosuch://x/y", ["nosuch://x/y cannot be opened"]),
    ],
)
def test_sources_that_are_none(tmp_path, monkeypatch, refuses, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_bytes(b"<html></html>")
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "rows.jsonl").write_bytes(b"{}")
    refuses(lambda: guess_format(name), *words)


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_sources_in_a_bucket(prepare, memory, picture):
    """A list whose images lie beside it, and a folder, at a URL."""
    for number in range(3):
        memory.pipe(f"/bucket/images/{number}.jpg", picture(number))
        memory.pipe(f"/bucket/images/{number}.txt", b"text")
    rows = [{"image": f"images/{number}.jpg", "caption": "x"} for number in range(3)]
    rows.append({"image": "../../etc/passwd", "caption": "x"})
    rows.append({"image": "memory://elsewhere/0.jpg", "caption": "x"})
    memory.pipe("/bucket/rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = prepare("memory://bucket/rows.jsonl", "text_to_image", "--max-bad-fraction=0.5", "--threads=3")
    assert [record.image for record in found.records] == [picture(number) for number in range(3)]
    assert "1 x image is a URL" in found.said and "1 x image file cannot be read" in found.said
    found = prepare("memory://bucket/images", output="folder")
    assert [record.key for record in found.records] == [f"images/{number}.jpg" for number in range(3)]
    found = prepare("memory://bucket/r*.jsonl", "text_to_image", "--max-bad-fraction=0.5", output="by pattern")
    assert len(found.records) == 3


def test_output_in_a_bucket(prepare, launch_command, memory, picture, tmp_path):
    """The folder there is the one that a local run writes, and nothing else stays."""
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n' * 5)
    local = prepare(tmp_path / "rows.jsonl", "text_to_image", "--holdout=0.2")
    given = [f"--source={tmp_path}/rows.jsonl", "--stream=text_to_image", "--processes=1", "--holdout=0.2"]
    main = launch_command("prepare_data").main
    main([*given, "--min-side=1", "--output=memory://bucket/out"])
    for inner, url in ((local.folder, "out"), (local.folder.with_name("out-holdout"), "out-holdout")):
        names = sorted(path.name for path in inner.iterdir())
        assert sorted(locations.listing(f"memory://bucket/{url}")) == names
        for name in names:
            if "report" not in name:
                assert memory.cat(f"/bucket/{url}/{name}") == (inner / name).read_bytes(), name
    assert not [path for path in memory.find("/") if "preparing" in path]
    with pytest.raises(SystemExit, match="memory://bucket/out exists already"):
        main([*given, "--min-side=1", "--output=memory://bucket/out"])
    main([*given, "--min-side=1", "--output=memory://bucket/out", "--overwrite"])
