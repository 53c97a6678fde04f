"""Parquet files and Hugging Face data sets: the layouts of the sets that people train on."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def struct(data, path=None):
    return {"bytes": data, "path": path}


@pytest.fixture
def layouts(picture):
    """Rows as the sets have them: (stream, rows, what must come out)."""
    a, b, c = picture(1), picture(2, "PNG"), picture(3)
    return {
        "BLIP3-o": ("text_to_image", {"jpg": a, "txt": "x", "__key__": "0"}, {"caption": "x", "image": a}),
        "text-to-image-2M": ("text_to_image", {"jpg": a, "json": {"prompt": "x"}, "prompt": "x"}, {"caption": "x"}),
        "ShareGPT-4o": ("text_to_image", {"image": struct(a, "1.jpg"), "prompt": "x"}, {"caption": "x", "image": a}),
        "MagicBrush": (
            "edit",
            {
                "img_id": "1",
                "turn_index": 1,
                "source_img": struct(a),
                "mask_img": struct(c),
                "instruction": "i",
                "target_img": struct(b),
                "caption": "x",
            },
            {"instruction": "i", "caption": "x", "image": b, "conditions": (a,)},
        ),
        "OmniEdit": (
            "edit",
            {
                "omni_edit_id": "1",
                "task": "add",
                "src_img": struct(a),
                "edited_img": struct(b),
                "edited_prompt_list": ["i", "a longer one"],
                "width": 64,
                "height": 48,
                "caption": "x",
            },
            {"instruction": "i", "caption": "x", "image": b, "conditions": (a,)},
        ),
        "AnyEdit": (
            "edit",
            {
                "edit": "i",
                "edit type": "add",
                "image_file": struct(a),
                "edited_file": struct(b),
                "input": "before",
                "output": "x",
            },
            {"instruction": "i", "caption": "x", "image": b, "conditions": (a,)},
        ),
        "UltraEdit": (
            "edit",
            {
                "source_image": struct(a),
                "edited_image": struct(b),
                "mask_image": None,
                "edit_prompt": "i",
                "source_caption": "before",
                "target_caption": "x",
            },
            {"instruction": "i", "caption": "x", "image": b, "conditions": (a,)},
        ),
        "InstructPix2Pix": (
            "edit",
            {
                "original_prompt": "before",
                "original_image": struct(a),
                "edit_prompt": "i",
                "edited_prompt": "x",
                "edited_image": struct(b),
            },
            {"instruction": "i", "caption": "x", "image": b, "conditions": (a,)},
        ),
        "LLaVA-OneVision": (
            "vqa",
            {
                "id": "1",
                "image": struct(a),
                "data_source": "s",
                "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "x"}],
            },
            {"question": "q", "answer": "x", "image": a},
        ),
        "VQAv2": ("vqa", {"question": "q", "multiple_choice_answer": "x", "image": struct(a)}, {"answer": "x"}),
    }


NAMES = [
    "BLIP3-o",
    "text-to-image-2M",
    "ShareGPT-4o",
    "MagicBrush",
    "OmniEdit",
    "AnyEdit",
    "UltraEdit",
    "InstructPix2Pix",
    "LLaVA-OneVision",
    "VQAv2",
]


@pytest.mark.parametrize("name", NAMES)
def test_layouts(prepare, layouts, tmp_path, name):
    stream, row, expected = layouts[name]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (record,) = prepare(tmp_path / "rows.parquet", stream).records
    assert {field: getattr(record, field) for field in expected} == expected
    assert record.key == "rows.parquet:1"


def test_row_groups_are_parts(prepare, picture, tmp_path):
    """Keys are the numbers of rows, whichever group they are in; a folder of files; paths beside the file."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "beside.jpg").write_bytes(picture(9))
    for file in range(2):
        rows = [{"image": struct(picture(n)), "caption": f"{file} {n}", "other": "x"} for n in range(7)]
        rows.append({"image": struct(None, "beside.jpg"), "caption": f"{file} beside", "other": "x"})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / f"{file}.parquet", row_group_size=3)
    found = prepare(tmp_path / "d")
    assert [record.key for record in found.records] == [
        f"d/{file}.parquet:{n}" for file in range(2) for n in range(1, 9)
    ]
    assert found.records[-1].image == picture(9) and found.records[-1].caption == "1 beside"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "rows, reason",
    [
        ([{"a": 1, "b": 2}], "columns missing"),
        ([{"image": 7, "caption": "x"}], "images missing"),
        ([{"image": b"", "caption": "x"}], "image cannot be decoded"),
        ([{"image": {"bytes": None, "path": None}, "caption": "x"}], "images missing"),
        ([{"image": {"bytes": b"no image", "path": "a.jpg"}, "caption": "x"}], "image cannot be decoded"),
        ([{"image": {"bytes": None, "path": "../../../etc/passwd"}, "caption": "x"}], "image outside of the folder"),
        ([{"image": {"bytes": None, "path": "/etc/passwd"}, "caption": "x"}], "image outside of the folder"),
        ([{"image": "https://x.org/a.jpg", "caption": "x"}], "image is a URL"),
        ([{"image": b"x", "caption": 3.5}], "text missing"),
        ([{"image": b"x", "caption": None}], "text missing"),
        ([{"image": None, "caption": "x"}], "images missing"),
    ],
    ids=range(11),
)
def test_bad_rows(prepare, picture, tmp_path, rows, reason):
    for row in rows:
        row["image"] = picture(1) if row.get("image") == b"x" else row.get("image")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_pylist([{"image": picture(1), "caption": "x"}]), tmp_path / "a.parquet")
    found = prepare(f"{tmp_path}/*.parquet", "text_to_image", "--max-bad-fraction=0.5")
    assert [record.key for record in found.records] == ["a.parquet:1"]
    assert f"1 x {reason}" in found.said


