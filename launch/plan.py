"""What a task needs on a chip that is not here: python launch/plan.py --help"""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unialign_jax.environment import explain_missing_packages

explain_missing_packages()

from unialign_jax.data.kinds import task_name

DESCRIPTION = """\
Compiles the programs of a sampling task for a TPU chip, or the training steps of a configuration for a TPU slice,
without the chips and without weights or data, and says what they need there. Needs the TPU compiler beside jax:
pip install 'libtpu==0.0.42.*' (for jax 0.10.2; best in an environment of its own). A full-size task takes a few minutes
on two CPU cores.
"""
EXAMPLES = """\
examples
  python launch/plan.py --task=text_to_image --topology=v5e:1x1
  python launch/plan.py --task=caption --topology=v5e:1x1 --batch=8 --quantize=int8 --output=caption.json
  python launch/plan.py --config=configs/stage1.py --topology=v4:4x4x4
  python launch/plan.py --config=configs/stage1.py --topology=v5e-256 --config.mesh.fsdp=-1
  python launch/plan.py --config=configs/stage1.py --topology=v4-8 --search
  python launch/plan.py --config=configs/stage1.py --all --output=plans --topologies=v4-128,v5e-256,4xv5e-256
  python launch/plan.py --report=plans

--all plans every slice that docs/tpu.md tells of (hours; --topologies names some of them), each with the micro-batches
and remat that suit it, one file a plan. What is in the folder is not compiled again: the same command goes on, and
several processes share the work by different --topologies. After a change of the code that compiles, name another
folder. --report writes the tables of docs/tpu.md from the folder.

Topologies are named by kind and grid, v4:4x4x4, or as on Google Cloud, v4-128 (cores, two a chip; of v5e and v6e
chips). Exit status 0 when all fits (with --low-memory: in that mode), 1 when it does not; of --all, where a misfit is a
result, 1 when something could not be planned.
"""
MOST_SLICES = 256
# Which options go with which of the four things to do.
TAKES = {
    "all": ("config", "topologies", "output"),
    "report": ("docs",),
    "config": ("topology", "num_slices", "stream", "search", "dump", "output"),
    "task": ("topology", "size", "batch", "quantize", "low_memory", "output"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; --help explains\n")


def parse_arguments(argv):
    """The command line -> its options, and the --config.KEY=VALUE changes as "KEY=VALUE"."""
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    changes = [argument.removeprefix("--config.") for argument in argv if argument.startswith("--config.")]
    parser = Parser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=("text_to_image", "edit", "caption"), type=task_name, help="sampling: the task")
    what.add_argument("--config", metavar="FILE", help="training: a stage file, and --config.KEY=VALUE for its keys")
    what.add_argument("--report", type=Path, metavar="DIR", help="docs/tpu.md and its plot from the plans of --all")
    parser.add_argument("--topology", default="v5e:1x1", help="the chips, default %(default)s; sampling uses one")
    parser.add_argument("--num-slices", type=int, default=1, help="training: slices of that topology, default 1")
    parser.add_argument("--stream", help="training: this stream only")
    parser.add_argument(
        "--search", action="store_true", help="training: find the micro-batches and the remat that are fastest and fit"
    )
    parser.add_argument(
        "--all", action="store_true", help="training: --search on many slices, into the folder --output"
    )
    parser.add_argument("--topologies", metavar="A,B", help="with --all: these only, such as v4-128,4xv5e-256")
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", default=ROOT / "docs", help="with --report: where tpu.md is"
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="training: keep the compiled steps' HLO text there")
    parser.add_argument("--size", type=int, default=512, help="sampling: pixels a side, default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sampling: images at a time, default %(default)s")
    parser.add_argument("--quantize", choices=("int8", "w8a8"), help="sampling: as in Pipeline.from_bundle")
    parser.add_argument("--low-memory", action="store_true", help="sampling: ask whether it fits with low_memory")
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="also write the figures to this file; with --all: the plans' folder"
    )
    arguments = parser.parse_args([argument for argument in argv if not argument.startswith("--config.")])
    if arguments.config == "":
        parser.error("--config is empty, expected a stage file such as configs/stage1.py")
    if arguments.all and not (arguments.config and arguments.output):
        parser.error("--all needs --config=FILE and --output=DIR")
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
    # There is no TPU to talk to, and no reason to keep another process from compiling.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    from unialign_jax import files

    try:
        if arguments.report:
            return write_report(arguments)
        if arguments.all:
            sys.exit(1 if plan_all(arguments, changes) else 0)
        if arguments.output:
            files.check_json_output(arguments.output)
        figures = plan_training(arguments, changes) if arguments.config else plan(arguments)
        if arguments.output:
            with files.replacing_file(arguments.output) as scratch:
                scratch.write_text(json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if figures["fits"] else 1)


