"""The programs that inference and the samples of training compile: networks, encoders and samplers put together.

The functions are pure. Each takes a module and its parameters first, then arrays. Seeds, guidance and noise levels are
arrays too, so other values of them compile nothing. `Programs` holds the functions of one model, compiled, and
`seconds_by_part` tells how long they took.

A sample's random numbers depend on its own seed alone, never on its batch. Under `jax.set_mesh(mesh)` samples are split
over the mesh where it divides them. Arrays of the wrong rank or shape raise AssertionError with both shapes.

Shape letters: B batch, H W image height and width, h w latent height and width, C latent channels, K conditions,
L text tokens, D width of the text embeddings, E evaluations of the network.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError
from jax.sharding import Mesh

from unialign_jax.files import first_line
from unialign_jax.models.autoencoder import Moments, denormalize, from_pixels, to_pixels
from unialign_jax.models.autoencoder import sample_latents as latents_of
from unialign_jax.models.mmdit import (
    MMDiT,
    block_modulations,
    first_of_pairs,
    in_pairs,
    second_of_pairs,
    without_modulations,
)
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.parallel.activations import BATCH_AXES, axes_that_divide
from unialign_jax.parallel.sharding import batch_sharding, replicated
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling.image import SamplerState
from unialign_jax.sampling.solvers import SolverTable
from unialign_jax.sampling.text import SINGLE_STEPS, TextSample, sample_text

KEPT = 64  # shapes of a function that stay compiled


class Guidance(NamedTuple):
    """How images are guided. What is None takes no part, and so belongs to the shape of the program."""

    scale: jax.Array  # [B] float32, of the text; 1 is the conditional model alone
    rescale: jax.Array  # [B] float32 in [0, 1], how much of the conditional prediction's contrast comes back
    active: jax.Array | None = None  # [E] bool, the evaluations that are guided; None guides all
    image_scale: jax.Array | None = None  # [B] float32, of the condition images, apart from the text's


def make_guidance(
    batch: int,
    table: SolverTable,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    image_scale: float | None = None,
) -> Guidance | None:
    """The guidance of `batch` samples alike; None for a scale of 1 that has no scale of the images beside it.

    Raises ValueError for an interval other than (0, 1) beside a scale of the images.
    """
    if image_scale is None and scale == 1:
        return None
    guidance = Guidance(np.full(batch, scale, np.float32), np.full(batch, rescale, np.float32))
    low, high = interval
    if image_scale is not None:
        if (low, high) != (0, 1):
            raise ValueError("guidance_interval goes with text guidance only: leave out image_guidance_scale")
        return guidance._replace(image_scale=np.full(batch, image_scale, np.float32))
    return guidance if (low, high) == (0, 1) else guidance._replace(active=(table.sigma >= low) & (table.sigma <= high))


def encode_prompts(text_encoder: TextEncoder, params: dict, ids: jax.Array) -> jax.Array:
    """Token ids int32 [B, L] -> T5 embeddings [B, L, D]."""
    return text_encoder.apply({"params": params}, ids)


def encode_images(autoencoder: Any, params: dict, images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] or [B, K, H, W, 3] -> normalised latents float32: the mean of the posterior, nothing drawn."""
    chex.assert_rank(images, {4, 5})
    chex.assert_shape(images, (..., 3))
    chex.assert_type(images, jnp.uint8)

    def encode(params, image):
        moments = autoencoder.apply({"params": params}, from_pixels(image[None]), method="encode")
        return latents_of(Moments(*moments), None, autoencoder.config)[0]

    latents = one_by_one(encode, params, images.reshape(-1, *images.shape[-3:]))
    return latents.reshape(*images.shape[:-3], *latents.shape[1:])


def decode_images(autoencoder: Any, params: dict, latents: jax.Array) -> jax.Array:
    """Normalised latents [B, h, w, C] -> uint8 [B, H, W, 3]."""
    chex.assert_shape(latents, (None, None, None, autoencoder.config.latent_channels))

    def decode(params, latent):
        raw = denormalize(latent[None], autoencoder.config)
        return to_pixels(autoencoder.apply({"params": params}, raw, method="decode")[0])

    return one_by_one(decode, params, latents)


