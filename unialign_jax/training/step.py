"""One optimizer step of one stream: encode, two passes of the one network, four losses, one update.

The step is a pure function (state, frozen, batch) -> (state, metrics). Its random numbers are a function of the seed,
the step number, the micro-batch and a name, so they are the same on any number of devices and hosts.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unialign_jax.data.kinds import has_image_pass
from unialign_jax.data.streams import TEACHER_TOKENS
from unialign_jax.diffusion import flow, masking
from unialign_jax.losses.cross_modal import cross_modal_loss
from unialign_jax.losses.flow_matching import flow_matching_loss
from unialign_jax.losses.intrinsic_modal import intrinsic_modal_loss
from unialign_jax.losses.masked_text import masked_text_loss
from unialign_jax.models.autoencoder import Moments, from_pixels, sample_latents
from unialign_jax.models.lora import adapted_network, beside_kernels
from unialign_jax.models.mmdit import in_pairs
from unialign_jax.models.parameters import storage_dtype
from unialign_jax.models.teacher import pooled_features, to_cells
from unialign_jax.parallel import sharding
from unialign_jax.parallel.activations import spread_rows
from unialign_jax.training.optimizer import Optimizer, ema_update
from unialign_jax.training.state import Networks, TrainState

# What the compilers are asked for beside their defaults, by platform: gathers that run beside matmuls in a loop.
COMPILER_OPTIONS = {
    "tpu": {"xla_enable_async_all_gather": True, "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
}
BUCKETS = 4  # the flow loss is reported by quarter of sigma, the text loss by quarter of the mask fraction


class Levels(NamedTuple):
    """The noise and the masking of each sample."""

    sigma: jax.Array  # [B] float32, noise of the image pass
    mask_fraction: jax.Array  # [B] float32, of the text pass


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key for each use in a step. A new use leaves the random numbers of the others as they were."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def encode_images(networks: Networks, frozen: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Images and conditions, or their cached moments -> latents [B, h, w, C], and [B, K, h, w, C] or None.

    The latents are sampled and normalised.
    """
    if "image_moments" in batch:
        moments = batch["image_moments"][:, None]
        if "condition_moments" in batch:
            moments = jnp.concatenate([moments, batch["condition_moments"]], axis=1)
        moments = Moments(*jnp.split(moments.astype(jnp.float32), 2, axis=-1))
        latents = sample_latents(moments, key, networks.autoencoder.config)
        return latents[:, 0], latents[:, 1:] if "condition_moments" in batch else None
    images = batch["image"][:, None]
    if "conditions" in batch:
        images = jnp.concatenate([images, batch["conditions"]], axis=1)
    batch_size, count = images.shape[:2]
    pixels = from_pixels(spread_rows(images.reshape(batch_size * count, *images.shape[2:])))
    moments = networks.autoencoder.apply({"params": frozen["autoencoder"]}, pixels, method="encode")
    latents = sample_latents(Moments(*moments), key, networks.autoencoder.config)
    latents = latents.reshape(batch_size, count, *latents.shape[1:])
    return latents[:, 0], latents[:, 1:] if count > 1 else None


def encode_texts(networks: Networks, frozen: dict, *ids: jax.Array, beside: Any = None):
    """T5 over several [B, L] id arrays in one call. Their rows are interleaved, so that a split batch stays split.

    Returns their embeddings, and with `beside` (models/text_encoder.py) those and its results.
    """
    stacked = jnp.stack(ids, axis=1)
    batch_size, count, length = stacked.shape
    embeddings = networks.text_encoder.apply(
        {"params": frozen["text_encoder"]}, stacked.reshape(batch_size * count, length), beside=beside
    )
    embeddings, results = embeddings if beside else (embeddings, None)
    embeddings = jax.lax.stop_gradient(embeddings).reshape(batch_size, count, length, -1)
    embeddings = tuple(embeddings[:, i] for i in range(count))
    return (embeddings, results) if beside else embeddings


