"""WebDataset's tars: members of one name are a row."""

import io
import json
import tarfile

import pytest


@pytest.fixture
def tar(tmp_path):
    """A function (name, {member: bytes}) -> the path of a tar."""

    def make(name, members, mode="w"):
        with tarfile.open(tmp_path / name, mode) as file:
            for member, data in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return make


def test_images_with_texts(prepare, tar, picture, tmp_path):
    tar("shard-000.tar", {"0001.jpg": picture(1), "0001.txt": b"one", "0001.json": b'{"caption": "other"}'})
    tar(
        "shard-001.tar",
        {
            "in/0001.png": picture(2, "PNG"),
            "in/0001.json": json.dumps({"prompt": "two", "image": "/home/x/0001.png"}).encode(),
            "in/0001.npy": b"ignored",
            "README": b"no row",
            "0002.WebP": picture(3, "WEBP"),
            "0002.cls": b"1\n",
        },
    )
    (tmp_path / "names").write_text("a cat\na dog\n")
    found = prepare(f"{tmp_path}/shard-{{000..001}}.tar", "text_to_image", f"--class-names={tmp_path / 'names'}")
    assert [(record.key, record.caption) for record in found.records] == [
        ("shard-000.tar/0001", "other"),
        ("shard-001.tar/in/0001", "two"),
        ("shard-001.tar/0002", "a dog"),
    ]
    assert found.records[0].image == picture(1)
    again = prepare(tmp_path / "shard-000.tar", "text_to_image", "--caption-key=txt", output="again")
    assert again.records[0].caption == "one"
    folder = prepare(tmp_path, "text_to_image", f"--class-names={tmp_path / 'names'}", output="whole")
    assert len(folder.records) == 3, "a folder of tars"


def test_edits(prepare, tar, picture, tmp_path):
    """Several images of a row, by their endings; `--source-key` names them."""
    members = {
        "1.source.jpg": picture(1),
        "1.target.jpg": picture(2),
        "1.json": b'{"instruction": "i", "caption": "c"}',
    }
    path = tar("edits.tar", members)
    (record,) = prepare(path, "edit", "--source-key=source.jpg", "--image-key=target.jpg").records
    assert (record.image, record.conditions) == (picture(2), (picture(1),))


def test_gzip(prepare, tar, picture):
    path = tar("shard.tar.gz", {"1.jpg": picture(1), "1.txt": b"one"}, "w:gz")
    assert len(prepare(path).records) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize("cut", ["inside an image", "inside a header", "compressed"])
def test_a_tar_cut_short(prepare, tar, picture, tmp_path, cut):
    """The rows before the cut are there, the rest is one bad row."""
    members = {f"{n:02d}.{e}": data for n in range(20) for e, data in (("jpg", picture(n)), ("txt", b"text"))}
    path = tar("shard.tar" + ".gz" * (cut == "compressed"), members, "w:gz" if cut == "compressed" else "w")
    whole = path.read_bytes()
    row = len(whole) // 20 if cut == "compressed" else 512 * (3 + -(-len(picture(0)) // 512))
    path.write_bytes(whole[: 10 * row + (700 if cut == "inside an image" else 100)])
    found = prepare(path, "text_to_image", "--max-bad-fraction=0.5")
    assert 5 <= len(found.records) <= 10
    assert [record.key for record in found.records] == [f"{path.name}/{n:02d}" for n in range(len(found.records))]
    assert "1 x tar cut short or broken" in found.said


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "members, reason",
    [
        ([("1.jpg", b""), ("1.txt", b"x")], "image cannot be decoded"),
        ([("1.txt", b"x")], "images missing"),
        ([("1.jpg", None)], "text missing"),
        ([("1.jpg", None), ("1.txt", b"\xff\xfe")], "text is not Unicode"),
        ([("1.jpg", None), ("1.txt", b"a\0b")], "text holds a NUL"),
        ([("1.jpg", None), ("1.json", b"{")], "not a JSON object"),
        ([("1.jpg", None), ("1.json", b"[1]")], "not a JSON object"),
        ([("1.jpg", None), ("1.cls", b"7")], "text missing"),
        ([("1.jpg", None), ("1.jpg", None), ("1.txt", b"x")], "duplicate key"),
        ([("1.jpg", None), ("1.txt", b"x")] + [(f"1.x{n}", b"") for n in range(70)], "too many files in a row"),
        ([("1.json", b'{"image": "/etc/passwd", "caption": "x"}')], "image file cannot be read"),
    ],
    ids=range(11),
)
def test_bad_rows(prepare, tar, picture, members, reason):
    good = [("0.jpg", picture(0)), ("0.txt", b"x")]
    bad = [(name, picture(1) if data is None else data) for name, data in members]
    found = prepare(
        tar("s.tar", [*good, *bad, ("2.jpg", picture(2)), ("2.txt", b"x")]), "text_to_image", "--max-bad-fraction=0.5"
    )
    assert [record.key for record in found.records] == ["s.tar/0", "s.tar/2"]
    assert f"1 x {reason}" in found.said and "s.tar: 1: " in found.said


@pytest.mark.bad_input
def test_rows_of_one_key(prepare, tar, picture):
    """The first is kept."""
    rows = [(f"{n}.{e}", data) for n in (1, 2, 1) for e, data in (("jpg", picture(n)), ("txt", b"x"))]
    found = prepare(tar("s.tar", rows))
    assert [record.key for record in found.records] == ["s.tar/1", "s.tar/2"]
    assert "1 record(s) with the key of an earlier one dropped" in found.said


@pytest.mark.bad_input
def test_links_and_devices_in_a_tar_are_no_rows(prepare, tar, picture, tmp_path):
    path = tar("s.tar", {"1.jpg": picture(1), "1.txt": b"x"})
    with tarfile.open(path, "a") as file:
        for name, kind in (("2.jpg", tarfile.SYMTYPE), ("3.jpg", tarfile.CHRTYPE), ("../4.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert len(prepare(path).records) == 1
