"""Trains UniAlignment: one stage, in one folder, resuming from what that folder holds.

    python launch/train.py --config=configs/stage1.py:tiny --workdir=runs/tiny
    python launch/train.py --config=configs/stage1.py --workdir=runs/stage1 --config.batch_size=128 --config.mesh.fsdp=8

--config names a stage file; ":tiny" after it is the same recipe for a laptop. Every key of the configuration (listed
with its meaning in unialign_jax/training/config.py) can be set as --config.KEY=VALUE. The folder gets config.json,
checkpoints/, metrics.jsonl, TensorBoard events and samples/. SIGTERM or Ctrl-C saves and stops; the same command goes
on from there.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Stage file, such as configs/stage1.py or configs/stage1.py:tiny.")
flags.DEFINE_string("workdir", None, "Folder of the run; made when missing, resumed when it holds a checkpoint.")
flags.DEFINE_bool("progress", True, "Whether to draw a progress bar.")
flags.DEFINE_bool("traceback", False, "Whether an error shows where it came from, instead of one line.")
flags.mark_flags_as_required(["config", "workdir"])


def main(arguments):
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.use_absl_handler()
    logging.getLogger("unialign_jax").setLevel(logging.INFO)

    from unialign_jax.training.loop import train

    try:
        train(FLAGS.config, FLAGS.workdir, progress=FLAGS.progress)
    except (ValueError, OSError, FloatingPointError) as error:
        if FLAGS.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def check_overrides(arguments):
    """Exits with all unknown --config.KEY arguments at once; absl alone would stop at the first, with a traceback."""
    from unialign_jax.training.config import load_stage, unknown_overrides

    path = next((a.split("=", 1)[1] for a in arguments if a.startswith(("--config=", "-config="))), None)
    if path is None:
        return
    try:
        problems = unknown_overrides(load_stage(path), arguments)
    except (ValueError, OSError) as error:
        problems = [str(error)]
    if problems:
        sys.exit("error: the configuration cannot run:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    check_overrides(sys.argv[1:])
    app.run(main)