def sum_and_count(values: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """[sum, count] float32 of the values: these add up over micro-batches, as means do not."""
    where = jnp.ones(values.shape, bool) if where is None else where
    return jnp.stack([jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where)]).astype(jnp.float32)


def bucketed(name: str, values: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    """The metrics of `values` [B] in each quarter of `positions` [B] in [0, 1]."""
    bucket = jnp.clip((positions * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    edges = [f"{i / BUCKETS:.2f}-{(i + 1) / BUCKETS:.2f}" for i in range(BUCKETS)]
    return {f"{name}/{edge}": sum_and_count(values, bucket == i) for i, edge in enumerate(edges)}


def compute_losses(
    config: ConfigDict,
    networks: Networks,
    kind: str,
    mask_id: int,
    eos_id: int,
    params: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    levels: Any = None,
):
    """Both passes of one micro-batch -> (total loss, metrics as sums and counts).

    Image pass: noisy target and clean conditions, clean prompt, sigma. Text pass: clean target, masked text, sigma 0.

    Args:
      levels: for validation, sigma and mask fractions instead of drawn ones. No prompt is dropped then, and the
        cross-modal loss is reported even where its weight is 0.
    """
    transformer = networks.transformer
    if networks.lora is not None:  # the base lies as compute needs it, the adapters are whole everywhere
        transformer = adapted_network(transformer, networks.lora)
        params = {"transformer": beside_kernels(frozen["base"], params["transformer"])}
    batch_size = batch["text_ids"].shape[0]
    latents, conditions = encode_images(networks, frozen, batch, named_key(key, "latents"))

    if levels is None:
        mask_fraction = masking.sample_mask_fractions(
            named_key(key, "mask fraction"), batch_size, min_fraction=config.min_mask_fraction
        )
    else:
        mask_fraction = levels.mask_fraction
    maskable = batch["text_is_target"]
    masked_ids, is_masked = masking.mask_tokens(
        named_key(key, "mask"), batch["text_ids"], mask_fraction, maskable, mask_id
    )

    losses, metrics = {}, {}
    if has_image_pass(kind):
        prompt_ids = batch["prompt_ids"]
        if levels is None:
            # T5 of an empty prompt is T5 of nothing but end-of-text: dropping ids is dropping the embedding.
            dropped = jax.random.bernoulli(named_key(key, "prompt dropout"), config.prompt_dropout, (batch_size, 1))
            prompt_ids = jnp.where(dropped, eos_id, prompt_ids)
        if levels is None:
            sigma = flow.sample_sigma(named_key(key, "sigma"), batch_size, **sigma_settings(config))
        else:
            sigma = levels.sigma
        noise = jax.random.normal(named_key(key, "noise"), latents.shape)
        noisy = flow.interpolate(latents, noise, sigma)

    texts = (prompt_ids, masked_ids) if has_image_pass(kind) else (masked_ids,)
    if networks.lora is not None:
        texts = encode_texts(networks, frozen, *texts)
    else:
        scan = lambda x, *beside: encode_texts(networks, x[0], *x[1], beside=beside or None)  # noqa: E731
        dtypes = lambda path: storage_dtype(path, transformer.config.dtype)  # noqa: E731
        depth, operands = networks.text_encoder.config.depth, ({"text_encoder": frozen["text_encoder"]}, texts)
        texts, params = sharding.params_for_compute(params, dtypes, (scan, depth, operands))
    *prompt, masked_text = texts

    weights, text_sigma = {"params": params["transformer"]}, jnp.zeros((batch_size,))
    drops = networks.lora is not None and networks.lora.dropout and levels is None

    def run(name, *inputs, **options):
        options |= {"rngs": {"dropout": named_key(key, f"dropout of the {name}")}} if drops else {}
        return transformer.apply(weights, *inputs, **options)

    if has_image_pass(kind) and conditions is None:
        # Both passes have the same shapes: as one forward, each weight is read (and under FSDP gathered) once.
        pairs = (in_pairs(noisy, latents), in_pairs(*prompt, masked_text), in_pairs(sigma, text_sigma))
        image_pass = text_pass = run("passes", *pairs, paired=True)
    elif has_image_pass(kind):
        passes = (noisy, *prompt, sigma, conditions), (latents, masked_text, text_sigma)
        image_pass, text_pass = run("passes", *passes, method="several")
    else:
        text_pass = run("text pass", latents, masked_text, text_sigma)

    if has_image_pass(kind):
        losses["flow_matching"] = flow_matching_loss(
            image_pass.velocity, flow.velocity(latents, noise), sigma, form=config.parity.flow_matching_form
        )
        metrics |= bucketed("flow_matching_by_sigma", losses["flow_matching"], sigma)
    losses["masked_text"] = masked_text_loss(
        text_pass.text_logits,
        batch["text_ids"],
        is_masked,
        maskable,
        mask_fraction,
        mask_id=mask_id,
        normalization=config.parity.masked_text_normalization,
    )
    metrics |= bucketed("masked_text_by_mask_fraction", losses["masked_text"], mask_fraction)

    if has_image_pass(kind) and (config.loss_weights.cross_modal or levels is not None):
        losses["cross_modal"] = cross_modal_loss(
            image_pass.image_features,
            text_pass.text_features,
            temperature=config.cross_modal.temperature,
            direction=config.parity.cross_modal_direction,
        )
    if config.loss_weights.intrinsic_modal:
        cell = config.teacher.grid if has_image_pass(kind) else 0
        if networks.teacher is not None:
            batch = batch | pooled_features(frozen["teacher"], batch, networks.teacher, cell=cell)
        image_tap = image_pass.image_tap if has_image_pass(kind) else text_pass.image_tap
        if cell:
            patch, factor = transformer.config.patch_size, networks.autoencoder.config.downsample_factor
            grid = tuple(side // patch for side in latents.shape[1:3])
            image_tap = to_cells(image_tap, grid, tuple(side * factor // cell for side in latents.shape[1:3]))
        to_image, to_text = networks.heads.apply(
            {"params": params["heads"]}, image_tap, text_pass.text_tap, pool_image=not cell
        )
        losses["intrinsic_modal"] = intrinsic_modal_loss(to_text, batch["teacher_text"])
        if has_image_pass(kind):
            target = batch["teacher_grid" if cell else "teacher_image"]
            losses["intrinsic_modal"] += intrinsic_modal_loss(to_image, target)

    total = sum(config.loss_weights[name] * jnp.mean(values) for name, values in losses.items())
    metrics |= {name: sum_and_count(values) for name, values in losses.items()}
    metrics["loss"] = jnp.stack([total, 1.0])
    return total, metrics


def sigma_settings(config: ConfigDict) -> dict:
    """The distribution of the noise levels, as arguments of `flow.sample_sigma`."""
    c = config.sigma
    return {"mean": c.mean, "std": c.std, "shift": c.shift, "levels": config.parity.sigma_levels or None}


def micro_batches(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """Arrays [B, ...] -> [count, B / count, ...]: each has every count-th row, so that no row changes device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch)


def make_train_step(
    config: ConfigDict,
    networks: Networks,
    tx: Optimizer,
    schedule: optax.Schedule,
    kind: str,
    mask_id: int,
    eos_id: int,
) -> Callable:
    """The step of one stream: (TrainState, frozen, batch) -> (TrainState, metrics).

    Gradients are averaged over `config.accumulation` micro-batches. Metrics are arrays [2]: mean = sum / count.
    "replaced_records" counts the records of the batch that could not be decoded, over all hosts.
    """

    def loss_and_gradients(params, frozen, batch, key):
        loss = lambda p: compute_losses(config, networks, kind, mask_id, eos_id, p, frozen, batch, key)  # noqa: E731
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return metrics, gradients

    def accumulate(params, frozen, batch, key):
        count = config.accumulation
        if count == 1:
            return loss_and_gradients(params, frozen, batch, jax.random.fold_in(key, 0))
        split = micro_batches(batch, count)

        def body(carry, inputs):
            index, micro_batch = inputs
            result = loss_and_gradients(params, frozen, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, result), None

        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(loss_and_gradients, params, frozen, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (metrics, gradients), _ = jax.lax.scan(body, zeros, (jnp.arange(count), split))
        return metrics, jax.tree.map(lambda g: g / count, gradients)

    def train_step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        metrics, gradients = accumulate(state.params, frozen, batch, key)
        after, norms = update_state(config, tx, state, gradients)
        single = norms | {
            "learning_rate": schedule(state.step),
            "replaced_records": jnp.sum(batch["replaced"]),
        }
        metrics |= {name: jnp.stack([jnp.asarray(value, jnp.float32), 1.0]) for name, value in single.items()}
        return after, metrics

    return train_step


def update_state(config: ConfigDict, tx: Optimizer, state: TrainState, gradients: dict) -> tuple[TrainState, dict]:
    """Optimizer and average: the new state, and the norms of gradients, updates and new parameters by name."""
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if config.ema_decay:
        # A shorter memory at first: in a short run the random start would dominate the average.
        ramp = (1 + state.step) / (10 + state.step)
        ema = ema_update(ema, params["transformer"], jnp.minimum(config.ema_decay, ramp))
    trees = {"gradient_norm": gradients, "update_norm": updates, "parameter_norm": params}
    norms = {name: optax.global_norm(tree) for name, tree in trees.items()}
    return TrainState(state.step + 1, params, ema, opt_state), norms


def batch_shapes(config: ConfigDict, stream: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a stream (see `data.streams.Stream`), from the configurations of the run and the stream."""
    size = tuple(stream.get("bucket", ())) or (config.image_size, config.image_size)
    length, width, factor = config.text_length, config.heads.teacher_width, config.autoencoder.downsample_factor
    moments = (size[0] // factor, size[1] // factor, 2 * config.autoencoder.latent_channels)
    cached = config.data.cached_latents
    example = {
        "image_moments" if cached else "image": (moments, jnp.float16) if cached else ((*size, 3), jnp.uint8),
        "prompt_ids": ((length,), jnp.int32),
        "text_ids": ((length,), jnp.int32),
        "text_is_target": ((length,), jnp.bool_),
        "replaced": ((), jnp.bool_),
    }
    if stream.num_conditions and cached:
        example["condition_moments"] = ((stream.num_conditions, *moments), jnp.float16)
    elif stream.num_conditions:
        example["conditions"] = ((stream.num_conditions, *size, 3), jnp.uint8)
    if config.loss_weights.intrinsic_modal and config.teacher.online:
        example["teacher_ids"] = ((TEACHER_TOKENS,), jnp.int32)
        example["teacher_is_token"] = ((TEACHER_TOKENS,), jnp.bool_)
    elif config.loss_weights.intrinsic_modal:
        example |= {name: ((width,), jnp.float16) for name in ("teacher_image", "teacher_text")}
        if cell := config.teacher.grid if has_image_pass(stream.kind) else 0:
            example["teacher_grid"] = (((size[0] // cell) * (size[1] // cell), width), jnp.float16)
    return {name: jax.ShapeDtypeStruct((config.batch_size, *shape), kind) for name, (shape, kind) in example.items()}


def lower_train_step(
    step: Callable, mesh: Mesh, state: TrainState, frozen: dict, batch: dict, platforms: tuple[str, ...] | None = None
) -> jax.stages.Lowered:
    """A train step, ready to compile; the state is donated.

    Args:
      state, frozen: shapes, dtypes and shardings.
      batch: shapes and dtypes; it is split over the mesh's batch axes.
      platforms: to lower for, such as ("tpu",); that of the mesh's devices when None.
    """
    place = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in batch.items()}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
            compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
        )
        return jitted.trace(state, frozen, batch).lower(lowering_platforms=platforms)
