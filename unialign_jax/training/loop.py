"""A training run, from a configuration to a folder of checkpoints, metrics and samples.

`Trainer` prepares a run: its program, data and weights. `train` takes the steps.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unialign_jax import bundle
from unialign_jax.data.mixture import IN_USE, Mixture, batches_ahead
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.text_lengths import cuts_of
from unialign_jax.data.tokenizer import Tokenizer, load_backend, load_tokenizer
from unialign_jax.files.places import place, reaching
from unialign_jax.models import flops, parameters
from unialign_jax.models.lora import params_with_adapters, relative_change
from unialign_jax.parallel import processes, sharding
from unialign_jax.parallel.activations import axes_that_divide
from unialign_jax.parallel.compiled import keep_compiled
from unialign_jax.parallel.hardware import find_chip
from unialign_jax.training import base_model, caching
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.config import active_streams, listed
from unialign_jax.training.metrics import Recorder
from unialign_jax.training.program import StepProgram, check_config
from unialign_jax.training.run_folder import RunFolder
from unialign_jax.training.runs import inherit_sources, load_params, saved_steps, write_config
from unialign_jax.training.samples import Sampler
from unialign_jax.training.state import (
    TrainState,
    abstract_transformer,
    cast_base,
    cast_text_encoder,
    create_sharded,
    init_frozen,
    init_state,
)
from unialign_jax.training.step import has_image_pass
from unialign_jax.training.trackers import check_tracker, open_tracker
from unialign_jax.training.validation import Validator, headlines, hold_out

log = logging.getLogger(__name__)

CHANGE_AFTER, LEAST_CHANGE = 100, 1e-5  # steps after which adapters should have changed their kernels, and by how much


# --- Preparation: program, data, weights ---


class Trainer(StepProgram):
    """A run before its first step: the program of its steps, its data and its weights."""

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device] | None = None):
        """Raises ValueError with all problems of the configuration, or of the data."""
        super().__init__(config, jax.devices() if devices is None else devices)
        self.tokenizer = load_tokenizer(config.tokenizer or None)
        self.token_ids = (self.tokenizer.mask_id, self.tokenizer.eos_id)
        self.streams, self.held_out = open_streams(config, self.tokenizer), {}
        self.settings = {name: self.settings[name] for name in self.streams}  # buckets without records are left out
        if config.validation.every:
            self.streams, self.held_out = hold_out(config, self.streams, self.tokenizer)
        if jax.process_index() == 0:
            for line in (line for stream in self.streams.values() for line in cuts_of(stream)):
                log.warning("%s; a larger --config.text_length keeps more", line)
        self.rows = processes.local_rows(sharding.batch_sharding(self.mesh), config.batch_size)
        self.mixture = Mixture(
            list(self.streams.values()), seed=config.seed, global_batch=config.batch_size, rows=self.rows
        )
        if jax.process_index() == 0:
            for line in self._repetitions():
                log.warning("%s", line)
        self.sample_flops = {name: self._sample_flops(stream) for name, stream in self.streams.items()}
        log.info("%s", self.mesh_choice)

    def _repetitions(self) -> Iterator[str]:
        """A line for each stream whose records the run reads more than `data.max_epochs_warning` times."""
        most = self.config.data.max_epochs_warning
        for name, epochs in self.mixture.epochs(self.config.num_steps).items():
            if 0 < most < epochs:
                count = len(self.streams[name])
                yield (
                    f"stream {name}: {count} records are read {epochs:.3g} times each, more than "
                    f"data.max_epochs_warning {most}: lower its weight or num_steps, or add records"
                )

    def _sample_flops(self, stream: Stream) -> float:
        cell = self.config.teacher.grid if has_image_pass(stream.config.kind) else 0
        return flops.training_sample_flops(
            self.networks.transformer.config,
            self.networks.text_encoder.config,
            self.networks.autoencoder.config,
            self.networks.heads.config,
            image_size=stream.config.size,
            text_length=self.config.text_length,
            num_conditions=stream.config.num_conditions,
            image_pass=has_image_pass(stream.config.kind),
            cached_latents=self.config.data.cached_latents,
            teacher_cells=math.prod(side // cell for side in stream.config.size) if cell else 1,
        )

    def init_state(self) -> TrainState:
        """A fresh state on the mesh: random weights, or those of `config.init_from`."""
        config = self.config
        key = jax.random.key(config.seed)
        with jax.set_mesh(self.mesh):
            state = create_sharded(
                lambda k: init_state(self.networks, self.tx, config.ema_decay, k), self.abstract_state, key
            )
            if config.init_from and self.networks.lora is None:
                params = self._load_params(state.params)
                ema = jax.tree.map(lambda x: x.copy(), params["transformer"]) if config.ema_decay else {}
                state = state._replace(params=params, ema=ema)
        return state

    def _load_params(self, fresh: dict) -> dict:
        """The parameters of `init_from`, and from `fresh` the heads or the text positions that it lacks."""
        config, abstract = self.config, dict(self.abstract_state.params)
        source = bundle.locate(config.init_from)
        if not bundle.is_bundle(source):
            loaded = load_params(config.init_from, abstract, config.init_weights)
        else:
            stored = bundle.read_config(source)
            if stored.heads is None:
                log.info("%s has no alignment heads, they start at random", config.init_from)
                del abstract["heads"]
            if stored.transformer is not None and not stored.transformer.text_positions:
                abstract["transformer"] = {k: v for k, v in abstract["transformer"].items() if k != "text_positions"}
            loaded = bundle.restore(source, abstract)
        if loaded["transformer"].keys() != fresh["transformer"].keys():
            log.info("%s has no text positions, they start at zero", config.init_from)
        return fresh | {name: fresh[name] | tree for name, tree in loaded.items()}

    def init_frozen(self, base: base_model.Base | None = None) -> dict:
        """The frozen networks on the mesh: the encoders of the bundle `config.frozen_from`, or random ones.

        Args:
          base: the transformer that the run's adapters change; that of `config.init_from` when None.
        """
        encoders = {name: self.abstract_frozen[name] for name in ("text_encoder", "autoencoder")}
        others = {}
        if self.networks.teacher is not None:
            others = bundle.restore(self.config.teacher.path, {"teacher": self.abstract_frozen["teacher"]})
        if self.networks.lora is not None:
            others["base"] = self._load_base(base or self.find_base())
        if self.config.frozen_from:
            source = bundle.locate(self.config.frozen_from)
            if self.config.quantize_text_encoder:
                others["text_encoder"] = self._quantized_text_encoder(source, encoders.pop("text_encoder"))
            return bundle.restore(source, encoders) | others
        if self.config.autoencoder.kind == "kl":
            log.warning("no frozen_from bundle: T5 and autoencoder are random, of use for measuring speed only")
        with jax.set_mesh(self.mesh):
            return create_sharded(lambda: init_frozen(self.networks._replace(lora=None)), encoders) | others

    def find_base(self) -> base_model.Base:
        """The transformer that a new run's adapters change."""
        config, step = self.config, -1
        if not bundle.is_bundle(bundle.locate(config.init_from)):
            step = next(iter(saved_steps(place(config.init_from) / "checkpoints")), -1)
        return base_model.find_base(config.init_from, config.init_weights, step)

    def _load_base(self, base: base_model.Base) -> dict:
        abstract = {"transformer": self.abstract_transformer}
        if base.step < 0:
            loaded = bundle.restore(bundle.locate(base.source), abstract)["transformer"]
        else:
            loaded = load_params(base.source, abstract, base.weights, base.step)["transformer"]
        if not self.networks.lora.quantize_base:
            return loaded
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_frozen["base"])
        with jax.set_mesh(self.mesh):
            return jax.jit(functools.partial(cast_base, self.networks), out_shardings=places)(loaded)

    @functools.cached_property
    def abstract_transformer(self) -> dict:
        """Shapes, compute dtypes and shardings of the transformer's parameters, for compute."""
        shapes = abstract_transformer(self.networks)
        return sharding.with_shardings(shapes, sharding.tree_shardings(shapes, self.mesh))

    def whole_transformer(self, params: dict, frozen: dict) -> dict:
        """The transformer's parameters of a state: with LoRA those of the base with the adapters `params`."""
        if self.networks.lora is None:
            return params
        with jax.set_mesh(self.mesh):
            return self._with_adapters(frozen["base"], params)

    @functools.cached_property
    def _with_adapters(self):
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_transformer)
        scale, dtype = self.networks.lora.scale, self.config.model.dtype
        return jax.jit(lambda *trees: params_with_adapters(*trees, scale, dtype), out_shardings=places)

    def check_change(self, state: TrainState, frozen: dict) -> None:
        """Logs by how much the adapters have changed the weights, as a warning where it is next to nothing."""
        with jax.set_mesh(self.mesh):
            measure = jax.jit(lambda *trees: relative_change(*trees, self.networks.lora.scale))
            change = float(measure(frozen["base"], state.params["transformer"]))
        if change < LEAST_CHANGE:
            log.warning(
                "after %d steps the adapters have changed their kernels by %.1e of their norm, which will not show: "
                "optimizer.learning_rate is %g, loss_weights are %s",
                int(state.step),
                change,
                self.config.optimizer.learning_rate,
                dict(self.config.loss_weights),
            )
        else:
            log.info("after %d steps the adapters have changed their kernels by %.2g of their norm", state.step, change)

    def _quantized_text_encoder(self, source: Path, abstract: dict) -> dict:
        """The text encoder of a bundle with kernels of 8 bits. Until then its weights are split over all devices."""
        module, dtypes = self.networks.text_encoder, bundle.component_dtypes(source, "text_encoder")

        def spread(path, leaf):
            axes = axes_that_divide(self.mesh.axis_names, self.mesh, leaf.shape[1]) if leaf.ndim > 1 else ()
            spec = jax.P(None, axes) if axes else jax.P()
            dtype = dtypes.get(sharding.path_string(path), leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=jax.sharding.NamedSharding(self.mesh, spec))

        plain = jax.eval_shape(lambda: parameters.init(module.config, jax.random.key(0)))
        plain = jax.tree_util.tree_map_with_path(spread, plain)
        plain = bundle.restore(source, {"text_encoder": plain})["text_encoder"]
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        with jax.set_mesh(self.mesh):
            return jax.jit(functools.partial(cast_text_encoder, module), out_shardings=places)(plain)

    def compile_steps(self, alive: Callable[[], None] = lambda: None) -> dict[str, jax.stages.Compiled]:
        """The executable of every stream; `alive` is called before each."""
        programs = {}
        for name in self.streams:
            alive()
            began = time.perf_counter()
            programs[name] = self.compile_step(name)
            log.info("compiled the step of %s in %.1f s", name, time.perf_counter() - began)
        return programs

    def batches(self, start: int) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
        """This host's rows of the batches from number `start` on, read ahead within `data.prefetch_gb`."""
        data, rows = self.config.data, len(self.rows)
        shapes = [self.batch_shapes(name).values() for name in self.streams]
        row_bytes = max(sum(x.size * x.dtype.itemsize for x in batch) for batch in shapes) // self.config.batch_size
        most = data.prefetch if data.num_threads else 0
        sharing = processes.processes_on_this_host()
        ahead = batches_ahead(rows * row_bytes, data.prefetch_gb * 1e9 / sharing, most)
        log.info(
            "data: %d batches ahead, %.2f GB of this host's memory with those in use (%d rows, up to %.1f MB a batch"
            "%s; data.prefetch_gb is %g)",
            ahead,
            (ahead + IN_USE) * rows * row_bytes * sharing / 1e9,
            rows,
            rows * row_bytes / 1e6,
            f", in each of {sharing} processes" if sharing > 1 else "",
            data.prefetch_gb,
        )
        return self.mixture.batches(start, num_threads=data.num_threads, prefetch=ahead)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows of a batch -> the global arrays."""
        place, size = sharding.batch_sharding(self.mesh), self.config.batch_size
        return {key: processes.put_rows(place, size, self.rows, value) for key, value in batch.items()}


def open_streams(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Stream]:
    """The data of every active stream. Raises ValueError with all problems of all streams."""
    streams, problems = {}, []
    intrinsic = config.loss_weights.intrinsic_modal > 0
    teacher_tokenizer = None
    if intrinsic and config.teacher.online:
        teacher_tokenizer = bundle.read_tokenizer(config.teacher.path, load=load_backend)
    for name, settings in active_streams(config).items():
        if settings.get("bucket") and not os.path.exists(settings.path):
            continue
        try:
            stream_config = StreamConfig(
                name=name,
                kind=settings.kind,
                path=settings.path,
                weight=settings.weight,
                num_conditions=settings.num_conditions,
                image_size=config.image_size,
                text_length=config.text_length,
                bucket=settings.get("bucket", ()),
                use_teacher=intrinsic,
                use_latents=config.data.cached_latents,
                teacher_cell=config.teacher.grid if intrinsic and has_image_pass(settings.kind) else 0,
            )
            stream = Stream(stream_config, tokenizer, teacher_tokenizer)
        except (ValueError, OSError) as error:
            problems.append(str(error))  # which names the stream
            continue
        if intrinsic and not config.teacher.online and stream.teacher_width != config.heads.teacher_width:
            found = f"features of width {stream.teacher_width}" if stream.teacher_width else "no teacher features"
            problems.append(
                f"stream {name}: {settings.path} has {found}, the alignment heads expect {config.heads.teacher_width}; "
                "train without the intrinsic-modal term by --config.loss_weights.intrinsic_modal=0"
            )
        streams[name] = stream
    if config.data.buckets:
        problems += share_weights(config, streams)
    problems += cache_problems(config, streams)
    if tokenizer.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids"
        )
    if problems:
        raise ValueError(listed("the data cannot be used", problems))
    return streams


def share_weights(config: ConfigDict, streams: dict[str, Stream]) -> list[str]:
    """Gives each bucket its share of its stream's weight, by its records. Returns the problems, one line each."""
    problems = []
    for name, settings in config.streams.items():
        names = [each for each in streams if each.rpartition("_")[0] == name]
        total = sum(len(streams[each]) for each in names)
        for each in names:
            weight = settings.weight * len(streams[each]) / total
            streams[each].config = dataclasses.replace(streams[each].config, weight=weight)
        if settings.weight > 0 and not names:
            problems.append(
                f"stream {name}: {settings.path} has no aspect buckets of image_size {config.image_size}: write "
                "them by launch/prepare_data.py --buckets, or set data.buckets=False"
            )
    return problems