def write_report(arguments):
    from unialign_jax.planning import plan_report

    plan_report.write_report(arguments.report, arguments.docs)
    print(f"wrote {arguments.docs / 'tpu.md'} and {arguments.docs / plan_report.PLOT}")


def plan_all(arguments, changes) -> list[str]:
    from unialign_jax.planning import sampling_plan, sweep
    from unialign_jax.training.stages import read_config

    config = read_config(arguments.config, changes)
    names = arguments.topologies.split(",") if arguments.topologies else sweep.TOPOLOGIES
    for name in names:
        sweep.split_name(name)
    make_folder("--output", arguments.output)
    sampling_plan.topology_devices("v5e-1")  # without the TPU compiler, one error and not one for each slice
    return sweep.sweep(config, arguments.config, names, arguments.output)


def make_folder(option, path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}={path} cannot be a folder: {error.strerror}") from None


def command(arguments, changes, **others) -> str:
    """This command line once more, with other options."""
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


def say_what_may_fit(options):
    """Prints what to try, (what it is, the command) each, where there is something."""
    if options:
        print("\nWhat may fit:")
    for what, line in options:
        print(f"  {what}:\n    {line}")


def training_that_may_fit(arguments, changes, remat) -> list[tuple[str, str]]:
    from unialign_jax.parallel import hardware

    options = []
    if not arguments.search:
        options.append(
            ("accumulation and remat, tried one after another (minutes each)", command(arguments, changes, search=True))
        )
        if remat not in ("block", "offload"):
            others = [change for change in changes if not change.startswith("model.remat=")]
            line = command(arguments, [*others, "model.remat=block"])
            options.append(("all blocks computed again in the backward pass", line))
    if larger := hardware.larger_slice(arguments.topology):
        options.append(("twice the chips", command(arguments, changes, topology=larger)))
    return options


