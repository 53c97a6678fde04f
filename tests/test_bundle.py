"""Bundles: what is written comes back, sharded and cast; what is not whole never looks it."""

import dataclasses
import errno
import json
import logging
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from unialign_jax import bundle, bundle_config
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.inference import jobs
from unialign_jax.integrity import inventory
from unialign_jax.models import presets
from unialign_jax.models.mmdit import AlignmentHeadsConfig
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh

CONFIG = bundle.BundleConfig(
    transformer=dataclasses.replace(
        presets.MMDIT["tiny"], depth=2, num_heads=2, head_width=8, text_width=16, latent_channels=48
    ),
    heads=AlignmentHeadsConfig(hidden_width=12, teacher_width=8),
    text_encoder=dataclasses.replace(presets.TEXT_ENCODER["tiny"], vocab_size=40, width=16, mlp_width=24, num_heads=2),
    autoencoder=presets.AUTOENCODER["pixels"],
    provenance={"note": "from a test"},
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), bundle.abstract_params(CONFIG))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(directory, CONFIG, params, tokenizer=load_tokenizer())
    return directory


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_was_saved_comes_back(saved, params):
    config, loaded = bundle.load(saved)
    assert config.transformer == CONFIG.transformer and config.text_encoder == CONFIG.text_encoder
    assert config.heads == CONFIG.heads and config.autoencoder == CONFIG.autoencoder
    assert config.dtypes == dict.fromkeys(("transformer", "heads", "text_encoder"), ["float32"]) | {"autoencoder": []}
    assert config.provenance["note"] == "from a test" and config.provenance["versions"]["jax"] == jax.__version__
    equal(loaded, params)
    assert loaded["autoencoder"] == {}  # space to depth has no parameters
    text = "a red circle"
    tokenizer = load_tokenizer(bundle.tokenizer_path(saved))
    np.testing.assert_array_equal(tokenizer.encode(text, 8), load_tokenizer().encode(text, 8))
    assert not list(saved.parent.glob("*.partial"))


def test_a_table_of_text_positions_comes_back_and_older_bundles_have_none(positioned_bundle, tiny_bundle, tmp_path):
    config, params = bundle.load(positioned_bundle)
    assert config.transformer.text_positions == 24 == len(params["transformer"]["text_positions"])
    content = json.loads((tiny_bundle / "config.json").read_text())
    del content["transformer"]["text_positions"], content[inventory.SEAL]  # as it was before there were any
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert bundle.read_config(tmp_path) == bundle.read_config(tiny_bundle)


def test_a_component_alone_runs_the_model_in_another_dtype(saved, params):
    _, loaded = bundle.load(saved, components=["text_encoder"], dtype="bfloat16")
    assert list(loaded) == ["text_encoder"]
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["text_encoder"])
    equal(loaded["text_encoder"], expected)
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    out = TextEncoder(CONFIG.text_encoder).apply({"params": loaded["text_encoder"]}, ids)
    assert out.shape == (1, 6, CONFIG.text_encoder.width)


def test_dtypes_may_differ_by_component(saved):
    _, loaded = bundle.load(saved, components=["transformer", "text_encoder"], dtype={"text_encoder": jnp.float16})
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["text_encoder"])} == {jnp.dtype("float16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["transformer"])} == {jnp.dtype("float32")}


def test_arrays_land_where_the_sharding_table_puts_them(saved, params):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    _, loaded = bundle.load(saved, mesh=mesh)
    equal(loaded, params)
    expected = sharding.tree_shardings(loaded, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, expected)))
    qkv = loaded["transformer"]["blocks"]["joint"]["image"]["qkv"]["kernel"]
    assert qkv.addressable_shards[0].data.size == qkv.size // 8


def test_an_array_larger_than_the_read_budget_is_still_read(saved, params, monkeypatch):
    monkeypatch.setattr(bundle, "READ_BYTES", 64)
    equal(bundle.load(saved, components=["transformer"])[1]["transformer"], params["transformer"])


def test_restore_puts_a_part_onto_given_shardings(saved, params):
    mesh = make_mesh(data=8, fsdp=1)
    abstract = bundle.abstract_params(CONFIG, ["heads"])
    abstract = sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))
    loaded = bundle.restore(saved, abstract)
    equal(loaded["heads"], params["heads"])
    assert len(loaded["heads"]["image_out"]["kernel"].sharding.device_set) == 8