def cache_problems(config: ConfigDict, streams: dict[str, Stream]) -> list[str]:
    """Caches that were not made by the run's own networks, or not by one, one line each."""
    expected = {}
    if config.teacher.path:
        expected["teacher"] = caching.network_digest(config.teacher.path, "teacher")
    if config.data.cached_latents and config.frozen_from:
        expected["latents"] = caching.network_digest(bundle.locate(config.frozen_from), "autoencoder")
    problems = []
    for name, stream in streams.items():
        for cache, network in stream.networks.items():
            if network != expected.setdefault(cache, network):
                problems.append(
                    f"stream {name}: {stream.config.path}/{cache} was made by another network ({network}) than "
                    f"{expected[cache]}, that of the run or of the first stream: encode it again"
                )
    return problems


# --- Stopping ---


class StopRequest:
    """Turns SIGTERM and SIGINT into a request to stop after the step under way; a second signal acts at once.

    Several processes all stop after the same step, whichever of them got the signal.
    """

    def __init__(self):
        self.signal = None
        self._vote = processes.DelayedMax() if jax.process_count() > 1 else None

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _frame):
        self.signal = self.signal or number
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop here. All processes ask at every step, and get the same answer."""
        if self._vote is None:
            return self.signal is not None
        chosen = self._vote(self.signal or 0)
        self.signal = chosen or self.signal
        return chosen > 0


# --- The run ---


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    progress: bool = True,
    devices: Sequence[jax.Device] | None = None,
    stuck_timeout: float = 0,
    make_scorer: Callable[[Trainer], Callable | None] | None = None,
) -> TrainState:
    """Trains to `config.num_steps` in `workdir`, from its newest whole checkpoint if it has one.

    Raises ValueError for a configuration or data that cannot run, OSError for a folder that cannot be written or that
    another run is in, FloatingPointError for a loss that is not finite, SystemExit (128 + signal) after a SIGTERM or
    SIGINT, once the state is saved.

    Args:
      config: from `configs/`, see training/config.py.
      workdir: the run's folder, on a file system that all hosts see, or gs://BUCKET/FOLDER.
      progress: whether to draw a progress bar.
      devices: those of the mesh; all when None.
      stuck_timeout: seconds after which a step, or another part of the run such as restoring, compiling one stream's
        step, sampling or saving, ends the process; 0 waits for ever.
      make_scorer: gives the scorer for `validation.scenes` (see `Validator`), such as `RunScenes.of` of the evaluation.
    """
    # --- Folder ---
    place(workdir)
    check_config(config, jax.devices() if devices is None else devices)
    check_tracker(config)
    keep_compiled(config.compilation_cache)

    with contextlib.ExitStack() as stack:
        alive = stack.enter_context(processes.ending_when_stuck(stuck_timeout))

        def in_time(call, *arguments):
            """Each call has the whole of `stuck_timeout`."""
            alive()
            return call(*arguments)

        # --- Program and data ---
        folder = RunFolder(workdir, stack)
        config = in_time(inherit_sources, config, folder.place)
        trainer = Trainer(config, devices)
        keep = config.checkpoint
        stack.enter_context(folder.taken())
        # Entered before the checkpoints, and so left after them: a signal must wait for the last save.
        stop = stack.enter_context(StopRequest())
        checkpoints = Checkpoints(folder.place, keep_last=keep.keep_last, keep_every=keep.keep_every)
        stack.enter_context(contextlib.closing(checkpoints))

        def save_all(state, step):
            folder.upload()  # first: a run that resumes from this step has the metrics up to it
            checkpoints.save(state, step)

        # --- Weights ---
        state = in_time(checkpoints.restore_latest, trainer.abstract_state)
        if state is None:
            state = in_time(trainer.init_state)
            log.info("starting %s from %s", folder.place, config.init_from or "random weights")
        else:
            log.info("resuming %s at step %d", folder.place, int(state.step))
        write_config(config, folder.local, int(state.step), run=folder.place)
        base = None
        if trainer.networks.lora is not None:
            base = in_time(base_of, trainer, folder, int(state.step))
        folder.upload()
        frozen = in_time(trainer.init_frozen, base)
        sampler = Sampler(config, trainer.networks, trainer.mesh, trainer.streams, trainer.tokenizer, folder.local)
        without_adapters = functools.partial(trainer.whole_transformer, {}, frozen) if base is not None else None

        def write_samples(state, step):
            params = trainer.whole_transformer(sampled_params(state), frozen)
            return sampler.write(step, params, frozen, without_adapters)

        # --- Steps ---
        step = int(state.step)
        if step < config.num_steps:
            programs = trainer.compile_steps(alive)
            validator = Validator(trainer, make_scorer, alive) if config.validation.every else None
            recorder = Recorder(trainer, folder.local, step, progress, open_tracker(config, folder.local))
            steps = run_steps(trainer, programs, state, frozen, recorder, stop)
            stack.enter_context(contextlib.closing(steps))
            alive()
            for state in steps:
                step += 1
                is_last = step == config.num_steps
                save = step % keep.every == 0
                sample = config.samples.every and step % config.samples.every == 0 and not is_last
                validate = validator and (step % config.validation.every == 0 or is_last)
                if save or sample or validate:
                    recorder.flush()  # a state whose loss is not finite must not be saved
                if base is not None and (step == CHANGE_AFTER or is_last):
                    in_time(trainer.check_change, state, frozen)
                if validate:  # before the save: a run that resumes from it has these rows
                    rows = validator(state.params | {"transformer": sampled_params(state)}, frozen)
                    recorder.add_validation(step, rows, headlines(rows, validator.leading))
                    if state.ema:  # beside the average's rows those of the weights that are trained
                        rows = validator(state.params, frozen, scenes=False)
                        recorder.add_validation(step, rows, prefix="validation_raw")
                if save:
                    in_time(save_all, state, step)
                if sample:
                    in_time(write_samples, state, step)
                    recorder.throughput.restart()
                alive()
            in_time(save_all, state, step)
        else:
            log.info("%s is already at step %d of %d", folder.place, step, config.num_steps)

        # --- Last samples ---
        finished = step >= config.num_steps
        alive()
        if finished and processes.anywhere(not sampler.is_written(step)):
            for path in write_samples(state, step):
                log.info("wrote %s", path)
        alive()  # closing the checkpoints waits for the last save
    if stop.signal is not None and not finished:
        log.info("stopped by %s at step %d, saved", signal.Signals(stop.signal).name, step)
        raise SystemExit(128 + stop.signal)
    return state


def base_of(trainer: Trainer, folder: RunFolder, step: int) -> base_model.Base:
    """The base of a run at `step`: kept in its base.json from the start on. Raises ValueError when it has changed."""
    with reaching(folder.place):
        is_kept = step or (folder.place / "base.json").is_file()
    if is_kept:
        base = base_model.read_base(folder.place)
        base_model.check_base(base, folder.place)
        return base
    base = trainer.find_base()
    if jax.process_index() == 0:
        base_model.write_base(base, folder.local)
        trained, stored = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (trainer.abstract_state.params, trainer.abstract_transformer)
        )
        log.info(
            "adapters of rank %d: %s parameters, %.2g%% of the transformer's; the state has %.3f GB, "
            "the frozen networks %.2f GB, before they are split",
            trainer.networks.lora.rank,
            f"{trained:,}",
            100 * trained / stored,
            tree_bytes(trainer.abstract_state) / 1e9,
            tree_bytes(trainer.abstract_frozen) / 1e9,
        )
        if seconds := expected_seconds(trainer):
            log.info(
                "by arithmetic the %d steps take %.2g hours: their matmuls, at the share of the peak of %s that large "
                "ones reach, an assumption; compiling, samples and saves come on top",
                trainer.config.num_steps,
                seconds / 3600,
                trainer.mesh.devices.flat[0].device_kind,
            )
    return base


def expected_seconds(trainer: Trainer) -> float | None:
    """The time of all steps, by the FLOPs that MFU counts and the devices' data sheet; None for unknown devices.

    With adapters these are the FLOPs of `remat=block`: a forward pass in place of the gradients of the weights.
    """
    chip = find_chip(trainer.mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    weights = {name: stream.config.weight for name, stream in trainer.streams.items()}
    sample = sum(weight * trainer.sample_flops[name] for name, weight in weights.items()) / sum(weights.values())
    samples = trainer.config.num_steps * trainer.config.batch_size
    return samples * sample / (trainer.mesh.size * chip.peak * chip.matmul_share)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def run_steps(
    trainer: Trainer,
    programs: dict[str, jax.stages.Compiled],
    state: TrainState,
    frozen: dict,
    recorder: Recorder,
    stop: StopRequest,
) -> Iterator[TrainState]:
    """Yields the state after each step. Metrics are fetched while the next step runs: the device waits for no host."""
    step = int(state.step)
    with contextlib.closing(recorder), contextlib.closing(trainer.batches(step)) as batches:
        while step < trainer.config.num_steps and not stop.agreed():
            name, batch = recorder.next_batch(batches)
            state, metrics = programs[name](state, frozen, trainer.put_batch(batch))
            recorder.add(step, name, metrics)
            step += 1
            yield state
        recorder.flush()


def sampled_params(state: TrainState) -> dict:
    """The transformer, or its adapters, that pictures are made with: the averaged ones where there are some."""
    return state.ema or state.params["transformer"]
