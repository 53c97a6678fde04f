"""Losses on held-out records, and accuracies on held-out scenes, at intervals of a run.

Records, noise, masks, sigma and mask fractions are the same in every validation, and no prompt is dropped. So the
points of a curve compare, and so do the curves of runs of the same batch size and accumulation, whatever their seeds.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from ml_collections import ConfigDict

from unialign_jax.data.streams import Stream
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.diffusion import flow, masking
from unialign_jax.parallel import sharding
from unialign_jax.training.config import active_streams, listed
from unialign_jax.training.metrics import to_means
from unialign_jax.training.state import Networks
from unialign_jax.training.step import Levels, compute_losses, micro_batches, sigma_settings

log = logging.getLogger(__name__)

SEED = 20260711  # of noise and masks, whatever the run's own
# Steps of a sequence that fills the unit square evenly (the powers of 1 / 1.3247..., the root of x^3 = x + 1).
SIGMA_STRIDE, MASK_STRIDE = 0.7548776662466927, 0.5698402909980532


def held_out_count(config: ConfigDict) -> int:
    """Held-out records of each stream: `validation.records`, rounded up to whole batches."""
    return -(-config.validation.records // config.batch_size) * config.batch_size


def hold_out(
    config: ConfigDict, streams: dict[str, Stream], tokenizer: Tokenizer
) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """(the streams without their held-out records, the held-out records of each as a stream).

    Held out are the first records of the folder `validation_path`, or without one the last of the stream's own.
    Raises ValueError with all streams that have too few records, or a folder that does not fit.
    """
    count, kept, held_out, problems = held_out_count(config), {}, {}, []
    rounded = f"validation.records {config.validation.records}, in whole batches of {config.batch_size}"
    settings = active_streams(config)
    for name, stream in streams.items():
        key = f"streams.{name}.validation_path"
        path, own = settings[name].validation_path, stream.config.path
        if path and os.path.realpath(path) == os.path.realpath(own):
            problems.append(f"{key} is the stream's own folder {own}: leave it empty to hold out its last records")
        elif path:
            try:
                other = Stream(dataclasses.replace(stream.config, path=path), tokenizer, stream.teacher_tokenizer)
            except (ValueError, OSError) as error:
                problems.append(f"{key}: {error}")
                continue
            if other.teacher_width != stream.teacher_width:
                problems.append(
                    f"{key}: {path} has teacher features of width {other.teacher_width}, the stream's own have width "
                    f"{stream.teacher_width}"
                )
            elif len(other) < count:
                problems.append(f"{key}: {path} has {len(other)} records, expected at least {count} ({rounded})")
            else:
                kept[name], held_out[name] = stream, other.part(0, count)
        elif len(stream) <= count:
            problems.append(
                f"stream {name}: {own} has {len(stream)} records, and {count} are to be held out ({rounded}): lower "
                f"that, write more records, or name a folder of others by {key}"
            )
        else:
            first = len(stream) - count
            kept[name], held_out[name] = stream.part(0, first), stream.part(first, len(stream))
    if problems:
        raise ValueError(listed("validation cannot run", problems))
    return kept, held_out


def strata(count: int, stride: float) -> np.ndarray:
    """The middles of `count` equal parts of [0, 1], float64 [count], in an order in which neighbours are far apart."""
    order = np.argsort(np.arange(count) * stride % 1)
    places = np.empty(count)
    places[order] = (np.arange(count) + 0.5) / count
    return places


def fixed_levels(config: ConfigDict, count: int) -> Levels:
    """The levels of `count` held-out records, float32 [count] each: evenly spaced quantiles of training's own."""
    normal = ndtri(jnp.asarray(strata(count, SIGMA_STRIDE), jnp.float32))
    fractions = masking.mask_fraction_at(strata(count, MASK_STRIDE), min_fraction=config.min_mask_fraction)
    sigma = flow.sigma_at(normal, **sigma_settings(config))
    return Levels(np.asarray(sigma), fractions.astype(np.float32))


def make_validation_step(config: ConfigDict, networks: Networks, kind: str, mask_id: int, eos_id: int):
    """The losses of a stream's batch: (params, frozen, batch, its number) -> metrics, arrays [2] of sum and count.

    `batch` is a training batch with the levels of its records: "sigma" and "mask_fraction", float32 [B]. It is cut
    into `config.accumulation` micro-batches as in training, whose samples are each other's negatives.
    """

    def losses(params, frozen, batch, key):
        levels = Levels(batch["sigma"], batch["mask_fraction"])
        return compute_losses(config, networks, kind, mask_id, eos_id, params, frozen, batch, key, levels)[1]

    def validation_step(params, frozen, batch, number):
        key, count = jax.random.fold_in(jax.random.key(SEED), number), config.accumulation
        if count == 1:
            return losses(params, frozen, batch, jax.random.fold_in(key, 0))
        metrics = jax.lax.map(
            lambda part: losses(params, frozen, part[1], jax.random.fold_in(key, part[0])),
            (jnp.arange(count), micro_batches(batch, count)),
        )
        return jax.tree.map(lambda x: x.sum(axis=0), metrics)

    return validation_step


