"""The teacher against the transformers library's Qwen2.5-VL: preprocessing, vision tower and pooled features."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models.teacher import (
    PIXEL_STD,
    TeacherConfig,
    VisionTower,
    encode_images,
    encode_texts,
    init_teacher,
    preprocess_images,
    resized_size,
    to_cells,
)
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh

TINY = TeacherConfig(
    depth=4,
    width=32,
    num_heads=2,
    mlp_width=44,
    window_size=112,
    full_attention_layers=(1, 3),
    output_width=24,
    vocab_size=50,
    dtype="float32",
)


@functools.partial(jax.jit, static_argnums=2)
def tower(vision, patches, grid):
    return VisionTower(TINY).apply({"params": vision}, patches, grid)


@pytest.fixture(scope="module")
def qwen():
    """The library's Qwen2.5-VL module, on torch."""
    pytest.importorskip("torch")
    return pytest.importorskip("transformers").models.qwen2_5_vl.modeling_qwen2_5_vl


def torch_vision_config(config):
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    return Qwen2_5_VLVisionConfig(
        depth=config.depth,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        spatial_merge_size=config.merge_size,
        window_size=config.window_size,
        fullatt_block_indexes=list(config.full_attention_layers),
        out_hidden_size=config.output_width,
        attn_implementation="eager",
    )


@pytest.fixture(scope="module")
def torch_tower(qwen):
    import torch

    torch.manual_seed(0)
    model = qwen.Qwen2_5_VisionTransformerPretrainedModel(torch_vision_config(TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Attention far from uniform, biases and scales that count: a window or a rotation missed must show.
            if "norm" in name or "ln_q" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * (2.0 if "qkv" in name else 1.0) / fan**0.5)
    return model


def vision_from_torch(model, config):
    """The tensors of the library's tower in our tree, by hand."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    width, heads, head_width = config.width, config.num_heads, config.width // config.num_heads

    def linear(name, kernel=None, bias=None):
        weight, offset = state[f"{name}.weight"].T, state[f"{name}.bias"]
        return {"kernel": weight.reshape(kernel or weight.shape), "bias": offset.reshape(bias or offset.shape)}

    def stacked(name, kernel=None, bias=None):
        layers = [linear(f"blocks.{i}.{name}", kernel, bias) for i in range(config.depth)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    def norm(name):
        return {"scale": np.stack([state[f"blocks.{i}.{name}.weight"] for i in range(config.depth)])}

    return {
        "patch_embed": {"kernel": state["patch_embed.proj.weight"].reshape(width, -1).T},
        "layers": {
            "attention_norm": norm("norm1"),
            "qkv": stacked("attn.qkv", (width, 3, heads, head_width), (3, heads, head_width)),
            "out": stacked("attn.proj", (heads, head_width, width)),
            "mlp_norm": norm("norm2"),
            "mlp_gate": stacked("mlp.gate_proj"),
            "mlp_up": stacked("mlp.up_proj"),
            "mlp_out": stacked("mlp.down_proj"),
        },
        "merger_norm": {"scale": state["merger.ln_q.weight"]},
        "merger_hidden": linear("merger.mlp.0"),
        "merger_out": linear("merger.mlp.2"),
    }


@pytest.fixture(scope="module")
def params(torch_tower):
    table = np.random.default_rng(1).normal(size=(TINY.vocab_size, TINY.output_width)).astype(np.float32)
    return {"vision": vision_from_torch(torch_tower, TINY), "token_embedding": table}


def test_init_makes_the_tree_that_torch_fills(params):
    shapes = jax.eval_shape(lambda key: init_teacher(key, TINY), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.slow
# One window and a bit each way; whole windows (where the library adds an empty one); less than one window.
@pytest.mark.parametrize("batch, grid", [(1, (10, 14)), (3, (16, 8)), (2, (4, 6))])
def test_tower_equals_the_transformers_library(torch_tower, params, batch, grid):
    import torch

    rng = np.random.default_rng(0)
    patches = rng.normal(size=(batch, grid[0] * grid[1], TINY.patch_values)).astype(np.float32)
    with torch.no_grad():
        expected = torch_tower(
            torch.from_numpy(patches).reshape(-1, TINY.patch_values), grid_thw=torch.tensor([[1, *grid]] * batch)
        ).pooler_output.numpy()
    found = np.asarray(tower(params["vision"], patches, grid))
    assert found.shape == (batch, grid[0] * grid[1] // 4, TINY.output_width)
    error = np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max()
    assert error < 3e-5, f"relative to the output's scale: {error:.1e}"


@pytest.mark.slow
def test_windows_and_full_layers_are_where_the_config_says(torch_tower, params):
    """Outside its window a patch is read only through the full layers: without them, the rest must not notice it."""
    grid = (16, 8)  # two windows of 8 x 8 patches, one above the other
    patches = np.random.default_rng(2).normal(size=(1, 128, TINY.patch_values)).astype(np.float32)
    changed = patches.copy()
    changed[:, 100] += 1.0  # in the lower window: merged tokens 16 to 31
    windows_only = VisionTower(dataclasses.replace(TINY, full_attention_layers=()))
    before, after = (windows_only.apply({"params": params["vision"]}, x, grid)[0] for x in (patches, changed))
    np.testing.assert_array_equal(before[:16], after[:16])
    assert np.abs(before[16:] - after[16:]).max(axis=1).min() > 1e-3
    before, after = (tower(params["vision"], x, grid)[0] for x in (patches, changed))
    assert np.abs(before - after).max(axis=1).min() > 1e-4


def images_of(sizes, seed=0):
    """Smooth colours with noise on them, uint8 [H, W, 3]: bicubic overshoots on such."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in sizes:
        ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 3] % 256
        images.append(np.where(rng.random((height, width, 1)) < 0.3, rng.integers(0, 2, ramp.shape) * 255, ramp))
    return [image.astype(np.uint8) for image in images]


