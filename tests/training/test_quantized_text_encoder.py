"""The text encoder's weights in 8 bits while a model trains: the same numbers on every mesh, and as in inference."""

import jax
import numpy as np
import pytest
import qwix
from flax.traverse_util import flatten_dict

from unialign_jax import bundle
from unialign_jax.models import parameters
from unialign_jax.models.quantization import dequantize_params, quantize_leaf, quantize_params
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.training import meshes
from unialign_jax.training.config import read_config
from unialign_jax.training.loop import Trainer
from unialign_jax.training.program import make_networks
from unialign_jax.training.state import frozen_shardings, init_frozen
from unialign_jax.training.step import encode_texts


def is_quantized(leaf):
    return isinstance(leaf, qwix.QArray)


@pytest.mark.parametrize(
    ("mode", "several"),
    [
        ("int8", [{"data": 2, "state": 2, "encoder": 2}, {"encoder": 4, "tensor": 2}, {"fsdp": 8}]),
        ("w8a8", [{"data": 2, "state": 2, "encoder": 2}]),
    ],
)
def test_every_mesh_gives_the_embeddings_of_one_device(mode, several, small_config):
    config = small_config(quantize_text_encoder=mode, text_encoder__num_heads=8)
    networks = make_networks(config, jax.devices()[:1])
    ids = np.random.default_rng(0).integers(0, 500, (8, 24)).astype(np.int32)

    def embed(mesh):
        # The random weights are drawn on one device: a mesh of several may round them otherwise.
        places = frozen_shardings(networks, jax.eval_shape(lambda: init_frozen(networks)), mesh)
        with jax.set_mesh(mesh):
            held = jax.device_put(frozen, places)
            place = sharding.batch_sharding(mesh)
            (found,) = jax.jit(lambda f, x: encode_texts(networks, f, x))(held, jax.device_put(ids, place))
        kernel = held["text_encoder"]["layers"]["mlp_up"]["kernel"]
        return np.asarray(found, np.float32), kernel.qvalue.sharding.shard_shape(kernel.shape)

    frozen = jax.device_get(init_frozen(networks))
    kernels = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == 7 and all(leaf.qvalue.dtype == np.int8 for leaf in kernels)
    expected, whole = embed(make_mesh(devices=jax.devices()[:1]))
    for axes in several:
        found, piece = embed(make_mesh(**{"fsdp": 1} | axes))
        parts = axes.get("encoder", 1) * axes.get("tensor", 1) * axes.get("fsdp", 1)
        assert np.prod(piece) * parts == np.prod(whole), axes
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=str(axes))


def test_a_bundles_encoder_has_the_weights_of_inference(small_config, tiny_bundle):
    stored = bundle.read_config(tiny_bundle)
    config = small_config(quantize_text_encoder="int8", frozen_from=str(tiny_bundle))
    config.mesh.update({"data": 2, "state": 2, "encoder": 2})
    found = Trainer(config, jax.devices()).init_frozen()["text_encoder"]
    found = {
        sharding.path_string(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(found, is_leaf=is_quantized)
    }
    abstract = flatten_dict(bundle.abstract_params(stored, ["text_encoder"])["text_encoder"], sep="/")
    assert found.keys() == abstract.keys()
    for path, leaf in bundle.read_leaves(tiny_bundle, "text_encoder"):
        expected = quantize_leaf(path, leaf, "int8", dtype=config.text_encoder.dtype)
        assert is_quantized(expected) == is_quantized(found[path])
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found[path]), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=path)


@pytest.mark.parametrize("mode", ["int8", "w8a8"])
def test_8_bits_and_back(mode, small_config):
    networks = make_networks(small_config(quantize_text_encoder=mode), jax.devices()[:1])
    params = parameters.init(networks.text_encoder.config, jax.random.key(0))
    back = flatten_dict(dequantize_params(quantize_params(params, mode), mode), sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        assert back[path].shape == leaf.shape
        np.testing.assert_allclose(back[path], leaf, atol=np.abs(leaf).max() / 250, err_msg=path)  # half a step of 127


def test_8_bits_let_fewer_chips_share_the_text_encoder():
    """By arithmetic on the full model: 24 layers of 4 x 4096^2 + 3 x 4096 x 10240 weights in a byte each, and
    32128 x 4096 embeddings in two, beside small scales: 4.9 of 9.5 GB.
    """
    config = read_config("stage1", ["quantize_text_encoder=int8"])
    memory = meshes.step_memory(config, make_networks(config, jax.devices()[:1]), "tpu")
    kernels, embeddings = 24 * (4 * 4096**2 + 3 * 4096 * 10240), 32128 * 4096
    assert memory.text_encoder == pytest.approx(kernels + 2 * embeddings, rel=2e-3)
    assert memory.text_block == pytest.approx(memory.text_encoder / 24)
