"""The SD3 MM-DiT as UniAlignment extends it: an image and a text stream, both read out after the last block.

Facts: Stable Diffusion 3 (arXiv 2403.03206), DualDiffusion (arXiv 2501.00289) and UniAlignment (arXiv 2509.23760).
Against SD3: T5 tokens only (no CLIP, no pooled vector, so the modulation depends on time alone), a full context half in
the last block, a text head, condition images appended to the image sequence, and a tap after block `tap_depth`.

Shape letters: B batch, H W latent height and width, C latent channels, K conditions, N image tokens, L text tokens,
D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from unialign_jax.models.attention import attention
from unialign_jax.parallel.activations import first_tokens, join_tokens, keep_tokens_sharded, last_tokens
from unialign_jax.parallel.few_rows import dense_of_all_blocks, moves_rows
from unialign_jax.parallel.gradients import scan_blocks, split_dot_general

XAVIER = nn.initializers.xavier_uniform()
REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Architecture of the MM-DiT; the defaults are UniAlignment's 2 B model.

    `remat` says what the forward pass saves for the backward pass: "none" saves every activation, "dots" the matmul
    outputs, "block" the inputs of the blocks, "offload" the same in the host's memory. The rest is recomputed.
    `max_patches` is the side of SD3's positional grid, `base_patches` the side at which neighbours are one unit apart.
    `text_positions` is the number of rows of a learned table that is added to the text tokens after `text_embed`, at
    least the text's length. 0 adds nothing, as in the released model.
    """

    depth: int = 24
    num_heads: int = 24
    head_width: int = 64
    mlp_ratio: int = 4
    latent_channels: int = 16
    patch_size: int = 2
    text_width: int = 4096
    vocab_size: int = 32100
    tap_depth: int = 8
    max_patches: int = 192
    base_patches: int = 64
    text_positions: int = 0
    attention: str = "xla"  # or "cudnn", "splash"; configurations may say "auto"
    remat: str = "block"
    dtype: str = "bfloat16"

    @property
    def width(self) -> int:
        return self.num_heads * self.head_width


class MMDiTOutput(NamedTuple):
    """The network's outputs; features and taps are those of the target's tokens, never of the conditions'."""

    velocity: jax.Array  # [B, H, W, C] float32, the predicted noise - clean
    text_logits: jax.Array  # [B, L, V] float32
    image_features: jax.Array  # [B, N, D] after the final modulated norm
    text_features: jax.Array  # [B, L, D] after the final norm
    image_tap: jax.Array  # [B, N, D] after block tap_depth
    text_tap: jax.Array  # [B, L, D] after block tap_depth


class Modulation(NamedTuple):
    """One stream's adaLN vectors in a block, each [B, 1, D]; the order is SD3's."""

    shift_attention: jax.Array
    scale_attention: jax.Array
    gate_attention: jax.Array
    shift_mlp: jax.Array
    scale_mlp: jax.Array
    gate_mlp: jax.Array

    @classmethod
    def of(cls, vectors: jax.Array) -> "Modulation":
        """Names the six vectors of [B, 6, D]."""
        return cls(*(vectors[:, i, None] for i in range(6)))


class Modulations(NamedTuple):
    """All adaLN vectors of the network at some noise levels; they depend on sigma alone.

    `block_modulations` makes one row for each of S sigmas; `MMDiT` takes one, without the axis S, for a whole batch.
    """

    image: jax.Array  # [S, depth, 6, D] the image stream's, in the compute dtype
    text: jax.Array  # [S, depth, 6, D] the text stream's
    head: jax.Array  # [S, 2, D] shift and scale of the image head, float32


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis in float32 (eps 1e-6, no learned scale), as SD3 does everywhere."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    return (layer_norm(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(dtype)


def time_features(sigma: jax.Array, features: int = 256) -> jax.Array:
    """Sinusoids of the SD3 timestep 1000 * sigma: [B] -> [B, features] float32, cosines first."""
    half = features // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * sigma.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@functools.cache
