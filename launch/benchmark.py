"""Measures speed and memory, and prints what it measured with the machine it ran on.

    python launch/benchmark.py train --config=configs/stage1.py:tiny
    python launch/benchmark.py convert --scratch=/tmp/convert
    python launch/benchmark.py sample --random=tiny --steps=4
    python launch/benchmark.py options --bundle=bundles/tiny
    python launch/benchmark.py step --micro-batches=1,2,4,8 --remat=none,dots,block
    python launch/benchmark.py memory
    python launch/benchmark.py soak --steps=2000 --saves=200

`train` runs the same number of optimizer steps twice: the bare compiled step on one batch that is already on the
device, and the training loop with data, metrics and progress. Their ratio is what the loop costs.
`convert` converts and loads files of the published sizes, filled at random: 2.1 B of SD3 and 4.8 B of T5.
`sample` makes images and captions with a bundle or with random weights; see benchmark_sample.py.
`options` says what the options of sampling cost, and how far each leads from the plain sampler.
`step` measures the training step alone: time, MFU and memory at several settings, and the share of each part.
`memory` puts the plan's memory of a training step beside that of a run.
`soak` watches the memory, descriptors and threads of a long run with many saves.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unialign_jax.environment import explain_missing_packages

explain_missing_packages()

import benchmark_convert  # beside this file
import benchmark_memory
import benchmark_options
import benchmark_sample
import benchmark_soak
import benchmark_step
from benchmark_sample import MOST_ROUNDS


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help explains\n")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the training loop against the bare step")
    train.add_argument("--config", default="configs/stage1.py:tiny", help="stage file, default %(default)s")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a configuration key")
    train.add_argument("--steps", type=int, default=30, help="steps of one measurement, default %(default)s")
    train.add_argument("--rounds", type=int, default=5, help="measurements of each kind, taken in turn; medians count")
    train.set_defaults(measure=benchmark_train)
    convert = commands.add_parser("convert", help="full-size weight conversions, memory and time")
    benchmark_convert.add_arguments(convert)
    convert.set_defaults(measure=benchmark_convert.benchmark_convert)
    sample = commands.add_parser("sample", help="inference: images and captions, time by part, beside diffusers")
    benchmark_sample.add_arguments(sample)
    sample.set_defaults(measure=benchmark_sample.benchmark_sample)
    options = commands.add_parser("options", help="what the options of sampling cost and give")
    benchmark_options.add_arguments(options)
    options.set_defaults(measure=benchmark_options.benchmark_options)
    step = commands.add_parser("step", help="the training step alone: time, MFU, memory, and its parts")
    benchmark_step.add_arguments(step)
    step.set_defaults(measure=benchmark_step.benchmark_step)
    memory = commands.add_parser("memory", help="the plan's memory of a training step beside a run's")
    benchmark_memory.add_arguments(memory)
    memory.set_defaults(measure=benchmark_memory.benchmark_memory)
    soak = commands.add_parser("soak", help="a long run with many saves: memory, descriptors and threads")
    benchmark_soak.add_arguments(soak)
    soak.set_defaults(measure=benchmark_soak.benchmark_soak)
    for command in (train, convert, sample, options, step, memory, soak):
        command.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    from unialign_jax import files

    try:
        if arguments.output:
            files.check_json_output(arguments.output)
        figures = arguments.measure(arguments)
        figures = machine() | figures  # afterwards: it takes the device, which `sample` leaves to other processes
        show(figures)
        if arguments.output:
            with files.replacing_file(arguments.output) as scratch:
                scratch.write_text(json.dumps(figures, indent=2) + "\n")
        if figures.get("flat") == "no":
            sys.exit("error: memory, descriptors or threads grew; the table says how")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def show(figures):
    """Prints figures one a line, tables (lists of rows) with their names above them."""
    from unialign_jax.planning.sampling_plan import format_table

    width = max(map(len, figures)) + 2
    for name, value in figures.items():
        if isinstance(value, list):
            rows = [{key: "-" if cell is None else cell for key, cell in row.items()} for row in value]
            print(f"\n{name}\n{format_table(rows)}\n")
        else:
            print(f"{name:{width}}{value:.4g}" if isinstance(value, float) else f"{name:{width}}{value}")


def machine() -> dict:
    """What a figure must be quoted with."""
    import jax

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    }


def benchmark_train(arguments) -> dict:
    import jax

    from unialign_jax.inference.inputs import check_whole
    from unialign_jax.models import flops
    from unialign_jax.parallel import processes
    from unialign_jax.training.loop import StopRequest, Trainer, run_steps
    from unialign_jax.training.metrics import memory_use
    from unialign_jax.training.stages import read_config

    for name in ("steps", "rounds"):
        check_whole(f"--{name}", getattr(arguments, name), 1, MOST_ROUNDS)
    logging.getLogger().setLevel(logging.ERROR)
    processes.take_gpu_memory(os.environ)  # as in training
    config = read_config(arguments.config, arguments.set)
    config.num_steps = 1 << 30  # each measurement sets its own end
    config.checkpoint.every = 1 << 30
    config.samples.every = config.validation.every = 0
    trainer = Trainer(config)
    began = time.perf_counter()
    programs = trainer.compile_steps()
    compile_seconds = time.perf_counter() - began
    state, frozen = trainer.init_state(), trainer.init_frozen()

    def bare(state, start):
        """The steps that the schedule names, each stream on a batch of its own that stays on the device."""
        for step in range(start, start + arguments.steps):
            name, _ = trainer.mixture.schedule(step)
            state, metrics = programs[name](state, frozen, resident[name])
        jax.block_until_ready(metrics)
        return state

    def loop(state, start):
        config.num_steps = start + arguments.steps
        with tempfile.TemporaryDirectory() as workdir, StopRequest() as stop:
            return run_steps(trainer, programs, state, frozen, None, None, workdir, stop, progress=True)

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
        "config": " ".join([arguments.config, *arguments.set]),
        "streams": ", ".join(trainer.streams),
        "compile seconds, all streams": compile_seconds,
        "bare step, s": bare_step,
        "loop step, s": loop_step,
        "loop / bare": loop_step / bare_step,
        "images / s": config.batch_size / loop_step,
        "TFLOP/s per device (analytic)": per_device / 1e12,
        "MFU": per_device / peak if peak else "no peak is known for this device",
    } | memory_use()


if __name__ == "__main__":
    main()
