"""What a task needs on a chip that is not here: python launch/plan.py --help"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DESCRIPTION = """\
Compiles the programs of a task for a TPU chip, without the chip and without weights, and says what they need in its
memory. Needs the TPU compiler beside jax: pip install 'libtpu==0.0.42.*' (for jax 0.10.2; best in an environment of its
own). A full-size task takes a few minutes on two CPU cores.
"""
EXAMPLES = """\
examples
  python launch/plan.py --task=t2i --topology=v5e:1x1
  python launch/plan.py --task=caption --topology=v5e:1x1 --batch=8 --quantize=int8 --output=caption.json

Exit status 0 when the task fits (with --low-memory: in that mode), 1 when it does not.
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=("t2i", "edit", "caption"), help="what to do")
    parser.add_argument("--topology", default="v5e:1x1", help="the chip, default %(default)s; sampling uses one")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="images at a time, default %(default)s")
    parser.add_argument("--quantize", choices=("int8", "w8a8"), help="as in Pipeline.from_bundle")
    parser.add_argument("--low-memory", action="store_true", help="ask whether it fits with low_memory")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse_arguments(argv)
    # There is no TPU to talk to, and no reason to keep another process from compiling.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    try:
        figures = plan(arguments)
        if arguments.output:
            arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if figures["fits"] else 1)


def plan(arguments) -> dict:
    from unialign_jax import planning

    devices = planning.topology_devices(arguments.topology)
    if len(devices) > 1:
        raise ValueError(f"topology {arguments.topology} has {len(devices)} chips, sampling runs on one: v5e:1x1")
    usable = planning.usable_bytes(devices[0])
    programs, params = planning.sampling_programs(
        arguments.task, devices[0], size=arguments.size, batch=arguments.batch, quantize=arguments.quantize
    )
    names = {name for program in programs for name in program.components}
    resident = {name: planning.resident_bytes(params[name]) for name in sorted(names)}
    measured = []
    for program in programs:
        print(f"compiling: {program.name}", file=sys.stderr)
        measured.append(planning.measure(program))
    rows = planning.table(measured, resident)
    peak = rows[-1]["peak_low_memory" if arguments.low_memory else "peak"]
    print(
        f"{arguments.task}, {arguments.size} px, batch {arguments.batch}, bfloat16, quantize {arguments.quantize}, "
        f"on {arguments.topology} ({devices[0].device_kind}); GiB\n"
    )
    print(planning.format_table(rows))
    fits = usable is None or peak * planning.GIB <= usable
    if usable is not None:
        mode = "with low_memory" if arguments.low_memory else "without low_memory"
        verdict = "fits" if fits else "DOES NOT FIT"
        print(f"\n{verdict} {mode}: {peak:.2f} of {usable / planning.GIB:.2f} GiB")
    return {
        "task": arguments.task,
        "topology": arguments.topology,
        "size": arguments.size,
        "batch": arguments.batch,
        "quantize": arguments.quantize,
        "low_memory": arguments.low_memory,
        "usable": usable and usable / planning.GIB,
        "fits": fits,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
