"""Trains UniAlignment: one stage, in one folder, resuming from what that folder holds.

    python launch/train.py --config=configs/stage1.py:tiny --workdir=runs/tiny
    python launch/train.py --config=configs/stage1.py --workdir=runs/stage1 --config.batch_size=128 --config.mesh.fsdp=8

--config names a stage file; ":tiny" after it is the same recipe for a laptop. Every key of the configuration (listed
with its meaning in unialign_jax/training/config.py) can be set as --config.KEY=VALUE. The folder gets config.json,
checkpoints/, metrics.jsonl, TensorBoard events and samples/. SIGTERM or Ctrl-C saves and stops; the same command goes
on from there.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help explains\n")


def parse(arguments):
    """The command line -> its options, and the --config.KEY=VALUE changes as "KEY=VALUE"."""
    changes, others, arguments = [], [], list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith(("--config.", "-config.")):
            others.append(argument)
            continue
        if "=" not in argument and arguments and not arguments[0].startswith("--"):
            argument += "=" + arguments.pop(0)
        changes.append(argument.split("config.", 1)[1])
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python launch/train.py --config=FILE[:tiny] --workdir=DIR [--config.KEY=VALUE ...]",
    )
    parser.add_argument("--config", required=True, help="stage file: configs/stage1.py, or configs/stage1.py:tiny")
    parser.add_argument("--workdir", required=True, help="folder of the run; resumed when it holds a checkpoint")
    parser.add_argument("--noprogress", action="store_true", help="draw no progress bar")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, not just what it is")
    return parser.parse_args(others), changes


def main(arguments):
    options, changes = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("unialign_jax").setLevel(logging.INFO)
    if not options.traceback:  # the pages that Orbax logs beside an exception say no more than it does
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        from unialign_jax.training.stages import read_config

        config = read_config(options.config, changes)
        from unialign_jax.training.loop import train

        train(config, options.workdir, progress=not options.noprogress)
    except (ValueError, OSError, FloatingPointError) as error:
        if options.traceback:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main(sys.argv[1:])
