"""A training run, from a configuration to a folder of checkpoints, metrics and samples.

`Trainer` prepares everything that a step needs (mesh, data, weights, one compiled program per stream); `train` runs the
steps, and writes down what they did.
"""

import contextlib
import json
import logging
import math
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.data.mixture import IN_USE, Mixture, batches_ahead
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.text_lengths import cuts_of
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.files import first_line, read_json, replacing_file
from unialign_jax.models import flops
from unialign_jax.parallel import processes, sharding
from unialign_jax.training.checkpoints import Checkpoints, checkpoints_of, load_params
from unialign_jax.training.config import active_streams, build_configs, config_problems, listed, with_new_names
from unialign_jax.training.meshes import mesh_for
from unialign_jax.training.metrics import MetricsWriter, Throughput, to_means
from unialign_jax.training.optimizer import make_optimizer
from unialign_jax.training.run_lock import only_run_in
from unialign_jax.training.samples import Sampler
from unialign_jax.training.state import (
    Networks,
    TrainState,
    abstract_frozen,
    abstract_state,
    create_sharded,
    init_frozen,
    init_state,
)
from unialign_jax.training.step import batch_shapes, has_image_pass, lower_train_step, make_train_step
from unialign_jax.training.validation import Validator, headlines, hold_out

log = logging.getLogger(__name__)


class Trainer:
    """Everything a run needs before its first step. Raises ValueError with all problems of the configuration."""

    def __init__(self, config: ConfigDict, devices=None):
        self.config = config
        devices = jax.devices() if devices is None else devices
        check_config(config, len(devices))
        self.networks = Networks.create(*build_configs(config, devices[0].platform))
        choice = mesh_for(config, devices, self.networks)
        self.mesh = sharding.make_mesh(**choice.sizes, devices=devices)
        self.networks = self.networks.on(self.mesh)

        self.tokenizer = load_tokenizer(config.tokenizer or None)
        self.streams, self.held_out = open_streams(config, self.tokenizer), {}
        if config.validation.every:
            self.streams, self.held_out = hold_out(config, self.streams, self.tokenizer)
        if jax.process_index() == 0:
            for line in (line for stream in self.streams.values() for line in cuts_of(stream)):
                log.warning("%s; a larger --config.text_length keeps more", line)
        self.rows = processes.local_rows(sharding.batch_sharding(self.mesh), config.batch_size)
        self.mixture = Mixture(
            list(self.streams.values()), seed=config.seed, global_batch=config.batch_size, rows=self.rows
        )
        self.tx, self.schedule = make_optimizer(**config.optimizer, decay_1d=config.parity.decay_1d)
        self.abstract_state = abstract_state(self.networks, self.tx, config.ema_decay, self.mesh)
        self.abstract_frozen = abstract_frozen(self.networks, self.mesh)
        self.sample_flops = {name: self._sample_flops(stream) for name, stream in self.streams.items()}
        log.info("%s", choice)

    def _sample_flops(self, stream):
        return flops.training_sample_flops(
            self.networks.transformer.config,
            self.networks.text_encoder.config,
            self.networks.autoencoder.config,
            self.networks.heads.config,
            image_size=self.config.image_size,
            text_length=self.config.text_length,
            num_conditions=stream.config.num_conditions,
            image_pass=has_image_pass(stream.config.kind),
        )

    def init_state(self) -> TrainState:
        """A fresh state on the mesh: random weights, or those of `config.init_from`."""
        config = self.config
        key = jax.random.key(config.seed)
        with jax.set_mesh(self.mesh):
            state = create_sharded(
                lambda k: init_state(self.networks, self.tx, config.ema_decay, k), self.mesh, key, state=True
            )
            if config.init_from:
                params = self._load_params(state.params)
                ema = jax.tree.map(lambda x: x.copy(), params["transformer"]) if config.ema_decay else {}
                state = state._replace(params=params, ema=ema)
        return state

    def _load_params(self, fresh):
        """Those of `init_from`, and of `fresh` what it lacks: a bundle's alignment heads, a table of text positions."""
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

    def init_frozen(self):
        """The frozen encoders on the mesh: those of the bundle `config.frozen_from`, or random ones."""
        if self.config.frozen_from:
            return bundle.restore(bundle.locate(self.config.frozen_from), self.abstract_frozen)
        if self.config.autoencoder.kind == "kl":
            log.warning("no frozen_from bundle: T5 and autoencoder are random, of use for measuring speed only")
        with jax.set_mesh(self.mesh):
            return create_sharded(lambda: init_frozen(self.networks), self.mesh)

    def step_function(self, name: str):
        stream = self.streams[name]
        return make_train_step(
            self.config,
            self.networks,
            self.tx,
            self.schedule,
            stream.config.kind,
            self.tokenizer.mask_id,
            self.tokenizer.eos_id,
        )

    def compile_step(self, name: str):
        """The stream's train step as one executable: it cannot compile again, and refuses another shape."""
        size = self.config.batch_size
        batch = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in self.streams[name][0].items()}
        step = self.step_function(name)
        return lower_train_step(step, self.mesh, self.abstract_state, self.abstract_frozen, batch).compile()

    def compile_steps(self, alive=lambda: None) -> dict[str, jax.stages.Compiled]:
        """The executable of every stream; `alive` is called before each."""
        programs = {}
        for name in self.streams:
            alive()
            began = time.perf_counter()
            programs[name] = self.compile_step(name)
            log.info("compiled the step of %s in %.1f s", name, time.perf_counter() - began)
        return programs

    def batches(self, start: int):
        """This host's rows of the batches from number `start` on, read ahead within `data.prefetch_gb`."""
        data, rows = self.config.data, len(self.rows)
        shapes = [batch_shapes(self.config, stream.config).values() for stream in self.streams.values()]
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

    def put_batch(self, batch: dict[str, np.ndarray]):
        """This host's rows of a batch -> the global arrays."""
        place, size = sharding.batch_sharding(self.mesh), self.config.batch_size
        return {key: processes.put_rows(place, size, self.rows, value) for key, value in batch.items()}


