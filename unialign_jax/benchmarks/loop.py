"""The `train` part of launch/benchmark.py: the training loop against the bare compiled step.

    python launch/benchmark.py train --config=configs/stage1.py:tiny

Alternates between two ways to run the same number of optimizer steps: the bare compiled step on a batch that is already
on the device, and the training loop with data, metrics and progress bar. Their ratio is the overhead of the loop.
"""

import argparse
import collections
import contextlib
import logging
import os
import statistics
import tempfile
import time

from unialign_jax.benchmarks.sample import MOST_ROUNDS, check_counts


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--config", default="configs/stage1.py:tiny", help="stage file, default %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="steps of one measurement, default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind, taken in turn; medians count")


def benchmark_train(arguments: argparse.Namespace) -> dict:
    """{figure: value}. Raises ValueError for bad options."""
    import jax

    from unialign_jax.models import flops
    from unialign_jax.parallel import processes
    from unialign_jax.training.config import read_config
    from unialign_jax.training.loop import StopRequest, Trainer, run_steps
    from unialign_jax.training.metrics import Recorder, memory_use

    check_counts(arguments, steps=MOST_ROUNDS, rounds=MOST_ROUNDS)
    logging.getLogger().setLevel(logging.ERROR)
    processes.prepare_memory(os.environ)  # as in training
    config = read_config(arguments.config, arguments.changes)
    config.num_steps = 1 << 30  # each measurement sets its own end
    config.checkpoint.every = 1 << 30
    config.samples.every = config.validation.every = 0
    trainer = Trainer(config)
    began = time.perf_counter()
    programs = trainer.compile_steps()
    compile_seconds = time.perf_counter() - began
    state, frozen = trainer.init_state(), trainer.init_frozen()

    def bare(state, start):
        """The steps of the schedule, each stream on one batch that stays on the device."""
        for step in range(start, start + arguments.steps):
            name, _ = trainer.mixture.schedule(step)
            state, metrics = programs[name](state, frozen, resident[name])
        jax.block_until_ready(metrics)
        return state

    def loop(state, start):
        config.num_steps = start + arguments.steps
        with tempfile.TemporaryDirectory() as workdir, StopRequest() as stop:
            recorder = Recorder(trainer, workdir, start, progress=True)
            (state,) = collections.deque(run_steps(trainer, programs, state, frozen, recorder, stop), maxlen=1)
        return state

    resident, step = {}, 0
    while len(resident) < len(trainer.streams):
        name, batch = trainer.mixture.batch(step)
        resident[name] = trainer.put_batch(batch)
        step += 1
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        state = bare(state, 0)  # warm caches and clocks
    seconds = {"bare": [], "loop": []}
    for _ in range(arguments.rounds):
        for name, measure in (("bare", bare), ("loop", loop)):
            start = int(state.step)
            began = time.perf_counter()
            state = measure(state, start)
            jax.block_until_ready(state.step)
            seconds[name].append((time.perf_counter() - began) / arguments.steps)

    bare_step, loop_step = statistics.median(seconds["bare"]), statistics.median(seconds["loop"])
    mean_flops = statistics.mean(trainer.sample_flops[trainer.mixture.schedule(n)[0]] for n in range(1000))
    per_device = mean_flops * config.batch_size / loop_step / jax.device_count()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return {
        "config": " ".join([arguments.config, *arguments.changes]),
        "streams": ", ".join(trainer.streams),
        "compile seconds, all streams": compile_seconds,
        "bare step, s": bare_step,
        "loop step, s": loop_step,
        "loop / bare": loop_step / bare_step,
        "images / s": config.batch_size / loop_step,
        "TFLOP/s per device (analytic)": per_device / 1e12,
        "MFU": per_device / peak if peak else "no peak is known for this device",
    } | memory_use()
