"""The networks of a run, their first weights, and the state that an optimizer step updates."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from unialign_jax.models import parameters
from unialign_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from unialign_jax.models.lora import LoraConfig, init_adapters
from unialign_jax.models.mmdit import AlignmentHeads, AlignmentHeadsConfig, MMDiT, MMDiTConfig
from unialign_jax.models.quantization import QuantizedModule, input_axes, is_quantized, quantize_params, rounds_inputs
from unialign_jax.models.teacher import TeacherConfig
from unialign_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from unialign_jax.parallel import sharding
from unialign_jax.parallel.gradients import scan_blocks
from unialign_jax.parallel.mesh import axes_without_wraparound, count_slices

if TYPE_CHECKING:  # readers of a checkpoint do without optax
    from unialign_jax.training.optimizer import Optimizer

# Without converted weights the frozen encoders are drawn from this seed, whatever the run's own: the stages of one
# training must agree on them.
FROZEN_SEED = 20250928
RELATIVE_BIAS_SPREAD = 4.0  # standard deviation, over distances, of a random encoder's attention bias


class Networks(NamedTuple):
    """The modules of a run; `transformer` and `heads` are trained, the others are frozen.

    `teacher` is the architecture of a teacher that runs in the train step; None where its features are stored.
    `lora` says which adapters are trained in place of transformer and heads; None where they are trained themselves.
    """

    transformer: MMDiT
    heads: AlignmentHeads
    text_encoder: TextEncoder | QuantizedModule
    autoencoder: Any
    teacher: TeacherConfig | None = None
    lora: LoraConfig | None = None

    @classmethod
    def create(
        cls,
        model: MMDiTConfig,
        heads: AlignmentHeadsConfig,
        text_encoder: TextEncoderConfig,
        autoencoder: AutoencoderConfig,
    ) -> "Networks":
        return cls(MMDiT(model), AlignmentHeads(heads), TextEncoder(text_encoder), make_autoencoder(autoencoder))

    def on(self, mesh: Mesh) -> "Networks":
        """The same networks, whose blocks' gradients are reduced as fits the mesh's place in its torus."""
        scan = scan_adapted
        if self.lora is None:
            scan = scan_on(axes_without_wraparound(mesh), count_slices(mesh.devices.flat))
        return self._replace(transformer=self.transformer.clone(scan_blocks=scan))


@functools.cache
def scan_on(axes: tuple[str, ...], slices: int) -> Callable:
    """`scan_blocks` where these axes have no wrap-around: one function, so that equal networks compare equal."""
    return functools.partial(scan_blocks, axes_without_wraparound=axes, slices=slices)


def scan_adapted(*args, late: bool = False):
    """`scan_blocks` that never reduces late: that computes the gradients of all weights, and few are adapted."""
    return scan_blocks(*args, late=False)


class TrainState(NamedTuple):
    """Everything that an optimizer step changes, and so everything that a checkpoint holds.

    `params` and `ema` are float32 trees. `params` has the branches "transformer" and "heads"; `ema` averages the
    transformer alone (the heads are not used after training), and is empty when switched off. Of a run that trains
    adapters, `params` has the branch "transformer" alone, and both hold adapters (models/lora.py) in its place.
    """

    step: jax.Array  # int32 scalar: optimizer steps done, which is also the position in the data
    params: dict
    ema: dict
    opt_state: Any


def init_params(networks: Networks, key: jax.Array) -> dict:
    """Random trained parameters: {"transformer": ..., "heads": ...}, float32; {"transformer": adapters} with LoRA."""
    config = networks.transformer.config
    if networks.lora is not None:
        return {"transformer": init_adapters(networks.lora, abstract_transformer(networks), key)}
    transformer_key, heads_key = jax.random.split(key)
    return {
        "transformer": parameters.init(config, transformer_key),
        "heads": parameters.init(networks.heads.config, heads_key, tap_width=config.width),
    }


def abstract_transformer(networks: Networks) -> dict:
    """The shapes of the transformer's parameters, in the dtypes that it may be kept in where it is not trained."""
    config = networks.transformer.config
    shapes = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, parameters.storage_dtype(sharding.path_string(path), config.dtype)
        ),
        shapes,
    )