def check_config(config: ConfigDict, device_count: int):
    """Raises ValueError with all that is wrong with a configuration."""
    if problems := config_problems(config, device_count):
        raise ValueError(listed("the configuration cannot run", problems))


def inherit_sources(config, workdir: Path) -> ConfigDict:
    """The configuration with an empty `frozen_from` and `tokenizer` filled in, so that config.json names what was used.

    A resumed run keeps its own; a new one takes those of `init_from`: what a bundle holds, or what a run names. The
    tokenizer that is still not named is the one of the bundle `frozen_from`, which its text encoder was made with.
    A bundle of the package is kept by its name, for the package may move; its tokenizer is the shapes world's, "".
    As a stage's default it stands back behind those of `init_from` or of the run.
    """
    config = config.copy_and_resolve_references()
    is_new = not (workdir / "config.json").is_file()
    default = config.frozen_from if bundle.is_packaged(config.frozen_from) else ""
    if default:
        config.frozen_from = ""
    if is_new and bundle.is_bundle(bundle.locate(config.init_from)):
        before = {"frozen_from": _lasting(config.init_from), "tokenizer": _tokenizer_of(config.init_from)}
    else:
        start = read_run_config(Path(config.init_from)) if config.init_from else None
        before = read_run_config(workdir)
        if before is None and config.init_from:
            checkpoints_of(config.init_from)  # a new run will need them; better told now than after it is compiled
        before = before or start or {}
    for key in ("frozen_from", "tokenizer"):
        config[key] = config[key] or before.get(key, "")
    if is_new:
        config.frozen_from = config.frozen_from or default
    if is_new and not config.tokenizer and bundle.is_bundle(bundle.locate(config.frozen_from)):
        config.tokenizer = _tokenizer_of(config.frozen_from)
    return config


