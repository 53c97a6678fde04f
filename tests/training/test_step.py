"""One optimizer step: its numbers, its accumulation, what each pass reads, and that it can learn a batch by heart."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unialign_jax.models.mmdit import MMDiTOutput
from unialign_jax.training import step as step_module
from unialign_jax.training.loop import Trainer
from unialign_jax.training.metrics import to_means
from unialign_jax.training.state import Networks, TrainState
from unialign_jax.training.step import compute_losses, make_train_step, named_key

KINDS = ("text_to_image", "edit", "perception", "personalization", "vqa")
BATCH = 4
FROZEN = "transformer/time_embed/hidden/"


@pytest.fixture(scope="module")
def trainer(small_config):
    """Small enough to learn four records by heart in seconds.

    A patch has 48 numbers: a network narrower than its patches could never predict their noise.
    """
    config = small_config(
        "stage3",
        batch_size=BATCH,
        image_size=16,
        prompt_dropout=0.0,
        ema_decay=0.9,
        model__num_heads=4,
        model__latent_channels=12,
        autoencoder__latent_channels=12,
        autoencoder__downsample_factor=2,
        loss_weights__masked_text=1.0,
        loss_weights__cross_modal=0.2,
        loss_weights__intrinsic_modal=0.5,
        optimizer__learning_rate=5e-3,
        optimizer__warmup_steps=20,
        optimizer__weight_decay=0.0,
        optimizer__clip_norm=10.0,
        optimizer__b2=0.95,
        optimizer__freeze=(FROZEN,),
    )
    return Trainer(config, jax.devices()[:1])


@pytest.fixture(scope="module")
def frozen(trainer):
    return trainer.init_frozen()


@pytest.fixture(scope="module")
def programs(trainer, optimized):
    """kind -> its compiled step, compiled once. They run for 300 steps."""
    return functools.cache(trainer.compile_step)


def records(trainer, kind, count=BATCH):
    examples = [trainer.streams[kind][index] for index in range(count)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def made_up_batch(count=BATCH):
    """An edit batch from a random generator: the golden numbers must not move with the procedural world."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8),
        "conditions": rng.integers(0, 256, (count, 1, 16, 16, 3), dtype=np.uint8),
        "prompt_ids": rng.integers(2, 400, (count, 24), dtype=np.int32),
        "text_ids": rng.integers(2, 400, (count, 24), dtype=np.int32),
        "text_is_target": np.ones((count, 24), bool),
        "teacher_image": rng.standard_normal((count, 16)).astype(np.float16),
        "teacher_text": rng.standard_normal((count, 16)).astype(np.float16),
        "replaced": np.arange(count) == 1,
    }


@pytest.fixture(scope="module")
def two_steps(trainer, frozen, programs):
    """Parameters and average before, after one and after two steps on the made-up batch, and the steps' metrics."""
    state, batch = trainer.init_state(), trainer.put_batch(made_up_batch())
    states, metrics = [jax.device_get(state)], []
    for _ in range(2):
        state, values = programs("edit")(state, frozen, batch)
        states.append(jax.device_get(state))
        metrics.append(to_means(jax.device_get(values)))
    return states, metrics


GOLDEN = {
    "loss": (10.826208, 9.126552),
    "flow_matching": (2.3307967, 2.3952823),
    "masked_text": (7.219223, 5.3755279),
    "cross_modal": (1.6370873, 1.6384561),
    "intrinsic_modal": (1.8975405, 2.0561008),
    "gradient_norm": (2.4308443, 1.9013908),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_steps(two_steps, name):
    _, metrics = two_steps
    found = [values[name] for values in metrics]
    np.testing.assert_allclose(
        found,
        GOLDEN[name],
        rtol=2e-4,
        err_msg=(
            f"{name} of steps 1 and 2 moved to {found}. Run this test on the commit before yours: when it passes "
            "there, your change altered what a step computes. If you did not mean that, it is a bug. If you did, put "
            "the new numbers into GOLDEN in the same commit and say in its message why they moved"
        ),
    )


def test_replaced_records_are_counted(two_steps):
    assert [values["replaced_records"] for values in two_steps[1]] == [1, 1]


def test_the_average_follows_its_formula(two_steps):
    """ema <- d ema + (1 - d) params with d = min(0.9, (1 + n) / (10 + n)), from the initial parameters on."""
    (start, one, two), _ = two_steps
    transformers = [state.params["transformer"] for state in (start, one, two)]
    for found, p0, p1, p2 in zip(*map(jax.tree.leaves, (two.ema, *transformers)), strict=True):
        first = p0 / 10 + p1 * 9 / 10
        np.testing.assert_allclose(found, first * 2 / 11 + p2 * 9 / 11, rtol=1e-5, atol=1e-6)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (two.ema, start.ema)), strict=True)]
    assert sum(m > 0 for m in moved) == len(moved) - 2  # the frozen layer's kernel and bias


