"""Plans sampling or training for TPUs and GPUs that are not here: python launch/plan.py --help"""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unialign_jax.command_line import Parser, explain_missing_packages, split_changes

explain_missing_packages()

from unialign_jax.data.kinds import TASKS, task_name

DESCRIPTION = """\
Compiles the programs of a sampling task for one TPU chip or GPU, or the training steps of a configuration for a TPU
slice or for GPUs, and prints the memory and time that they need there. It reads neither weights nor data and uses no
chips. It needs the compiler, for jax 0.10.2 and best in an environment of its own: for TPUs pip install
'libtpu==0.0.42.*', for GPUs pip install 'jax-cuda12-plugin==0.10.2' 'nvidia-cuda-nvcc-cu12==12.9.86'. A full-size
task takes a few minutes on two CPU cores.
"""
EXAMPLES = """\
examples
  python launch/plan.py --task=text_to_image --topology=v5e:1x1
  python launch/plan.py --task=caption --topology=v5e:1x1 --batch=8 --quantize=int8 --output=caption.json
  python launch/plan.py --config=configs/stage1.py --topology=v4:4x4x4
  python launch/plan.py --config=configs/stage1.py --topology=v5e-256 --config.mesh.fsdp=-1
  python launch/plan.py --config=configs/stage1.py --topology=v4-8 --search
  python launch/plan.py --task=text_to_image --topology=h100:1 --quantize=fp8
  python launch/plan.py --config=configs/stage1.py --topology=h100:8 --config.accumulation=2
  python launch/plan.py --config=configs/stage1.py --all --output=plans.json --topologies=v4-128,v5e-256,4xv5e-256
  python launch/plan.py --report=plans.json
  python launch/plan.py --gpus --output=gpu_plans.json && python launch/plan.py --report=gpu_plans.json

--all searches micro-batches and remat for every slice in docs/tpu_tables.md (hours; --topologies names some of them)
and collects the plans in the file --output. A plan of today's code in the file is not compiled again: the same command
resumes, and several processes may share the work by different --topologies. A plan of older code is replaced. --report
writes docs/tpu_tables.md from the file, and the tables of docs/tpu.md. --gpus compiles what the tables of docs/gpu.md
need (hours; it resumes).

Topologies are named by kind and grid, v4:4x4x4, or as on Google Cloud, v4-128 (of v4 and v5p the number of cores, two
per chip; of v5e and v6e the number of chips); GPUs by the GPUs of a host, h100:1 and h100:8, and several hosts
h100:2x8 (h100, h200, b200, a100-80g, a100-40g, l4, t4). Exit status 0 when all fits (with --low-memory: in that mode),
1 when it does not. With --all a slice on which nothing fits is a result; the status is 1 when something could not be
planned.
"""
MOST_SLICES = 256
# The options of each of the four modes.
TAKES = {
    "all": ("config", "topologies", "output"),
    "gpus": ("output",),
    "report": ("docs",),
    "config": ("topology", "num_slices", "stream", "search", "dump", "output"),
    "task": ("topology", "size", "batch", "quantize", "low_memory", "output"),
}


def parse_arguments(argv):
    """The command line -> its options, and the --config.KEY=VALUE changes as "KEY=VALUE"."""
    argv, changes = split_changes(sys.argv[1:] if argv is None else argv)
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--task", type=task_name, choices=TASKS, help="to sample")
    modes.add_argument("--config", metavar="FILE", help="training: a stage file, and --config.KEY=VALUE for its keys")
    modes.add_argument("--gpus", action="store_true", help="what docs/gpu.md has, into the file --output")
    modes.add_argument(
        "--report",
        type=Path,
        metavar="JSON",
        help="docs/tpu_tables.md, its plot and the tables of docs/tpu.md from the plans of --all, or docs/gpu.md",
    )
    parser.add_argument("--topology", default="v5e:1x1", help="the chips, default %(default)s; sampling uses one")
    parser.add_argument("--num-slices", type=int, default=1, help="training: slices of that topology, default 1")
    parser.add_argument("--stream", help="training: this stream only")
    parser.add_argument(
        "--search", action="store_true", help="training: find the micro-batches and the remat that are fastest and fit"
    )
    parser.add_argument("--all", action="store_true", help="training: --search on many slices, into the file --output")
    parser.add_argument("--topologies", metavar="A,B", help="with --all: these only, such as v4-128,4xv5e-256")
    parser.add_argument("--docs", type=Path, metavar="DIR", default=ROOT / "docs", help="--report: the page's folder")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="training: keep the compiled steps' HLO text there")
    parser.add_argument("--size", type=int, default=512, help="sampling: pixels per side, default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sampling: images at a time, default %(default)s")
    parser.add_argument("--quantize", choices=("int8", "w8a8", "fp8"), help="sampling: as in Pipeline.from_bundle")
    parser.add_argument("--low-memory", action="store_true", help="sampling: ask whether it fits with low_memory")
    parser.add_argument("--output", type=Path, metavar="JSON", help="a file for the figures; --all: for the plans")
    arguments = parser.parse_args(argv)
    if arguments.config == "":
        parser.error("--config is empty, expected a stage file such as configs/stage1.py")
    if arguments.all and not (arguments.config and arguments.output):
        parser.error("--all needs --config=FILE and --output=JSON")
    if arguments.gpus and not arguments.output:
        parser.error("--gpus needs --output=JSON")
    mode = next(mode for mode in TAKES if getattr(arguments, mode))
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    if refused := [name for name in given if name not in (mode, *TAKES[mode])]:
        taken = ", ".join(f"--{name.replace('_', '-')}" for name in TAKES[mode])
        parser.error(f"--{refused[0].replace('_', '-')} does not go with --{mode}, which takes {taken}")
    if changes and not arguments.config:
        parser.error(f"--config.KEY=VALUE does not go with --{mode}")
    return arguments, changes