def test_another_architecture_is_refused_with_the_leaves(saved):
    other = dataclasses.replace(CONFIG, transformer=dataclasses.replace(CONFIG.transformer, vocab_size=7))
    with pytest.raises(ValueError, match=r"transformer/text_head/kernel: wanted \(16, 7\), the bundle has \(16, 512\)"):
        bundle.restore(saved, bundle.abstract_params(other, ["transformer"]))


def test_what_is_no_bundle_is_said_so(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such bundle"):
        bundle.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a bundle"):
        bundle.load(tmp_path)
    content = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match="bundle of version 99, this code reads version 1"):
        bundle.load(tmp_path)
    bundle_config.write_content(tmp_path, content | {"heads": None})
    with pytest.raises(ValueError, match="lacks heads; it has transformer, text_encoder, autoencoder"):
        bundle.load(tmp_path, components=["heads"])
    with pytest.raises(ValueError, match="unknown component 'unet'"):
        bundle.load(saved, components=["unet"])


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def read_all(directory, **options):
    return bundle.load(directory, **options), bundle.read_tokenizer(directory, **options)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


READERS = {
    "config.json": bundle.read_config,
    "tokenizer": bundle.read_tokenizer,
    "transformer": lambda folder: dict(bundle.read_leaves(folder, "transformer")),
    "heads": lambda folder: bundle.load(folder, components=["heads"]),
}


@pytest.mark.parametrize("part", READERS)
def test_every_flipped_bit_is_found_on_load(copy, part):
    generator, read = random.Random(part), READERS[part]
    chosen = [path for path in [*files_of(copy / part), copy / part] if path.is_file() and path.stat().st_size]
    read(copy)
    for _ in range(20):
        path = generator.choice(chosen)
        before = path.read_bytes()
        flip(path, generator.randrange(8 * len(before)))
        with pytest.raises(ValueError) as raised:
            read(copy)
        assert "\n" not in str(raised.value) and str(copy) in str(raised.value)
        path.write_bytes(before)
    read(copy)


def test_what_is_read_array_by_array_is_checked_too(copy):
    largest = max(files_of(copy / "transformer"), key=lambda path: path.stat().st_size)
    flip(largest, 4 * largest.stat().st_size)
    with pytest.raises(ValueError, match=f"is not as it was written: {largest.relative_to(copy)} has been changed"):
        list(bundle.read_leaves(copy, "transformer"))
    assert list(bundle.read_leaves(copy, "transformer", verify=False))


def test_damage_is_read_when_that_is_asked_for(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"from a test"', '"by a hand "'))
    with pytest.raises(ValueError, match="config.json has been changed.*--no-verify"):
        bundle.read_config(copy)
    assert bundle.read_config(copy, verify=False).provenance["note"] == "by a hand "
    flip(copy / "tokenizer/tokenizer.json", 0)
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        bundle.read_tokenizer(copy, verify=False)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder, file: file.unlink(), "is missing"),
        (lambda folder, file: file.write_bytes(file.read_bytes()[:-1]), "bytes, expected"),
        (lambda folder, file: file.write_bytes(file.read_bytes() + b"x"), "bytes, expected"),
        (lambda folder, file: (folder / "heads/more").write_text("x"), "heads/more is not in the inventory"),
        (lambda folder, file: (file.unlink(), file.mkdir()), "is a folder, expected a file"),
        (lambda folder, file: (file.unlink(), os.mkfifo(file)), "is a device, pipe or socket"),
        (lambda folder, file: (file.unlink(), file.symlink_to("/dev/zero")), "is a device, pipe or socket"),
        (lambda folder, file: shutil.rmtree(folder / "transformer"), "is missing"),
    ],
)
def test_files_that_are_missing_too_long_or_too_many(copy, refuses, spoil, message):
    spoil(copy, next(path for path in files_of(copy / "transformer") if path.stat().st_size > 99))
    refuses(lambda: bundle.load(copy), "is not as it was written: ", message)
    if "device" in message:  # what Orbax would wait for is not opened in any case
        refuses(lambda: bundle.load(copy, verify=False), message)
    assert any(message in line for line in bundle.verify(copy))