def _lasting(source: str) -> str:
    """The name of a bundle that a run can be resumed with from another folder."""
    return source if bundle.is_packaged(source) else str(Path(source).absolute())


def _tokenizer_of(source: str) -> str:
    return "" if bundle.is_packaged(source) else str(bundle.tokenizer_path(Path(source).absolute()) or "")


def open_streams(config, tokenizer) -> dict[str, Stream]:
    """The data of every active stream; raises ValueError listing all that cannot be used."""
    streams, problems = {}, []
    intrinsic = config.loss_weights.intrinsic_modal > 0
    for name, settings in active_streams(config).items():
        try:
            stream = Stream(
                StreamConfig(
                    name=name,
                    kind=settings.kind,
                    path=settings.path,
                    weight=settings.weight,
                    num_conditions=settings.num_conditions,
                    image_size=config.image_size,
                    text_length=config.text_length,
                    use_teacher=intrinsic,
                ),
                tokenizer,
            )
        except (ValueError, OSError) as error:
            problems.append(str(error))  # which names the stream
            continue
        if intrinsic and stream.teacher_width != config.heads.teacher_width:
            found = f"features of width {stream.teacher_width}" if stream.teacher_width else "no teacher features"
            problems.append(
                f"stream {name}: {settings.path} has {found}, the alignment heads expect {config.heads.teacher_width}; "
                "train without the intrinsic-modal term by --config.loss_weights.intrinsic_modal=0"
            )
        streams[name] = stream
    if tokenizer.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids"
        )
    if problems:
        raise ValueError(listed("the data cannot be used", problems))
    return streams


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish to stop after the step under way; a second signal acts at once.

    With several processes all stop after the same step, whichever of them got the signal.
    """

    def __init__(self):
        self.signal = None
        self._vote = processes.Vote() if jax.process_count() > 1 else None

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
        """Whether to stop here. To be asked at every step, by all processes: they give the same answer."""
        if self._vote is None:
            return self.signal is not None
        chosen = self._vote(self.signal or 0)
        self.signal = chosen or self.signal
        return chosen > 0


def write_config(config: ConfigDict, workdir: Path):
    """Keeps the run's configuration in `config.json`; on a resumed run says what has changed since."""
    current = json.loads(config.to_json_best_effort())
    for line in _changes(read_run_config(workdir) or current, current):
        log.warning("configuration changed since the run began: %s", line)
    if jax.process_index() == 0:
        with replacing_file(workdir / "config.json") as path:
            path.write_text(json.dumps(current, indent=2) + "\n")


def read_run_config(run: Path) -> dict | None:
    """What a run's `config.json` says, or None where there is none. Raises ValueError when it cannot be read."""
    path = run / "config.json"
    if not os.path.lexists(path):
        return None
    try:
        config = with_new_names(read_json(path))
        for key in ("frozen_from", "tokenizer"):
            if not isinstance(config.get(key, ""), str):
                raise ValueError(f"its {key} is a {type(config[key]).__name__}, expected a string")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); bring it back, or remove it and name frozen_from and tokenizer "
            "yourself"
        ) from error
    return config


def _changes(before, after, prefix=""):
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} from {_shown(old)} to {_shown(new)}"


def _shown(value) -> str:
    """A value of a configuration in a line; of what none holds, its type."""
    values = value if isinstance(value, list) else [value]
    plain = all(isinstance(each, str | int | float | None) for each in values)
    return repr(value)[:300] if plain else f"a {type(value).__name__}"