def library_patches(images):
    """The reference's way: floats resized by torch (what torchvision calls on them), then the library's processor.

    float64, because torch places the filter in the precision of the pixels: in float32 that moves them by up to 3e-4.
    """
    import torch

    resized = []
    for image in images:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
        size = resized_size(*image.shape[:2], TINY)
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        resized.append(pixels[0].float().numpy())
    processor = pytest.importorskip("transformers").Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False)
    return processor(images=resized, input_data_format="channels_first", return_tensors="pt")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (100, 61), (300, 40), (40, 300), (84, 112)])
def test_preprocessing_equals_torch_and_the_transformers_library(size):
    pytest.importorskip("torch")
    images = images_of([size])
    expected = library_patches(images)
    for given in (jnp.asarray(images[0]), jnp.asarray(images[0], jnp.float32) / 127.5 - 1):
        found, grid = preprocess_images(given[None], TINY)
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        np.testing.assert_allclose(found[0], expected["pixel_values"], atol=2e-5)


# Pillow 13 begins with the rows where that is less work: here every version begins with the columns, as ours does.
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (100, 61), (300, 40), (84, 112)])
def test_preprocessing_through_bytes_equals_the_transformers_library(size):
    processor = pytest.importorskip("transformers").Qwen2VLImageProcessorPil()
    (image,) = images_of([size])
    expected = processor(images=[image], return_tensors="np")
    found, grid = preprocess_images(jnp.asarray(image)[None], TINY, round_to_bytes=True)
    assert (1, *grid) == tuple(expected["image_grid_thw"][0])
    # Pillow's weights are fixed point: what lies on a half may round to the other side, by one level, in each pass.
    level = 1 / 255 / min(PIXEL_STD)
    difference = np.abs(np.asarray(found[0]) - expected["pixel_values"])
    assert difference.max() < 2.1 * level
    assert np.mean(difference > 1e-4) < 2e-2


def test_sizes_equal_the_transformers_library():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    config = dataclasses.replace(TINY, min_pixels=56 * 56, max_pixels=28 * 28 * 100)
    assert resized_size(512, 512, TINY) == (504, 504)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 900, (300, 2)):
        expected = smart_resize(int(height), int(width), 28, config.min_pixels, config.max_pixels)
        assert resized_size(int(height), int(width), config) == expected


@pytest.mark.slow
def test_image_features_equal_torch_from_pixels_on(torch_tower, params):
    """The whole way of a batch that is not square: the library's processor, its tower, and a mean over tokens."""
    import torch

    images = images_of([(120, 200), (120, 200)])
    inputs = library_patches(images)
    with torch.no_grad():
        merged = torch_tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    expected = merged.reshape(2, -1, TINY.output_width)

    batch = np.stack(images)
    tokens = jax.jit(functools.partial(encode_images, config=TINY, pool=False))(params, batch)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-4 * expected.abs().max())
    features = jax.jit(functools.partial(encode_images, config=TINY))(params, batch)
    expected = expected.mean(dim=1)
    assert features.shape == (2, TINY.output_width) and features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4 * expected.abs().max())