def init_frozen(networks: Networks) -> dict:
    """Random frozen encoders: {"text_encoder": ..., "autoencoder": ...}, each in its compute dtype.

    With LoRA also the "base", a random transformer that the adapters change.
    """
    text_key, image_key = jax.random.split(jax.random.key(FROZEN_SEED))
    text = parameters.init(networks.text_encoder.config, text_key)
    # Only this bias gives the text stream positions. T5's own initialisation leaves it near zero, which would make a
    # random encoder a bag of words. With a wide spread each head attends to distances of its own.
    text["relative_bias"] *= RELATIVE_BIAS_SPREAD * networks.text_encoder.config.width**0.5
    image = parameters.init(networks.autoencoder.config, image_key)
    frozen = {
        "text_encoder": cast_text_encoder(networks.text_encoder, text),
        "autoencoder": _cast(image, networks.autoencoder.config.dtype),
    }
    if networks.lora is not None:
        frozen["base"] = cast_base(networks, parameters.init(networks.transformer.config, jax.random.key(FROZEN_SEED)))
    return frozen


def cast_base(networks: Networks, params: dict) -> dict:
    """Parameters of the transformer that adapters change, as a step holds them: in its compute dtype or in 8 bits."""
    mode, whole = networks.lora.quantize_base, abstract_transformer(networks)
    params = quantize_params(params, mode) if mode else params
    keep = lambda x, like: x if is_quantized(x) else x.astype(like.dtype)  # noqa: E731
    return jax.tree.map(keep, params, whole, is_leaf=is_quantized)


def cast_text_encoder(module: TextEncoder | QuantizedModule, params: dict) -> dict:
    """Parameters of the text encoder as a step holds them: kernels in 8 bits where the module takes these, all else in
    its compute dtype.
    """
    if not isinstance(module, QuantizedModule):
        return _cast(params, module.config.dtype)
    keep = lambda leaf: leaf if is_quantized(leaf) else leaf.astype(module.config.dtype)  # noqa: E731
    return jax.tree.map(keep, quantize_params(params, module.mode), is_leaf=is_quantized)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def init_state(networks: Networks, tx: "Optimizer", ema_decay: float, key: jax.Array) -> TrainState:
    """A state of random parameters at step 0."""
    params = init_params(networks, key)
    # A copy, since the step donates the state, and no buffer can be donated twice.
    ema = jax.tree.map(jnp.copy, params["transformer"]) if ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def create_sharded(init: Callable, abstract: Any, *args):
    """`init(*args)` with every leaf made where that of `abstract` is to lie, never whole on one device."""
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(*args)


def abstract_state(networks: Networks, tx: "Optimizer", ema_decay: float, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_state(networks, tx, ema_decay, jax.random.key(0)))
    return sharding.with_shardings(shapes, sharding.tree_shardings(shapes, mesh, state=True))


def abstract_frozen(networks: Networks, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of the frozen encoders; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_frozen(networks))
    if (teacher := networks.teacher) is not None:
        shapes["teacher"] = jax.eval_shape(lambda: _cast(parameters.init(teacher, jax.random.key(0)), teacher.dtype))
    return sharding.with_shardings(shapes, frozen_shardings(networks, shapes, mesh))


def frozen_shardings(networks: Networks, shapes: dict, mesh: Mesh) -> dict:
    """Where the frozen networks lie. The table is for kernels [layers, inputs, outputs], and some of 8 bits have the
    inputs last.
    """
    places, module = sharding.tree_shardings(shapes, mesh), networks.text_encoder
    if not isinstance(module, QuantizedModule) or not rounds_inputs(module.mode):
        return places

    def turned(path, leaf, place):
        path = sharding.path_string(path)
        axes = input_axes(path)
        if axes is None:
            return place
        shape = (leaf.shape[0], *leaf.shape[-axes:], *leaf.shape[1:-axes])
        spec = sharding.partition_spec(path, shape, mesh)
        spec = (*spec, *[None] * (leaf.ndim - len(spec)))
        return NamedSharding(mesh, jax.P(spec[0], *spec[1 + axes :], *spec[1 : 1 + axes]))

    def both(path, leaf, place):
        return jax.tree.map(lambda part, own: turned(path, part, own), leaf, place)

    text = jax.tree_util.tree_map_with_path(both, shapes["text_encoder"], places["text_encoder"], is_leaf=is_quantized)
    return places | {"text_encoder": text}
