"""A preparation: the same by any number of processes, resumed after a kill, with duplicates dropped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unialign_jax.data.preparation import packing, pieces, runner
from unialign_jax.data.preparation.packing import near_duplicates
from unialign_jax.data.records import open_records
from unialign_jax.data.sources import pictures
from unialign_jax.data.sources.parts import SourceOptions

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def rows(tmp_path, picture):
    """A list of 300 rows of 10 pictures, of which every hundredth is bad."""
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    path = tmp_path / "rows.jsonl"
    lines = [{"image": f"{n % 10}.jpg" if n % 100 else "gone.jpg", "caption": f"text {n}"} for n in range(300)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def plan_of(rows, output, rows_per_part=16, **options):
    source = SourceOptions("text_to_image", free_paths=True, rows_per_part=rows_per_part)
    return runner.Plan(pieces.Job("text_to_image", "json", "", source), [str(rows)], str(output), **options)


def keys(folder):
    found = open_records(folder)
    return [found[number].key for number in range(len(found))]


def files(folder):
    """All bytes of a folder, but for the report's, which names the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "report" not in path.name}


EXPECTED = [f"rows.jsonl:{n + 1}" for n in range(300) if n % 100]


def test_processes_write_what_one_writes(rows, tmp_path):
    seen = []
    one = runner.prepare(
        plan_of(rows, tmp_path / "one", shard_bytes=50_000), progress=lambda c: seen.append(c.num_rows)
    )
    assert keys(tmp_path / "one") == EXPECTED and seen[-1] == 300
    assert (one.counts.num_rows, one.counts.num_bad, one.counts.num_records) == (300, 3, 297)
    three = runner.prepare(plan_of(rows, tmp_path / "three", shard_bytes=50_000), processes=3)
    # The fields of a record may lie in another order in its bytes.
    both = [open_records(tmp_path / name) for name in ("one", "three")]
    assert all(both[0][number] == both[1][number] for number in range(297))
    lengths = [[shard["num_records"] for shard in found.metadata.shards] for found in both]
    assert lengths[0] == lengths[1]
    assert one.counts.first_bad == three.counts.first_bad
    assert len(open_records(tmp_path / "one").metadata.shards) > 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_tfds_opens_the_folder(rows, tmp_path):
    import tensorflow_datasets as tfds

    runner.prepare(plan_of(rows, tmp_path / "o", shard_bytes=200_000))
    builder = tfds.builder_from_directory(str(tmp_path / "o"))
    assert builder.info.splits["train"].num_examples == 297
    row = builder.as_data_source("train")[296]
    assert row["caption"] == b"text 299" and row["image"].shape == (48, 64, 3)


@pytest.mark.parametrize("stage", ["pieces", "shards", "publish"])
def test_a_run_goes_on_where_it_stopped(rows, tmp_path, monkeypatch, stage):
    """Nothing is lost and nothing twice, and what was done is not done again."""
    runner.prepare(plan_of(rows, tmp_path / "whole", holdout=0.1, shard_bytes=50_000))
    plan = plan_of(rows, tmp_path / "o", holdout=0.1, shard_bytes=50_000)
    calls = []
    module, name = {
        "pieces": (runner, "make_piece"),
        "shards": (packing, "pack_shard"),
        "publish": (packing, "publish"),
    }[stage]
    original = getattr(module, name)

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(KeyboardInterrupt):
        runner.prepare(plan)
    assert not (tmp_path / "o").exists(), "nothing is there before it is whole"
    monkeypatch.setattr(module, name, original)
    read = []
    monkeypatch.setattr(pieces, "_read_rows", lambda job, part: read.append(part) or iter(()))
    if stage == "pieces":
        monkeypatch.undo()
    result = runner.prepare(plan)
    assert result.resumed == (1 if stage == "pieces" else 19) and not read
    for folder in ("", "-holdout"):
        assert files(tmp_path / f"whole{folder}") == files(tmp_path / f"o{folder}")
    assert not (tmp_path / ".o.preparing").exists()


