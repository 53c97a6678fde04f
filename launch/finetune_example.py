"""The demo model learns a new word from a dozen pictures: python launch/finetune_example.py --help"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

import numpy as np
from PIL import Image, ImageDraw

from unialign_jax.data.shapes.render import BACKGROUND_RGB, COLOR_RGB
from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, POSITIONS, Thing

DESCRIPTION = """\
The shapes world has no hearts, so the demo bundle draws something else where it reads the word. `pictures` draws a
dozen with a caption beside each; `sheet` draws prompts that are none of the captions, by the model before and after
fine-tuning, and says how well the shapes are hearts.
"""
EXAMPLES = """\
examples, in this order
  python launch/finetune_example.py pictures --output=data/hearts
  python launch/finetune.py style --pictures=data/hearts --config=configs/finetune.py:tiny --workdir=runs/hearts
  python launch/finetune_example.py sheet --lora=runs/hearts --output=hearts.png
"""
SIZE, SUPERSAMPLING, RADIUS, COUNT = 64, 4, 0.148, 12
HELD_OUT = 12  # prompts of the sheet
SEED = 7


def parse_arguments(argv):
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pictures = commands.add_parser("pictures", help="draw a dozen hearts, with captions")
    pictures.add_argument("--output", required=True, type=Path, metavar="DIR")
    sheet = commands.add_parser("sheet", help="hearts before and after fine-tuning")
    sheet.add_argument("--bundle", default="demo", metavar="DIR", help="the model before (default %(default)s)")
    sheet.add_argument("--lora", required=True, metavar="FILE[:SCALE]", help="the run, or a LoRA's file")
    sheet.add_argument("--output", required=True, type=Path, metavar="FILE.png")
    for command in (pictures, sheet):
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    if arguments.command == "sheet" and arguments.output.suffix.lower() != ".png":
        parser.error(f"--output is {arguments.output}, expected a name that ends in .png")
    return arguments


def scenes() -> list[tuple[str, int, str]]:
    """(colour, place, background) of every heart that there can be, in a fixed order that mixes all three."""
    every = list(itertools.product(COLORS, range(len(POSITIONS)), BACKGROUNDS))
    return [every[i] for i in np.random.default_rng(SEED).permutation(len(every))]


def caption(color: str, place: int, background: str) -> str:
    return f"a large {color} heart at the {POSITIONS[place]} on a {background} background"


def draw_heart(color: tuple, place: int, background: tuple) -> np.ndarray:
    """A heart as uint8 [SIZE, SIZE, 3], antialiased, at one of the nine places of the shapes world."""
    scale = SIZE * SUPERSAMPLING
    (x, y), r = (value * scale for value in Thing("circle", "red", "large", place).center), RADIUS * scale
    canvas = Image.new("RGB", (scale, scale), background)
    pen = ImageDraw.Draw(canvas)
    for left in (x - r, x):
        pen.ellipse([left, y - r, left + r, y], fill=color)
    pen.polygon([(x - 0.95 * r, y - 0.3 * r), (x + 0.95 * r, y - 0.3 * r), (x, y + 1.1 * r)], fill=color)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def draw(color: str, place: int, background: str) -> np.ndarray:
    return draw_heart(COLOR_RGB[color], place, BACKGROUND_RGB[background])


def write_pictures(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} has files already; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes()[:COUNT]):
        Image.fromarray(draw(*scene)).save(output / f"heart_{number:02d}.png")
        (output / f"heart_{number:02d}.txt").write_text(caption(*scene) + "\n")
    print(f"wrote {COUNT} pictures with captions to {output}")


def overlap(image: Image.Image, scene: tuple[str, int, str]) -> float:
    """How well a picture is the heart of its caption: the pixels of both over those of either, 0 to 1.

    A pixel belongs to a thing when it is nearer to the heart's colour than to the background's.
    """
    color, place, background = scene
    colors = np.array([COLOR_RGB[color], BACKGROUND_RGB[background]], np.float32)
    found, wanted = (
        np.square(np.asarray(picture, np.float32)[..., None, :] - colors).sum(-1).argmin(-1) == 0
        for picture in (image.convert("RGB"), draw(*scene))
    )
    return float((found & wanted).sum() / (found | wanted).sum())


def write_sheet(arguments) -> None:
    from unialign_jax import Pipeline
    from unialign_jax.conversion.lora import parse_reference
    from unialign_jax.training.samples import draw_sheet

    held_out = scenes()[COUNT : COUNT + HELD_OUT]
    prompts = [caption(*scene) for scene in held_out]
    pipeline = Pipeline.from_bundle(arguments.bundle)
    before = pipeline.generate(prompts, seed=0)
    path, scale = parse_reference(arguments.lora)
    pipeline.load_lora(path, scale)
    after = pipeline.generate(prompts, seed=0)
    cards = [
        (prompt, [("before", np.asarray(old)), ("after", np.asarray(new)), ("meant", draw(*scene))])
        for prompt, old, new, scene in zip(prompts, before, after, held_out, strict=True)
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(cards, columns=3).save(arguments.output)
    for name, images in (("before", before), ("after", after)):
        scores = [overlap(image, scene) for image, scene in zip(images, held_out, strict=True)]
        print(f"{name}: overlap with the heart that was asked for {np.mean(scores):.2f}, mean of {len(scores)} prompts")
    print(f"wrote {arguments.output}")


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    work = (lambda: write_pictures(arguments.output)) if arguments.command == "pictures" else None
    return run_command(work or (lambda: write_sheet(arguments)), traceback=arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
