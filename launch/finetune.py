"""Adapters (LoRA) from a folder of pictures, by one command: python launch/finetune.py --help"""

import argparse
import importlib.util
import json
import logging
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command, split_changes

explain_missing_packages()

from unialign_jax.data import records
from unialign_jax.data.preparation.runner import work_folder
from unialign_jax.data.sources import locations
from unialign_jax.data.sources.folder import IMAGES, METADATA, TEXTS
from unialign_jax.files import read_json, replacing_file, sha256

DESCRIPTION = """\
Trains adapters of a model on a folder of pictures. It prints and executes the commands that this takes: records of the
pictures, pictures of the class where they are asked for, and training, all in the folder of the run. The same command
resumes where it was stopped, with the same pictures and texts: others are another run, in another folder.

recipes
  style      pictures with a text beside each (a.jpg, a.txt)
  subject    the same of one subject, with --class-prompt: the model's own pictures of its class are a second stream,
             so that the class stays what it was (DreamBooth's prior preservation)
  edit       pairs of pictures: metadata.jsonl, a line {"source": "a.jpg", "target": "b.jpg", "instruction": "...",
             "caption": "..."} each; the caption says what the target shows
  captions   pictures with the text that is to be written of each
  answers    metadata.jsonl, a line {"image": "a.jpg", "question": "...", "answer": "..."} each

At the end, and every samples.every steps, the run's samples/ show pictures and texts before and after.
"""
EXAMPLES = """\
examples
  python launch/finetune.py style --pictures=my_pictures --bundle=bundles/unialign --workdir=runs/style \\
      --prompt="a fox in the style of mine"
  python launch/finetune.py subject --pictures=my_dog --caption="a photo of zwx dog" \\
      --class-prompt="a photo of a dog" --bundle=bundles/unialign --workdir=runs/dog --config.lora.quantize_base=int8
"""
TEXT = (
    *("loss_weights.flow_matching=0", "loss_weights.masked_text=1"),
    "lora.targets=('blocks/.*/(qkv|out|mlp_in|mlp_out)/kernel$', 'text_head/kernel$')",
)
# (the kind of the records, changes of the configuration)
RECIPES = {
    "style": ("text_to_image", ()),
    "subject": ("text_to_image", ()),
    "edit": ("edit", ()),
    "captions": ("text_to_image", TEXT),
    "answers": ("vqa", TEXT),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv, changes = split_changes(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        usage="python launch/finetune.py RECIPE --pictures=DIR --workdir=DIR [options] [--config.KEY=VALUE ...]",
    )
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--pictures", required=True, type=Path, metavar="DIR")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--bundle", metavar="DIR", help="the model to start from (default: init_from of --config)")
    parser.add_argument("--caption", metavar="TEXT", help="of pictures without a text beside them")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="to draw while it trains, once for each")
    parser.add_argument("--class-prompt", metavar="TEXT", help='of subject, such as "a photo of a dog"')
    parser.add_argument("--class-pictures", type=int, default=100, metavar="N", help="(default %(default)s)")
    parser.add_argument("--class-weight", type=float, default=1.0, metavar="X", help="steps for each of the pictures'")
    parser.add_argument("--config", default="finetune", metavar="FILE[:tiny]", help="stage file (default %(default)s)")
    parser.add_argument("--noprogress", action="store_true", help="draw no progress bar")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    arguments.changes = changes
    parser.check_least(arguments, class_pictures=1)
    if (arguments.recipe == "subject") != (arguments.class_prompt is not None):
        parser.error("--class-prompt goes with the recipe subject, which needs it")
    return arguments