def one_by_one(function: Callable, params: dict, samples: jax.Array) -> jax.Array:
    """`function(params, sample)` of each sample [B, ...] in turn; under a mesh each device does its own.

    One image fills a device, and memory does not grow with the batch. XLA's partitioner cannot split such a loop.
    """

    def local(params, samples):
        return jax.lax.map(functools.partial(function, params), samples)

    axes = axes_that_divide(BATCH_AXES, jax.sharding.get_abstract_mesh(), samples.shape[0])
    if not axes:
        return local(params, samples)
    rows = jax.P(axes)
    return jax.shard_map(local, in_specs=(jax.P(), rows), out_specs=rows, check_vma=False)(params, samples)


def initial_noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], each sample's from its own seed (uint32 [B])."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


def advance_images(
    transformer: MMDiT,
    params: dict,
    state: SamplerState,
    table: SolverTable,
    prompt: jax.Array,
    negative: jax.Array,
    guidance: Guidance | None,
    conditions: jax.Array | None = None,
) -> SamplerState:
    """The state of the image sampler after the evaluations of `table`.

    The adaLN modulations of all rows are made first; the loop does not read the weights that made them.

    Args:
      table: rows of a SolverTable, float32 [E, ...].
      prompt, negative: text embeddings [B, L, D].
      guidance: None is the prediction under the prompt alone, which does not read `negative`.
      conditions: latents [B, K, h, w, C]. The unconditional half of the guidance sees them too; with an `image_scale`
        there is a third prediction without them.
    """
    evaluations, batch = len(table.sigma), len(state.latents)
    chex.assert_equal_shape([prompt, negative])
    chex.assert_shape([*table], (evaluations,))
    active = None if guidance is None else guidance.active
    if guidance is not None:
        chex.assert_shape([x for x in guidance._replace(active=None) if x is not None], (batch,))
    if active is not None:
        chex.assert_shape(active, (evaluations,))
    rows = block_modulations(transformer.config, params, jnp.asarray(table.sigma, jnp.float32))
    lean = without_modulations(params)

    def network(latents, text, conditions, modulations):
        apply = transformer.apply
        return apply({"params": lean}, latents, text, None, conditions, modulations=modulations).velocity

    def both(latents, modulations):
        """The predictions under the negative and under the given prompt, in one forward of twice the batch.

        The two rows of a sample are neighbours, so a batch that is split over devices stays split.
        """
        twice = None if conditions is None else in_pairs(conditions, conditions)
        velocities = network(in_pairs(latents, latents), in_pairs(negative, prompt), twice, modulations)
        return first_of_pairs(velocities), second_of_pairs(velocities)

    def velocity(latents, sigma, row):
        modulations, is_active = row

        def conditional():
            return network(latents, prompt, conditions, modulations)

        def guided():
            return image_sampler.text_guidance(*both(latents, modulations), guidance.scale, guidance.rescale)

        if guidance is None:
            return conditional()
        if guidance.image_scale is not None:
            neither = network(latents, negative, None, modulations)
            return image_sampler.two_scale_guidance(
                neither, *both(latents, modulations), guidance.image_scale, guidance.scale, guidance.rescale
            )
        return guided() if is_active is None else jax.lax.cond(is_active, guided, conditional)

    return image_sampler.advance(velocity, state, (table, (rows, active)))


def sample_images(
    transformer: MMDiT,
    params: dict,
    seeds: jax.Array,
    table: SolverTable,
    prompt: jax.Array,
    negative: jax.Array,
    guidance: Guidance | None,
    conditions: jax.Array | None = None,
    *,
    latent_shape: tuple[int, int, int],
) -> jax.Array:
    """Latents [B, h, w, C] from noise, all evaluations in one scan; the other arguments are those of `advance_images`.

    Args:
      seeds: uint32 [B].
      latent_shape: (h, w, C).
    """
    chex.assert_shape(seeds, (len(prompt),))
    state = image_sampler.start(initial_noise(seeds, latent_shape))
    return advance_images(transformer, params, state, table, prompt, negative, guidance, conditions).latents


