"""Losses on held-out records, and accuracies on held-out scenes, at intervals of a run.

Nothing is drawn anew from one validation to the next: records, noise, masks, sigma and mask fractions stay, and no
prompt is dropped. So the points of a curve can be compared, and the curves of runs of the same batch size and
accumulation, whatever their seeds.
"""

import dataclasses
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.scipy.special import ndtri

from unialign_jax import bundle
from unialign_jax.data.streams import Stream
from unialign_jax.diffusion import flow, masking
from unialign_jax.evaluation import shapes, shapes_run
from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.parallel import sharding
from unialign_jax.training import runs
from unialign_jax.training.config import listed
from unialign_jax.training.metrics import to_means
from unialign_jax.training.state import Networks
from unialign_jax.training.step import Levels, compute_losses, micro_batches, sigma_settings

log = logging.getLogger(__name__)

SEED = 20260711  # of noise and masks, whatever the run's own
# Steps of a sequence that fills the unit square evenly (the powers of 1 / 1.3247..., the root of x^3 = x + 1).
SIGMA_STRIDE, MASK_STRIDE = 0.7548776662466927, 0.5698402909980532
SCENES_AT_ONCE = 32


def held_out_count(config) -> int:
    """Held-out records of each stream: `validation.records`, rounded up to whole batches."""
    return -(-config.validation.records // config.batch_size) * config.batch_size


def hold_out(config, streams: dict[str, Stream], tokenizer) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """(the streams without their held-out records, the held-out records of each as a stream).

    Those are the first of the folder `validation_path`, or without one the last of the stream's own.
    Raises ValueError with all streams that have too few records, or a folder that does not fit.
    """
    count, kept, held_out, problems = held_out_count(config), {}, {}, []
    rounded = f"validation.records {config.validation.records}, in whole batches of {config.batch_size}"
    for name, stream in streams.items():
        key = f"streams.{name}.validation_path"
        path, own = config.streams[name].validation_path, stream.config.path
        if path and os.path.realpath(path) == os.path.realpath(own):
            problems.append(f"{key} is the stream's own folder {own}: leave it empty to hold out its last records")
        elif path:
            try:
                other = Stream(dataclasses.replace(stream.config, path=path), tokenizer)
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


def fixed_levels(config, count: int) -> Levels:
    """The levels of `count` held-out records, float32 [count] each: evenly spaced quantiles of training's own."""
    normal = ndtri(jnp.asarray(strata(count, SIGMA_STRIDE), jnp.float32))
    fractions = masking.mask_fraction_at(strata(count, MASK_STRIDE), min_fraction=config.min_mask_fraction)
    sigma = flow.sigma_at(normal, **sigma_settings(config))
    return Levels(np.asarray(sigma), fractions.astype(np.float32))


def make_validation_step(config, networks: Networks, kind: str, mask_id: int, eos_id: int):
    """The losses of a stream's batch: (params, frozen, batch, its number) -> metrics, arrays [2] of sum and count.

    `batch` has the levels of its records beside what a training batch has: "sigma" and "mask_fraction", float32 [B].
    It is cut into `config.accumulation` micro-batches as in training, whose samples are each other's negatives.
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

    def __init__(self, trainer, alive=lambda: None):
        """Args: `trainer`, whose `held_out` streams are read; `alive` is called before each program is compiled.

        Raises ValueError for sampling settings that no pipeline takes.
        """
        self._trainer = trainer
        self._levels = fixed_levels(trainer.config, held_out_count(trainer.config))
        self._replicated = sharding.replicated(trainer.mesh)
        self._programs = {}
        for name in trainer.held_out:
            alive()
            began = time.perf_counter()
            self._programs[name] = self._compile(name)
            log.info("compiled the validation of %s in %.1f s", name, time.perf_counter() - began)
        self._scenes = Scenes.of(trainer)

    def _compile(self, name):
        trainer, stream = self._trainer, self._trainer.held_out[name]
        ids = trainer.tokenizer.mask_id, trainer.tokenizer.eos_id
        step = make_validation_step(trainer.config, trainer.networks, stream.config.kind, *ids)
        state, place = trainer.abstract_state, sharding.batch_sharding(trainer.mesh)
        params = {"transformer": state.params["transformer"], "heads": state.params["heads"]}
        example = stream[0] | {key: values[0] for key, values in self._levels._asdict().items()}
        size = trainer.config.batch_size
        batch = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype, sharding=place) for k, v in example.items()}
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        with jax.set_mesh(trainer.mesh):
            jitted = jax.jit(step, out_shardings=self._replicated)
            return jitted.lower(params, trainer.abstract_frozen, batch, number).compile()

    def __call__(self, params, frozen, alive=lambda: None) -> dict[str, dict[str, float]]:
        """The means over the held-out records of every stream, and the accuracies of every task on held-out scenes.

        Args:
          params: {"transformer", "heads"}, which are read, not donated.
          alive: called before each batch.
        """
        rows = {}
        for name in self._trainer.held_out:
            totals = {}
            for number in range(held_out_count(self._trainer.config) // self._trainer.config.batch_size):
                alive()
                index = jax.make_array_from_callback((), self._replicated, lambda _, n=number: np.int32(n))
                batch = self._trainer.put_batch(self._read(name, number))
                found = jax.device_get(self._programs[name](params, frozen, batch, index))
                totals = {key: totals.get(key, 0) + value.astype(np.float64) for key, value in found.items()}
            rows[name] = to_means(totals)
        if self._scenes:
            for task, values in self._scenes(params["transformer"], frozen, alive).items():
                rows[task] = rows.get(task, {}) | values
        return rows

    def _read(self, name, number) -> dict[str, np.ndarray]:
        """This host's rows of held-out batch `number`, with their levels."""
        rows = number * self._trainer.config.batch_size + self._trainer.rows
        with ThreadPoolExecutor(max(1, self._trainer.config.data.num_threads)) as pool:
            examples = list(pool.map(self._trainer.held_out[name].__getitem__, rows.tolist()))
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return batch | {key: values[rows] for key, values in self._levels._asdict().items()}


class Scenes:
    """The accuracies of a model under training on held-out scenes of the shapes world, as launch/evaluate.py has them.

    Images by the run's own sampling settings, texts by the most likely tokens first (top_k at temperature 0), all on
    the mesh's first device.
    """

    @classmethod
    def of(cls, trainer) -> "Scenes | None":
        """Those that the run asks for; None, and a warning, where there are none to have."""
        if not trainer.config.validation.scenes:
            return None
        kinds = {
            stream.config.kind
            for stream in trainer.streams.values()
            if stream.records.metadata.parameters.get("source") == "shapes"
        }
        reason = "no stream has records of the shapes world" if not kinds else ""
        if jax.process_count() > 1:
            reason = f"they run in a single process, and there are {jax.process_count()}"
        if reason and jax.process_index() == 0:
            log.warning("validation.scenes is passed over: %s", reason)
        if reason:
            return None
        return cls(trainer, [task for task in shapes_run.TASKS if shapes_run.stream_of(task) in kinds])

    def __init__(self, trainer, tasks):
        config, networks = trainer.config, trainer.networks
        self._count, self._tasks, self._params = config.validation.scenes, tasks, {}
        settings = json.loads(config.to_json_best_effort())
        model = bundle.BundleConfig(
            transformer=networks.transformer.config,
            text_encoder=networks.text_encoder.config,
            autoencoder=networks.autoencoder.config,
            **runs.describe("this run", settings | {"init_from": ""}),
        )
        leaves = lambda name: flatten_dict(self._params[name], sep="/").items()  # noqa: E731
        run = runs.Run("this run", model, trainer.tokenizer, leaves, "", 0, "")
        self._pipeline = Pipeline.from_run(run, max_batch=SCENES_AT_ONCE, device=trainer.mesh.devices.flat[0])

    def __call__(self, transformer, frozen, alive) -> dict[str, dict[str, float]]:
        """{task: {figure: its mean}}; `alive` is called before each batch of scenes."""
        self._params = frozen | {"transformer": transformer}
        try:
            return {task: self._score(task, alive) for task in self._tasks}
        finally:
            self._pipeline.unload("transformer")  # the next step gives these buffers away
            self._params = {}

    def _score(self, task, alive):
        alive()
        results = shapes_run.run_task(
            self._pipeline,
            task,
            self._count,
            text_options={"decoding": "top_k", "temperature": 0.0},
            batch=SCENES_AT_ONCE,
            progress=lambda _: alive(),
        )
        return {name: figure["mean"] for name, figure in shapes.summary([r.scores for r in results]).items()}


def headlines(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """What a progress bar shows of a validation: the loss of each stream and the leading figure of each task."""
    leading = {name: ("loss", shapes_run.LEADING.get(name)) for name in rows}
    return {f"val/{name}/{key}": rows[name][key] for name in rows for key in leading[name] if key in rows[name]}