@pytest.mark.bad_input
@pytest.mark.parametrize("damage", ["cut short", "no Parquet", "empty", "damaged inside"])
def test_files_that_are_damaged(prepare, picture, tmp_path, damage):
    rows = [{"image": picture(n), "caption": "x" * 50} for n in range(50)]
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=10)
    whole = (tmp_path / "b.parquet").read_bytes()
    middle = whole[:5000] + b"\xff" * 3000 + whole[8000:]
    changed = {"cut short": whole[: len(whole) // 2], "no Parquet": b"<html>", "empty": b"", "damaged inside": middle}
    (tmp_path / "b.parquet").write_bytes(changed[damage])
    found = prepare(f"{tmp_path}/*.parquet", "text_to_image", "--max-bad-fraction=0.6")
    assert [record.key for record in found.records][:50] == [f"a.parquet:{n}" for n in range(1, 51)]
    assert "skipped" in found.said and len(found.records) < 100


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def save_to_disk(folder, rows, files=2):
    """A data set as `Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    each = -(-len(rows) // files)
    for n, name in enumerate(names):
        part = table.slice(n * each, each)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set(prepare, picture, tmp_path):
    rows = [{"image": struct(picture(n)), "text": f"text {n}"} for n in range(9)]
    save_to_disk(tmp_path / "set", rows)
    found = prepare(tmp_path / "set")
    assert [record.caption for record in found.records] == [f"text {n}" for n in range(9)]
    assert found.records[0].key == "set/data-00000-of-00002.arrow:1"


def test_splits_of_a_saved_data_set(prepare, picture, tmp_path):
    for split, count in (("train", 3), ("dev", 2)):
        rows = [{"image": struct(picture(n)), "text": split} for n in range(count)]
        save_to_disk(tmp_path / "sets" / split, rows, files=1)
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    assert len(prepare(tmp_path / "sets").records) == 3
    assert [r.caption for r in prepare(tmp_path / "sets", "text_to_image", "--split=dev", output="o2").records] == [
        "dev"
    ] * 2
    with pytest.raises(SystemExit, match="has no split test, it has train, dev"):
        prepare(tmp_path / "sets", "text_to_image", "--split=test", output="o3")


@pytest.mark.bad_input
def test_an_arrow_file_cut_short(prepare, picture, tmp_path):
    save_to_disk(tmp_path / "set", [{"image": struct(picture(n)), "text": "x"} for n in range(20)], files=2)
    file = tmp_path / "set" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-4000])
    found = prepare(tmp_path / "set", "text_to_image", "--max-bad-fraction=0.5")
    assert 10 <= len(found.records) < 20 and "1 x Arrow file is broken" in found.said


def test_with_the_package_itself(prepare, picture, tmp_path):
    """What `datasets` saves, and what it streams by name."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": struct(picture(n)), "text": f"text {n}"} for n in range(9)]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(tmp_path / "set", num_shards=2)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "sets")
    for name in ("set", "sets"):
        assert [r.caption for r in prepare(tmp_path / name, output=f"of {name}").records] == [
            f"text {n}" for n in range(9)
        ]
    (tmp_path / "hub").mkdir()
    for n in range(2):
        made.shard(2, n, contiguous=True).to_parquet(tmp_path / "hub" / f"train-0000{n}.parquet")
    from unialign_jax.data.sources import huggingface
    from unialign_jax.data.sources.parts import SourceOptions

    options = SourceOptions("text_to_image")
    parts = [huggingface.Part(str(tmp_path / "hub"), "hub", units=(n, 2)) for n in range(2)]
    found = [row for part in parts for row in huggingface.read_part(part, options)]
    assert [(row.key, row.fields["text"]) for row in found][:2] == [("hub/0:1", "text 0"), ("hub/0:2", "text 1")]
    assert found[0].fields["image"]["bytes"] == picture(0) and len(found) == 9
