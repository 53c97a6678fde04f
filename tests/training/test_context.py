"""Steps and samplers whose tokens are split over the mesh's axis `context`: the numbers of one device."""

import functools

import jax
import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.sampling.programs import Programs, make_guidance
from unialign_jax.sampling.solvers import solver_table
from unialign_jax.training.loop import Trainer, train
from unialign_jax.training.metrics import read_metrics
from unialign_jax.training.step import compute_losses

BATCH = 4


@pytest.fixture(scope="module")
def computed(small_config):
    """A function (kind, mesh) -> the loss's parts and the gradients of all weights, which are random everywhere."""

    @functools.cache
    def trainer_of(mesh):
        config = small_config("stage3", batch_size=BATCH, model__num_heads=4, text_length=24)
        config.mesh.update(dict(mesh))
        devices = int(np.prod([size for _, size in mesh]))
        return Trainer(config, jax.devices()[:devices])

    def compute(kind, **mesh):
        trainer = trainer_of(tuple(mesh.items()))
        generator = np.random.default_rng(0)

        def draw(leaf):
            return jax.device_put((0.1 * generator.normal(size=leaf.shape)).astype(np.float32), leaf.sharding)

        params, frozen = (jax.tree.map(draw, tree) for tree in (trainer.abstract_state.params, trainer.abstract_frozen))
        examples = [trainer.streams[kind][index] for index in range(BATCH)]
        batch = trainer.put_batch({name: np.stack([example[name] for example in examples]) for name in examples[0]})
        ids = trainer.tokenizer.mask_id, trainer.tokenizer.eos_id

        @jax.jit
        def step(params, frozen, batch, key):
            loss = lambda p: compute_losses(trainer.config, trainer.networks, kind, *ids, p, frozen, batch, key)  # noqa: E731
            (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return metrics, gradients

        with jax.set_mesh(trainer.mesh):
            program = step.lower(params, frozen, batch, jax.random.key(7)).compile()
            metrics, gradients = program(params, frozen, batch, jax.random.key(7))
        return program, jax.device_get(metrics), gradients

    return compute


@pytest.mark.slow
def test_split_tokens_give_the_gradients_of_one_device(computed):
    """Of a stream with condition images, so of both passes apart; edit and perception are like it."""
    _, expected, plain = computed("personalization", data=1)
    program, found, gradients = computed("personalization", data=2, context=2)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    for (path, one), many in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5, err_msg=sharding.path_string(path))
    assert "all-to-all" in program.as_text()
    kernel = gradients["transformer"]["blocks"]["joint"]["image"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4  # as the state


@pytest.mark.slow
def test_one_picture_over_two_devices_is_that_of_one(tiny_bundle):
    config, params = bundle.load(tiny_bundle)
    table = solver_table("euler", sampling_sigmas(2))
    generator = np.random.default_rng(1)
    prompt, negative = generator.normal(size=(2, 1, 24, 32)).astype(np.float32)
    conditions = generator.normal(size=(1, 3, 8, 8, 48)).astype(np.float32)
    seeds, guidance = np.array([5], np.uint32), make_guidance(1, table, scale=3.0)

    def sample(**axes):
        mesh = make_mesh(fsdp=1, **axes, devices=jax.devices()[: axes.get("context", 1)])
        programs = Programs.of(MMDiT(config.transformer), None, None, mask_id=511, eos_id=1, mesh=mesh)
        weights = jax.device_put(jax.device_get(params["transformer"]), sharding.replicated(mesh))
        with jax.set_mesh(mesh):
            return programs.sample_images(
                weights, seeds, table, prompt, negative, guidance, conditions, latent_shape=(8, 8, 48)
            )

    expected = sample()
    np.testing.assert_allclose(sample(context=2), expected, rtol=1e-5, atol=1e-5)
    assert 0.3 < np.std(expected) < 30


@pytest.mark.slow
def test_a_run_with_split_tokens_resumes_without(small_config, tmp_path):
    config, split = (small_config("stage1", num_steps=steps) for steps in (2, 1))
    split.mesh.update({"data": 2, "context": 2})
    train(config, tmp_path / "plain", progress=False, devices=jax.devices()[:1])
    train(split, tmp_path / "split", progress=False, devices=jax.devices()[:4])
    train(config, tmp_path / "split", progress=False, devices=jax.devices()[:1])
    plain, resumed = (read_metrics(tmp_path / name) for name in ("plain", "split"))
    assert [row["step"] for row in resumed] == [1, 2]
    for one, other in zip(plain, resumed, strict=True):
        for name in ("loss", "flow_matching", "masked_text", "cross_modal", "intrinsic_modal", "gradient_norm"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