def describe(
    transformer: MMDiT,
    text_encoder: TextEncoder,
    params: dict,
    latents: jax.Array,
    ids: jax.Array,
    is_target: jax.Array,
    seeds: jax.Array,
    num_steps: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array,
    entropy_bound: jax.Array,
    evaluations: jax.Array | int = 0,
    most: jax.Array | None = None,
    *,
    mask_id: int,
    eos_id: int,
    decoding: str,
) -> TextSample:
    """The text of an image: T5 and the network fill the masked positions of ids (see `sampling.text.sample_text`).

    Args:
      params: {"transformer": ..., "text_encoder": ...}.
      latents: [B, h, w, C] of the images, clean.
      ids, is_target: [B, L]; positions that are no target, such as a question's, stay.
      seeds: uint32 [B].
      evaluations, most: of a text that is filled in parts.
    """
    chex.assert_rank(latents, 4)
    chex.assert_equal_shape([ids, is_target])
    chex.assert_equal_shape_prefix([latents, ids, seeds], 1)
    # The image is clean: one noise level, 0, and so one row of modulations for all steps.
    table = block_modulations(transformer.config, params["transformer"], jnp.zeros((1,)))
    row = jax.tree.map(lambda x: x[0], table)
    lean = without_modulations(params["transformer"])

    def logits(ids):
        text = encode_prompts(text_encoder, params["text_encoder"], ids)
        return transformer.apply({"params": lean}, latents, text, None, modulations=row).text_logits

    return sample_text(
        logits,
        ids,
        is_target,
        jax.vmap(jax.random.key)(seeds),
        num_steps=num_steps,
        mask_id=mask_id,
        eos_id=eos_id,
        single_steps=0 if transformer.config.text_positions else SINGLE_STEPS,
        decoding=decoding,
        temperature=temperature,
        threshold=threshold,
        entropy_bound=entropy_bound,
        evaluations=evaluations,
        most=most,
    )


class Stopwatch:
    """Adds up the seconds of the programs that a thread calls, by part.

    Attributes:
      seconds: {part: seconds}.
      has_compiled: whether one of the programs was called with this shape for the first time, or again after long.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.has_compiled = False
        self._loop = None  # (part, begin, last result) of a loop of calls that may go on

    def call(self, part: str, is_in_loop: bool, program: Callable) -> Any:
        if self._loop is None or not is_in_loop or self._loop[0] != part:
            self.end_loop()
            began = time.perf_counter()
        else:
            began = self._loop[1]
        result = program()
        if is_in_loop:
            self._loop = part, began, result
        else:
            jax.block_until_ready(result)
            self._add(part, began)
        return result

    def end_loop(self) -> None:
        """Waits for a loop's last result, if there is one."""
        if self._loop is not None:
            part, began, result = self._loop
            self._loop = None
            with contextlib.suppress(Exception):  # who reads the result is told of its error
                jax.block_until_ready(result)
            self._add(part, began)

    def _add(self, part, began):
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


_stopwatch = contextvars.ContextVar("stopwatch", default=None)


@contextlib.contextmanager
def seconds_by_part() -> Iterator[Stopwatch]:
    """The seconds, whole at the end of the block, of the programs that this thread calls in it.

    The parts are encode_prompts, encode_images, sample, write_text and decode_images. A part lasts from the call of its
    program until its result is there, compiling included. Results are waited for where the next part needs them;
    programs that are called in a loop, step by step, are waited for at its end.
    """
    watch = Stopwatch()
    token = _stopwatch.set(watch)
    try:
        yield watch
    finally:
        _stopwatch.reset(token)
        watch.end_loop()


