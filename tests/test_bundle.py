"""Bundles: what is written comes back, sharded and cast; what is not whole never looks it."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from unialign_jax import bundle, sharding
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.models import presets
from unialign_jax.models.mmdit import AlignmentHeadsConfig
from unialign_jax.models.text_encoder import TextEncoder

CONFIG = bundle.BundleConfig(
    transformer=dataclasses.replace(presets.MMDIT["tiny"], depth=2, num_heads=2, head_width=8, text_width=16),
    heads=AlignmentHeadsConfig(hidden_width=12, teacher_width=8),
    text_encoder=dataclasses.replace(presets.TEXT_ENCODER["tiny"], vocab_size=40, width=16, mlp_width=24, num_heads=2),
    autoencoder=presets.AUTOENCODER["tiny"],
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
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
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
    mesh = sharding.make_mesh(data=8, fsdp=1)
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
    (tmp_path / "config.json").write_text(json.dumps(content | {"heads": None}))
    with pytest.raises(ValueError, match="lacks heads; it has transformer, text_encoder, autoencoder"):
        bundle.load(tmp_path, components=["heads"])
    with pytest.raises(ValueError, match="unknown component 'unet'"):
        bundle.load(saved, components=["unet"])


def test_verify_names_damaged_and_missing_files(params, tmp_path):
    directory = tmp_path / "bundle"
    bundle.save(directory, CONFIG, params, tokenizer=load_tokenizer())
    assert bundle.verify(directory) == []
    files = [path for path in (directory / "transformer").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (directory / "tokenizer/tokenizer.json").unlink()
    assert sorted(line.split(" ", 1)[1] for line in bundle.verify(directory)) == [
        "has been changed (its hash differs)",
        "is missing",
    ]


def test_an_existing_folder_is_kept_unless_told_otherwise(saved, params, tmp_path):
    directory = tmp_path / "bundle"
    directory.mkdir()
    (directory / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        bundle.save(directory, CONFIG, params)
    with pytest.raises(FileExistsError, match="not a bundle, so it is not overwritten"):
        bundle.save(directory, CONFIG, params, overwrite=True)
    assert (directory / "mine.txt").read_text() == "precious"
    small = bundle.BundleConfig(autoencoder=CONFIG.autoencoder)
    bundle.save(tmp_path / "two", small, params)
    bundle.save(tmp_path / "two", dataclasses.replace(CONFIG, heads=None), params, overwrite=True)
    assert bundle.read_config(tmp_path / "two").components == ("transformer", "text_encoder", "autoencoder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "two"]


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
    left = tmp_path / "bundle.partial"
    (left / "transformer").mkdir(parents=True)
    (left / "transformer/half").write_text("x")
    assert not bundle.is_bundle(left)
    bundle.save(tmp_path / "bundle", CONFIG, params)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and bundle.verify(tmp_path / "bundle") == []


def test_arrays_are_read_on_the_host_one_by_one(saved, params, monkeypatch):
    monkeypatch.setattr(bundle, "GROUP_BYTES", 3000)
    expected = bundle.flatten(params["transformer"])
    found = dict(bundle.read_leaves(saved, "transformer"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected[path])
    wanted = ["text_head/bias", "blocks/joint/text/mlp_in/kernel"]
    assert [path for path, _ in bundle.read_leaves(saved, "transformer", wanted)] == wanted
