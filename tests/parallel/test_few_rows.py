"""Layers whose weights stay split and whose rows travel give what whole weights give."""

import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.parallel import sharding
from unialign_jax.parallel.few_rows import dense_of_all_blocks, moves_rows
from unialign_jax.parallel.mesh import make_mesh

PATH = "blocks/joint/image/modulation/kernel"


def test_outputs_and_gradients_are_those_of_whole_weights():
    rng = np.random.default_rng(0)
    x, kernel, bias, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((16, 8), (3, 8, 6, 12), (3, 6, 12), (3, 16, 6, 12))
    )
    mesh = make_mesh(replica=2, data=2, encoder=2, fsdp=1)
    place = sharding.tree_shardings({"blocks": {"modulation": {"kernel": kernel}}}, mesh, state=True)
    split = jax.device_put(kernel, jax.tree.leaves(place)[0])

    def plain(x, kernel, bias):
        return jnp.einsum("bi,nijo->nbjo", x, kernel) + bias[:, None]

    def values(form):
        return lambda *a: (jnp.sum(weight * form(*a) ** 2), form(*a))

    (_, expected), gradients = jax.value_and_grad(values(plain), (0, 1, 2), has_aux=True)(x, kernel, bias)
    with jax.set_mesh(mesh):
        assert moves_rows(PATH, kernel, 16) and not moves_rows(PATH, kernel, 12)
        step = jax.jit(jax.value_and_grad(values(dense_of_all_blocks), (0, 1, 2), has_aux=True))
        (_, found), found_gradients = step(x, split, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    assert found_gradients[1].sharding.shard_shape(kernel.shape) == (3, 8, 6, 3)


def test_compute_keeps_them_split_only_where_weights_would_be_whole():
    def split(shape, path=PATH):
        return sharding.stays_split(path, (3, 8, 6, 12), make_mesh(**{"fsdp": 1} | shape))

    assert split({"replica": 2, "data": 2, "encoder": 2}) and split({"data": 4, "replica": 2})
    assert not split({"data": 8})  # which 8 does not divide
    assert not split({"data": 4, "fsdp": 2}) and not split({"data": 4, "tensor": 2}) and not split({"fsdp": 8})
    assert not split({"replica": 8})
    assert not split({"data": 4, "replica": 2}, path="blocks/joint/image/qkv/kernel")
