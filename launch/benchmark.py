"""Measures speed and memory, and prints what it measured with the machine it ran on.

    python launch/benchmark.py train --config=configs/stage1.py:tiny
    python launch/benchmark.py convert --scratch=/tmp/convert
    python launch/benchmark.py sample --random=tiny --steps=4
    python launch/benchmark.py options --bundle=bundles/tiny
    python launch/benchmark.py quantize
    python launch/benchmark.py step --micro-batches=1,2,4,8 --remat=none,dots,block
    python launch/benchmark.py memory
    python launch/benchmark.py soak --steps=2000 --saves=200
    python launch/benchmark.py data
    python launch/benchmark.py serve

`python launch/benchmark.py PART --help` says what each measures, and how.
`train`, `step`, `memory` and `soak` read a stage, and take --config.KEY=VALUE for its keys as launch/train.py does.
"""

import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unialign_jax.command_line import Parser, explain_missing_packages, sigterm_interrupts, split_changes

explain_missing_packages()

from unialign_jax.benchmarks import convert, data, loop, memory, options, quantize, sample, serve, soak, step


def main(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, part, measure, explained in (
        ("train", loop, loop.benchmark_train, "the training loop against the bare step"),
        ("convert", convert, convert.benchmark_convert, "full-size weight conversions, memory and time"),
        ("sample", sample, sample.benchmark_sample, "inference: images and captions, time by part, beside diffusers"),
        ("options", options, options.benchmark_options, "what the options of sampling cost and give"),
        ("quantize", quantize, quantize.benchmark_quantize, "what 8 bits for T5's weights change"),
        ("step", step, step.benchmark_step, "the training step alone: time, MFU, memory, and its parts"),
        ("memory", memory, memory.benchmark_memory, "the plan's memory of a training step beside a run's"),
        ("soak", soak, soak.benchmark_soak, "a long run with many saves: memory, descriptors and threads"),
        ("data", data, data.benchmark_data, "images per second of one core, from JPEGs and from caches"),
        ("serve", serve, serve.benchmark_serve, "a server under load: throughput, waiting times, losses, memory"),
    ):
        command = commands.add_parser(name, help=explained, description=part.__doc__)
        part.add_arguments(command)
        command.add_argument("--output", type=Path, help="also write the figures to this JSON file")
        command.set_defaults(measure=measure)
    argv, changes = split_changes(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(argv)
    if changes and not hasattr(arguments, "config"):
        parser.error(f"{arguments.command} reads no stage and takes no --config.KEY=VALUE")
    arguments.changes = changes
    from unialign_jax import files

    try:
        if arguments.output:
            files.check_json_output(arguments.output)
        with sigterm_interrupts():  # so that the processes that it has started end too
            figures = arguments.measure(arguments)
        figures = machine() | figures  # afterwards: it takes the device, which `sample` leaves to other processes
        show(figures)
        if arguments.output:
            files.write_json(arguments.output, figures)
        if figures.get("flat") == "no":
            sys.exit("error: memory, descriptors or threads grew; the table says how")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print("interrupted: nothing was measured", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))


def show(figures):
    """Prints figures one a line, tables (lists of rows) with their names above them."""
    from unialign_jax.planning.report import format_table

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


if __name__ == "__main__":
    main()
