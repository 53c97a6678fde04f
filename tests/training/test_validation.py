"""Validation: fixed levels, losses by hand, records kept out of training, the same numbers everywhere, resuming."""

import shutil
import types
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from unialign_jax import Pipeline
from unialign_jax.data.records import RecordError
from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.evaluation import shapes_run
from unialign_jax.evaluation.run_scenes import RunScenes
from unialign_jax.models.mmdit import MMDiTOutput
from unialign_jax.training import runs, validation
from unialign_jax.training.config import config_problems
from unialign_jax.training.loop import Trainer, train
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.state import Networks
from unialign_jax.training.step import compute_losses
from unialign_jax.training.validation import Validator, fixed_levels, headlines, hold_out, make_validation_step

CLOCK = {"images_per_second", "seconds_per_step", "tflops_per_second_per_device", "data_wait_share", "host_peak_gb"}
LOSSES = {"flow_matching", "masked_text", "cross_modal", "intrinsic_modal", "loss"}


def on_one_device(config):
    return Trainer(config, jax.devices()[:1])


@pytest.mark.parametrize("count", [8, 64])
def test_levels_are_evenly_spaced_quantiles(small_config, count):
    config = small_config(sigma__mean=0.5, sigma__std=1.5, sigma__shift=3.0, min_mask_fraction=0.01)
    sigma, fractions = fixed_levels(config, count)
    places = (np.arange(count) + 0.5) / count
    plain = 1 / (1 + np.exp(-(0.5 + 1.5 * np.array([NormalDist().inv_cdf(place) for place in places]))))
    np.testing.assert_allclose(np.sort(sigma), 3 * plain / (1 + 2 * plain), rtol=1e-5)
    np.testing.assert_allclose(np.sort(fractions), 0.01 + 0.99 * places, rtol=1e-5)
    assert sigma.dtype == fractions.dtype == np.float32
    # Every eight records in a row see all of both, and one says nothing of the other.
    for values in (sigma, fractions):
        parts = np.argsort(np.argsort(values)).reshape(-1, 8) * 4 // count
        assert all(len(set(part)) == 4 for part in parts)
    assert abs(np.corrcoef(np.argsort(np.argsort(sigma)), fractions)[0, 1]) < (0.5 if count == 8 else 0.1)


def stub_networks(trainer, passes):
    """Networks that predict nothing, velocity 0 and all tokens alike, and note what the passes are given."""

    def transform(variables, *inputs, method):
        return [one_pass(*each) for each in inputs]

    def one_pass(latents, text, sigma, conditions=None):
        passes.append({"latents": latents, "sigma": sigma, "ids": text[..., 0]})
        features = latents.reshape(latents.shape[0], -1, latents.shape[-1])
        logits = jnp.tile(0 * text[..., :1], 512)  # no constants, which the compiler would compute with for seconds
        return MMDiTOutput(0 * latents, logits, features, features, features, features)

    encode = lambda variables, ids, beside=None: ids[..., None].astype(jnp.float32)  # noqa: E731
    align = lambda variables, image, text, **_: (image[:, 0, :16], text[:, 0, :16])  # noqa: E731
    stubs = [types.SimpleNamespace(apply=apply) for apply in (transform, align, encode)]
    stubs[0].config, stubs[2].config = types.SimpleNamespace(dtype="float32"), types.SimpleNamespace(depth=0)
    return Networks(*stubs, trainer.networks.autoencoder)


@pytest.fixture(scope="module")
def edits(small_config):
    """A trainer of the edit stream alone, and its first batch of held-out records with their levels."""
    config = small_config("stage2", validation__every=1, validation__records=8, prompt_dropout=1.0)
    config.loss_weights.cross_modal = 0.0
    for name, stream in config.streams.items():
        stream.weight = float(name == "edit")
    trainer = on_one_device(config)
    examples = [trainer.held_out["edit"][index] for index in range(8)]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return trainer, batch | fixed_levels(config, 8)._asdict()


