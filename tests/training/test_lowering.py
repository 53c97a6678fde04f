"""Every program of training and sampling, lowered for TPUs and NVIDIA GPUs on this machine's CPU.

Lowering finds what JAX itself refuses on those machines (a kernel that is not split by hand, shapes that a kernel does
not take), in seconds and without their compilers. The attention is the one that "auto" chooses there. Sizes are small,
but for the width of the heads, which the kernels depend on. Most of the time is tracing: programs share what they can.
"""

import functools
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.models.attention import attention
from unialign_jax.models.autoencoder import AutoencoderKL
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.models.parameters import storage_dtype
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling import programs
from unialign_jax.sampling.solvers import solver_table
from unialign_jax.sampling.text import DECODINGS
from unialign_jax.training import samples
from unialign_jax.training.config import build_configs, read_config
from unialign_jax.training.optimizer import make_optimizer
from unialign_jax.training.samples import Sampler
from unialign_jax.training.state import Networks, abstract_frozen, abstract_state
from unialign_jax.training.step import batch_shapes, lower_train_step, make_train_step

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "stage1": ("text_to_image",),
    "stage2": ("text_to_image", "edit", "perception", "personalization"),
    "stage3": ("text_to_image", "edit", "perception", "personalization", "vqa"),
}
# What of a stage and a stream makes the program of the step: those that agree in it are one program.
SAME = {"perception": "edit"}
REMAT = {"stage1": "dots", "stage2": "block", "stage3": "block"}
STEPS = {
    (REMAT[stage], SAME.get(name, name)): (stage, SAME.get(name, name))
    for stage, names in STAGES.items()
    for name in names
}
EVERY_PLATFORM = pytest.mark.parametrize("platform", ["tpu", "cuda"])
ONE, FSDP, MIXED, POD = {}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 2, "encoder": 2}


