"""Weighs each alignment term in the shapes world (paper, Fig. 8): python launch/ablate.py --help"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command, split_changes

explain_missing_packages()


DESCRIPTION = """\
Trains the tiny stages with and without the cross-modal and the intrinsic-modal term, each variant from several seeds,
and compares what they learn: losses on held-out records, and the accuracies of `launch/evaluate.py shapes`.

Every run is `launch/train.py`: stage 1 from random weights, then stage 2 with text to image and edits alone. Finished
runs are kept: the same command resumes. --config.KEY=VALUE changes a key of all runs. Writes OUTPUT/results.json,
table.md and ablation.png.
"""
EXAMPLES = """\
examples:
  python launch/prepare_data.py --format=shapes --output=data/shapes
  python launch/ablate.py --output=runs/ablation
  python launch/ablate.py --output=runs/trial --variants=both,neither --seeds=1 --steps=200 --edit-steps=100 --scenes=32
"""
# variant -> its changes to the configuration of both stages
VARIANTS = {
    "both": [],
    "no_cross_modal": ["loss_weights.cross_modal=0"],
    "no_intrinsic_modal": ["loss_weights.intrinsic_modal=0"],
    "neither": ["loss_weights.cross_modal=0", "loss_weights.intrinsic_modal=0"],
    "one_way": ["parity.cross_modal_direction=image_to_text"],
    "cross_modal_x4": ["loss_weights.cross_modal=0.2"],
    "intrinsic_modal_x5": ["loss_weights.intrinsic_modal=0.5"],
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv, changes = split_changes(sys.argv[1:] if argv is None else argv)
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"), metavar="DIR", help="default %(default)s")
    default = "both,no_cross_modal,no_intrinsic_modal,neither"
    parser.add_argument(
        "--variants", default=default, metavar="A,B", help=f"of {', '.join(VARIANTS)} (default {default})"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, metavar="N", help="of stage 1 (%(default)s)")
    parser.add_argument("--edit-steps", type=int, default=400, metavar="N", help="of stage 2; 0: none (%(default)s)")
    parser.add_argument("--scenes", type=int, default=128, metavar="N", help="evaluated of each task (%(default)s)")
    arguments = parser.parse_args(argv)
    arguments.changes = changes
    arguments.variants = [name.strip() for name in arguments.variants.split(",")]
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants names {unknown[0]!r}, expected some of {', '.join(VARIANTS)}")
    parser.check_least(arguments, seeds=1, steps=1, edit_steps=0, scenes=1)
    return arguments


def run_changes(arguments: argparse.Namespace, variant: str, seed: int, stage: str) -> list[str]:
    """The changes that make the configuration of one run from that of its stage."""
    steps = arguments.steps if stage == "stage1" else arguments.edit_steps
    changes = [
        f"num_steps={steps}",
        f"seed={seed}",
        f"checkpoint.every={steps}",
        "samples.count=0",
        f"validation.every={steps}",
        f"compilation_cache={arguments.output.absolute() / 'compiled'}",
        "validation.records=256",
        f"streams.text_to_image.path={arguments.data / 'text_to_image'}",
    ]
    if stage == "stage2":
        changes += [
            f"init_from={run_folder(arguments, variant, seed, 'stage1')}",
            f"streams.edit.path={arguments.data / 'edit'}",
            "streams.text_to_image.weight=1",
            "streams.perception.weight=0",
            "streams.personalization.weight=0",
        ]
    return [*changes, *VARIANTS[variant], *arguments.changes]


def run_folder(arguments: argparse.Namespace, variant: str, seed: int, stage: str) -> Path:
    return arguments.output / variant / f"seed{seed}" / stage


def train(arguments: argparse.Namespace, variant: str, seed: int, stage: str) -> None:
    """Trains or resumes one run; its log is STAGE.log beside its folder. Raises ValueError when it fails."""
    folder = run_folder(arguments, variant, seed, stage)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "launch" / "train.py", "--noprogress", f"--config={stage}:tiny"]
    command += [f"--workdir={folder}"]
    command += [f"--config.{change}" for change in run_changes(arguments, variant, seed, stage)]
    path = folder.with_suffix(".log")
    with open(path, "a+") as log:
        status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
            raise ValueError(f"training {folder} ended with status {status}: {last} (all of it is in {path})")


def ablate(arguments: argparse.Namespace) -> None:
    from unialign_jax import files
    from unialign_jax.evaluation import ablation
    from unialign_jax.parallel.compiled import keep_compiled

    # Runs of one shape share their compiled programs.
    keep_compiled(arguments.output.absolute() / "compiled")
    path = arguments.output / "results.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": arguments.steps,
        "edit_steps": arguments.edit_steps,
        "scenes": arguments.scenes,
        "set": arguments.changes,
    }
    content = files.read_json(path) if path.exists() else {"settings": settings, "runs": {}}
    if content.get("settings") != settings:
        found = content.get("settings")
        raise ValueError(f"{path} was made with {found}: choose another --output, or give the same options")
    stages = ("stage1", "stage2") if arguments.edit_steps else ("stage1",)
    cells = [(v, s, t) for t in stages for s in range(arguments.seeds) for v in arguments.variants]
    for number, (variant, seed, stage) in enumerate(cells):
        key = f"{variant}/seed{seed}/{stage}"
        if key in content["runs"]:
            continue
        began = time.monotonic()
        train(arguments, variant, seed, stage)
        content["runs"][key] = ablation.evaluate(run_folder(arguments, variant, seed, stage), stage, arguments.scenes)
        files.write_json(path, content, indent=1)
        print(f"{number + 1} of {len(cells)}: {key}, {time.monotonic() - began:.0f} s", flush=True)
    table = ablation.tabulate(content["runs"], arguments.variants)
    summary = (
        f"{arguments.seeds} seeds, {arguments.steps} steps of stage 1 and {arguments.edit_steps} of stage 2; mean and "
        f"95% interval over seeds; accuracies over {arguments.scenes} held-out scenes."
    )
    ablation.write_table(arguments.output / "table.md", content["runs"], arguments.variants, summary)
    ablation.draw(arguments.output / "ablation.png", table, arguments.variants)
    print((arguments.output / "table.md").read_text())


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda: ablate(arguments), interrupted="the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
