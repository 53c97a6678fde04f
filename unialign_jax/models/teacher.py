"""The frozen teacher of the intrinsic-modal loss: Qwen2.5-VL's vision tower and input embeddings.

The tower encodes images. Texts are only looked up in the table of embeddings: as in the released UniAlignment code, no
layer of the language model runs. Both are averaged over tokens, which gives one vector per image and one per text.

Facts: Qwen2.5-VL (arXiv 2502.13923) as the transformers library runs it: RMS norms, SwiGLU with biases, rotary
positions of row and column, attention inside windows of 112 pixels except in four layers that see the whole image,
and a merger that makes one token of 2 x 2 patches.

Shape letters: B batch, H W image height and width, N patches, M merged tokens, P values of a patch, L text tokens,
T width of the features.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.models.attention import attention

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of images in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Architecture of the teacher; the defaults are Qwen2.5-VL-7B's. `dtype` is that of the matmuls.

    `window_size` is in pixels of the resized image; `full_attention_layers` count from 0. `output_width` is the width
    of the image and text features. The resized image has from `min_pixels` to `max_pixels` pixels.
    """

    depth: int = 32
    width: int = 1280
    num_heads: int = 16
    mlp_width: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    output_width: int = 3584
    vocab_size: int = 152064
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    attention: str = "xla"  # of the full-attention layers; or "cudnn", "splash"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.width % self.num_heads or self.width // self.num_heads % 4:
            raise ValueError(
                f"teacher: width {self.width} over {self.num_heads} heads, expected a multiple of 4 for each head "
                "(rotary pairs of rows and of columns)"
            )
        if self.window_size < self.patch_size * self.merge_size:
            raise ValueError(
                f"teacher: window_size is {self.window_size}, expected at least one merged token, "
                f"{self.patch_size * self.merge_size} pixels"
            )
        wrong = [i for i in self.full_attention_layers if not 0 <= i < self.depth]
        if wrong:
            raise ValueError(f"teacher: full_attention_layers has {wrong}, expected 0 to {self.depth - 1}")

    @property
    def patch_values(self) -> int:
        """P: the values of one patch, counting the frames that a still image repeats."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """The side of a window in merged tokens."""
        return self.window_size // self.merge_size // self.patch_size


# Images -> patches


def resized_size(height: int, width: int, config: TeacherConfig) -> tuple[int, int]:
    """The tower's (height, width): the nearest multiples of 28 pixels, within min_pixels to max_pixels.

    512 becomes 504. Source: Qwen's smart_resize. Raises ValueError for an aspect ratio above 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height} x {width} pixels, expected an aspect ratio of at most 200")
    step = config.patch_size * config.merge_size
    resized = tuple(round(side / step) * step for side in (height, width))  # halves to even, as the original rounds
    if math.prod(resized) > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        resized = tuple(max(1, math.floor(side / shrink / step)) * step for side in (height, width))
    elif math.prod(resized) < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        resized = tuple(math.ceil(side * grow / step) * step for side in (height, width))
    return resized