@pytest.mark.slow
def test_the_losses_are_those_of_the_given_levels(edits):
    """Of a network that predicts nothing: |noise - clean|^2, and log 511 a masked token over its mask fraction.

    (The mask's own logit is left out of the 512.)
    """
    trainer, batch = edits
    passes = []
    networks, ids = stub_networks(trainer, passes), (trainer.tokenizer.mask_id, trainer.tokenizer.eos_id)
    step = make_validation_step(trainer.config, networks, "edit", *ids)

    @jax.jit
    def run(batch, number):
        passes.clear()
        metrics = step({"transformer": {}, "heads": {}}, {"autoencoder": {}, "text_encoder": {}}, batch, number)
        return metrics, list(passes)

    metrics, (image_pass, text_pass) = jax.device_get(run(batch, 0))
    np.testing.assert_array_equal(image_pass["sigma"], batch["sigma"])
    np.testing.assert_array_equal(image_pass["ids"], batch["prompt_ids"])  # though prompt_dropout is 1
    sigma, clean = batch["sigma"][:, None, None, None], text_pass["latents"]
    noise = (image_pass["latents"] - (1 - sigma) * clean) / sigma
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    flow_losses = ((noise - clean) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["flow_matching"], [flow_losses.sum(), 8], rtol=1e-3)
    for quarter, name in enumerate(("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")):
        inside = (batch["sigma"] * 4).astype(int) == quarter
        expected = [flow_losses[inside].sum(), inside.sum()]
        np.testing.assert_allclose(metrics[f"flow_matching_by_sigma/{name}"], expected, rtol=1e-3)
        assert metrics[f"masked_text_by_mask_fraction/{name}"][1] == 2  # of eight, two in every quarter
    masked = text_pass["ids"] != batch["text_ids"]
    assert (text_pass["ids"][masked] == trainer.tokenizer.mask_id).all()
    text_losses = np.log(511) * masked.mean(axis=1) / batch["mask_fraction"]
    np.testing.assert_allclose(metrics["masked_text"], [text_losses.sum(), 8], rtol=1e-4)

    assert metrics["cross_modal"][1] == 8  # told though it has no weight
    means = {name: metrics[name][0] / 8 for name in ("flow_matching", "masked_text", "intrinsic_modal")}
    total = means["flow_matching"] + 0.2 * means["masked_text"] + 0.1 * means["intrinsic_modal"]
    np.testing.assert_allclose(metrics["loss"], [total, 1], rtol=1e-5)

    again, other = (jax.device_get(run(batch, number)[1][0]["latents"]) for number in (0, 1))
    np.testing.assert_array_equal(again, image_pass["latents"])
    assert np.abs(other - again).max() > 0.1  # each batch has noise of its own


@pytest.mark.slow
def test_micro_batches_are_those_of_training(edits):
    """Each has every second record, and the key of its number."""
    trainer, batch = edits
    networks, ids = stub_networks(trainer, []), (trainer.tokenizer.mask_id, trainer.tokenizer.eos_id)
    config = trainer.config.copy_and_resolve_references()
    config.accumulation = 2
    empty = {"transformer": {}, "heads": {}}, {"autoencoder": {}, "text_encoder": {}}
    found = jax.jit(make_validation_step(config, networks, "edit", *ids))(*empty, batch, 3)
    key = jax.random.fold_in(jax.random.key(validation.SEED), 3)

    @jax.jit
    def losses(part, key):
        levels = validation.Levels(part["sigma"], part["mask_fraction"])
        return compute_losses(config, networks, "edit", *ids, *empty, part, key, levels)[1]

    parts = [losses({n: v[i::2] for n, v in batch.items()}, jax.random.fold_in(key, i)) for i in range(2)]
    for name, value in found.items():
        np.testing.assert_allclose(value, parts[0][name] + parts[1][name], rtol=1e-5, err_msg=name)


def noting(stream, read, damaged=()):
    """Replaces a stream's records by ones that note which are read, and cannot read some."""

    class Noting:
        metadata, source = stream.records.metadata, stream.records

        def __getitem__(self, index):
            read.append(index)
            if index in damaged:
                raise RecordError("damaged")
            return self.source[index]

        def __len__(self):
            return len(self.source)

    stream.records = Noting()