def test_frozen_parameters_stay_bit_for_bit_and_all_others_move(two_steps):
    (start, _, two), _ = two_steps
    still = []
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(start.params), jax.tree.leaves(two.params), strict=True
    ):
        if np.array_equal(before, after):
            still.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    assert still == [FROZEN + "bias", FROZEN + "kernel"]


def toy_networks(autoencoder):
    """Networks of a few parameters that use all that they are given: how a batch is split does not ask for more."""

    def encode(variables, ids, beside=None):
        return jnp.sin(ids[..., None] * jnp.arange(1, 9))

    def transform(variables, *passes, method):
        return [one_pass(variables["params"], *each) for each in passes]

    def one_pass(p, latents, text, sigma, conditions=None):
        image = latents.reshape(latents.shape[0], -1, latents.shape[-1]) @ p["image"]
        text = text @ p["text"] + sigma[:, None, None]
        if conditions is not None:
            image = image + conditions.mean(axis=(1, 2, 3))[:, None] @ p["image"]
        mixed = jnp.tanh(image + text.mean(axis=1, keepdims=True)), jnp.tanh(text + image.mean(axis=1, keepdims=True))
        velocity = (mixed[0] @ p["image"].T).reshape(latents.shape)
        return MMDiTOutput(velocity, mixed[1] @ p["logits"], *mixed, *mixed)

    def align(variables, image, text, **_):
        return image.mean(axis=1) @ variables["params"]["head"], text.mean(axis=1) @ variables["params"]["head"]

    stubs = [types.SimpleNamespace(apply=apply) for apply in (transform, align, encode)]
    stubs[0].config, stubs[2].config = types.SimpleNamespace(dtype="float32"), types.SimpleNamespace(depth=0)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / 4  # noqa: E731
    transformer = {"image": draw(0, 12, 10), "text": draw(1, 8, 10), "logits": draw(2, 10, 512)}
    return Networks(*stubs, autoencoder), {"transformer": transformer, "heads": {"head": draw(3, 10, 16)}}