@pytest.mark.slow
def test_kill_9(rows, tmp_path, launch_command):
    """The command, killed while two processes work, and started again."""
    command = [
        sys.executable,
        ROOT / "launch" / "prepare_data.py",
        f"--source={rows}",
        "--stream=text_to_image",
        f"--output={tmp_path / 'o'}",
        "--processes=2",
    ]
    content = rows.read_text()
    rows.write_text("\n".join([content] * 40))  # 47 pieces
    first = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".o.preparing" / "pieces"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and len(list(work.glob("*.json") if work.exists() else [])) < 4:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "o").exists()
    again = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "piece(s) were there of a run before" in again.stdout
    found = keys(tmp_path / "o")
    assert found == [f"rows.jsonl:{n + 1}" for n in range(12_000) if n % 300 % 100]
    assert not (tmp_path / ".o.preparing").exists()


def test_work_of_another_command_is_not_taken(rows, tmp_path, monkeypatch, refuses):
    plan = plan_of(rows, tmp_path / "o")
    monkeypatch.setattr(runner, "_check_counts", lambda *a, **b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.prepare(plan)
    monkeypatch.undo()
    other = dataclasses.replace(plan, job=dataclasses.replace(plan.job, min_words=1))
    refuses(lambda: runner.prepare(other), ".o.preparing", "unfinished work of another command (another min_words)")
    rows.write_text(rows.read_text() + "\n")
    refuses(lambda: runner.prepare(plan), "another source_bytes")
    assert runner.prepare(dataclasses.replace(other, overwrite=True)).resumed == 0
    assert keys(tmp_path / "o") == EXPECTED


def test_two_at_once(rows, tmp_path, refuses):
    plan = plan_of(rows, tmp_path / "o")
    with runner._claimed(runner.work_folder(plan.output), plan.output):
        refuses(lambda: runner.prepare(plan), "another process prepares the same output")
    assert not (tmp_path / "o").exists()


def test_holdout(rows, tmp_path):
    """By the key's hash: a row's records stay together, and other rows do not move it."""
    whole = runner.prepare(plan_of(rows, tmp_path / "o", holdout=0.1))
    held, kept = keys(tmp_path / "o-holdout"), keys(tmp_path / "o")
    assert sorted(held + kept) == sorted(EXPECTED) and 15 < len(held) < 50
    assert whole.folders == {str(tmp_path / "o"): len(kept), str(tmp_path / "o-holdout"): len(held)}
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:150]))
    runner.prepare(plan_of(rows, tmp_path / "half", holdout=0.1, rows_per_part=7))
    assert keys(tmp_path / "half-holdout") == [key for key in held if int(key.split(":")[1]) <= 150]
    rows.write_text("\n".join(lines[1:3]))
    runner.prepare(plan_of(rows, tmp_path / "two", holdout=0.001))
    assert len(keys(tmp_path / "two")) == len(keys(tmp_path / "two-holdout")) == 1