def position_table(rows: int, columns: int, width: int, max_patches: int, base_patches: int) -> np.ndarray:
    """SD3's fixed 2-D sinusoids, [rows * columns, width] float32: the crop from the middle of the max_patches grid.

    The first half of the width encodes the column, the second the row, each as sines then cosines.
    """
    step = max_patches / base_patches
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(count):
        start = (max_patches - count) // 2
        angles = np.outer((start + np.arange(count)) / step, omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    column = np.broadcast_to(encode(columns)[None], (rows, columns, width // 2))
    row = np.broadcast_to(encode(rows)[:, None], (rows, columns, width // 2))
    return np.concatenate([column, row], axis=-1).reshape(rows * columns, width).astype(np.float32)


def patchify(latents: jax.Array, patch: int) -> jax.Array:
    """[..., H, W, C] -> [..., N, patch * patch * C], row by row, each patch flattened as (row, column, channel)."""
    *lead, height, width, channels = latents.shape
    x = latents.reshape(*lead, height // patch, patch, width // patch, patch, channels)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*lead, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(tokens: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """The inverse of `patchify`: [B, N, patch * patch * C] -> [B, H, W, C]."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return jnp.swapaxes(x, 2, 3).reshape(batch, height, width, -1)


def first_of_pairs(x: jax.Array) -> jax.Array:
    """The rows 0, 2, ... of [2B, ...], by a reshape, which keeps a split batch split."""
    return x.reshape(x.shape[0] // 2, 2, *x.shape[1:])[:, 0]


def second_of_pairs(x: jax.Array) -> jax.Array:
    """The rows 1, 3, ... of [2B, ...]."""
    return x.reshape(x.shape[0] // 2, 2, *x.shape[1:])[:, 1]


def in_pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """Interleaves the rows of two arrays: [B, ...] and [B, ...] -> [2B, ...]."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def kernel_path(module: nn.Module, name: str) -> str:
    """The path of the weight of a module's layer `name`, as the sharding table knows it."""
    return "/".join((*module.path, name, "kernel"))


def dense(module: nn.Module, name: str, features: Any, axis: Any = -1, init: Callable = XAVIER) -> nn.DenseGeneral:
    """The dense layer of a module's attribute `name`."""
    dot_general = split_dot_general(kernel_path(module, name))
    return nn.DenseGeneral(features, axis=axis, dtype=module.config.dtype, kernel_init=init, dot_general=dot_general)


def head(module: nn.Module, name: str, features: int, init: Callable) -> nn.Dense:
    """The dense layer of a module's attribute `name`, with a float32 result."""
    dot_general = functools.partial(split_dot_general(kernel_path(module, name)), preferred_element_type=jnp.float32)
    return nn.Dense(features, dtype=module.config.dtype, kernel_init=init, dot_general=dot_general)


class StreamHalf(nn.Module):
    """One stream's half of a joint block: its modulation, its q k v and output projections, its MLP."""

    config: MMDiTConfig

    def setup(self):
        c = self.config
        self.modulation = dense(self, "modulation", (6, c.width), init=nn.initializers.zeros)
        self.qkv = dense(self, "qkv", (3, c.num_heads, c.head_width))
        self.out = dense(self, "out", c.width, axis=(-2, -1))
        self.mlp_in = dense(self, "mlp_in", c.mlp_ratio * c.width)
        self.mlp_out = dense(self, "mlp_out", c.width)

    def modulate(self, time_embedding: jax.Array):
        """The stream's adaLN vectors: [B, D] -> [B, 6, D]."""
        return self.modulation(nn.silu(time_embedding))

    def project(self, x: jax.Array, m: Any):
        """Queries, keys and values of the normed and modulated x, each [B, tokens, heads, head width]."""
        qkv = self.qkv(modulated_norm(x, m.shift_attention, m.scale_attention, self.config.dtype))
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def update(self, x: jax.Array, attended: jax.Array, m: Any):
        """The two residual steps of the stream: attention, then MLP."""
        x = x + m.gate_attention * self.out(attended)
        hidden = self.mlp_in(modulated_norm(x, m.shift_mlp, m.scale_mlp, self.config.dtype))
        return x + m.gate_mlp * self.mlp_out(nn.gelu(hidden, approximate=True))


class JointBlock(nn.Module):
    """A joint block: each stream has its own weights, attention runs over the tokens of both."""

    config: MMDiTConfig

    def setup(self):
        self.image = StreamHalf(self.config)
        self.text = StreamHalf(self.config)

    def __call__(self, image, text, time_embedding, vectors=None):
        """`vectors`: the precomputed modulation [1, 6, D] of each stream, or None to compute it from the time."""
        image, text = checkpoint_name(image, "block input"), checkpoint_name(text, "block input")
        if vectors is None:
            vectors = self.image.modulate(time_embedding), self.text.modulate(time_embedding)
        image_modulation, text_modulation = map(Modulation.of, vectors)
        image_qkv = self.image.project(image, image_modulation)
        text_qkv = self.text.project(text, text_modulation)
        query, key, value = map(join_tokens, image_qkv, text_qkv)
        attended = attention(query, key, value, implementation=self.config.attention)
        tokens = image.shape[1]
        image = self.image.update(image, first_tokens(attended, tokens), image_modulation)
        text = self.text.update(text, last_tokens(attended, tokens), text_modulation)
        return keep_tokens_sharded(image), keep_tokens_sharded(text)


class Layer(nn.Module):
    """The body of the scan: one block, and the taps, which keep the outputs of block `tap_depth`."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, carry, index, vectors, time_embedding):
        image, text, image_tap, text_tap = carry
        block = JointBlock
        if self.config.remat != "none":
            block = nn.remat(JointBlock, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
        image, text = block(self.config, name="joint")(image, text, time_embedding, vectors)
        # Outside the remat: `where` saves no residuals, so that the taps cost no memory per block.
        reached = index == self.config.tap_depth - 1
        image_tap = jnp.where(reached, first_tokens(image, image_tap.shape[1]), image_tap)
        text_tap = jnp.where(reached, text, text_tap)
        return (image, text, image_tap, text_tap), None

    @staticmethod
    def weights_read(params: dict, vectors: Any) -> dict:
        """The parameters that a block reads: with `vectors`, not those of the modulations."""
        return params if vectors is None else {"joint": joint_without_modulations(params["joint"])}


class TimeEmbedder(nn.Module):
    """sigma [B] -> [B, D]: sinusoids, then a two-layer MLP; all float32."""

    width: int

    @nn.compact
    def __call__(self, sigma):
        init = nn.initializers.normal(0.02)
        hidden = nn.silu(nn.Dense(self.width, kernel_init=init, name="hidden")(time_features(sigma)))
        return nn.Dense(self.width, kernel_init=init, name="out")(hidden)


class MMDiT(nn.Module):
    """The one network of both passes; see `MMDiTOutput` for what it returns.

    Args of `apply`:
      latents: [B, H, W, C] normalised latents, noisy in the image pass, clean in the text pass. H and W are multiples
        of the patch size and at most max_patches patches.
      text_embeddings: [B, L, text_width] T5 embeddings.
      sigma: [B] noise level in [0, 1], 0 is clean; the text pass runs at 0. None where `modulations` are given.
      conditions: [B, K, h, w, C] clean latents of K condition images, or None. Their tokens follow the target's in the
        image sequence, with the same patch embedding, positions and modulation.
      modulations: one row of `block_modulations`, for the sigma of all samples. The weights that compute modulations
        are then not read, and may be missing: `without_modulations(params)`.
      paired: rows 2b and 2b + 1 are the image pass and the text pass of sample b, run as one forward. The outputs have
        one row per sample: the image side from its image pass, the text side from its text pass.

    `scan_blocks` runs the blocks, and decides how the gradients of their weights are reduced (parallel/gradients.py).
    Raises ValueError when a size does not fit.
    """

    config: MMDiTConfig
    scan_blocks: Callable = scan_blocks

    def setup(self):
        c = self.config
        self.patch_embed = dense(self, "patch_embed", c.width)
        self.text_embed = dense(self, "text_embed", c.width)
        if c.text_positions:
            # Zero at the start: a model that was converted without the table computes the same as before.
            self.text_positions = self.param("text_positions", nn.initializers.zeros, (c.text_positions, c.width))
        self.time_embed = TimeEmbedder(c.width)
        self.blocks = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},  # of adapters, models/lora.py
            in_axes=(0, 0, nn.broadcast),
            length=c.depth,
        )(c)
        self.image_head_modulation = head_modulation_layer(c)
        patch_features = c.patch_size * c.patch_size * c.latent_channels
        self.image_head = head(self, "image_head", patch_features, init=nn.initializers.zeros)
        self.text_head = head(self, "text_head", c.vocab_size, init=nn.initializers.normal(0.02))

    def __call__(
        self,
        latents: jax.Array,
        text_embeddings: jax.Array,
        sigma: jax.Array | None,
        conditions: jax.Array | None = None,
        *,
        modulations: Modulations | None = None,
        paired: bool = False,
    ) -> MMDiTOutput:
        read_out, block_pass = self.begin(latents, text_embeddings, sigma, conditions, modulations, paired)
        return read_out(*self.run_blocks(block_pass)[0])

    def several(self, *passes: tuple) -> list[MMDiTOutput]:
        """The outputs of passes of several shapes, each (latents, text_embeddings, sigma[, conditions]).

        Where gradients are reduced a block late, the passes run side by side, so that they are reduced once.
        """
        begun = [self.begin(*each) for each in passes]
        carries = self.run_blocks(*(block_pass for _, block_pass in begun))
        return [read_out(*carry) for (read_out, _), carry in zip(begun, carries, strict=True)]

    def begin(self, latents, text_embeddings, sigma, conditions=None, modulations=None, paired=False):
        """A pass up to the blocks: the function of the last carry that ends it, and its (carry, inputs, shared)."""
        c = self.config
        check_inputs(c, latents, text_embeddings, sigma, conditions, modulations)
        image, text = self.embed(latents, conditions, text_embeddings)
        time_embedding = vectors = None
        if modulations is None:
            time_embedding = self.time_embed(sigma)
            head_modulation = self.image_head_modulation(nn.silu(time_embedding))
            vectors = self.vectors_of_blocks(time_embedding)
            time_embedding = time_embedding if vectors is None else None
        else:
            vectors = modulations.image[:, None], modulations.text[:, None]
            head_modulation = modulations.head[None]
        image, text = keep_tokens_sharded(image), keep_tokens_sharded(text)
        target_tokens = latents.shape[1] * latents.shape[2] // c.patch_size**2
        carry = image, text, jnp.zeros_like(first_tokens(image, target_tokens)), jnp.zeros_like(text)
        read_out = functools.partial(
            self.read_out, head_modulation=head_modulation, latent_size=latents.shape[1:3], paired=paired
        )
        return read_out, (carry, vectors, time_embedding)

    def run_blocks(self, *passes: tuple) -> list[tuple]:
        c = self.config
        return self.scan_blocks(self.blocks, Layer(c, parent=None), c.depth, passes, late=c.remat != "offload")

    def vectors_of_blocks(self, time_embedding: jax.Array):
        """The modulations of all blocks, [depth, B, 6, D] of each stream, where their kernels stay split; or None."""
        if self.is_initializing():
            return None
        vectors = []
        for stream in ("image", "text"):
            weights = self.blocks.variables["params"]["joint"][stream].get("modulation", {})
            path = f"blocks/joint/{stream}/modulation/kernel"
            if set(weights) != {"kernel", "bias"} or not moves_rows(path, weights["kernel"], len(time_embedding)):
                return None  # weights of none, or with an adapter
            vectors.append(dense_of_all_blocks(nn.silu(time_embedding), weights["kernel"], weights["bias"]))
        return tuple(vectors)

    def embed(self, latents: jax.Array, conditions: jax.Array | None, text_embeddings: jax.Array):
        """The image tokens [B, N, D], the target's and the conditions' joined, and the text tokens [B, L, D]."""
        c = self.config
        image = self.embed_image(latents)
        if conditions is not None:
            condition_tokens = self.embed_image(conditions)
            condition_tokens = condition_tokens.reshape(latents.shape[0], -1, c.width)
            image = join_tokens(image, condition_tokens)
        text = self.text_embed(text_embeddings)
        if c.text_positions:
            text = text + self.text_positions[: text.shape[1]].astype(c.dtype)
        return image, text

    def embed_image(self, x: jax.Array):
        """Patch embedding and positions: [..., H, W, C] -> [..., N, D]."""
        c = self.config
        rows, columns = x.shape[-3] // c.patch_size, x.shape[-2] // c.patch_size
        positions = position_table(rows, columns, c.width, c.max_patches, c.base_patches)
        return self.patch_embed(patchify(x, c.patch_size)) + jnp.asarray(positions, c.dtype)

    def read_out(
        self,
        image: jax.Array,
        text: jax.Array,
        image_tap: jax.Array,
        text_tap: jax.Array,
        head_modulation: Any,
        latent_size: tuple[int, int],
        paired: bool,
    ):
        """The final norms and the heads, on the outputs of the last block."""
        c = self.config
        if paired:
            head_modulation, image, image_tap = (first_of_pairs(x) for x in (head_modulation, image, image_tap))
            text, text_tap = second_of_pairs(text), second_of_pairs(text_tap)
        shift, scale = head_modulation[:, 0, None], head_modulation[:, 1, None]
        image_features = modulated_norm(first_tokens(image, image_tap.shape[1]), shift, scale, c.dtype)
        text_features = layer_norm(text).astype(c.dtype)
        velocity, text_logits = self.image_head(image_features), self.text_head(text_features)
        return MMDiTOutput(
            velocity=unpatchify(velocity, *latent_size, c.patch_size),
            text_logits=text_logits,
            image_features=image_features,
            text_features=text_features,
            image_tap=image_tap,
            text_tap=text_tap,
        )


def head_modulation_layer(config: MMDiTConfig) -> nn.DenseGeneral:
    return nn.DenseGeneral((2, config.width), kernel_init=nn.initializers.zeros)


def block_modulations(config: MMDiTConfig, params: dict, sigma: jax.Array) -> Modulations:
    """The adaLN vectors of every block for the noise levels sigma [S], by the network's own layers.

    The layers that compute them hold a third of the parameters. A sampler computes the vectors once, outside its loop,
    and the loop reads a row of this table instead of those weights. The numbers are exactly the same.
    """
    chex.assert_rank(sigma, 1)
    embedding = TimeEmbedder(config.width).apply({"params": params["time_embed"]}, sigma)

    def stream(half):
        def layer(kernel_and_bias):
            variables = {"params": {"modulation": kernel_and_bias}}
            return StreamHalf(config).apply(variables, embedding, method="modulate")

        return jnp.swapaxes(jax.lax.map(layer, half["modulation"]), 0, 1)

    blocks = params["blocks"]["joint"]
    head = head_modulation_layer(config).apply({"params": params["image_head_modulation"]}, nn.silu(embedding))
    return Modulations(image=stream(blocks["image"]), text=stream(blocks["text"]), head=head)


def without_modulations(params: dict) -> dict:
    """The two thirds of the parameters that the network reads when it is given `modulations`."""
    rest = {k: v for k, v in params.items() if k not in ("time_embed", "image_head_modulation", "blocks")}
    return rest | {"blocks": {"joint": joint_without_modulations(params["blocks"]["joint"])}}


def joint_without_modulations(streams: dict) -> dict:
    return {name: {k: v for k, v in half.items() if k != "modulation"} for name, half in streams.items()}


def check_inputs(
    config: MMDiTConfig,
    latents: jax.Array,
    text_embeddings: jax.Array,
    sigma: jax.Array,
    conditions: jax.Array | None,
    modulations: Modulations | None = None,
) -> None:
    """Raises ValueError, with the numbers, when the inputs of the MM-DiT do not fit it or each other."""
    c = config
    if not 1 <= c.tap_depth <= c.depth:
        raise ValueError(f"tap_depth is {c.tap_depth}, but the network has {c.depth} blocks: choose 1 to {c.depth}")
    if c.remat != "none" and c.remat not in REMAT_POLICIES:
        raise ValueError(f"remat is {c.remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}")
    if latents.ndim != 4:
        raise ValueError(f"latents have shape {latents.shape}, expected [batch, height, width, channels]")
    batch = latents.shape[0]
    if conditions is not None and (conditions.ndim != 5 or conditions.shape[0] != batch):
        raise ValueError(
            f"conditions have shape {conditions.shape}, expected [{batch}, count, height, width, {c.latent_channels}]"
        )
    images = {"latents": latents} if conditions is None else {"latents": latents, "conditions": conditions}
    for name, array in images.items():
        height, width, channels = array.shape[-3:]
        if channels != c.latent_channels:
            raise ValueError(f"{name} have {channels} channels, the network expects {c.latent_channels}")
        for side, size in (("high", height), ("wide", width)):
            if size % c.patch_size or not 0 < size <= c.max_patches * c.patch_size:
                raise ValueError(
                    f"{name} are {size} {side}, expected a multiple of {c.patch_size} "
                    f"from {c.patch_size} to {c.max_patches * c.patch_size}"
                )
    if text_embeddings.ndim != 3 or text_embeddings.shape[0] != batch or text_embeddings.shape[2] != c.text_width:
        raise ValueError(
            f"text_embeddings have shape {text_embeddings.shape}, expected [{batch}, tokens, {c.text_width}]"
        )
    if c.text_positions and text_embeddings.shape[1] > c.text_positions:
        raise ValueError(
            f"text_embeddings have {text_embeddings.shape[1]} tokens, the model has positions for {c.text_positions}"
        )
    if modulations is not None:
        if modulations.image.shape != (c.depth, 6, c.width):
            raise ValueError(
                f"modulations have shape {modulations.image.shape}, expected one row, {(c.depth, 6, c.width)}"
            )
    elif sigma.shape != (batch,):
        raise ValueError(f"sigma has shape {sigma.shape}, expected [{batch}], one per sample")


@dataclasses.dataclass(frozen=True)
class AlignmentHeadsConfig:
    """Sizes of the two projections onto the teacher's features.

    `final_silu` is for parity with the released checkpoint. `pool` averages the tokens before the projection.
    """

    hidden_width: int = 2048
    teacher_width: int = 3584
    final_silu: bool = False
    pool: bool = True


class AlignmentHeads(nn.Module):
    """Projects the taps onto the teacher's feature space; used in training only (paper, equation 4).

    (image_tap [B, N, D], text_tap [B, L, D]) -> (image [B, teacher_width], text [B, teacher_width]), float32. Tokens
    are averaged first, as in the released code; with `pool=False` each is projected: [B, N or L, teacher_width], and
    with `pool_image=False` each of the image's.
    Raises AssertionError when the taps differ in batch or width.
    """

    config: AlignmentHeadsConfig

    @nn.compact
    def __call__(self, image_tap, text_tap, pool_image=True):
        chex.assert_rank([image_tap, text_tap], 3)
        chex.assert_equal_shape([image_tap, text_tap], dims=(0, 2))

        def project(tap, name, pool=True):
            x = tap.astype(jnp.float32)
            if self.config.pool and pool:
                x = jnp.mean(x, axis=1)
            x = nn.silu(dense(self.config.hidden_width, f"{name}_hidden")(x))
            x = dense(self.config.teacher_width, f"{name}_out")(x)
            return nn.silu(x) if self.config.final_silu else x

        def dense(features, name):
            return nn.Dense(features, dot_general=split_dot_general(f"heads/{name}/kernel"), name=name)

        return project(image_tap, "image", pool_image), project(text_tap, "text")
