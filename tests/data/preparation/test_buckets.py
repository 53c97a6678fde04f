"""Aspect buckets, from pictures of several shapes to the streams of a run."""

import collections
import json

import jax
import numpy as np
import pytest

from unialign_jax.data.buckets import bucket_name, bucket_sizes, data_folders, nearest_buckets
from unialign_jax.data.mixture import Mixture
from unialign_jax.data.preparation import packing, pieces, runner
from unialign_jax.data.records import open_records
from unialign_jax.data.sources.parts import SourceOptions
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.training.config import active_streams
from unialign_jax.training.loop import open_streams
from unialign_jax.training.program import StepProgram

SIDE = 256  # 192 x 320, 256 x 256 and 320 x 192
SIZES = bucket_sizes(SIDE)
PICTURES = [(64, 64), (100, 100), (128, 64), (64, 128), (40, 96), (70, 60)]  # (width, height)
COUNT = 90
KEYS = {f"rows.jsonl:{n + 1}": PICTURES[n % len(PICTURES)] for n in range(COUNT)}


@pytest.fixture
def rows(tmp_path, picture):
    """A list of rows with pictures of several shapes."""
    for number, size in enumerate(PICTURES):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, size=size))
    lines = [{"image": f"{n % len(PICTURES)}.jpg", "caption": f"text {n}"} for n in range(COUNT)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rows.jsonl"


def plan_of(rows, output, **options):
    source = SourceOptions("text_to_image", free_paths=True, rows_per_part=16)
    options = {"buckets": SIDE, "holdout": 0.2, "shard_bytes": 10_000} | options
    return runner.Plan(pieces.Job("text_to_image", "json", "", source), [str(rows)], str(output), **options)


def keys(folder):
    """The keys of each bucket of a folder, by its name, in order."""
    found = {}
    for path, _ in data_folders(folder):
        source = open_records(path)
        found[path.name] = [source[number].key for number in range(len(source))]
    return found


def nearest(size):
    return bucket_name(SIZES[nearest_buckets([size[1]], [size[0]], SIZES)[0]])


def files(folder):
    return {path: (folder / path).read_bytes() for path in sorted(p.relative_to(folder) for p in folder.glob("*/*"))}


def test_every_record_is_once_in_the_bucket_of_its_shape(rows, tmp_path):
    result = runner.prepare(plan_of(rows, tmp_path / "o"))
    kept, held = keys(tmp_path / "o"), keys(tmp_path / "o-holdout")
    assert set(kept) == {nearest(size) for size in PICTURES} and len(kept) >= 3
    for name, found in [*kept.items(), *held.items()]:
        assert {nearest(KEYS[key]) for key in found} == {name}
    assert sorted(sum([*kept.values(), *held.values()], [])) == sorted(KEYS)
    assert 5 < sum(map(len, held.values())) < 40
    folders = {}
    for end, found in (("", kept), ("-holdout", held)):
        folders |= {str(tmp_path / f"o{end}" / name): len(each) for name, each in found.items()}
    assert result.folders == folders
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["records"] == COUNT and (tmp_path / "o" / "report.html").exists()
    assert not (tmp_path / ".o.preparing").exists()


def test_buckets_take_the_records_of_a_folder_without_them(rows, tmp_path):
    """In the same order; and what is held out does not depend on buckets."""
    for name, buckets in (("plain", None), ("o", SIDE)):
        runner.prepare(plan_of(rows, tmp_path / name, buckets=buckets))
    for end in ("", "-holdout"):
        (plain,) = keys(tmp_path / f"plain{end}").values()
        assert keys(tmp_path / f"o{end}") == {
            name: found
            for name in map(bucket_name, SIZES)
            if (found := [key for key in plain if nearest(KEYS[key]) == name])
        }


@pytest.mark.parametrize("stage", ["make_piece", "pack_shard", "publish", "reports"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_goes_on_where_it_stopped(rows, tmp_path, monkeypatch, stage, after):
    runner.prepare(plan_of(rows, tmp_path / "whole"))
    module, name = {
        "make_piece": (runner, "make_piece"),
        "pack_shard": (packing, "pack_shard"),
        "publish": (packing, "publish"),
        "reports": (runner.locations, "remove_folder"),
    }[stage]
    original, calls = getattr(module, name), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == after or stage == "reports":
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(KeyboardInterrupt):
        runner.prepare(plan_of(rows, tmp_path / "o"))
    monkeypatch.setattr(module, name, original)
    runner.prepare(plan_of(rows, tmp_path / "o"))
    for end in ("", "-holdout"):
        assert files(tmp_path / f"whole{end}") == files(tmp_path / f"o{end}")
    assert not (tmp_path / ".o.preparing").exists()


def test_a_second_run_replaces_all_buckets(rows, tmp_path, refuses):
    runner.prepare(plan_of(rows, tmp_path / "o", holdout=0.0))
    lines = [line for line in rows.read_text().splitlines() if '"2.jpg"' not in line]  # the only wide ones
    rows.write_text("\n".join(lines))
    refuses(lambda: runner.prepare(plan_of(rows, tmp_path / "o", holdout=0.0)), "exists already")
    runner.prepare(plan_of(rows, tmp_path / "o", holdout=0.0, overwrite=True))
    found = keys(tmp_path / "o")
    assert set(found) == {nearest(size) for size in PICTURES if size != PICTURES[2]}
    assert nearest(PICTURES[2]) not in found and sum(map(len, found.values())) == len(lines)


def test_a_folder_without_buckets_is_not_mixed_with_them(rows, tmp_path, refuses):
    runner.prepare(plan_of(rows, tmp_path / "o", buckets=None, holdout=0.0))
    refuses(lambda: runner.prepare(plan_of(rows, tmp_path / "o", holdout=0.0)), "a data folder without buckets")
    runner.prepare(plan_of(rows, tmp_path / "b", holdout=0.0))
    refuses(lambda: runner.prepare(plan_of(rows, tmp_path / "b", buckets=None, holdout=0.0)), "is not replaced")


def test_the_command(rows, tmp_path, launch_command, capsys, command_refuses):
    given = [f"--source={rows}", "--stream=text_to_image", f"--output={tmp_path / 'o'}", "--processes=1"]
    launch_command("prepare_data").main([*given, f"--buckets={SIDE}", "--side=32"])
    said = capsys.readouterr().out
    for folder, size in data_folders(tmp_path / "o"):
        stream = Stream(StreamConfig("s", "text_to_image", str(folder), bucket=size), load_tokenizer())
        assert stream[0]["image"].shape == (*size, 3) and f"{folder}: written, {len(stream)} " in said
    command_refuses("prepare_data", [*given, "--buckets=100"], "expected a multiple of the buckets' step 64")


@pytest.fixture
def config(rows, tmp_path, small_config):
    """A run of two streams in buckets."""
    runner.prepare(plan_of(rows, tmp_path / "o"))
    config = small_config(data__buckets=True, image_size=SIDE, loss_weights__intrinsic_modal=0.0)
    for name, stream in config.streams.items():
        stream.weight = 3.0 if name == "text_to_image" else 0.0
    config.streams.text_to_image.path = str(tmp_path / "o")
    config.streams.text_to_image.validation_path = str(tmp_path / "o-holdout")
    return config


def test_a_run_has_a_stream_for_each_bucket(config, tmp_path):
    """With weights in proportion to records, so that all are seen equally often."""
    streams = open_streams(config, load_tokenizer())
    counts = {name: len(found) for name, found in keys(tmp_path / "o").items()}
    assert {name: len(stream) for name, stream in streams.items()} == {
        f"text_to_image_{name}": count for name, count in counts.items()
    }
    total = sum(counts.values())
    for stream in streams.values():
        assert stream.config.weight == pytest.approx(3 * len(stream) / total)
        assert stream[0]["image"].shape == (*stream.config.bucket, 3)
    assert set(streams) == set(active_streams(config))


def test_an_epoch_holds_every_record_of_a_bucket_once(config):
    """In batches of one bucket each, by a schedule that depends on the batch's number alone."""
    streams = open_streams(config, load_tokenizer())
    batch, epochs = 2, 4
    total = sum(map(len, streams.values()))
    for stream in streams.values():  # the number of a record in place of its arrays
        stream.load = lambda index, size=stream.config.bucket: {"number": np.array(index), "size": np.array(size)}
    mixture = Mixture(list(streams.values()), seed=0, global_batch=batch)
    seen = collections.defaultdict(list)
    for n in range(total * epochs // batch):
        name, found = mixture.batch(n)
        assert (found["size"] == streams[name].config.bucket).all()
        seen[name] += found["number"].tolist()
    for name, stream in streams.items():
        count = len(stream)
        assert len(seen[name]) == count * epochs, "in proportion to records"
        for start in range(0, len(seen[name]), count):
            assert sorted(seen[name][start : start + count]) == list(range(count))
    again = Mixture(list(streams.values()), seed=0, global_batch=batch)
    for n in (17, 3, 40):
        assert again.schedule(n) == mixture.schedule(n)
        np.testing.assert_array_equal(again.batch(n)[1]["number"], mixture.batch(n)[1]["number"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 13])
def test_any_hosts_and_threads_read_the_same_batches(config, hosts, start):
    streams = open_streams(config, load_tokenizer())
    for stream in streams.values():
        stream.load = lambda index, size=stream.config.bucket: {"number": np.array(index), "size": np.array(size)}
    whole = Mixture(list(streams.values()), seed=0, global_batch=4)
    for host in range(hosts):
        rows = range(host, 4, hosts)
        own = Mixture(list(streams.values()), seed=0, global_batch=4, rows=rows)
        batches = own.batches(start, num_threads=host, prefetch=3)
        for _ in range(12):
            n, name, found = next(batches)
            expected = whole.batch(n)
            assert name == expected[0]
            for key, value in found.items():
                np.testing.assert_array_equal(value, expected[1][key][list(rows)])
        batches.close()


@pytest.mark.slow
def test_each_bucket_has_a_step_of_its_own_shapes(config):
    program = StepProgram(config, jax.devices()[:1])
    assert set(program.settings) == {f"text_to_image_{bucket_name(size)}" for size in SIZES}
    for size in SIZES:
        name = f"text_to_image_{bucket_name(size)}"
        assert program.batch_shapes(name)["image"].shape == (config.batch_size, *size, 3)
    program.lower_step(f"text_to_image_{bucket_name(SIZES[0])}")
