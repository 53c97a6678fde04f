"""Gradients that are summed a layer late are those of a plain scan on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.parallel import gradients, sharding
from unialign_jax.parallel.gradients import (
    reduce_scatter_line,
    reduce_scatter_ring,
    reduces_late,
    scan_reducing_late,
    sum_over_replicas,
)
from unialign_jax.parallel.mesh import make_mesh

DEPTH, BATCH = 3, 16  # the first round, the last and one between


def layer(params, index, carry, inputs, shared):
    """Leaves of several shapes, split along the first axis, the last, or not at all; weights used in two places."""
    block = params["joint"]
    hidden = jnp.tanh(carry["x"] @ block["image"]["mlp_in"]["kernel"] + block["image"]["mlp_in"]["bias"])
    x = carry["x"] + hidden @ block["image"]["mlp_out"]["kernel"] + inputs * shared
    text = (
        carry["text"] @ block["text"]["mlp_out"]["kernel"]
        + index * jnp.mean(hidden, axis=-1, keepdims=True) * block["text"]["odd"]
    )
    return {"x": x, "text": text + x @ block["text"]["mlp_out"]["kernel"]}


def inputs(width):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    params = {
        "joint": {
            "image": {
                "mlp_in": {"kernel": array(DEPTH, width, 2 * width), "bias": array(DEPTH, 2 * width)},
                "mlp_out": {"kernel": array(DEPTH, 2 * width, width)},
            },
            "text": {"mlp_out": {"kernel": array(DEPTH, width, width)}, "odd": array(DEPTH, width)},
        }
    }
    carry = {"x": array(BATCH, width), "text": array(BATCH, width)}
    return params, carry, array(DEPTH, BATCH, width), array(BATCH, width)


def plain_scan(params, carry, inputs, shared):
    step = lambda carry, x: (layer(x[1], x[0], carry, x[2], shared), None)  # noqa: E731
    return jax.lax.scan(step, carry, (jnp.arange(DEPTH), params, inputs))[0]


def loss(scan):
    return lambda *arguments: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(scan(*arguments)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "width", "without_wraparound"),
    [
        ({"data": 8}, 32, ()),
        ({"data": 8}, 32, ("data",)),
        ({"data": 8}, 30, ()),  # which 8 does not divide: nothing is split
        ({"data": 2, "state": 2, "encoder": 2}, 32, ("state",)),
        ({"data": 2, "encoder": 4}, 32, ("encoder",)),
        ({"replica": 4, "data": 2}, 32, ()),
    ],
    ids=str,
)
def test_gradients_are_those_of_one_device(shape, width, without_wraparound):
    arguments = inputs(width)
    expected_loss, expected = jax.value_and_grad(loss(plain_scan), argnums=(0, 1, 2, 3))(*arguments)
    mesh = make_mesh(fsdp=1, **shape)
    assert reduces_late(mesh, BATCH)
    late = loss(lambda *a: scan_reducing_late(layer, *a, "blocks", without_wraparound))
    with jax.set_mesh(mesh):
        found_loss, found = jax.jit(jax.value_and_grad(late, argnums=(0, 1, 2, 3)))(*arguments)
        compared = jax.jit(late)(*arguments)
    np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(compared, expected_loss, rtol=1e-5)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5, err_msg=sharding.path_string(path))
    # Each device holds its part of the sum, as of the state.
    kernel = found[0]["joint"]["image"]["mlp_in"]["kernel"]
    parts = 8 // shape.get("replica", 1) if width == 32 else 1
    assert kernel.sharding.shard_shape(kernel.shape) == (DEPTH, width // parts, 2 * width)


@pytest.mark.slow
def test_weights_are_not_kept_a_second_time_for_the_backward_pass():
    params, *others = inputs(32)
    mesh = make_mesh(data=8, fsdp=1)

    def kept(*arguments):
        return jax.vjp(lambda *a: scan_reducing_late(layer, *a, "blocks"), *arguments)[1]

    with jax.set_mesh(mesh):
        residuals = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, params, *others))]
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert weights <= set(residuals)  # once, as they came
    assert any(shape[:2] == (8, DEPTH) for shape in residuals)  # by device and layer: what the layer keeps
    assert not any(shape[:2] == (8, DEPTH) and shape[1:] in weights for shape in residuals)


@pytest.mark.slow
def test_sums_in_bfloat16_stay_near_one_devices():
    """Both round activations alike; a sum over 4 x 2 devices is then rounded at 4 hops more, by 2^-9 of it at most."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), inputs(32))
    expected = jax.grad(loss(plain_scan))(*low)
    late = loss(lambda *a: scan_reducing_late(layer, *a, "blocks"))
    with jax.set_mesh(make_mesh(data=4, encoder=2, fsdp=1)):
        found = jax.jit(jax.grad(late))(*low)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        assert y.dtype == jnp.bfloat16
        error = np.linalg.norm(np.float32(y) - np.float32(x)) / np.linalg.norm(np.float32(x))
        assert error < 0.02, sharding.path_string(path)


@pytest.mark.parametrize(
    ("form", "closing"),
    [
        (functools.partial(reduce_scatter_ring, direction=1), True),
        (functools.partial(reduce_scatter_ring, direction=-1), True),
        (reduce_scatter_line, False),
    ],
    ids=["forward", "backward", "line"],
)
def test_rings_and_lines_are_reduce_scatters(form, closing):
    mesh = make_mesh(data=8, fsdp=1)
    x = np.random.default_rng(1).normal(size=(8, 8, 3)).astype(np.float32)  # [device, part, numbers]
    reduce = jax.shard_map(
        lambda x: form(x[0], name="data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")
    )
    np.testing.assert_allclose(reduce(x).reshape(8, 3), x.sum(axis=0), rtol=1e-5, atol=1e-6)
    # Only neighbours send to one another, and the ends only on a ring.
    pairs = re.findall(r"\((\d+), ?(\d+)\)", str(jax.make_jaxpr(reduce)(x)))
    apart = {abs(int(source) - int(target)) for source, target in pairs}
    assert apart == ({1, 7} if closing else {1})


def test_replicas_are_summed_in_their_slice_and_then_across(monkeypatch):
    monkeypatch.setattr(gradients, "LONGEST_RING", 4)  # so that 8 take two rings
    mesh = make_mesh(replica=8, fsdp=1)
    x = np.random.default_rng(1).normal(size=(8, 8, 3)).astype(np.float32)  # [device, tiles, numbers]
    for slices in (1, 2, 4, 8):
        total = jax.shard_map(
            lambda x, slices=slices: sum_over_replicas([x[0], -x[0]], slices),
            mesh=mesh,
            in_specs=jax.P("replica"),
            out_specs=jax.P("replica"),
            check_vma=False,
        )
        sums = np.asarray(jax.jit(total)(x)).reshape(2, 8, 8, 3)
        np.testing.assert_allclose(sums[:, 0], [x.sum(axis=0), -x.sum(axis=0)], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(sums, np.broadcast_to(sums[:, :1], sums.shape))  # the same bits


def test_not_where_weights_are_split_or_samples_do_not_divide():
    assert not reduces_late(make_mesh(data=2, fsdp=4), 16)
    assert not reduces_late(make_mesh(data=4, fsdp=1, tensor=2), 16)
    assert not reduces_late(make_mesh(data=8, fsdp=1), 12)
    assert not reduces_late(make_mesh(replica=8, fsdp=1), 16)
    assert not reduces_late(jax.sharding.get_abstract_mesh(), 16)