def test_held_out_records_are_never_trained_on(small_config):
    """Of 40 records the last 16, asked for as 10 in batches of 8; a stand-in for record 23 is 0 and not 24."""
    trainer = on_one_device(small_config(validation__every=1, validation__records=10))
    kept, held_out, read = trainer.streams["text_to_image"], trainer.held_out["text_to_image"], []
    noting(kept, read, damaged=(23,))
    for n in range(6):
        trainer.mixture.batch(n)
    assert set(read) == set(range(24)) and len(kept) == 24
    kept[23]
    assert read[-2:] == [23, 0]
    read.clear()
    noting(held_out, read, damaged=(39,))
    for index in range(len(held_out)):
        held_out[index]
    assert read == [*range(24, 40), 24] and len(held_out) == 16


def test_without_validation_all_records_are_trained_on(small_config):
    trainer, read = on_one_device(small_config()), []
    assert trainer.held_out == {}
    noting(trainer.streams["text_to_image"], read)
    for n in range(5):
        trainer.mixture.batch(n)
    assert set(read) == set(range(40))


def test_a_folder_of_held_out_records_leaves_the_stream_whole(small_config, tmp_path):
    write_shapes(tmp_path, 9, streams=("text_to_image",), seed=5, image_size=32, teacher_width=16)
    folder = str(tmp_path / "text_to_image")
    with_folder = small_config(
        validation__every=1, validation__records=8, streams__text_to_image__validation_path=folder
    )
    trainer, without = on_one_device(with_folder), on_one_device(small_config())
    for n in range(2):
        jax.tree.map(np.testing.assert_array_equal, trainer.mixture.batch(n), without.mixture.batch(n))
    held_out = trainer.held_out["text_to_image"]
    assert held_out.config.path == folder and len(held_out) == 8


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"validation__records": 33}, ["has 40 records", "40 are to be held out", "records 33", "batches of 8"]),
        ({"streams__text_to_image__validation_path": "nowhere"}, ["validation_path", "nowhere does not exist"]),
        ({"streams__text_to_image__validation_path": "{shapes}/vqa"}, ["validation_path", "holds vqa records"]),
        (
            {"streams__text_to_image__validation_path": "{shapes}/../{name}/text_to_image"},
            ["validation_path", "is the stream's own folder", "leave it empty"],
        ),
        ({"streams__text_to_image__validation_path": "{few}"}, ["has 3 records, expected at least 8"]),
        ({"streams__text_to_image__validation_path": "{plain}"}, ["teacher features of width 0", "have width 16"]),
    ],
)
def test_what_cannot_be_held_out(small_config, shapes_dir, other_folders, refuses, changes, words):
    names = {"shapes": shapes_dir, "name": shapes_dir.name} | other_folders
    changes = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    config = small_config(validation__every=1, **{"validation__records": 8} | changes)
    refuses(lambda: on_one_device(config), *words)


@pytest.fixture(scope="module")
def other_folders(tmp_path_factory):
    folders = {}
    for name, count, width in (("few", 3, 16), ("plain", 8, 0)):
        folder = tmp_path_factory.mktemp(name)
        write_shapes(folder, count, streams=("text_to_image",), image_size=32, teacher_width=width)
        folders[name] = str(folder / "text_to_image")
    return folders


@pytest.mark.bad_input
def test_settings_that_say_nothing_are_refused(small_config):
    (problem,) = config_problems(small_config(validation__every=5, validation__records=0))
    assert problem == "validation.records is 0, expected at least 1 where validation.every is on"
    for key in ("every", "records", "scenes"):
        (problem,) = config_problems(small_config(**{f"validation__{key}": -1}))
        assert problem == f"validation.{key} is -1, expected 0 or more"
    assert config_problems(small_config(validation__records=0)) == []