def main(argv=None):
    arguments, changes = parse_arguments(argv)
    # There is no TPU here, and no reason to keep another process from compiling.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the GPU compiler would say that there is no driver
    import jax

    jax.config.update("jax_platforms", "cpu")
    from unialign_jax import files
    from unialign_jax.planning import gpu_report, gpu_sweep, report, sweep
    from unialign_jax.training.config import read_config

    try:
        if arguments.output:
            files.check_json_output(arguments.output)
        if arguments.report:
            if gpu_sweep.is_gpu_file(arguments.report):
                gpu_report.write_report(arguments.report, arguments.docs)
                print(f"wrote {arguments.docs / 'gpu.md'}")
                return
            report.write_report(arguments.report, arguments.docs)
            print(
                f"wrote {', '.join(str(arguments.docs / name) for name in (report.TABLES, report.GUIDE, report.PLOT))}"
            )
            return
        if arguments.gpus:
            gpu_sweep.sweep_gpus(arguments.output)
            return
        if arguments.all:
            names = arguments.topologies.split(",") if arguments.topologies else sweep.TOPOLOGIES
            config = read_config(arguments.config, changes)
            sys.exit(1 if sweep.sweep(config, arguments.config, names, arguments.output) else 0)
        figures = plan_training(arguments, changes) if arguments.config else plan_sampling(arguments)
        if arguments.output:
            files.write_json(arguments.output, figures)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if figures["fits"] else 1)


def plan_training(arguments, changes) -> dict:
    from unialign_jax.files import make_folder
    from unialign_jax.planning import report, stage
    from unialign_jax.training.config import read_config

    config = read_config(arguments.config, changes)
    if not 1 <= arguments.num_slices <= MOST_SLICES:
        raise ValueError(f"--num-slices is {arguments.num_slices}, expected 1 to {MOST_SLICES}")
    if arguments.dump:
        make_folder(arguments.dump, "--dump")
    plan = stage.plan_stage(
        config,
        arguments.topology,
        arguments.num_slices,
        stream=arguments.stream,
        searching=arguments.search,
        dump=arguments.dump,
    )
    if plan.steps or not arguments.search:
        several = f"{arguments.num_slices} x " if arguments.num_slices > 1 else ""
        print(f"{arguments.config} on {several}{arguments.topology}\n{report.stage_text(plan)}")
    if not plan.fits:
        say_what_training_may_fit(arguments, changes, plan.config.model.remat)
    if arguments.search and not plan.steps:
        raise ValueError(f"{plan.out_of_memory[0]}, and no other micro-batch or remat needs less")
    options = {name: getattr(arguments, name) for name in ("config", "topology", "num_slices")}
    return report.stage_figures(plan) | options | {"changes": changes}


def plan_sampling(arguments) -> dict:
    from unialign_jax.planning import report, sampling
    from unialign_jax.planning.topology import DoesNotFit

    options = {name: getattr(arguments, name) for name in ("size", "batch", "quantize", "low_memory")}
    try:
        figures = sampling.plan_sampling(arguments.task, arguments.topology, **options)
    except DoesNotFit:
        say_what_sampling_may_fit(arguments)
        raise
    print(report.sampling_text(figures))
    if not figures["fits"]:
        say_what_sampling_may_fit(arguments)
    return figures


def command(arguments, changes, **others) -> str:
    """This command line with other options."""
    options = {name: getattr(arguments, name) for name in (*TAKES["config"], *TAKES["task"]) if name != "output"}
    defaults = {"topology": "v5e:1x1", "num_slices": 1, "size": 512, "batch": 1}
    words = [f"--config={arguments.config}" if arguments.config else f"--task={arguments.task}"]
    words += [f"--config.{change}" for change in changes]
    for name, value in (options | others).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value and value != defaults.get(name):
            words.append(f"{flag}={value}")
    return "python launch/plan.py " + shlex.join(words)


def say_what_may_fit(arguments, changes, options):
    """Prints this command line with other options, from rows of (whether it applies, what it is, the options)."""
    options = [(what, {"changes": changes} | other) for applies, what, other in options if applies]
    if options:
        print("\nWhat may fit:")
    for what, other in options:
        print(f"  {what}:\n    {command(arguments, **other)}")


def say_what_training_may_fit(arguments, changes, remat):
    from unialign_jax.planning import topology

    alone, larger = not arguments.search, topology.larger(arguments.topology)
    block = [*(change for change in changes if not change.startswith("model.remat=")), "model.remat=block"]
    may_block = alone and remat not in ("block", "offload")
    options = [
        (alone, "accumulation and remat, tried one after another (minutes each)", {"search": True}),
        (may_block, "recomputation of all blocks in the backward pass", {"changes": block}),
        (larger, "more chips", {"topology": larger}),
    ]
    say_what_may_fit(arguments, changes, options)


def say_what_sampling_may_fit(arguments):
    from unialign_jax.planning import gpus

    larger, name = "v6e:1x1", "a chip with 32 GB"
    if gpus.is_gpu(arguments.topology):
        kind = gpus.roomier(gpus.split_gpus(arguments.topology)[0])
        larger, name = (f"{kind}:1", gpus.GPUS[kind].kind) if kind else (arguments.topology, "")
    options = [
        (not arguments.low_memory, "only the weights of the current program on the chip", {"low_memory": True}),
        (not arguments.quantize, "weights of 8 bits", {"quantize": "int8"}),
        (arguments.batch > 1, "fewer images at a time", {"batch": arguments.batch // 2}),
        (arguments.topology != larger, name, {"topology": larger}),
    ]
    say_what_may_fit(arguments, [], options)


if __name__ == "__main__":
    main()