def resize_matrix(size: int, new_size: int) -> np.ndarray:
    """The antialiased bicubic filter as a matrix: [new_size, size] float32, rows summing to one.

    The kernel is Keys' with a = -0.5, widened when the image shrinks, as in Pillow and torchvision.
    """
    widen = max(size / new_size, 1.0)
    center = (np.arange(new_size)[:, None] + 0.5) * (size / new_size)
    pixel = np.arange(size)[None] + 0.5
    distance = np.abs(pixel - center) / widen
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def preprocess_images(
    images: jax.Array, config: TeacherConfig, *, round_to_bytes: bool = False
) -> tuple[jax.Array, tuple[int, int]]:
    """Images of one size -> the tower's input: (patches [B, N, P] float32, grid (rows, columns) of patches).

    The order is Qwen2VLImageProcessor's: merged tokens row by row, the four patches of a token together, and the values
    of a patch as (channel, frame, row, column).

    Args:
      images: [B, H, W, 3], uint8 or float in [-1, 1] (clipped, as the reference does).
      round_to_bytes: resizes as Pillow does, through bytes, columns first. False keeps the resized pixels exact, as the
        reference does (it hands torchvision floats). The two differ by a level of 255, more where bicubic overshoots.

    Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {list(images.shape)}, expected [batch, height, width, 3]")
    batch, height, width, _ = images.shape
    new_height, new_width = resized_size(height, width, config)
    if jnp.issubdtype(images.dtype, jnp.floating):
        pixels = (jnp.clip(images.astype(jnp.float32), -1, 1) + 1) * 127.5
    else:
        pixels = images.astype(jnp.float32)
    to_bytes = (lambda x: jnp.clip(jnp.floor(x + 0.5), 0, 255)) if round_to_bytes else (lambda x: x)
    # At a TPU's default precision a matmul would round every pixel to bfloat16.
    columns, rows = resize_matrix(width, new_width), resize_matrix(height, new_height)
    pixels = to_bytes(jnp.einsum("bhwc,vw->bhvc", to_bytes(pixels), columns, precision="highest"))
    pixels = to_bytes(jnp.einsum("bhvc,uh->buvc", pixels, rows, precision="highest"))
    pixels = (pixels / 255 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)

    patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    grid = new_height // patch, new_width // patch
    x = pixels.reshape(batch, grid[0] // merge, merge, patch, grid[1] // merge, merge, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]  # batch, token, patch in it, channel, frame, pixel
    x = jnp.repeat(x, frames, axis=6)
    return x.reshape(batch, grid[0] * grid[1], config.patch_values), grid


# The tower


def rotary_table(grid: tuple[int, int], config: TeacherConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of each patch's rotation, both [N, head width / 2] float32, in the order of the patches.

    The first half of the angles encodes the row, the second the column.
    """
    merge = config.merge_size
    position = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"), axis=-1)
    position = position.reshape(grid[0] // merge, merge, grid[1] // merge, merge, 2).swapaxes(1, 2).reshape(-1, 2)
    half = config.width // config.num_heads // 2
    frequencies = (ROTARY_BASE ** -(np.arange(0, half, 2) / half)).astype(np.float32)
    angles = (position[..., None].astype(np.float32) * frequencies).reshape(-1, half)
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, cosine: np.ndarray, sine: np.ndarray) -> jax.Array:
    """Rotates queries or keys [B, N, heads, head width] in float32; value i of a head is paired with i + half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def to_windows(x: jax.Array, grid: tuple[int, int], config: TeacherConfig) -> jax.Array:
    """[B, N, ...] -> [B, windows, patches of a window, ...], padded with zeros at the edges."""
    side, merge = config.window_tokens, config.merge_size
    rows, columns = grid[0] // merge, grid[1] // merge
    x = x.reshape(x.shape[0], rows, columns, merge**2, *x.shape[2:])
    edges = [(0, 0)] * x.ndim
    edges[1], edges[2] = (0, -rows % side), (0, -columns % side)
    x = jnp.pad(x, edges)
    down, across = x.shape[1] // side, x.shape[2] // side
    x = x.reshape(x.shape[0], down, side, across, side, *x.shape[3:])
    return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], down * across, side * side * merge**2, *x.shape[6:])


def from_windows(x: jax.Array, grid: tuple[int, int], config: TeacherConfig) -> jax.Array:
    """The inverse of `to_windows`."""
    side, merge = config.window_tokens, config.merge_size
    rows, columns = grid[0] // merge, grid[1] // merge
    down, across = -(-rows // side), -(-columns // side)
    x = x.reshape(x.shape[0], down, across, side, side, merge**2, *x.shape[3:])
    x = jnp.swapaxes(x, 2, 3).reshape(x.shape[0], down * side, across * side, *x.shape[5:])
    x = x[:, :rows, :columns]
    return x.reshape(x.shape[0], grid[0] * grid[1], *x.shape[4:])


def window_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, grid: tuple[int, int], config: TeacherConfig
) -> jax.Array:
    """Attention inside windows, [B, N, heads, head width] each; the softmax is float32."""
    query, key, value = (to_windows(x, grid, config) for x in (query, key, value))
    inside = to_windows(jnp.ones((1, grid[0] * grid[1]), bool), grid, config)[:, :, None, None]
    scores = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(inside, scores * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return from_windows(jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value), grid, config)


def rms_norm(config: TeacherConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=config.dtype, name=name)


def dense(config: TeacherConfig, features: Any, name: str, axis: Any = -1, use_bias: bool = True) -> nn.DenseGeneral:
    return nn.DenseGeneral(features, axis=axis, use_bias=use_bias, dtype=config.dtype, name=name)


class Layer(nn.Module):
    """Attention, over the whole image or inside windows, then a gated MLP; each pre-normed, with a residual."""

    config: TeacherConfig
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x, sees_all, rotary):
        c = self.config

        def whole(query, key, value):
            return attention(query, key, value, implementation=c.attention)

        def windowed(query, key, value):
            return window_attention(query, key, value, self.grid, c)

        hidden = rms_norm(c, "attention_norm")(x)
        qkv = dense(c, (3, c.num_heads, c.width // c.num_heads), "qkv")(hidden)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        attended = jax.lax.cond(sees_all, whole, windowed, query, key, value)
        x = x + dense(c, c.width, "out", axis=(-2, -1))(attended)

        hidden = rms_norm(c, "mlp_norm")(x)
        hidden = nn.silu(dense(c, c.mlp_width, "mlp_gate")(hidden)) * dense(c, c.mlp_width, "mlp_up")(hidden)
        return x + dense(c, c.width, "mlp_out")(hidden), None


class VisionTower(nn.Module):
    """Patches [B, N, P] and their `grid` (rows, columns) -> merged tokens [B, M, T], M = N / 4.

    The layers' parameters are stacked along a leading axis. Raises ValueError unless the patches fit the grid.
    """

    config: TeacherConfig

    @nn.compact
    def __call__(self, patches, grid):
        c = self.config
        if grid[0] % c.merge_size or grid[1] % c.merge_size:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches, expected multiples of {c.merge_size}")
        expected = (grid[0] * grid[1], c.patch_values)
        if patches.ndim != 3 or patches.shape[1:] != expected:
            raise ValueError(
                f"patches have shape {list(patches.shape)}, expected [batch, {expected[0]}, {expected[1]}]"
            )

        x = dense(c, c.width, "patch_embed", use_bias=False)(patches)
        sees_all = np.isin(np.arange(c.depth), c.full_attention_layers)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.depth,
        )
        x, _ = layers(c, grid, name="layers")(x, jnp.asarray(sees_all), rotary_table(grid, c))

        x = rms_norm(c, "merger_norm")(x)
        merged_width = c.width * c.merge_size**2
        x = x.reshape(x.shape[0], -1, merged_width)
        x = nn.gelu(dense(c, merged_width, "merger_hidden")(x), approximate=False)
        return dense(c, c.output_width, "merger_out")(x)


# Features


def init_teacher(key: jax.Array, config: TeacherConfig) -> dict:
    """Random parameters {"vision": the tower's, "token_embedding": [vocab_size, T]}, float32."""
    tower_key, table_key = jax.random.split(key)
    grid = config.merge_size, config.merge_size
    patches = jnp.zeros((1, config.merge_size**2, config.patch_values))
    vision = VisionTower(config).init(tower_key, patches, grid)["params"]
    table = 0.02 * jax.random.normal(table_key, (config.vocab_size, config.output_width))
    return {"vision": vision, "token_embedding": table}


def encode_images(
    params: dict, images: jax.Array, config: TeacherConfig, *, pool: bool = True, round_to_bytes: bool = False
) -> jax.Array:
    """The features of images of one size, [B, H, W, 3] uint8 or float in [-1, 1] -> [B, T] float32.

    `pool=False` leaves out the mean over tokens: [B, M, T]. `round_to_bytes` is that of `preprocess_images`. Raises
    ValueError for another shape.
    """
    patches, grid = preprocess_images(images, config, round_to_bytes=round_to_bytes)
    tokens = VisionTower(config).apply({"params": params["vision"]}, patches, grid).astype(jnp.float32)
    return jnp.mean(tokens, axis=1) if pool else tokens


def area_matrix(size: int, new_size: int) -> np.ndarray:
    """The share of each of `size` equal pieces of a line in each of `new_size`: float32, rows summing to one."""
    edges, new_edges = np.arange(size + 1) / size, np.arange(new_size + 1) / new_size
    low = np.maximum(edges[None, :-1], new_edges[:-1, None])
    high = np.minimum(edges[None, 1:], new_edges[1:, None])
    return (np.maximum(high - low, 0) * new_size).astype(np.float32)


def to_cells(tokens: jax.Array, grid: tuple[int, int], cells: tuple[int, int]) -> jax.Array:
    """The mean of the tokens [B, M, T] in each cell of an image, by area: float32 [B, P, T], cells row by row.

    A token that lies in several cells counts in each by its share, so the mean over the cells is that over the tokens.

    Args:
      grid: (rows, columns) of the tokens.
      cells: (rows, columns) of the cells.
    """
    x = tokens.astype(jnp.float32).reshape(tokens.shape[0], *grid, -1)
    rows, columns = area_matrix(grid[0], cells[0]), area_matrix(grid[1], cells[1])
    x = jnp.einsum("bhwt,rh,cw->brct", x, rows, columns, precision="highest")
    return x.reshape(x.shape[0], cells[0] * cells[1], -1)


def pooled_features(
    params: dict, batch: dict[str, jax.Array], config: TeacherConfig, *, cell: int = 0
) -> dict[str, jax.Array]:
    """The features of a batch as data sets keep them: teacher_image and teacher_text, both float16 [B, T].

    Args:
      batch: "image" uint8 [B, H, W, 3], "teacher_ids" int32 [B, L] and "teacher_is_token" bool [B, L].
      cell: pixels a side of the cells of an image, whose means are given as teacher_grid, float16 [B, P, T]; 0: none.
    """
    height, width = batch["image"].shape[1:3]
    tokens = encode_images(params, batch["image"], config, pool=False)
    text = encode_texts(params, batch["teacher_ids"], batch["teacher_is_token"])
    features = {"teacher_image": jnp.mean(tokens, axis=1), "teacher_text": text}
    if cell:
        step = config.patch_size * config.merge_size
        grid = tuple(side // step for side in resized_size(height, width, config))
        features["teacher_grid"] = to_cells(tokens, grid, (height // cell, width // cell))
    return {name: value.astype(jnp.float16) for name, value in features.items()}


def encode_texts(params: dict, ids: jax.Array, is_token: jax.Array | None = None) -> jax.Array:
    """The mean input embedding of each text: ids int32 [B, L], is_token bool [B, L] -> [B, T] float32.

    `is_token` is false on pads; None averages over them too, as the released code does. A text without tokens gives
    zeros. Ids must lie in the table: JAX reads NaN beyond it. Raises ValueError for other shapes or types.
    """
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}, expected integers [batch, tokens]")
    if is_token is not None and is_token.shape != ids.shape:
        raise ValueError(f"is_token has shape {list(is_token.shape)}, expected that of the ids, {list(ids.shape)}")
    embeddings = jnp.take(params["token_embedding"], ids, axis=0).astype(jnp.float32)
    if is_token is None:
        return jnp.mean(embeddings, axis=1)
    weights = is_token.astype(jnp.float32)[..., None]
    # Not a product: the embedding at an id that is not a token may be anything, NaN included.
    total = jnp.sum(jnp.where(weights > 0, embeddings, 0), axis=1)
    return total / jnp.maximum(jnp.sum(weights, axis=1), 1)