def train(config: ConfigDict, workdir, *, progress=True, devices=None, stuck_timeout=0) -> TrainState:
    """Trains to `config.num_steps` in `workdir`, from its newest whole checkpoint if it has one.

    Args:
      config: from `configs/`, see training/config.py.
      workdir: the run's folder, on a file system that all hosts see.
      progress: whether to draw a progress bar.
      devices: what the mesh spans; all devices when None.
      stuck_timeout: seconds that a step or another stage, such as restoring, compiling one stream's step, sampling or
        saving, may take before the process ends itself; 0 waits for ever.

    Raises ValueError for a configuration or data that cannot run, OSError for a folder that cannot be written or that
    another run is in, FloatingPointError for a loss that is not finite, SystemExit (128 + signal) after a SIGTERM or
    SIGINT, once the state is saved.
    """
    if "://" in str(workdir) or not str(workdir):
        raise ValueError(f"the run's folder is {str(workdir)!r}, expected a path; object stores must be mounted first")
    workdir = Path(workdir).absolute()
    check_config(config, len(jax.devices() if devices is None else devices))
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    with processes.ending_when_stuck(stuck_timeout) as alive:
        alive()
        config = inherit_sources(config, workdir)
        trainer = Trainer(config, devices)
        keep = config.checkpoint
        # Stopping is outside of what closes the checkpoints: a signal while the last save is written must wait for it.
        with (
            only_run_in(workdir),
            StopRequest() as stop,
            contextlib.closing(
                Checkpoints(workdir, keep_last=keep.keep_last, keep_every=keep.keep_every)
            ) as checkpoints,
        ):
            alive()
            state = checkpoints.restore_latest(trainer.abstract_state)
            if state is None:
                alive()
                state = trainer.init_state()
                log.info("starting %s from %s", workdir, config.init_from or "random weights")
            else:
                log.info("resuming %s at step %d", workdir, int(state.step))
            write_config(config, workdir)
            alive()
            frozen = trainer.init_frozen()
            sampler = Sampler(config, trainer.networks, trainer.mesh, trainer.streams, trainer.tokenizer, workdir)
            if int(state.step) < config.num_steps:
                programs = trainer.compile_steps(alive)
                validator = Validator(trainer, alive) if config.validation.every else None
                state = run_steps(
                    trainer, programs, state, frozen, checkpoints, sampler, workdir, stop, progress, alive, validator
                )
                alive()
                checkpoints.save(state, int(state.step))
            else:
                log.info("%s is already at step %d of %d", workdir, int(state.step), config.num_steps)
            finished = int(state.step) >= config.num_steps
            alive()
            if finished and config.samples.count and processes.anywhere(not sampler.is_written(int(state.step))):
                for path in sampler.write(int(state.step), sampled_params(state), frozen):
                    log.info("wrote %s", path)
            alive()
    if stop.signal is not None and not finished:
        log.info("stopped by %s at step %d, saved", signal.Signals(stop.signal).name, int(state.step))
        raise SystemExit(128 + stop.signal)
    return state


def sampled_params(state: TrainState):
    """The transformer that pictures are made with: the averaged one where there is one."""
    return state.ema or state.params["transformer"]


def run_steps(
    trainer, programs, state, frozen, checkpoints, sampler, workdir, stop, progress, alive=lambda: None, validator=None
) -> TrainState:
    """The loop. A step's numbers are fetched while the next step runs, so that the device never waits for the host."""
    config = trainer.config
    step = int(state.step)
    recorder = Recorder(trainer, MetricsWriter(workdir, step), progress, step)
    batches = trainer.batches(step)
    with contextlib.closing(recorder), contextlib.closing(batches):
        while step < config.num_steps and not stop.agreed():
            alive()
            began = time.perf_counter()
            _, name, batch = next(batches)
            recorder.throughput.add_wait(time.perf_counter() - began)
            state, metrics = programs[name](state, frozen, trainer.put_batch(batch))
            recorder.add(step, name, metrics)
            step += 1
            save = step % config.checkpoint.every == 0
            sample = config.samples.every and step % config.samples.every == 0 and step < config.num_steps
            validate = validator and (step % config.validation.every == 0 or step == config.num_steps)
            if save or sample or validate:
                recorder.flush()  # a state whose loss is not finite must not be saved
            if validate:  # before the save: a run that goes on from it has these rows
                params = {"transformer": sampled_params(state), "heads": state.params["heads"]}
                recorder.add_validation(step, validator(params, frozen, alive))
            if save:
                alive()
                checkpoints.save(state, step)
            if sample:
                alive()
                sampler.write(step, sampled_params(state), frozen)
                recorder.throughput.restart()
        recorder.flush()
    return state