class Validator:
    """The validations of a run: `validator(params, frozen)` -> {stream or task: {name: value}}.

    All processes take part, and get the same numbers. Programs are compiled here and at the first scenes, never again.
    """

    def __init__(self, trainer, make_scorer: Callable | None = None, alive: Callable[[], None] = lambda: None):
        """Raises ValueError for sampling settings that no pipeline takes.

        Args:
          trainer: the run's; its `held_out` streams are read.
          make_scorer: trainer -> the scorer for `validation.scenes`, or None where there are none to score. A scorer is
            `scorer(transformer, frozen, alive)` -> {task: {figure: its mean}}, and has `leading`, {task: figure}.
          alive: called before each program is compiled, and before each batch.
        """
        self._trainer, self._alive = trainer, alive
        self._levels = fixed_levels(trainer.config, held_out_count(trainer.config))
        self._replicated = sharding.replicated(trainer.mesh)
        self._programs = {}
        for name in trainer.held_out:
            alive()
            began = time.perf_counter()
            self._programs[name] = self._compile(name)
            log.info("compiled the validation of %s in %.1f s", name, time.perf_counter() - began)
        self._scorer = None
        if trainer.config.validation.scenes and make_scorer is None:
            log.warning("validation.scenes is passed over: train() was given no make_scorer")
        elif trainer.config.validation.scenes:
            self._scorer = make_scorer(trainer)

    @property
    def leading(self) -> dict[str, str]:
        """{task: the figure that a progress bar shows} of the held-out scenes."""
        return self._scorer.leading if self._scorer else {}

    def _compile(self, name: str) -> jax.stages.Compiled:
        trainer, place = self._trainer, sharding.batch_sharding(self._trainer.mesh)
        kind = trainer.settings[name].kind
        step = make_validation_step(trainer.config, trainer.networks, kind, *trainer.token_ids)
        params = trainer.abstract_state.params
        level = jax.ShapeDtypeStruct((trainer.config.batch_size,), jnp.float32)
        shapes = trainer.batch_shapes(name) | dict.fromkeys(Levels._fields, level)
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for key, x in shapes.items()}
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        with jax.set_mesh(trainer.mesh):
            jitted = jax.jit(step, out_shardings=self._replicated)
            return jitted.lower(params, trainer.abstract_frozen, batch, number).compile()

    def __call__(self, params: dict, frozen: dict, *, scenes: bool = True) -> dict[str, dict[str, float]]:
        """The means over the held-out records of every stream, and the accuracies of every task on held-out scenes.

        Args:
          params: as the state has them; not donated.
          scenes: whether the held-out scenes are scored, if the run has any.
        """
        rows = {}
        for name in self._trainer.held_out:
            totals = {}
            for number in range(held_out_count(self._trainer.config) // self._trainer.config.batch_size):
                self._alive()
                index = jax.make_array_from_callback((), self._replicated, lambda _, n=number: np.int32(n))
                batch = self._trainer.put_batch(self._read(name, number))
                found = jax.device_get(self._programs[name](params, frozen, batch, index))
                totals = {key: totals.get(key, 0) + value.astype(np.float64) for key, value in found.items()}
            rows[name] = to_means(totals)
        if self._scorer and scenes:
            transformer = self._trainer.whole_transformer(params["transformer"], frozen)
            for task, values in self._scorer(transformer, frozen, self._alive).items():
                rows[task] = rows.get(task, {}) | values
        return rows

    def _read(self, name: str, number: int) -> dict[str, np.ndarray]:
        """This host's rows of held-out batch `number`, with their levels."""
        rows = number * self._trainer.config.batch_size + self._trainer.rows
        with ThreadPoolExecutor(max(1, self._trainer.config.data.num_threads)) as pool:
            examples = list(pool.map(self._trainer.held_out[name].__getitem__, rows.tolist()))
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return batch | {key: values[rows] for key, values in self._levels._asdict().items()}


def headlines(rows: dict[str, dict[str, float]], leading: dict[str, str]) -> dict[str, float]:
    """The figures of a validation for the progress bar: the loss of each stream, the leading figure of each task."""
    return {f"val/{n}/{key}": row[key] for n, row in rows.items() for key in ("loss", leading.get(n)) if key in row}
