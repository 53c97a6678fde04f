import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unialign_jax import sharding
from unialign_jax.models import presets
from unialign_jax.models.mmdit import AlignmentHeads, MMDiT
from unialign_jax.models.text_encoder import TextEncoder


def full_size_shapes():
    transformer = MMDiT(presets.MMDIT["unialign_2b"])
    text_encoder = TextEncoder(presets.TEXT_ENCODER["t5_xxl"])
    heads = AlignmentHeads(presets.ALIGNMENT_HEADS["unialign_2b"])
    latents, text = jnp.zeros((1, 2, 2, 16)), jnp.zeros((1, 1, 4096))

    def init(key):
        return {
            "transformer": transformer.init(key, latents, text, jnp.zeros((1,)))["params"],
            "heads": heads.init(key, jnp.zeros((1, 1, 1536)), jnp.zeros((1, 1, 1536)))["params"],
            "text_encoder": text_encoder.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        }

    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_at_full_size_every_large_parameter_is_split_over_fsdp_and_tensor(shape):
    mesh = sharding.make_mesh(*shape)
    shapes = full_size_shapes()
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    shardings = sharding.tree_shardings(shapes, mesh)
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        if np.prod(leaf.shape) > 1e6:
            held = np.prod(place.shard_shape(leaf.shape))
            assert held * split == np.prod(leaf.shape), (sharding.path_string(path), place.spec)


def test_optimizer_moments_live_where_their_parameters_do():
    mesh = sharding.make_mesh(1, 8, 1)
    path = "blocks/joint/image/qkv/kernel"
    assert sharding.partition_spec(f"0/mu/transformer/{path}", (24, 1536, 3, 24, 64), mesh)[1] == "fsdp"
    assert sharding.partition_spec("0/count", (), mesh) == P()


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(1, 1, 8)
    spec = sharding.partition_spec("blocks/joint/image/qkv/kernel", (4, 128, 3, 4, 32), mesh)
    assert spec == P(None, "fsdp", None, None, None)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [((1, -1, 1), 8, (1, 8, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 1, 1), 1, (1, 1, 1))],
)
def test_a_free_axis_takes_what_is_left(sizes, devices, expected):
    assert sharding.complete_mesh_shape(sizes, devices) == expected


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (-1, -1, 1), (0, 8, 1)])
def test_a_mesh_that_does_not_come_out_even_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        sharding.complete_mesh_shape(sizes, 8)