@pytest.mark.slow
def test_accumulation_is_the_mean_of_its_micro_batches(trainer):
    """Micro-batch i has every second row from i on, and the key folded with i."""
    config = trainer.config.copy_and_resolve_references()
    config.update({"accumulation": 2, "batch_size": 2 * BATCH, "ema_decay": 0.0, "prompt_dropout": 0.5})
    networks, params = toy_networks(trainer.networks.autoencoder)
    frozen = {"autoencoder": {}, "text_encoder": {}}
    tx = optax.sgd(1.0)  # so that a step subtracts the gradient itself
    ids = (trainer.tokenizer.mask_id, trainer.tokenizer.eos_id)
    train_step = make_train_step(config, networks, tx, lambda step: 1.0, "edit", *ids)
    start = TrainState(jnp.int32(5), params, {}, tx.init(params))
    batch = {name: jnp.asarray(value) for name, value in made_up_batch(2 * BATCH).items()}

    after, metrics = jax.jit(train_step)(start, frozen, batch)

    @jax.jit
    def losses(params, batch, key):
        loss = lambda p: compute_losses(config, networks, "edit", *ids, p, frozen, batch, key)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    key = jax.random.fold_in(jax.random.key(config.seed), 5)
    (one, two) = (
        losses(params, {name: value[i::2] for name, value in batch.items()}, jax.random.fold_in(key, i))
        for i in range(2)
    )
    gradients = jax.tree.map(lambda a, b: (a + b) / 2, one[1], two[1])
    found = jax.tree.map(lambda a, b: a - b, params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, gradients)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(gradients))
    for name, value in one[0][1].items():
        np.testing.assert_allclose(metrics[name], value + two[0][1][name], rtol=1e-5, err_msg=name)
    means = to_means(metrics)
    assert means["loss"] == pytest.approx(float(one[0][0] + two[0][0]) / 2, rel=1e-5)
    assert means["gradient_norm"] == pytest.approx(float(optax.global_norm(gradients)), rel=1e-5)
    assert means["replaced_records"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_learnt_by_heart(trainer, frozen, programs, kind):
    """300 steps on four records, noise and masks drawn anew at each.

    The floors. flow_matching, cross_modal and intrinsic_modal: 0, since four images can be known by heart; what is left
    is the network's width and the few steps, and at sigma near 0 and 1 the task is hardest. masked_text: 0 for answers,
    which the question makes known. For captions it is not 0: the text has no positions but T5's relative ones, so
    where everything is masked all positions look alike, and no network of this kind can do better than the entropy of
    the caption's own tokens, padding included. With few tokens masked the floor is 0 again.
    """
    batch = records(trainer, kind)
    state, device_batch, metrics = trainer.init_state(), trainer.put_batch(batch), []
    for _ in range(300):
        state, values = programs(kind)(state, frozen, device_batch)
        metrics.append(values)
    metrics = jax.device_get(metrics)

    def mean(name, rows):
        total, count = np.sum([row[name] for row in rows], axis=0)
        return total / count

    losses = [name for name in trainer.config.loss_weights if name in metrics[0]]
    assert set(losses) == {"masked_text", "intrinsic_modal"} | (
        {"flow_matching", "cross_modal"} if kind != "vqa" else set()
    )
    start = {name: mean(name, metrics[:1]) for name in losses}
    end = {name: mean(name, metrics[-50:]) for name in metrics[0]}
    shown = {name: f"{start[name]:.3f} -> {end[name]:.3f}" for name in losses}
    assert end["intrinsic_modal"] < 0.1 * start["intrinsic_modal"], shown
    if kind == "vqa":
        assert end["masked_text"] < 0.05 * start["masked_text"], shown
        return
    assert end["flow_matching"] < 0.25 * start["flow_matching"], shown
    assert end["cross_modal"] < 0.25 * start["cross_modal"], shown
    entropy = np.mean([token_entropy(ids) for ids in batch["text_ids"]])
    many, few = (end["masked_text_by_mask_fraction/" + fractions] for fractions in ("0.75-1.00", "0.00-0.25"))
    assert many < 1.15 * entropy < 0.5 * start["masked_text"], (many, entropy, shown)
    assert few < 0.6 * entropy, (few, entropy, shown)


def token_entropy(ids):
    _, counts = np.unique(ids, return_counts=True)
    share = counts / counts.sum()
    return -(share * np.log(share)).sum()


def recorder(trainer, kind, **changes):
    """batch -> what the networks are given: of the [image pass,] text pass, and the ids that the text encoder sees."""
    config = trainer.config.copy_and_resolve_references()
    config.update(changes)
    seen, passes = [], []

    def encode(variables, ids, beside=None):
        seen.append(ids)
        return jnp.zeros((*ids.shape, 8)).at[..., 0].set(ids)

    def transform(variables, *inputs, method=None):
        return [transform(variables, *each) for each in inputs] if method == "several" else one_pass(*inputs)

    def one_pass(latents, text, sigma, conditions=None):
        passes.append({"latents": latents, "text": text, "sigma": sigma, "conditions": conditions})
        # Not constants, which the compiler would compute with for seconds.
        image, logits = latents.reshape(latents.shape[0], -1, 12), jnp.tile(text[..., :1], 512)
        return MMDiTOutput(latents, logits, image, text[..., :1] + image[:, :1], image, text)

    def align(variables, image, text, **_):
        return (image[:, 0, :1] + jnp.arange(16),) * 2

    stubs = [types.SimpleNamespace(apply=apply) for apply in (transform, align, encode)]
    stubs[2].config = types.SimpleNamespace(depth=0)
    networks = Networks(*stubs, trainer.networks.autoencoder)
    ids = (trainer.tokenizer.mask_id, trainer.tokenizer.eos_id)

    @jax.jit
    def run(batch, key):
        seen.clear(), passes.clear()
        empty, frozen = {"transformer": {}, "heads": {}}, {"autoencoder": {}, "text_encoder": {}}
        compute_losses(config, networks, kind, *ids, empty, frozen, batch, key)
        return passes, seen[0]

    return lambda batch: jax.device_get(run(batch, jax.random.key(3)))


def test_images_are_compared_cell_by_cell_where_there_is_a_grid(trainer):
    """Four cells of 8 x 8 pixels, each the mean of 2 x 2 tokens of 4 pixels a side."""
    config = trainer.config.copy_and_resolve_references()
    config.teacher.grid = 8
    rng = np.random.default_rng(1)
    tap, grid = (rng.standard_normal((BATCH, count, 16)).astype(np.float32) for count in (16, 4))
    batch = made_up_batch() | {"teacher_grid": grid.astype(np.float16)}

    def transform(variables, *passes, method):
        logits = [jnp.tile(text[..., :1], 512) for _, text, *_ in passes]
        features = [latents.reshape(BATCH, -1, 12) for latents, *_ in passes]
        return [
            MMDiTOutput(latents, logits, features, features, jnp.asarray(tap), text)
            for (latents, text, *_), logits, features in zip(passes, logits, features, strict=True)
        ]

    def align(variables, image, text, pool_image):
        assert not pool_image
        return image, jnp.asarray(batch["teacher_text"])

    networks = Networks(
        types.SimpleNamespace(apply=transform, config=types.SimpleNamespace(patch_size=2, dtype="float32")),
        types.SimpleNamespace(apply=align),
        types.SimpleNamespace(
            apply=lambda variables, ids, beside: jnp.zeros((*ids.shape, 8)), config=types.SimpleNamespace(depth=0)
        ),
        trainer.networks.autoencoder,
    )
    ids = (trainer.tokenizer.mask_id, trainer.tokenizer.eos_id)
    empty, frozen = {"transformer": {}, "heads": {}}, {"autoencoder": {}, "text_encoder": {}}
    losses = jax.jit(functools.partial(compute_losses, config, networks, "edit", *ids, empty, frozen))
    _, metrics = losses(batch, jax.random.key(0))
    means = tap.reshape(BATCH, 2, 2, 2, 2, 16).mean(axis=(2, 4)).reshape(BATCH, 4, 16)
    target = batch["teacher_grid"].astype(np.float32)
    cosine = (means * target).sum(-1) / np.linalg.norm(means, axis=-1) / np.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(to_means(metrics)["intrinsic_modal"], (1 - cosine).mean(), rtol=1e-4)


@pytest.mark.slow
def test_the_passes_read_what_they_should(trainer):
    batch = records(trainer, "personalization")
    (image_pass, text_pass), ids = recorder(trainer, "personalization")(batch)
    pixels = lambda x: x.astype(np.float32) / 127.5 - 1  # noqa: E731
    # The codec moves pixels about and doubles them; it has no mean to take away.
    clean = np.asarray(text_pass["latents"])
    np.testing.assert_allclose(
        np.sort(clean.reshape(BATCH, -1)), np.sort(2 * pixels(batch["image"]).reshape(BATCH, -1)), atol=1e-5
    )
    conditions = np.asarray(image_pass["conditions"])
    assert conditions.shape[:2] == (BATCH, 3)
    np.testing.assert_allclose(
        np.sort(conditions.reshape(BATCH, 3, -1)),
        np.sort(2 * pixels(batch["conditions"]).reshape(BATCH, 3, -1)),
        atol=1e-5,
    )
    assert text_pass["conditions"] is None
    np.testing.assert_array_equal(text_pass["sigma"], 0)
    sigma = np.asarray(image_pass["sigma"])
    assert ((sigma > 0) & (sigma < 1)).all() and len(set(sigma.tolist())) == BATCH
    noise = (np.asarray(image_pass["latents"]) - (1 - sigma[:, None, None, None]) * clean) / sigma[:, None, None, None]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1

    # Prompt and masked text take turns in the text encoder's batch.
    np.testing.assert_array_equal(ids[0::2], batch["prompt_ids"])
    masked = ids[1::2] != batch["text_ids"]
    np.testing.assert_array_equal(ids[1::2][masked], trainer.tokenizer.mask_id)
    assert masked.any()
    np.testing.assert_array_equal(image_pass["text"][..., 0], ids[0::2])
    np.testing.assert_array_equal(text_pass["text"][..., 0], ids[1::2])


@pytest.mark.slow
def test_a_dropped_prompt_is_the_empty_prompt(trainer):
    passes_of = recorder(trainer, "edit", prompt_dropout=1.0)
    batch = records(trainer, "edit")
    other = batch | {"prompt_ids": np.roll(batch["prompt_ids"], 1, axis=0)}
    assert (other["prompt_ids"] != batch["prompt_ids"]).any()
    (passes, ids), (other_passes, other_ids) = passes_of(batch), passes_of(other)
    np.testing.assert_array_equal(ids[0::2], trainer.tokenizer.eos_id)
    # So nothing of the prompt reaches either pass.
    jax.tree.map(np.testing.assert_array_equal, (passes, ids), (other_passes, other_ids))


@pytest.mark.slow
def test_prompts_are_dropped_by_sample_and_in_their_share(trainer):
    batch = {name: np.repeat(value, 250, axis=0) for name, value in made_up_batch().items()}
    _, ids = recorder(trainer, "edit", prompt_dropout=0.25)(batch)
    kept = (ids[0::2] == batch["prompt_ids"]).all(axis=1)
    dropped = (ids[0::2] == trainer.tokenizer.eos_id).all(axis=1)
    assert (kept ^ dropped).all()
    assert 0.2 < dropped.mean() < 0.3  # of 1000; the standard deviation is 0.014


@pytest.mark.slow
def test_of_a_question_only_the_answer_is_masked(trainer):
    batch = records(trainer, "vqa", count=40)
    (text_pass,), ids = recorder(trainer, "vqa")(batch)
    masked = ids != batch["text_ids"]
    assert not (masked & ~batch["text_is_target"]).any()
    assert (ids[masked] == trainer.tokenizer.mask_id).all()
    hit = masked.any(axis=0)
    first = batch["text_is_target"].argmax(axis=1).max()
    assert hit[first:].all() and not hit[:4].any()
    assert text_pass["conditions"] is None


@pytest.mark.slow
@pytest.mark.parametrize("names", [("noise", "sigma"), ("mask", "mask fraction")])
def test_the_two_passes_draw_by_names_of_their_own(trainer, monkeypatch, names):
    """Other noise leaves the text pass as it was, other masks the image pass."""
    batch = records(trainer, "edit")
    before, _ = recorder(trainer, "edit")(batch)
    monkeypatch.setattr(step_module, "named_key", lambda key, name: named_key(key, name + " anew" * (name in names)))
    after, _ = recorder(trainer, "edit")(batch)
    untouched = 1 if "noise" in names else 0
    jax.tree.map(np.testing.assert_array_equal, before[untouched], after[untouched])
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, before[1 - untouched], after[1 - untouched])


def test_named_keys_differ_by_name_and_step():
    key = jax.random.key(0)
    names = ("latents", "mask fraction", "mask", "prompt dropout", "sigma", "noise")
    keys = [jax.random.key_data(named_key(jax.random.fold_in(key, s), n)).tobytes() for n in names for s in range(3)]
    assert len(set(keys)) == len(keys)