@pytest.mark.slow
def test_features_are_the_same_on_a_mesh(params):
    """Eight devices, batch and parameters split, both kinds of attention inside one scan: the numbers stay."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    images = np.stack(images_of([(84, 140)] * 4, seed=7))
    encode = functools.partial(encode_images, config=TINY)
    expected = np.asarray(jax.jit(encode)(params, images))
    spread = jax.device_put(params, sharding.tree_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(encode)(spread, jax.device_put(images, sharding.batch_sharding(mesh)))
    assert found.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_text_features_equal_torch(params):
    torch = pytest.importorskip("torch")
    table = torch.nn.Embedding.from_pretrained(torch.from_numpy(params["token_embedding"]))
    ids = np.random.default_rng(3).integers(0, TINY.vocab_size, (3, 7))
    lengths = np.array([7, 4, 1])
    is_token = np.arange(7) < lengths[:, None]
    looked_up = table(torch.from_numpy(ids))
    expected = np.stack([looked_up[i, :n].mean(dim=0).numpy() for i, n in enumerate(lengths)])
    np.testing.assert_allclose(encode_texts(params, jnp.asarray(ids), jnp.asarray(is_token)), expected, atol=1e-6)
    # The released code: pads count, as long as the longest text of the batch is.
    np.testing.assert_allclose(encode_texts(params, jnp.asarray(ids)), looked_up.mean(dim=1).numpy(), atol=1e-6)


def test_pads_and_empty_texts_do_no_harm(params):
    ids = jnp.asarray([[3, 4, 10**6], [0, 0, 0]], jnp.int32)  # an id past the table reads NaN
    is_token = jnp.asarray([[True, True, False], [False] * 3])
    features = encode_texts(params, ids, is_token)
    np.testing.assert_allclose(features[0], params["token_embedding"][3:5].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(features[1], np.zeros(TINY.output_width))


def test_the_7b_tower_is_as_large_as_the_published_one(qwen):
    import torch

    config = TeacherConfig()
    shapes = jax.eval_shape(lambda key: init_teacher(key, config), jax.random.key(0))
    with torch.device("meta"):
        published = qwen.Qwen2_5_VisionTransformerPretrainedModel(torch_vision_config(config))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["vision"]))
    assert count == sum(p.numel() for p in published.parameters()) == 676_550_144
    assert shapes["token_embedding"].shape == (152064, 3584)


def test_the_reference_image_gives_324_tokens():
    """512 px become 504: 36 x 36 patches, 18 x 18 tokens, with windows of 4 that reach over both edges."""
    image = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.uint8)
    params = jax.eval_shape(lambda key: init_teacher(key, TeacherConfig()), jax.random.key(0))
    tokens = jax.eval_shape(lambda p, x: encode_images(p, x, TeacherConfig(), pool=False), params, image)
    assert tokens.shape == (2, 324, 3584)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(params):
    images = jnp.stack(images_of([(84, 112)]))
    exact = jax.jit(functools.partial(encode_images, config=TINY))(params, images)
    rough_config = dataclasses.replace(TINY, dtype="bfloat16")
    rough = jax.jit(functools.partial(encode_images, config=rough_config))(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params), images
    )
    assert rough.dtype == jnp.float32
    cosine = np.sum(exact * rough) / np.linalg.norm(exact) / np.linalg.norm(rough)
    assert cosine > 0.999


def test_bad_input_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"shape \[3, 64, 64\], expected \[batch, height, width, 3\]"):
        preprocess_images(jnp.zeros((3, 64, 64), jnp.uint8), TINY)
    with pytest.raises(ValueError, match="image of 1 x 300 pixels, expected an aspect ratio of at most 200"):
        preprocess_images(jnp.zeros((1, 1, 300, 3), jnp.uint8), TINY)
    with pytest.raises(ValueError, match=r"shape \[1, 16, 100\], expected \[batch, 16, 1176\]"):
        tower({}, jnp.zeros((1, 16, 100)), (4, 4))
    with pytest.raises(ValueError, match="grid of 3 x 4 patches, expected multiples of 2"):
        tower({}, jnp.zeros((1, 12, 1176)), (3, 4))
    with pytest.raises(ValueError, match=r"expected integers \[batch, tokens\]"):
        encode_texts({}, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"is_token has shape \[2, 4\], expected that of the ids, \[2, 3\]"):
        encode_texts({}, jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4), bool))
    with pytest.raises(ValueError, match=r"full_attention_layers has \[31\], expected 0 to 3"):
        TeacherConfig(depth=4, full_attention_layers=(1, 31))
    with pytest.raises(ValueError, match="width 30 over 2 heads"):
        dataclasses.replace(TINY, width=30)
    with pytest.raises(ValueError, match="window_size is 20, expected at least one merged token, 28 pixels"):
        dataclasses.replace(TINY, window_size=20)


def test_cells_take_tokens_by_area():
    """Three tokens in a row over two cells: the middle one is half in each."""
    tokens = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]]])
    found = to_cells(tokens, (1, 3), (1, 2))
    np.testing.assert_allclose(found, [[[4 / 3, 40 / 3], [14 / 3, 140 / 3]]], rtol=1e-6)
    np.testing.assert_allclose(to_cells(tokens, (3, 1), (2, 1)), found, rtol=1e-6)
    np.testing.assert_array_equal(to_cells(tokens, (1, 3), (1, 3)), tokens)
    # 18 x 18 tokens of 504 pixels onto 16 x 16 cells: the mean stays, rows before columns.
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 18 * 18, 3)), jnp.float32)
    cells = to_cells(tokens, (18, 18), (16, 16))
    np.testing.assert_allclose(cells.mean(axis=1), tokens.mean(axis=1), atol=1e-6)
    rows = jnp.repeat(jnp.arange(18.0), 18)[None, :, None]
    downwards = to_cells(rows, (18, 18), (16, 16)).reshape(16, 16)
    assert np.all(np.diff(downwards, axis=0) > 1) and np.allclose(np.diff(downwards, axis=1), 0, atol=1e-5)