def sampling_that_may_fit(arguments) -> list[tuple[str, str]]:
    options = []
    if not arguments.low_memory:
        line = command(arguments, [], low_memory=True)
        options.append(("on the chip only what the current part of a task reads", line))
    if not arguments.quantize:
        options.append(("weights of 8 bits", command(arguments, [], quantize="int8")))
    if arguments.batch > 1:
        options.append(("fewer images at a time", command(arguments, [], batch=arguments.batch // 2)))
    if arguments.topology != "v6e:1x1":
        options.append(("a chip with 32 GB", command(arguments, [], topology="v6e:1x1")))
    return options


def plan_training(arguments, changes) -> dict:
    from unialign_jax.parallel import hardware
    from unialign_jax.planning import sampling_plan, search
    from unialign_jax.planning import step_plan as training
    from unialign_jax.training import meshes
    from unialign_jax.training.config import active_streams, config_problems
    from unialign_jax.training.stages import read_config

    config = read_config(arguments.config, changes)
    hardware.topology_name(arguments.topology)
    if not 1 <= arguments.num_slices <= MOST_SLICES:
        raise ValueError(f"--num-slices is {arguments.num_slices}, expected 1 to {MOST_SLICES}")
    if problems := config_problems(config):  # those of the mesh are found with the devices
        raise ValueError("the configuration cannot run: " + "; ".join(problems))
    names = list(active_streams(config))
    if arguments.stream:
        if arguments.stream not in names:
            raise ValueError(f"unknown stream {arguments.stream!r}, expected one of {', '.join(names)}")
        names = [arguments.stream]
    if arguments.dump:
        make_folder("--dump", arguments.dump)
    devices = sampling_plan.topology_devices(arguments.topology, arguments.num_slices)
    usable = sampling_plan.usable_bytes(devices[0])

    def compile_step(config, name):
        print(f"compiling: {name}, remat {config.model.remat}, accumulation {config.accumulation}", file=sys.stderr)
        how = f"accumulation-{config.accumulation}-remat-{config.model.remat}"
        dump = arguments.dump and arguments.dump / f"{config.name}-{name}-{how}.hlo"
        return training.plan_step(config, devices, name, usable=usable, dump=dump)

    searched = {}
    if arguments.search:
        heaviest = search.heaviest_stream(config, names)
        ordered = search.candidates(config, devices, heaviest)
        found = search.search(
            ordered, usable or math.inf, lambda candidate: compile_step(candidate.applied_to(config), heaviest)
        )
        if found.plan is None:
            say_what_may_fit(training_that_may_fit(arguments, changes, config.model.remat))
            raise ValueError(f"{found.misfit}, and no other micro-batch or remat needs less")
        searched[heaviest] = found.plan
        config.accumulation, config.model.remat = found.plan.accumulation, found.plan.remat
        print(f"found: accumulation {config.accumulation}, remat {config.model.remat}", file=sys.stderr)
    plans, misfits = [], []
    for name in names:
        try:
            plans.append(searched.get(name) or compile_step(config, name))
        except training.DoesNotFit as error:
            misfits.append(str(error))
    print(
        f"{arguments.config} on {arguments.num_slices} x {arguments.topology} ({len(devices)} x "
        f"{devices[0].device_kind}), batch {config.batch_size}, accumulation {config.accumulation}, "
        f"remat {config.model.remat}"
    )
    for line in sorted({f"mesh {meshes.format_mesh(plan.mesh)}: {plan.mesh_reason}" for plan in plans}):
        print(line)
    print()
    figures = training.report(config, plans)
    if plans:
        for title, rows in figures["tables"].items():
            print(f"{title}\n{sampling_plan.format_table(rows)}\n")
    for plan in plans:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        sizes = f"{plan.peak / sampling_plan.GIB:.2f} of {(usable or 0) / sampling_plan.GIB:.2f} GiB"
        print(f"{plan.stream}: {verdict}: {sizes}")
    for line in misfits:
        print(f"DOES NOT FIT: {line}")
    fits = not misfits and all(plan.fits for plan in plans)
    if not fits:
        say_what_may_fit(training_that_may_fit(arguments, changes, config.model.remat))
    return figures | {
        "config": arguments.config,
        "changes": changes,
        "topology": arguments.topology,
        "num_slices": arguments.num_slices,
        "chips": len(devices),
        "mesh": plans[0].mesh if plans else dict(config.mesh),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "remat": config.model.remat,
        "misfits": misfits,
        "fits": fits,
    }


def plan(arguments) -> dict:
    from unialign_jax.parallel import hardware
    from unialign_jax.planning import sampling_plan

    sampling_plan.check_sampling(sampling_plan.published_config(), arguments.size, arguments.batch)
    chips = hardware.chips_of(hardware.topology_name(arguments.topology))
    if chips > 1:
        raise ValueError(f"topology {arguments.topology} has {chips} chips, sampling runs on one: v5e:1x1")
    devices = sampling_plan.topology_devices(arguments.topology)
    usable = sampling_plan.usable_bytes(devices[0])
    programs, params = sampling_plan.sampling_programs(
        arguments.task, devices[0], size=arguments.size, batch=arguments.batch, quantize=arguments.quantize
    )
    names = {name for program in programs for name in program.components}
    resident = {name: sampling_plan.resident_bytes(params[name]) for name in sorted(names)}
    measured = []
    for program in programs:
        print(f"compiling: {program.name}", file=sys.stderr)
        try:
            measured.append(sampling_plan.measure(program))
        except ValueError:  # no room for this one alone
            say_what_may_fit(sampling_that_may_fit(arguments))
            raise
    rows = sampling_plan.table(measured, resident)
    peak = rows[-1]["peak_low_memory" if arguments.low_memory else "peak"]
    print(
        f"{arguments.task}, {arguments.size} px, batch {arguments.batch}, bfloat16, quantize {arguments.quantize}, "
        f"on {arguments.topology} ({devices[0].device_kind}); GiB\n"
    )
    print(sampling_plan.format_table(rows))
    fits = usable is None or peak * sampling_plan.GIB <= usable
    if usable is not None:
        mode = "with low_memory" if arguments.low_memory else "without low_memory"
        verdict = "fits" if fits else "DOES NOT FIT"
        print(f"\n{verdict} {mode}: {peak:.2f} of {usable / sampling_plan.GIB:.2f} GiB")
    if not fits:
        say_what_may_fit(sampling_that_may_fit(arguments))
    return {
        "task": arguments.task,
        "topology": arguments.topology,
        "size": arguments.size,
        "batch": arguments.batch,
        "quantize": arguments.quantize,
        "low_memory": arguments.low_memory,
        "usable": usable and usable / sampling_plan.GIB,
        "fits": fits,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