def test_early_end_of_what_is_all_bad(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(runner, "LOOKED_AT", 50)
    (tmp_path / "rows.jsonl").write_text('{"image": "gone.jpg", "caption": "x"}\n' * 1000)
    with pytest.raises(runner.TooManyBadRows) as raised:
        runner.prepare(plan_of(tmp_path / "rows.jsonl", tmp_path / "o"))
    assert raised.value.counts.num_rows == 64
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_near_duplicates(tmp_path):
    """A smaller copy, another compression and a brighter one go; another picture and a flat one stay."""
    from PIL import Image, ImageEnhance

    first, second = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
        for seed in (0, 1)
    )
    copies = {
        "0": first,
        "1": first.resize((40, 30)),
        "2": ImageEnhance.Brightness(first).enhance(1.1),
        "3": second,
        "4": Image.new("RGB", (9, 9)),
        "5": Image.new("RGB", (9, 9), "red"),
    }
    for name, image in copies.items():
        image.save(tmp_path / f"{name}.jpg", quality=60)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": f"{n}.jpg", "caption": "x"}) for n in copies))
    plan = plan_of(tmp_path / "rows.jsonl", tmp_path / "o", near_duplicates=3)
    job = dataclasses.replace(plan.job, images=pictures.ImageRules(hashed=True))
    result = runner.prepare(dataclasses.replace(plan, job=job))
    assert keys(tmp_path / "o") == [f"rows.jsonl:{n}" for n in (1, 4, 5, 6)]
    assert result.counts.notes == {"record(s) with almost the picture of an earlier one dropped": 2}


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_near_duplicates_against_all_pairs(distance):
    generator = np.random.default_rng(distance)
    hashes = generator.integers(1, 2**63, 300, dtype=np.uint64)
    for number in range(150, 300):  # copies with a few bits changed
        bits = np.uint64(1) << generator.choice(64, generator.integers(0, 6), replace=False).astype(np.uint64)
        hashes[number] = hashes[number - 150] ^ bits.sum(dtype=np.uint64)
    kept = []
    for number, one in enumerate(hashes):
        if all(int(one ^ hashes[other]).bit_count() > distance for other in kept):
            kept.append(number)
    found = near_duplicates(hashes, np.ones(300, bool), distance)
    assert set(range(300)) - set(found) == set(kept)


def test_report(prepare, tmp_path, picture):
    """Counts that add up; a page that stands alone, with texts of strangers escaped."""
    (tmp_path / "wide.jpg").write_bytes(picture(1, size=(200, 40)))
    (tmp_path / "a.jpg").write_bytes(picture(2))
    nasty = '<script>alert(1)</script> & "red" </figure>'
    lines = [{"image": "a.jpg", "caption": nasty}, {"image": "wide.jpg", "caption": "red " * 40}]
    lines += [{"image": "gone.jpg", "caption": "<img src=x onerror=alert(1)>"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--max-bad-fraction=0.5", "--tokenizer=shapes", "--text-length=32"]
    folder = prepare(tmp_path / "rows.jsonl", "text_to_image", *options).folder
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"], report["bad_rows"], report["records"]) == (3, 1, 2)
    assert report["reasons"] == {"image file cannot be read": 1}
    aspect, side, tokens = (report["histograms"][name] for name in ("aspect", "shorter_side", "caption_tokens"))
    assert sum(aspect["counts"]) == sum(side["counts"]) == sum(tokens["counts"]) == 2
    assert aspect["counts"][-1] == 1, "5 to 1"
    assert side["counts"][:2] == [2, 0], "both below 64"
    assert report["cut_share"] == {"caption": 1.0} or report["cut_share"] == {"caption": 0.5}
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert (
        "src=http" not in page
        and "href" not in page
        and "url(" not in page
        and page.count("data:image/jpeg;base64,") == 2
    )


def test_reports_may_be_replaced(prepare, tmp_path, picture):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "caption": "x"}')
    prepare(tmp_path / "rows.jsonl")
    prepare(tmp_path / "rows.jsonl", "text_to_image", "--overwrite")


def test_memory_does_not_grow_with_the_number(tmp_path, picture):
    """A million rows are stood in for by counting what is held of each: hashes and sizes, no text and no image."""
    (tmp_path / "a.jpg").write_bytes(picture(0, size=(8, 8)))
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "caption": "some text"}\n' * 500)
    plan = plan_of(tmp_path / "rows.jsonl", tmp_path / "o", rows_per_part=500)
    job = dataclasses.replace(plan.job, work=str(tmp_path / "work"))
    runner._make_folders(job.work)
    ((name, part),) = runner.named_parts(plan)
    pieces.make_piece(job, name, part)
    table = pieces.read_table(job.work, name)
    assert sum(column.nbytes for column in table.values()) <= 500 * 64