class Recorder:
    """Takes each step's metrics and looks at them one step late: finite or not, progress bar, files."""

    def __init__(self, trainer: Trainer, writer: MetricsWriter, progress: bool, start: int):
        self._trainer, self._writer = trainer, writer
        self._pending = None
        self._losses = {}
        self._bad = BadRecords(trainer.config.data.max_bad_fraction)
        device = trainer.mesh.devices.flat[0]
        self.throughput = Throughput(trainer.mesh.size, flops.peak_flops(device.device_kind))
        self._bar = tqdm(
            total=trainer.config.num_steps,
            initial=start,
            unit="step",
            disable=None if progress and jax.process_index() == 0 else True,  # None: not into files and pipes
            dynamic_ncols=True,
        )

    def add(self, step: int, stream: str, metrics):
        """Notes the metrics of the step just started, and deals with those of the one before."""
        self.flush()
        self._pending = (step, stream, metrics)

    def flush(self):
        """Waits for the pending step and looks at its numbers.

        Raises FloatingPointError when one is not finite, ValueError when too many records could not be decoded.
        """
        if self._pending is None:
            return
        step, stream, metrics = self._pending
        self._pending = None
        values = to_means(jax.device_get(metrics))
        config = self._trainer.config
        self.throughput.add_step(config.batch_size, config.batch_size * self._trainer.sample_flops[stream])
        for name in ("loss", "gradient_norm", "parameter_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"{name} is {values[name]} at step {step + 1} in stream {stream}; losses: "
                    + ", ".join(f"{key} {values[key]:.4g}" for key in config.loss_weights if key in values)
                    + ". The last checkpoint is from before; lower optimizer.learning_rate or look at that batch"
                )
        self._bad.count(int(values["replaced_records"]), config.batch_size)
        self._losses[stream] = values["loss"]
        self._bar.update()
        self._show()
        _, index = self._trainer.mixture.schedule(step)
        # Rows of steps with replaced records are never left out, so that the file's sum is their number.
        if index % config.log_every == 0 or step + 1 == config.num_steps or values["replaced_records"]:
            self._writer.write(step + 1, stream, values | self.throughput.report())

    def add_validation(self, step: int, rows: dict[str, dict[str, float]]):
        """Takes what a validation after `step` steps has found; the time that it took counts as nobody's.

        Raises FloatingPointError for a loss that is not finite.
        """
        for name, values in rows.items():
            if not math.isfinite(values.get("loss", 0)):
                raise FloatingPointError(
                    f"the validation loss is {values['loss']} at step {step} in stream {name}. The last checkpoint is "
                    "from before; lower optimizer.learning_rate"
                )
            self._writer.write(step, f"validation/{name}", values)
        self._losses |= headlines(rows)
        self._show()
        self.throughput.restart()

    def _show(self):
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._losses.items()}, refresh=False)

    def close(self):
        self._bar.close()
        self._writer.close()


class BadRecords:
    """Counts the examples that stand in for undecodable records; raises ValueError when they become too many."""

    def __init__(self, max_fraction: float, patience: int = 1000):
        self._max_fraction, self._patience = max_fraction, patience
        self._bad = self._seen = 0

    def count(self, replaced: int, samples: int):
        self._bad += replaced
        self._seen += samples
        # A few early ones say nothing about the share; from `patience` samples on they do.
        if self._bad > self._max_fraction * max(self._seen, self._patience):
            raise ValueError(
                f"{self._bad} of {self._seen} records could not be decoded, more than data.max_bad_fraction "
                f"{self._max_fraction} allows; the log names them. Mend the data, or raise data.max_bad_fraction"
            )
