"""Trains UniAlignment: one stage, in one folder, resuming from what that folder holds.

    python launch/train.py --config=configs/stage1.py:tiny --workdir=runs/tiny
    python launch/train.py --config=configs/stage1.py --workdir=runs/stage1 --config.batch_size=128 --config.mesh.fsdp=8

--config names a stage file; ":tiny" after it is the same recipe for a laptop. --config.KEY=VALUE sets any key of the
configuration; configs/base.py lists them with their meaning. The folder gets config.json, checkpoints/, metrics.jsonl,
TensorBoard events and samples/. SIGTERM or Ctrl-C saves and stops; the same command resumes.

On several hosts the same command runs on each. They find one another on a TPU slice and under SLURM's srun; elsewhere
give --coordinator, --num-processes and --process-id. When one is lost, all end; the same command resumes.

Exit status: 0 when training has finished, 128 + the signal when it was stopped and saved, 1 for an error, 2 for a bad
command line. With several processes, 75 (or 134, when JAX ends the process) when another was lost: start again.
"""

import argparse
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unialign_jax.command_line import Parser, explain_missing_packages, split_changes

explain_missing_packages()


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line -> its options, and the --config.KEY=VALUE changes as "KEY=VALUE"."""
    arguments, changes = split_changes(arguments)
    parser = Parser(
        description=__doc__,
        allow_abbrev=False,
        usage="python launch/train.py --config=FILE[:tiny] --workdir=DIR [--config.KEY=VALUE ...]",
    )
    parser.add_argument("--config", required=True, help="stage file: configs/stage1.py, or configs/stage1.py:tiny")
    parser.add_argument(
        "--workdir", required=True, help="folder of the run, or gs://BUCKET/FOLDER; resumed when it holds a checkpoint"
    )
    parser.add_argument("--noprogress", action="store_true", help="draw no progress bar")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, not just what it is")
    several = parser.add_argument_group("several processes")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached by the others")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument(
        "--heartbeat-timeout", type=int, default=60, metavar="S", help="a process silent for so long is lost (60)"
    )
    several.add_argument("--start-timeout", type=int, default=300, metavar="S", help="wait for the others (300)")
    several.add_argument(
        "--stuck-timeout",
        type=int,
        default=1800,
        metavar="S",
        help="end when a step, a restore, a compilation or a save takes so long (1800); 0: never",
    )
    options = parser.parse_args(arguments)
    if len({value is None for value in (options.coordinator, options.num_processes, options.process_id)}) > 1:
        parser.error("--coordinator, --num-processes and --process-id go together")
    parser.check_least(options, heartbeat_timeout=1, start_timeout=1, stuck_timeout=0)
    return options, changes


def main(arguments: list[str]) -> None:
    options, changes = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("unialign_jax").setLevel(logging.INFO)
    if not options.traceback:  # Orbax and gcsfs log pages beside an exception that says all
        for name in ("absl", "asyncio", "gcsfs"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        from unialign_jax.training.config import read_config

        config = read_config(options.config, changes)
        from unialign_jax.parallel import processes

        processes.prepare_memory(os.environ)
        last_words = processes.start(
            os.environ,
            options.coordinator,
            options.num_processes,
            options.process_id,
            heartbeat_timeout=options.heartbeat_timeout,
            initialization_timeout=options.start_timeout,
        )
        if last_words:
            train_together(config, options, last_words)
            return
        from unialign_jax.evaluation.run_scenes import RunScenes
        from unialign_jax.training.loop import train

        train(config, options.workdir, progress=not options.noprogress, make_scorer=RunScenes.of)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        line = expected(error, options.config)
        if options.traceback or not line:
            raise
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def expected(error: BaseException, config: str) -> str | None:
    """The message for an error that needs no traceback; None for one that does."""
    from unialign_jax.parallel.processes import out_of_memory

    if reason := out_of_memory(error):
        return (
            f"the memory does not suffice ({reason}). Raise --config.accumulation, so that fewer samples are held at "
            "once, or set --config.model.remat=block; for TPUs, what fits is found by "
            f"`python launch/plan.py --config={config} --search`"
        )
    return str(error).strip() if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


def train_together(config, options: argparse.Namespace, last_words) -> None:
    """Trains as one of several processes. When it cannot continue, it ends this process, so that the others end too."""
    from unialign_jax.evaluation.run_scenes import RunScenes
    from unialign_jax.parallel.processes import AGAIN, LOST, lost_another
    from unialign_jax.training.loop import train

    progress, stuck, status = not options.noprogress, options.stuck_timeout, 1
    try:
        train(config, options.workdir, progress=progress, stuck_timeout=stuck, make_scorer=RunScenes.of)
    except Exception as error:
        line, lost = expected(error, options.config), lost_another(error)
        if options.traceback or not (lost or line):
            traceback.print_exc()
        line = line or str(error).strip() or type(error).__name__
        if lost:
            reason, status = line.splitlines()[0][:300], LOST
            line = f"this process cannot continue, most likely because another was lost ({reason}). {AGAIN}"
    except KeyboardInterrupt:
        line = "interrupted"
    except SystemExit:  # all processes have stopped and saved; JAX waits for them at the exit
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        last_words.take_back()
        raise
    else:
        last_words.take_back()
        return
    print(f"error: {line}", file=sys.stderr, flush=True)
    last_words.take_back()
    # Not sys.exit: at the exit JAX would wait for the others, which wait for this process.
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
