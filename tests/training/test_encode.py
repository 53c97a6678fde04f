"""`prepare_data.py encode` and what a run makes of it: cached, and online, the same training."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tokenizers

from unialign_jax import bundle
from unialign_jax.bundle_config import BundleConfig
from unialign_jax.data import caches
from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.models import teacher as teachers
from unialign_jax.training.loop import train
from unialign_jax.training.metrics import read_metrics

COUNT = 24


def make_teacher(directory, seed=0, width=64):
    config = teachers.TeacherConfig(
        depth=2,
        width=16,
        num_heads=2,
        mlp_width=20,
        full_attention_layers=(1,),
        output_width=width,
        vocab_size=300,
        dtype="float32",
    )
    folder = directory.with_name(f"{directory.name}-tokenizer")
    folder.mkdir()
    characters = {chr(i): i for i in range(256)}
    tokenizers.Tokenizer(tokenizers.models.BPE(characters, [])).save(str(folder / "tokenizer.json"))
    params = jax.jit(functools.partial(teachers.init_teacher, config=config))(jax.random.key(seed))
    with bundle.Writer(directory) as writer:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        writer.add("teacher", config, [(_path(path), np.asarray(leaf)) for path, leaf in leaves])
        writer.add_tokenizer(folder)
        writer.provenance = {"kind": "teacher"}
    return directory


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("bundles") / "teacher")


@pytest.fixture
def data(tmp_path):
    write_shapes(tmp_path / "data", COUNT, image_size=32, teacher_width=0, streams=("text_to_image", "edit", "vqa"))
    return tmp_path / "data"


@pytest.fixture
def encode(launch_command):
    command = launch_command("prepare_data")
    return lambda *arguments: command.main(["encode", "--image-size=32", "--batch-size=8", *map(str, arguments)])


def settings(small_config, data, **changes):
    config = small_config("stage3", num_steps=3, heads__teacher_width=64, loss_weights__intrinsic_modal=0.1)
    for name in ("perception", "personalization"):
        config.streams[name].weight = 0.0
    for name in ("text_to_image", "edit", "vqa"):
        config.streams[name].path = str(data / name)
    for key, value in changes.items():
        *groups, last = key.split("__")
        functools.reduce(lambda group, name: group[name], groups, config)[last] = value
    return config


def losses(workdir):
    names = ("flow_matching", "masked_text", "cross_modal", "intrinsic_modal")
    return [{name: row[name] for name in names if name in row} for row in read_metrics(workdir)]


@pytest.mark.slow
def test_a_run_with_stored_features_is_the_run_with_the_teacher_in_the_step(
    small_config, data, teacher, encode, tmp_path, capsys
):
    """Features in float16 either way; only the order of sums may differ."""
    online = {"teacher__online": True, "teacher__path": str(teacher)}
    train(settings(small_config, data, **online), tmp_path / "online", progress=False, devices=jax.devices()[:1])
    for name in ("text_to_image", "edit", "vqa"):
        encode(f"--input={data / name}", f"--teacher={teacher}")
    assert "24 records of 256 bytes" in capsys.readouterr().out
    train(
        settings(small_config, data, teacher__path=str(teacher)),
        tmp_path / "stored",
        progress=False,
        devices=jax.devices()[:1],
    )
    for one, other in zip(losses(tmp_path / "online"), losses(tmp_path / "stored"), strict=True):
        assert one.keys() == other.keys()
        assert "intrinsic_modal" in one
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=2e-3, err_msg=key)

    encode(f"--input={data / 'edit'}", f"--teacher={teacher}")
    assert "already there" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_stored_latents_is_the_run_with_images(small_config, data, tiny_bundle, encode, tmp_path):
    """Moments in float16; the same noise is drawn from them."""
    shared = {"loss_weights__intrinsic_modal": 0.0, "frozen_from": str(tiny_bundle), "streams__vqa__weight": 0.0}
    architecture = bundle.read_config(tiny_bundle)
    for group in ("text_encoder", "autoencoder"):
        shared |= {f"{group}__{k}": v for k, v in dataclasses.asdict(getattr(architecture, group)).items()}
    train(settings(small_config, data, **shared), tmp_path / "images", progress=False, devices=jax.devices()[:1])
    for name in ("text_to_image", "edit"):
        encode(f"--input={data / name}", f"--bundle={tiny_bundle}")
    cached = settings(small_config, data, **shared, data__cached_latents=True)
    train(cached, tmp_path / "latents", progress=False, devices=jax.devices()[:1])
    for one, other in zip(losses(tmp_path / "images"), losses(tmp_path / "latents"), strict=True):
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=5e-3, err_msg=key)


def test_features_of_another_teacher_are_told(small_config, data, teacher, encode, tmp_path):
    other = make_teacher(tmp_path / "other", seed=1)
    for name, source in (("text_to_image", teacher), ("edit", other), ("vqa", teacher)):
        encode(f"--input={data / name}", f"--teacher={source}")
    with pytest.raises(ValueError, match="text_to_image/teacher was made by another network"):
        train(settings(small_config, data), tmp_path / "run", progress=False, devices=jax.devices()[:1])
    with pytest.raises(SystemExit, match="error: .*was made by another network .*--overwrite replaces it"):
        encode(f"--input={data / 'edit'}", f"--teacher={teacher}")
    encode(f"--input={data / 'edit'}", f"--teacher={teacher}", "--overwrite")


def test_the_grid_is_stored_where_it_is_asked_for(data, teacher, encode, capsys):
    folder = data / "vqa"
    with pytest.raises(SystemExit, match="--teacher-grid=24 does not divide images of 32 x 32 pixels"):
        encode(f"--input={folder}", f"--teacher={teacher}", "--teacher-grid=24")
    encode(f"--input={folder}", f"--teacher={teacher}", "--teacher-grid=16")
    assert f"24 records of {2 * 64 * (2 + 4)} bytes" in capsys.readouterr().out  # image, text, four cells
    with pytest.raises(SystemExit, match="was made with other settings .*--overwrite replaces it"):
        encode(f"--input={folder}", f"--teacher={teacher}")


def test_shares_of_the_work_make_one_cache(data, teacher, encode, monkeypatch):
    monkeypatch.setattr(caches, "rows_of_a_file", lambda arrays: 5)
    folder = data / "text_to_image"
    encode(f"--input={folder}", f"--teacher={teacher}", "--part=2/3")
    with pytest.raises(ValueError, match="is missing, the cache is not whole"):
        caches.Cache(folder, "teacher")
    for part in ("1/3", "3/3"):
        encode(f"--input={folder}", f"--teacher={teacher}", f"--part={part}")
    assert caches.Cache(folder, "teacher")[23] is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to store"),
        (["--teacher=nowhere"], "nowhere"),
        (["--bundle=demo", "--part=5/4"], "--part is '5/4'"),
        (["--bundle=demo", "--image-size=0"], "--image-size is 0"),
        (["--teacher=demo"], "holds no teacher|there is no"),
        (["--bundle=demo", "--teacher-grid=16"], "--teacher-grid is 16, expected 0 or more, and --teacher with it"),
    ],
)
def test_bad_options_are_told_in_a_line(data, encode, arguments, words):
    with pytest.raises(SystemExit, match=words):
        encode(f"--input={data / 'edit'}", *arguments)


def test_a_teacher_that_is_not_named_or_does_not_fit(small_config, data, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.path is empty"):
        train(
            settings(small_config, data, teacher__online=True),
            tmp_path / "run",
            progress=False,
            devices=jax.devices()[:1],
        )
    wide = make_teacher(tmp_path / "wide", width=32)
    online = {"teacher__online": True, "teacher__path": str(wide)}
    with pytest.raises(ValueError, match=r"features of width 32, heads\.teacher_width is 64"):
        train(settings(small_config, data, **online), tmp_path / "run", progress=False, devices=jax.devices()[:1])
    assert BundleConfig(**{}).teacher is None
    assert json.loads((teacher / "config.json").read_text())["teacher"]["output_width"] == 64