@pytest.fixture(scope="module")
def prepared(small_config):
    """A function (devices, streams) -> the validator of a new run, its parameters and its frozen encoders."""

    def prepare(devices, *streams):
        config = small_config("stage3", validation__every=1, validation__records=16)
        for name, stream in config.streams.items():
            stream.weight = float(name in streams)
        trainer = Trainer(config, devices)
        state, frozen = trainer.init_state(), trainer.init_frozen()
        params = {"transformer": state.ema, "heads": state.params["heads"]}
        return Validator(trainer), params, frozen

    return prepare


@pytest.mark.slow
def test_the_same_weights_give_the_same_numbers_and_compile_nothing(prepared):
    validator, params, frozen = prepared(jax.devices()[:1], "edit", "vqa")
    first = validator(params, frozen)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    assert validator(params, frozen) == first
    assert compiled == []
    assert set(first) == {"edit", "vqa"}
    assert LOSSES <= first["edit"].keys() and LOSSES & first["vqa"].keys() == {"masked_text", "intrinsic_modal", "loss"}

    validator, params, frozen = prepared(jax.devices()[:2], "edit")
    found = validator(params, frozen)["edit"]
    assert found.keys() == first["edit"].keys()
    for key, value in found.items():
        assert value == pytest.approx(first["edit"][key], rel=1e-5, abs=1e-5), key


@pytest.fixture(scope="module")
def validated(small_config, tmp_path_factory):
    """A run of 4 steps that is validated at 2 and 4 on 16 records and 2 scenes, and the scenes' results."""
    config = small_config(
        num_steps=4,
        validation__every=2,
        validation__records=16,
        validation__scenes=2,
        optimizer__warmup_steps=1,
        ema_decay=0.0,
    )
    workdir, seen = tmp_path_factory.mktemp("validated"), []
    run_task = shapes_run.run_task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shapes_run, "run_task", lambda *args, **kwargs: seen.append(run_task(*args, **kwargs)) or seen[-1]
        )
        train(config, workdir, progress=False, devices=jax.devices()[:1], make_scorer=RunScenes.of)
    return config, workdir, seen


def numbers(rows):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


@pytest.mark.slow
def test_a_validated_run_has_rows_of_its_own(validated):
    _, workdir, _ = validated
    rows = read_metrics(workdir)
    names = [(row["step"], row["stream"]) for row in rows]
    own = [[(step, f"validation/{name}") for name in ("text_to_image", "caption")] for step in (2, 4)]
    trained = [(step, "text_to_image") for step in (1, 2, 3, 4)]
    assert names == [*trained[:2], *own[0], *trained[2:], *own[1]]
    first = next(row for row in rows if row["stream"] == "validation/text_to_image")
    assert LOSSES | {"exact", "color", "place"} <= first.keys() and not CLOCK & first.keys()
    assert sum(key.startswith("masked_text_by_mask_fraction/") for key in first) == 4
    assert {"parses", "true", "exact"} <= rows[3].keys()
    # What counts as training is each stretch of steps, whatever the validation between them took.
    assert all(CLOCK <= row.keys() for row in rows if row["stream"] == "text_to_image")
    shown = headlines({"text_to_image": first, "caption": rows[3]}, RunScenes.leading)
    assert list(shown) == ["val/text_to_image/loss", "val/text_to_image/exact", "val/caption/true"]


@pytest.mark.slow
def test_scenes_are_those_of_the_saved_run(validated):
    """The weights of every validation are the run's at that step: of the last, what its checkpoint gives."""
    config, workdir, (early, _, late, captions) = validated
    run, frozen = runs.open_to_sample(workdir), on_one_device(config).init_frozen()
    # Its own frozen encoders: drawn again outside of jit they differ in the last bit, and a tie may be decided anew.
    leaves = lambda name: flatten_dict(frozen[name], sep="/").items() if name in frozen else run.leaves(name)  # noqa: E731
    pipeline = Pipeline.from_run(run._replace(leaves=leaves))
    again = shapes_run.run_task(pipeline, "text_to_image", 2)
    for found, expected, before in zip(late, again, early, strict=True):
        np.testing.assert_array_equal(found.made, expected.made)
        assert (found.made != before.made).any()
    options = {"decoding": "top_k", "temperature": 0.0}
    texts = shapes_run.run_task(pipeline, "caption", 2, text_options=options)
    assert [result.made for result in captions] == [result.made for result in texts]