class Program:
    """A function that is compiled for each shape of its arguments after the parameters.

    The shapes that were called last stay compiled. Others are forgotten, so that memory does not grow with the number
    of shapes; called again, they are compiled again, or read from JAX's cache on disk. Threads may share a program.
    """

    def __init__(
        self,
        function: Callable,
        part: str,
        *,
        is_in_loop: bool = False,
        out_shardings: Any = None,
        static: str | None = None,
        kept: int = KEPT,
    ):
        """Args:
        part: of `seconds_by_part`.
        is_in_loop: whether it is called step by step.
        static: name of an argument that belongs to the shape.
        kept: how many shapes stay compiled.
        """
        self._function, self._part, self._is_in_loop = function, part, is_in_loop
        self._out_shardings, self._static, self._kept = out_shardings, static, kept
        self._compiled = collections.OrderedDict()  # {shape: jitted function}, the one that was called last at the end
        self._lock = threading.Lock()

    def __call__(self, params: dict, *arrays: Any, **options: Any) -> Any:
        jitted, is_new = self._of_shape(arrays, options)
        call, watch = functools.partial(jitted, params, *arrays, **options), _stopwatch.get()
        if watch is None:
            return call()
        watch.has_compiled |= is_new
        return watch.call(self._part, self._is_in_loop, call)

    def lower(self, *args: Any, **options: Any) -> jax.stages.Lowered:
        """As of `jax.jit`; nothing is kept."""
        return self._jit().lower(*args, **options)

    def eval_shape(self, *args: Any, **options: Any) -> Any:
        """As of `jax.jit`; nothing is kept."""
        return self._jit().eval_shape(*args, **options)

    def _cache_size(self) -> int:  # as of `jax.jit`
        return sum(jitted._cache_size() for jitted in list(self._compiled.values()))

    def _jit(self):
        # A partial of its own for each: JAX keeps programs for as long as their function lives.
        function = functools.partial(self._function)
        return jax.jit(function, out_shardings=self._out_shardings, static_argnames=self._static)

    def _of_shape(self, arrays, options):
        fixed = options.get(self._static)
        traced = {name: value for name, value in options.items() if name != self._static}
        leaves, structure = jax.tree.flatten((arrays, traced))
        shape = structure, tuple(map(jax.typeof, leaves)), fixed
        with self._lock:
            jitted, is_new = self._compiled.pop(shape, None), False
            if jitted is None:
                jitted, is_new = self._jit(), True
            self._compiled[shape] = jitted
            if len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
        return jitted, is_new


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions above of one model, under their names: compiled, without the modules and the tokenizer's ids.

    `dataclasses.replace` puts another callable in the place of one, such as a timed one.
    """

    encode_prompts: Callable[..., jax.Array]
    encode_images: Callable[..., jax.Array]
    sample_images: Callable[..., jax.Array]  # static: latent_shape
    advance_images: Callable[..., SamplerState]
    decode_images: Callable[..., jax.Array]
    describe: Callable[..., TextSample]  # static: decoding

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(
        cls,
        transformer: MMDiT,
        text_encoder: TextEncoder,
        autoencoder: Any,
        *,
        mask_id: int,
        eos_id: int,
        mesh: Mesh | None = None,
        kept: int = KEPT,
    ) -> "Programs":
        """The programs of three modules. A module may be None; its programs cannot be called then.

        Equal arguments give the same programs, so that nothing is traced or compiled twice in a process.

        Args:
          mesh: when given, every result is split over the axes that split a batch; call them under `jax.set_mesh`.
          kept: how many shapes of each function stay compiled, those that were called last.
        """
        split = text = None
        if mesh is not None:
            split, text = batch_sharding(mesh), TextSample(batch_sharding(mesh), replicated(mesh))

        def program(function, part, *modules, is_in_loop=False, out_shardings=split, static=None, **ids):
            function = functools.partial(refusing_others(function), *modules, **ids)
            how = {"is_in_loop": is_in_loop, "out_shardings": out_shardings, "static": static, "kept": kept}
            return Program(function, part, **how)

        writing = {"is_in_loop": True, "out_shardings": text, "static": "decoding"}
        ids = {"mask_id": mask_id, "eos_id": eos_id}
        return cls(
            encode_prompts=program(encode_prompts, "encode_prompts", text_encoder),
            encode_images=program(encode_images, "encode_images", autoencoder),
            sample_images=program(sample_images, "sample", transformer, static="latent_shape"),
            advance_images=program(advance_images, "sample", transformer, is_in_loop=True),
            decode_images=program(decode_images, "decode_images", autoencoder),
            describe=program(describe, "write_text", transformer, text_encoder, **writing, **ids),
        )


def refusing_others(function: Callable) -> Callable:
    """`function`, a network's, raising ValueError in one line for parameters of another network when it is traced."""

    @functools.wraps(function)
    def refusing(*args, **options):
        try:
            return function(*args, **options)
        except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
            raise ValueError(f"the parameters do not fit the configuration: {first_line(error)}") from None
        except KeyError as missing:
            raise ValueError(f"the parameters do not fit the configuration: {missing} is missing") from missing

    return refusing