def test_files_of_the_machine_are_passed_over(copy, caplog):
    (copy / "transformer/.DS_Store").write_text("x")
    (copy / "README.md").write_text("mine")  # no part of the model: only `verify` speaks of it
    with caplog.at_level(logging.WARNING):
        read_all(copy)
    assert not caplog.text and bundle.verify(copy) == ["README.md is not in the inventory"]


def test_verify_names_damaged_and_missing_files(copy):
    assert bundle.verify(copy) == []
    largest = max(files_of(copy / "transformer"), key=lambda path: path.stat().st_size)
    flip(largest, 4 * largest.stat().st_size)
    (copy / "tokenizer/tokenizer.json").unlink()
    assert sorted(line.split(" ", 1)[1] for line in bundle.verify(copy)) == [
        "has been changed (its hash differs)",
        "is missing",
    ]


def test_a_bundle_without_hashes_is_read_and_not_called_whole(copy, params, caplog, command_refuses):
    content = json.loads((copy / "config.json").read_text())
    for key in (inventory.SEAL, "tasks", "sampling", "files"):  # as older code wrote it
        del content[key]
    (copy / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        config, loaded = bundle.load(copy)
    equal(loaded, params)
    assert "records no hashes" in caplog.text
    assert config.tasks is None and config.sampling_defaults["guidance_scale"] == 7
    with pytest.raises(ValueError, match="records no hashes"):
        bundle.verify(copy)
    command_refuses("convert", ["inspect", copy, "--verify"], "records no hashes of its files")


def test_older_bundles_are_checked_by_the_hashes_that_they_have(copy):
    content = json.loads((copy / "config.json").read_text())
    for entry in content["files"].values():
        del entry["checksum"]
    bundle_config.write_content(copy, content)
    read_all(copy)
    for name in ("heads", "tokenizer"):
        path = max(files_of(copy / name), key=lambda path: path.stat().st_size)
        flip(path, 4 * path.stat().st_size)
        with pytest.raises(ValueError, match=f"{path.relative_to(copy)} has been changed"):
            read_all(copy)
        flip(path, 4 * path.stat().st_size)


def test_a_seal_survives_its_own_hash_in_the_text():
    content = {"note": "0" * 64, "text": "été \u2028"}
    text = inventory.sealed(content).encode()
    assert not inventory.seal_is_broken(text, json.loads(text))
    assert inventory.seal_is_broken(text.replace(b"note", b"nope"), json.loads(text))


CONFIG_FILES = {
    "not UTF-8": b"\xff\xfe{}",
    "no JSON": b'{"format": ',
    "a list": b"[1, 2]",
    "a number": b"7",
    "too deep": b"[" * 200_000,
    "a number of 5,000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "empty": b"",
}


@pytest.mark.bad_input
@pytest.mark.parametrize("content", CONFIG_FILES.values(), ids=CONFIG_FILES.keys())
def test_a_config_that_is_no_object(tmp_path, refuses, content):
    (tmp_path / "config.json").write_bytes(content)
    refuses(lambda: bundle.load(tmp_path), str(tmp_path))
    assert not bundle.is_bundle(tmp_path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "keys, value, words",
    [
        ("transformer", 3, "transformer is 3, expected an object"),
        ("transformer", [], "transformer is [], expected an object"),
        ("transformer", "mmdit", "expected an object"),
        ("transformer.depth", "2", "transformer.depth is '2', expected a whole number"),
        ("transformer.depth", -1, "transformer.depth is -1, expected a whole number from 1"),
        ("transformer.depth", 0, "transformer.depth is 0, expected a whole number from 1"),
        ("transformer.depth", 2.5, "transformer.depth is 2.5, expected a whole number"),
        ("transformer.depth", True, "transformer.depth is True, expected a whole number"),
        ("transformer.depth", None, "transformer.depth is None, expected a whole number"),
        ("transformer.depth", 10**9, "transformer.depth is 1000000000, expected a whole number from 1 to 1000"),
        ("transformer.num_heads", 2**70, "transformer.num_heads is 1180591620717411303424, expected"),
        ("transformer.dtype", "float8", "transformer.dtype is 'float8', expected one of bfloat16, float32"),
        ("transformer.dtype", ["float32"], "expected one of bfloat16, float32"),
        ("transformer.attention", "flash", "transformer.attention is 'flash', expected one of"),
        ("transformer.remat", {}, "transformer.remat is {}, expected one of"),
        ("transformer.colour", "red", "transformer has the unknown key 'colour', expected some of depth"),
        ("heads.final_silu", 1, "heads.final_silu is 1, expected true or false"),
        ("heads.hidden_width", [12], "heads.hidden_width is [12], expected a whole number"),
        ("text_encoder.width", 1e999, "text_encoder.width is inf, expected a whole number"),
        ("text_encoder.vocab_size", "\n\n" * 1000, "expected a whole number"),
        ("autoencoder.kind", "vqgan", "autoencoder.kind is 'vqgan', expected one of kl, space_to_depth"),
        ("autoencoder.scale", 0, "autoencoder.scale is 0, expected a number"),
        ("autoencoder.scale", float("nan"), "autoencoder.scale is nan, expected a number"),
        ("autoencoder.shift", "0", "autoencoder.shift is '0', expected a number"),
        ("autoencoder.block_widths", 128, "autoencoder.block_widths is 128, expected 1 to 16 whole numbers"),
        ("autoencoder.block_widths", [128] * 99, "expected 1 to 16 whole numbers"),
        ("autoencoder.block_widths", [[128]], "expected 1 to 16 whole numbers"),
        ("autoencoder.latent_channels", 7, "the configuration's autoencoder cannot be built: latent_channels is 7"),
        ("image_size", "32", "image_size is '32', expected a whole number"),
        ("image_size", -32, "image_size is -32, expected a whole number"),
        ("image_size", 10_000_000, "image_size is 10000000, expected a whole number from 1 to 65536"),
        ("text_length", 2**70, "text_length is 1180591620717411303424, expected"),
        ("text_length", 1, "text_length is 1, expected a whole number from 2"),
        ("tasks", "t2i", "tasks is 't2i', expected a list of text_to_image, edit"),
        ("tasks", ["t2i", "fly"], "expected a list of text_to_image, edit"),
        ("tasks", [{}], "expected a list of text_to_image, edit"),
        ("sampling", [7], "sampling is [7], expected an object"),
        ("sampling.guidance_scale", "7", "sampling.guidance_scale is '7', expected 0 to 100"),
        ("sampling.guidance_scale", float("nan"), "sampling.guidance_scale is nan, expected 0 to 100"),
        ("sampling.steps", 0, "sampling.steps is 0, expected 1 to 1000"),
        ("sampling.steps", 2.5, "sampling.steps is 2.5, expected 1 to 1000"),
        ("sampling.caption_decoding", "best", "caption_decoding is 'best', expected one of ancestral, confidence,"),
        ("sampling.answer_decoding", ["top_k"], "sampling.answer_decoding is ['top_k'], expected one of"),
        ("sampling.caption_temperature", -1, "sampling.caption_temperature is -1, expected 0 to 100"),
        ("transformer.text_positions", -1, "transformer.text_positions is -1, expected a whole number from 0"),
        ("sampling.mood", 1, "sampling has the unknown key 'mood', expected some of steps"),
        ("dtypes", 3, "dtypes is 3, expected an object"),
        ("provenance", "mine", "provenance is 'mine', expected an object"),
        ("files", [], "files is a JSON list, expected an object"),
        ("files.a", 3, "files has no size and hashes of 'a'"),
        ("files.a", {"size": -1, "sha256": "0" * 64}, "files has no size and hashes of 'a'"),
        ("files.a", {"size": 1, "sha256": "0" * 64, "checksum": 7}, "files has no size and hashes of 'a'"),
        ("files.a", {"size": 1, "sha256": "zz"}, "files has no size and hashes of 'a'"),
        ("files.../a", {"size": 1, "sha256": "0" * 64}, "files names '../a', which is not inside the folder"),
        ("files./etc/passwd", {"size": 1, "sha256": "0" * 64}, "which is not inside the folder"),
        ("version", "1", "is a bundle of version 1"),
        ("version", None, "is a bundle of version None"),
        ("format", ["unialign_jax bundle"], "is not a bundle"),
        ("weights", 1, "has the unknown key 'weights'"),
        (inventory.SEAL, 5, "config.json has been changed"),
        (inventory.SEAL, "0" * 64, "config.json has been changed"),
    ],
)
def test_a_config_that_says_what_cannot_be(saved, tmp_path, refuses, keys, value, words):
    content = json.loads((saved / "config.json").read_text())
    del content[inventory.SEAL]  # as a hand, or older code, would write it
    group, _, key = keys.partition(".")
    if key:
        content[group][key] = value
    else:
        content[group] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    refuses(lambda: bundle.abstract_params(bundle.read_config(tmp_path)), words)


def test_tasks_have_the_names_of_jobs():
    assert bundle_config.TASKS == tuple(jobs.TASKS)


# What a user has


def test_an_existing_folder_is_kept_unless_told_otherwise(saved, params, tmp_path):
    directory = tmp_path / "bundle"
    directory.mkdir()
    (directory / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds what was not written by this command .mine.txt."):
            bundle.save(directory, CONFIG, params, overwrite=overwrite)
    assert (directory / "mine.txt").read_text() == "precious"
    small = bundle.BundleConfig(autoencoder=CONFIG.autoencoder)
    bundle.save(tmp_path / "two", small, params, tokenizer=load_tokenizer())
    with pytest.raises(FileExistsError, match="exists already"):
        bundle.save(tmp_path / "two", small, params)
    bundle.save(tmp_path / "two", dataclasses.replace(CONFIG, heads=None), params, overwrite=True)
    assert bundle.read_config(tmp_path / "two").components == ("transformer", "text_encoder", "autoencoder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "two"]


@pytest.mark.parametrize("name", ["notes.txt", "transformer/notes.txt", ".hidden", "samples/1.png"])
def test_own_files_inside_a_bundle_keep_it_from_being_replaced(saved, params, copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"was not written by this command .{name}.*is not replaced"):
        bundle.save(copy, CONFIG, params, overwrite=True)
    assert (copy / name).read_text() == "mine" and bundle.is_bundle(copy)


@pytest.mark.parametrize("ending", [".partial", ".old"])
def test_a_users_neighbours_are_not_touched(params, tmp_path, ending):
    neighbour = tmp_path / f"bundle{ending}"
    neighbour.mkdir()
    (neighbour / "mine.txt").write_text("precious")
    for _ in range(2):
        bundle.save(tmp_path / "bundle", CONFIG, params, overwrite=True)
    assert (neighbour / "mine.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", neighbour.name]


def test_a_full_disk_or_an_interrupt_leaves_nothing(params, tmp_path, monkeypatch):
    calls = []

    def fails(*arguments, **_):
        calls.append(arguments)
        if len(calls) == 2:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
        return real(*arguments)

    real = ocp.partial.save
    monkeypatch.setattr(ocp.partial, "save", fails)
    monkeypatch.setattr(bundle, "GROUP_BYTES", 1000)
    with pytest.raises(OSError, match="is full; nothing was kept") as raised:
        bundle.save(tmp_path / "bundle", CONFIG, params)
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []

    def interrupted():
        yield "text_head/bias", np.zeros(3, np.float32)
        raise KeyboardInterrupt

    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt), bundle.Writer(tmp_path / "bundle") as writer:
        writer.add("transformer", CONFIG.transformer, interrupted())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_bundle_and_is_swept(params, tmp_path):
    left = tmp_path / ".bundle.1234.partial"
    (left / "transformer").mkdir(parents=True)
    (left / ".being-written").touch()  # its lock went with its process
    assert not bundle.is_bundle(left)
    bundle.save(tmp_path / "bundle", CONFIG, params)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and bundle.verify(tmp_path / "bundle") == []


def test_arrays_are_read_on_the_host_one_by_one(saved, params, monkeypatch):
    monkeypatch.setattr(bundle, "GROUP_BYTES", 3000)
    expected = flatten_dict(params["transformer"], sep="/")
    found = dict(bundle.read_leaves(saved, "transformer"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected[path])
    wanted = ["text_head/bias", "blocks/joint/text/mlp_in/kernel"]
    assert [path for path, _ in bundle.read_leaves(saved, "transformer", wanted)] == wanted


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "provenance",
    [
        {"components": []},
        {"components": {"a": {}}},
        {"versions": []},
        {"dropped": 3},
        {"mask_embedding": {}},
        {"files": [1]},
        {"files": [{"name": "a", "size": "b", "sha256": "c"}]},
    ],
)
def test_provenance_that_no_writer_records(tiny_bundle, tmp_path, command_refuses, provenance):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    content = json.loads((copy / "config.json").read_text())
    content.pop("config_sha256", None)
    (copy / "config.json").write_text(json.dumps(content | {"provenance": provenance}))
    command_refuses("convert", ["inspect", copy], "provenance")