def run(name: str, *arguments: str) -> None:
    """Prints and executes a command of this folder. Raises ValueError when it fails."""
    print(f"python launch/{name}.py {shlex.join(arguments)}", flush=True)
    spec = importlib.util.spec_from_file_location(f"launch_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.main(list(arguments)):
        raise ValueError(f"launch/{name}.py failed, for the reason above")


def with_captions(pictures: Path, caption: str, folder: Path) -> Path:
    """A folder of copies of the pictures, with a text beside each: its own, or `caption`."""
    names = sorted(path for path in pictures.iterdir() if path.suffix.lower() in IMAGES)
    if not names or any((pictures / name).exists() for name in METADATA):
        raise ValueError(f"--caption: {pictures} holds no pictures, or has a metadata file that says what they are")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for picture in names:
        own = [picture.with_suffix(suffix) for suffix in TEXTS]
        text = next((path.read_text() for path in own if path.exists()), caption)
        (folder / picture.name).with_suffix(".txt").write_text(text)
        shutil.copyfile(picture, folder / picture.name)
    return folder


def described(arguments: argparse.Namespace, model: str, seed: int) -> dict[str, str | int]:
    """What the records are made from, by what a user calls it: options, and hashes of the files."""
    facts = {"the recipe": arguments.recipe}
    if arguments.caption is not None:
        facts["--caption"] = arguments.caption
    for place, inside, names in locations.walk(str(arguments.pictures)):
        read = (name for name in names if name in METADATA or name.lower().endswith(IMAGES + TEXTS))
        facts |= {str(Path(inside) / name): sha256(Path(place) / name) for name in read}
    if arguments.class_prompt is not None:
        from unialign_jax.inference.opening import ModelSource

        facts |= {"--class-prompt": arguments.class_prompt, "--class-pictures": arguments.class_pictures}
        facts |= {"the model": ModelSource(model, verify=False).digest, "the seed": seed}
    return facts


MADE = ("records", "class_records", "pictures", "class_jobs.jsonl", "class")  # in the run's data/
OF_CLASS = ("--class-prompt", "the model", "the seed")  # facts that a picture of the class depends on


def check_unchanged(data: Path, facts: dict[str, str | int]) -> None:
    """Keeps `facts` in the run's `data`. Where others were kept there, what was made from them is removed.

    Raises ValueError, and changes nothing, where the run has saved steps that were trained with them.
    """
    from unialign_jax.training.runs import is_run, saved_steps

    workdir, kept = data.parent, data / "made_from.json"
    has_begun = is_run(workdir) and bool(saved_steps(workdir / "checkpoints"))
    before = read_json(kept) if kept.exists() else {}
    if before == facts or (has_begun and not before):  # a run of a version that kept none
        return
    if before:
        states = {name: "is gone" for name in before if name not in facts}
        states |= {name: "has changed" for name in before if name in facts and before[name] != facts[name]}
        states |= {name: "is new" for name in facts if name not in before}
        told = ", ".join(f"{name} {state}" for name, state in list(states.items())[:3])
        told += f" and {len(states) - 3} more" if len(states) > 3 else ""
        if has_begun:
            raise ValueError(
                f"{workdir} has trained with other pictures or texts ({told}): give a new --workdir to train with "
                "these, or undo the change to resume"
            )
        print(f"{data} is made again: {told}")
    # Of pictures of the class that an older version has drawn, or somebody has put there, nothing is known.
    keeps_class = not before or all(before.get(name) == facts.get(name) for name in OF_CLASS)
    for name in MADE[: -1 if keeps_class else None]:
        for path in (data / name, Path(work_folder(str(data / name)))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    with replacing_file(kept) as scratch:
        scratch.write_text(json.dumps(facts, indent=1))


def write_records(source: Path, kind: str, output: Path) -> None:
    if not records.is_data_folder(output):
        # Whoever brings twelve pictures wants all of them, small ones too.
        options = [f"--stream={kind}", "--min-side=1", "--processes=1", f"--output={output}"]
        run("prepare_data", f"--source={source}", *options)


def draw_class(arguments: argparse.Namespace, model: str, seed: int, folder: Path) -> None:
    """Pictures of the class by the model as it is, with the prompt beside each. Those that are there stay."""
    names, task = [f"picture_{i}" for i in range(arguments.class_pictures)], {"task": "text_to_image"}
    folder.mkdir(exist_ok=True)
    for path in folder.glob("picture_*"):
        if path.stem not in names:
            path.unlink()
    if not all((folder / f"{name}.png").exists() for name in names):
        jobs = [task | {"id": id, "prompt": arguments.class_prompt, "seed": seed + i} for i, id in enumerate(names)]
        file = folder.with_name("class_jobs.jsonl")
        file.write_text("".join(json.dumps(job) + "\n" for job in jobs))
        # Pictures of these jobs are not drawn again; others under their names are.
        run("generate", f"--bundle={model}", f"--jobs={file}", f"--output={folder}", "--overwrite")
    for name in names:
        (folder / f"{name}.txt").write_text(arguments.class_prompt)


def finetune(arguments: argparse.Namespace) -> None:
    from unialign_jax.training.config import read_config

    kind, changes = RECIPES[arguments.recipe]
    data, pictures = arguments.workdir / "data", arguments.pictures
    name = "text_to_image" if kind == "text_to_image" else "pictures"
    changes = [f"streams.{name}.kind={kind}", f"streams.{name}.path={data / 'records'}", *changes]
    if name == "pictures":
        changes.append("streams.text_to_image.weight=0")
    if arguments.class_prompt is not None:
        changes += ["streams.class.kind=text_to_image", f"streams.class.path={data / 'class_records'}"]
        changes.append(f"streams.class.weight={arguments.class_weight}")
    if arguments.bundle:
        changes.append(f"init_from={arguments.bundle}")
    if arguments.prompt:
        changes.append(f"samples.prompts={tuple(arguments.prompt)!r}")
    if pictures.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--pictures={pictures} lies in {data}, which is the run's own: put the pictures elsewhere")
    config = read_config(arguments.config, changes := [*changes, *arguments.changes])  # bad ones are refused here

    check_unchanged(data, described(arguments, config.init_from, config.seed))
    if arguments.caption is not None and not records.is_data_folder(data / "records"):
        pictures = with_captions(pictures, arguments.caption, data / "pictures")
    write_records(pictures, kind, data / "records")
    if arguments.class_prompt is not None:
        draw_class(arguments, config.init_from, config.seed, data / "class")
        write_records(data / "class", "text_to_image", data / "class_records")
    options = ["--noprogress"] * arguments.noprogress + ["--traceback"] * arguments.traceback
    changes = [f"--config.{change}" for change in changes]
    run("train", f"--config={arguments.config}", f"--workdir={arguments.workdir}", *options, *changes)
    print(f"samples before and after: {arguments.workdir / 'samples'}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return run_command(
        lambda: finetune(arguments), traceback=arguments.traceback, interrupted="the same command resumes"
    )


if __name__ == "__main__":
    sys.exit(main())