@pytest.fixture(autouse=True)
def no_cudnn_needed(monkeypatch):
    """JAX asks the library for its version when it traces a call, where lowering needs only the answer."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "paired"))
def apply_once(module, *arguments, **keywords):
    """A network on arrays of these shapes, on this mesh: traced for the first program that has it."""
    return nn.Module.apply(module, *arguments, **keywords)


def encode_once(module, *arguments, beside=None):
    """The same of a text encoder, unless weights are gathered beside it."""
    return nn.Module.apply(module, *arguments, beside=beside) if beside else apply_once(module, *arguments)


@pytest.fixture(autouse=True)
def encoders_traced_once(monkeypatch):
    """The frozen networks are the same on every platform."""
    monkeypatch.setattr(TextEncoder, "apply", encode_once)
    monkeypatch.setattr(AutoencoderKL, "apply", apply_once)


@functools.cache
def made_small(stage):
    config = read_config(str(ROOT / "configs" / f"{stage}.py"), [])
    config.update(
        {
            "batch_size": 8,
            "image_size": 16,
            "text_length": 24,
            "model": {"depth": 2, "num_heads": 2, "tap_depth": 1, "text_width": 128, "vocab_size": 512},
            "heads": {"hidden_width": 32, "teacher_width": 16},
            "text_encoder": {"width": 128, "mlp_width": 64, "num_heads": 2, "depth": 1, "vocab_size": 512},
            "autoencoder": {"block_widths": (32, 64), "blocks_per_level": 1, "downsample_factor": 2},
            "samples": {"count": 5, "steps": 2},
        }
    )
    return config


def on(mesh):
    """The mesh of these sizes over the virtual devices; of one of them for no sizes."""
    sizes = {"fsdp": 1} | mesh
    return make_mesh(**sizes, devices=jax.devices()[: 8 if mesh else 1])


@functools.cache
def weights(stage, mesh):
    """The state and the frozen encoders of a stage, as shapes on the mesh: no platform changes them."""
    config = made_small(stage)
    networks = Networks.create(*build_configs(config, "cpu")).on(mesh)
    tx, _ = make_optimizer(**config.optimizer, decay_1d=True)
    return abstract_state(networks, tx, config.ema_decay, mesh), abstract_frozen(networks, mesh)


def lower(platform, function, mesh, *arguments):
    """Lowers `function(*arguments)` under the mesh; the arguments are shapes."""
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))


def test_the_steps_below_are_all_there_are():
    for stage, names in STAGES.items():
        config = made_small(stage)
        assert set(names) == {name for name, stream in config.streams.items() if stream.weight}
        assert config.model.remat == REMAT[stage] and config.model.attention == "auto"
        for name, other in SAME.items():
            if name in names:
                assert batch_shapes(config, config.streams[name]) == batch_shapes(config, config.streams[other])


@pytest.mark.slow
@EVERY_PLATFORM
@pytest.mark.parametrize("mesh", [ONE, FSDP], ids=["one", "fsdp"])
@pytest.mark.parametrize(("stage", "name"), STEPS.values())
def test_the_train_step_of_every_stream(stage, name, mesh, platform):
    lower_step(stage, name, mesh, platform)


@pytest.mark.slow
@EVERY_PLATFORM
@pytest.mark.parametrize("mesh", [MIXED, POD], ids=["mixed", "pod"])
def test_the_train_step_on_other_meshes(mesh, platform):
    lower_step("stage2", "edit", mesh, platform)


def lower_step(stage, name, sizes, platform):
    config, mesh = made_small(stage), on(sizes)
    networks = Networks.create(*build_configs(config, platform)).on(mesh)
    assert networks.transformer.config.attention == {"tpu": "splash", "cuda": "cudnn"}[platform]
    tx, schedule = make_optimizer(**config.optimizer, decay_1d=True)
    step = make_train_step(config, networks, tx, schedule, config.streams[name].kind, mask_id=511, eos_id=1)
    batch = batch_shapes(config, config.streams[name])
    lower_train_step(step, mesh, *weights(stage, mesh), batch, platforms=(platform,))


@pytest.mark.slow
@EVERY_PLATFORM
@pytest.mark.parametrize(("mesh", "batch"), [(ONE, 5), (FSDP, 8), (FSDP, 5)], ids=str)
def test_every_sampling_program(mesh, batch, platform, monkeypatch):
    config, mesh = made_small("stage3"), on(mesh)
    networks = Networks.create(*build_configs(config, platform))
    transformer, text_encoder, autoencoder = networks.transformer, networks.text_encoder, networks.autoencoder
    state, frozen = weights("stage3", mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, storage_dtype(sharding.path_string(path), "bfloat16"), sharding=leaf.sharding
        ),
        state.params["transformer"],
    )
    place = sharding.replicated(mesh) if batch % 8 else sharding.batch_sharding(mesh)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place)

    latents, seeds = array(8, 8, 16), array(dtype=jnp.uint32)
    text = array(24, 128, dtype=jnp.bfloat16)
    table = solver_table("euler", sampling_sigmas(2))
    text_only = programs.Guidance(array(), array())
    interval, two_scales = text_only._replace(active=np.ones(2, bool)), text_only._replace(image_scale=array())
    state = image_sampler.SamplerState(latents, latents, latents)

    ids, is_target = array(24, dtype=jnp.int32), array(24, dtype=jnp.bool_)
    images = array(16, 16, 3, dtype=jnp.uint8)
    calls = [
        (functools.partial(programs.encode_prompts, text_encoder), frozen["text_encoder"], ids),
        (functools.partial(programs.encode_images, autoencoder), frozen["autoencoder"], images),
        (functools.partial(programs.decode_images, autoencoder), frozen["autoencoder"], latents),
        (functools.partial(programs.advance_images, transformer), params, state, table, text, text, text_only),
    ]
    sample = functools.partial(programs.sample_images, transformer, latent_shape=(8, 8, 16))
    for guidance in (None, text_only, interval, two_scales):  # by the same function, `advance_images`
        conditions = array(1, 8, 8, 16) if guidance is two_scales else None
        calls.append((sample, params, seeds, table, text, text, guidance, conditions))
    both = {"transformer": params, "text_encoder": frozen["text_encoder"]}
    describe = functools.partial(programs.describe, transformer, text_encoder, mask_id=511, eos_id=1)
    for decoding in DECODINGS:
        rest = (latents, ids, is_target, seeds, 4, 1.0, 0.9, 0.1)
        calls.append((functools.partial(describe, decoding=decoding), both, *rest))

    def every_program(arguments):
        return [function(*own) for (function, *_), own in zip(calls, arguments, strict=True)]

    monkeypatch.setattr(MMDiT, "apply", apply_once)  # and lowered once, where programs call it in one module
    lower(platform, every_program, mesh, [arguments for _, *arguments in calls])


class Blank:
    """A stream of five black examples."""

    def __init__(self, settings):
        self.config = settings

    def __len__(self):
        return 5

    def with_images(self):
        return self

    def __getitem__(self, index):
        example = {
            "image": np.zeros((16, 16, 3), np.uint8),
            "prompt_ids": np.zeros(24, np.int32),
            "text_ids": np.zeros(24, np.int32),
            "text_is_target": np.ones(24, bool),
        }
        if self.config.num_conditions:
            example["conditions"] = np.zeros((self.config.num_conditions, 16, 16, 3), np.uint8)
        return example


@pytest.mark.slow
@EVERY_PLATFORM
@pytest.mark.parametrize("mesh", [ONE, FSDP, POD], ids=["one", "fsdp", "pod"])
def test_the_samples_of_every_stream(mesh, platform, monkeypatch, tmp_path):
    """The sampler of training as it runs, each of its programs lowered instead of compiled and run."""
    config, mesh = made_small("stage3"), on(mesh)
    networks = Networks.create(*build_configs(config, platform))
    lowered = []

    def lowering_jit(function, **options):
        program, seen = jax.jit(function, **options), {}

        def call(*arguments, **keywords):
            described = [(np.shape(x), getattr(x, "sharding", None)) for x in jax.tree.leaves(arguments)]
            key = str((described, jax.tree.structure(arguments), keywords))
            if key not in seen:
                traced = program.trace(*arguments, **keywords)
                traced.lower(lowering_platforms=(platform,))
                lowered.append(function)
                places = options.get("out_shardings") or sharding.tree_shardings(traced.out_info, mesh)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), traced.out_info)
                seen[key] = jax.device_put(zeros, places)
            return seen[key]

        return call

    # For the files of the sampler and of its programs, and for nothing else.
    for module in (samples, programs):
        monkeypatch.setattr(module, "jax", types.SimpleNamespace(**vars(jax) | {"jit": lowering_jit}))
    streams = {name: Blank(settings) for name, settings in config.streams.items() if name not in SAME}
    tokenizer = types.SimpleNamespace(eos_id=1, mask_id=511, decode=str)
    monkeypatch.setattr(MMDiT, "apply", apply_once)
    sampler = Sampler(config, networks, mesh, streams, tokenizer, tmp_path)
    state, frozen = weights("stage3", mesh)
    written = sampler.write(1, state.params["transformer"], frozen)
    assert len(written) == 7 and all(path.is_file() for path in written)
    # The weights, T5, images with 0, 1 and 3 conditions sampled, the targets and 1 and 3 conditions encoded, decoding,
    # the text, and images and texts on their way to the hosts.
    assert len(lowered) == 1 + 1 + 3 + 3 + 1 + 1 + 2


@EVERY_PLATFORM
@pytest.mark.parametrize(("batch", "heads"), [(8, 2), (5, 2), (4, 3), (1, 3)])
@pytest.mark.parametrize("mesh", [ONE, FSDP, MIXED], ids=["one", "fsdp", "mixed"])
def test_attention_whatever_divides(mesh, batch, heads, platform):
    """Forward and backward: where no axis divides samples or heads, every device does all of the work."""
    implementation = {"tpu": "splash", "cuda": "cudnn"}[platform]

    def loss(*inputs):
        return jnp.sum(attention(*inputs, implementation=implementation).astype(jnp.float32))

    inputs = [jax.ShapeDtypeStruct((batch, 40, heads, 64), jnp.bfloat16)] * 3
    lower(platform, jax.value_and_grad(loss, argnums=(0, 1, 2)), on(mesh), *inputs)