@pytest.mark.slow
def test_a_run_in_two_halves_is_validated_as_one(validated, tmp_path):
    config, workdir, _ = validated
    half = config.copy_and_resolve_references()
    half.num_steps = 2
    for settings in (half, config):
        train(settings, tmp_path, progress=False, devices=jax.devices()[:1], make_scorer=RunScenes.of)
    assert numbers(read_metrics(tmp_path)) == numbers(read_metrics(workdir))


@pytest.mark.slow
def test_validation_changes_no_step(validated, small_config, tmp_path):
    """The losses of a run without it, on a folder that has the records that were left."""
    config, workdir, _ = validated
    plain = config.copy_and_resolve_references()
    plain.validation.every = 0
    trainer = on_one_device(plain)
    trainer.streams["text_to_image"] = trainer.streams["text_to_image"].part(0, 24)
    programs = trainer.compile_steps()
    mixture = type(trainer.mixture)(
        list(trainer.streams.values()), seed=plain.seed, global_batch=plain.batch_size, rows=trainer.rows
    )
    state, frozen, losses = trainer.init_state(), trainer.init_frozen(), []
    for n in range(4):
        name, batch = mixture.batch(n)
        state, metrics = programs[name](state, frozen, trainer.put_batch(batch))
        losses.append(float(metrics["loss"][0]))
    found = [row["loss"] for row in read_metrics(workdir) if row["stream"] == "text_to_image"]
    assert found == losses


@pytest.mark.slow
def test_a_run_with_an_average_is_validated_with_both_weights(small_config, tmp_path):
    """Rows `validation` are the average's, as before, `validation_raw` those of the weights that are trained."""
    config = small_config(num_steps=2, validation__every=2, validation__records=8, optimizer__warmup_steps=1)
    state = train(config, tmp_path, progress=False, devices=jax.devices()[:1])
    averaged, raw = read_metrics(tmp_path)[-2:]
    assert (averaged.pop("stream"), raw.pop("stream")) == ("validation/text_to_image", "validation_raw/text_to_image")
    assert averaged.pop("step") == raw.pop("step") == 2
    assert averaged.keys() == raw.keys() >= LOSSES
    trainer = on_one_device(config)
    validator, frozen = Validator(trainer), trainer.init_frozen()
    for found, transformer in ((averaged, state.ema), (raw, state.params["transformer"])):
        expected = validator({"transformer": transformer, "heads": state.params["heads"]}, frozen)["text_to_image"]
        assert found == pytest.approx(expected, rel=1e-5)
    assert abs(averaged["flow_matching"] - raw["flow_matching"]) > 1e-4


def test_scenes_without_a_world_are_passed_over(small_config, shapes_dir, tmp_path, monkeypatch, caplog):
    shutil.copytree(shapes_dir / "text_to_image", tmp_path / "data")
    path = tmp_path / "data" / "records.json"
    path.write_text(path.read_text().replace('"source": "shapes"', '"source": "photographs"'))
    config = small_config(validation__every=1, validation__records=8, validation__scenes=2)
    config.streams.text_to_image.path = str(tmp_path / "data")
    trainer = on_one_device(config)
    assert RunScenes.of(trainer) is None
    assert "validation.scenes is passed over: no stream has records of the shapes world" in caplog.text
    monkeypatch.setattr(Validator, "_compile", lambda self, name: None)
    assert Validator(trainer).leading == {}
    assert "validation.scenes is passed over: train() was given no make_scorer" in caplog.text


def test_every_problem_of_holding_out_is_told_at_once(small_config):
    config = small_config("stage2", validation__every=1, validation__records=40)
    trainer = on_one_device(small_config("stage2"))
    with pytest.raises(ValueError) as raised:
        hold_out(config, trainer.streams, trainer.tokenizer)
    assert len(str(raised.value).splitlines()) == 5 and "stream perception" in str(raised.value)
