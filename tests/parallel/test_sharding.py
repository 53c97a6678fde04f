import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from unialign_jax import bundle
from unialign_jax.models import presets
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.planning.collectives import read_collectives


def full_size_shapes():
    transformer, heads = presets.MMDIT["unialign_2b"], presets.ALIGNMENT_HEADS["unialign_2b"]
    return bundle.abstract_params(bundle.BundleConfig(transformer, heads, presets.TEXT_ENCODER["t5_xxl"]))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_at_full_size_every_large_parameter_is_split_over_fsdp_and_tensor(shape):
    mesh = make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2])
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
    mesh = make_mesh(fsdp=8)
    path = "blocks/joint/image/qkv/kernel"
    assert sharding.partition_spec(f"0/mu/transformer/{path}", (24, 1536, 3, 24, 64), mesh)[1] == "fsdp"
    assert sharding.partition_spec("0/count", (), mesh) == P()


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh(fsdp=1, tensor=8)
    spec = sharding.partition_spec("blocks/joint/image/qkv/kernel", (4, 128, 3, 4, 32), mesh)
    assert spec == P(None, None, None, None, None)


def test_the_state_is_split_over_axes_that_repeat_the_weights():
    mesh = make_mesh(data=2, encoder=2, fsdp=2)
    path, shape = "blocks/joint/image/mlp_in/kernel", (24, 1536, 6144)
    assert sharding.partition_spec(path, shape, mesh) == P(None, "fsdp", None)
    assert sharding.partition_spec(path, shape, mesh, state=True) == P(None, ("data", "encoder", "fsdp"), None)
    # What does not divide evenly is split over fewer axes, the outermost left out first.
    assert sharding.partition_spec(path, (24, 12, 6), mesh, state=True) == P(None, ("encoder", "fsdp"), None)
    assert sharding.BATCH[0] == ("replica", "data", "state", "encoder", "fsdp")


def test_the_text_encoder_is_split_over_its_own_axis():
    mesh = make_mesh(encoder=4, fsdp=1, tensor=2)
    spec = sharding.partition_spec("layers/query/kernel", (24, 4096, 64, 64), mesh)
    assert spec == P(None, None, ("encoder", "tensor"))
    assert sharding.partition_spec("blocks/joint/image/qkv/kernel", (24, 1536, 3, 24, 64), mesh)[3] == "tensor"


def test_compute_weights_are_whole_and_gradients_split():
    mesh = make_mesh(data=4, fsdp=2)
    path, weights = "blocks/joint/image/mlp_in/kernel", jnp.ones((1, 16, 8))
    tree = unflatten_dict({path: weights}, sep="/")
    place = sharding.tree_shardings(tree, mesh, state=True)

    def loss(tree, x):
        computing = sharding.params_for_compute(tree, lambda path: jnp.bfloat16)
        kernel = flatten_dict(computing, sep="/")[path]
        return jnp.sum(x @ kernel[0]), kernel

    x = jnp.arange(8 * 16.0).reshape(8, 16)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, has_aux=True))
        gradient, kernel = step(jax.device_put(tree, place), jax.device_put(x, sharding.batch_sharding(mesh)))
    (gradient,) = jax.tree.leaves(gradient)
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding.shard_shape(kernel.shape) == (1, 8, 8)
    assert gradient.dtype == jnp.float32 and gradient.sharding.shard_shape(gradient.shape) == (1, 2, 8)
    expected = np.broadcast_to(np.asarray(x).sum(axis=0)[:, None], (16, 8))
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-2)


def test_the_weights_of_blocks_are_gathered_in_the_loop_of_other_work():
    """Of four blocks, one or two an iteration: the loop's result, weights and gradients bit for bit as without."""
    mesh = make_mesh(data=4, encoder=2, fsdp=1)
    shapes = {
        "blocks/joint/image/mlp_in/kernel": (4, 16, 8),
        "blocks/joint/image/mlp_in/bias": (4, 8),
        "text_head/kernel": (16, 8),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    flat = {path: jax.random.normal(key, shapes[path]) for path, key in zip(shapes, keys, strict=True)}
    tree = unflatten_dict(flat, sep="/")
    place = sharding.tree_shardings(tree, mesh, state=True)
    rows = jnp.arange(8 * 16.0).reshape(8, 16)

    def powers(operands, function=lambda others: None, others=None):
        """An integer to the power of the loop's length, and function(others[i])."""
        body = lambda power, others: (power * operands["number"], function(others))  # noqa: E731
        power, results = jax.lax.scan(body, 1, others, length=operands["length"].size)
        return (power, results) if others else power

    def loss(tree, rows, count, depth):
        beside = (powers, depth, {"number": count, "length": jnp.zeros(depth)}) if depth else None
        computing = sharding.params_for_compute(tree, lambda path: jnp.bfloat16, beside)
        power, computing = computing if depth else (0, computing)
        leaves = flatten_dict(computing, sep="/")
        kernels = leaves["blocks/joint/image/mlp_in/kernel"].sum(axis=0) + leaves["text_head/kernel"]
        return jnp.sum(jnp.sin(rows @ kernels + leaves["blocks/joint/image/mlp_in/bias"].sum(axis=0))), (power, leaves)

    found = {}
    with jax.set_mesh(mesh):
        arguments = jax.device_put(tree, place), jax.device_put(rows, sharding.batch_sharding(mesh)), jnp.int32(3)
        for depth in (0, 2, 3, 4):
            step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3, out_shardings=(place, None))
            step = step.lower(*arguments, depth).compile()
            found[depth] = (step(*arguments), step.as_text())
    for depth in (2, 3, 4):
        (gradients, (power, leaves)), text = found[depth]
        assert power == 3**depth
        jax.tree.map(np.testing.assert_array_equal, leaves, found[0][0][1][1])
        jax.tree.map(np.testing.assert_array_equal, gradients, found[0][0][0])
        gathers = [collective for collective in read_collectives(text) if collective.kind == "all-gather"]
        assert {gather.times for gather in gathers} == {2: {1, 2}, 3: {1}, 4: {1, 4}}[depth]
