"""Weights in and out: python launch/convert.py --help"""

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

from unialign_jax.conversion import lora_commands

DESCRIPTION = """\
Converts downloaded PyTorch weights to a bundle (the folder that training and sampling start from) and back.
It needs no PyTorch, no accelerator and little memory: one tensor is in memory at a time.
"""

EXAMPLES = """\
examples
  python launch/convert.py sd3 --source=stable-diffusion-3-medium-diffusers --output=bundles/sd3 \\
      --mask-embedding=mask_token_emb.00-of-01.pth
  python launch/convert.py sd3 --source=sd3_medium.safetensors --text-encoder=t5xxl_fp16.safetensors \\
      --tokenizer=tokenizer_3 --output=bundles/sd3
  python launch/convert.py unialign --source=UniAlignment --output=bundles/unialign
  python launch/convert.py teacher --source=Qwen2.5-VL-7B-Instruct --output=bundles/teacher
  python launch/convert.py export --run=runs/stage3 --weights=ema --format=unialign --output=exported
  python launch/convert.py export-lora --run=runs/mine --layout=diffusers --output=mine.safetensors
  python launch/convert.py merge-lora --bundle=bundles/sd3 --lora=mine.safetensors:0.8 --output=bundles/mine
  python launch/convert.py inspect bundles/sd3 --verify

`python launch/convert.py COMMAND --help` lists the options of each. docs/weights.md lists the files to download.
"""

SD3 = """\
Stable Diffusion 3 medium -> a bundle whose image velocity is SD3's own (T5 text, no CLIP). What SD3 lacks is
added: the text head is drawn from a fixed seed, the last block's text half is silent, the pooled vector is zero.

--source is one of
  a folder of diffusers: transformer/ vae/ text_encoder_3/ tokenizer_3/ (one safetensors file each, or shards)
  Stability's single file: sd3_medium.safetensors, sd3_medium_incl_clips_t5xxlfp16.safetensors, ...
  the folder or file of the transformer alone, with the other parts by their own options
"""
UNIALIGN = """\
The released UniAlignment model, or DualDiffusion's -> a bundle, with the alignment heads when the file has them.

--source is the released folder (transformer/ vae/ text_encoder/ tokenizer/), or the transformer's folder or file alone
(safetensors, or a trainer's consolidated .pth), with the other parts by their own options. The learned mask embedding
is found in the folder, or given by --mask-embedding.
"""
TEACHER = """\
Qwen2.5-VL (any size) -> the frozen teacher of the intrinsic-modal loss: its vision tower and its input embeddings.
"""
EXPORT = """\
A bundle or a training run -> files that PyTorch loads strictly.

formats
  unialign    the released folder: transformer/ (heads included when there are any), vae/, text_encoder/, tokenizer/,
              scheduler/ and model_index.json
  diffusers   SD3's folder (the same with text_encoder_3/ tokenizer_3/). It makes the same images from a prompt, but has
              no place for the text head and the last block's text half: no captions, no answers.
  stability   the same as Stability's single .safetensors file
  bundle      of a run alone: a bundle to sample from or to start another run from. T5, VAE and tokenizer are those that
              the run was trained with, or --bundle's.
"""
INSPECT = """\
Describes a safetensors file, a model's folder, a bundle or a run: components, layout, dtypes, parameters.
"""


def parse_arguments(argv):
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, help):
        sub = commands.add_parser(name, description=text, help=help)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        return sub

    for name, text, help in (
        ("sd3", SD3, "Stable Diffusion 3 medium -> a bundle"),
        ("unialign", UNIALIGN, "the released UniAlignment model -> a bundle"),
    ):
        sub = command(name, text, help)
        add_output(sub, "bundle to write")
        sub.add_argument("--source", required=True, metavar="PATH", help="what was downloaded: a folder or a file")
        sub.add_argument("--text-encoder", metavar="PATH", help="T5 v1.1 XXL: a folder or a file")
        sub.add_argument("--vae", metavar="PATH", help="SD3's VAE: a folder or a file")
        sub.add_argument("--tokenizer", metavar="PATH", help="T5's tokenizer folder (tokenizer.json or spiece.model)")
        sub.add_argument(
            "--mask-embedding",
            metavar="PATH",
            help="the learned embedding of masked text (mask_token_emb.00-of-01.pth)",
        )
        add_components(sub, "convert")
        sub.add_argument("--heads", action="store_true", help="draw new alignment heads when the source has none")
        add_dtype(sub, "how to store the weights (default: as the source does; eight-bit floats become bfloat16)")

    sub = command("teacher", TEACHER, "Qwen2.5-VL -> the teacher")
    add_output(sub, "folder to write")
    sub.add_argument("--source", required=True, metavar="PATH", help="Qwen2.5-VL's folder as downloaded")
    sub.add_argument("--tokenizer", metavar="PATH", help="folder of its tokenizer.json, when the source has none")
    add_dtype(sub, "how to store the weights (default: as the source does)")

    sub = command("export", EXPORT, "a bundle or a run -> PyTorch's files")
    add_output(sub, "folder, or .safetensors file for stability")
    sub.add_argument("--bundle", metavar="DIR", help="the bundle; beside --run, the frozen parts come from it")
    sub.add_argument(
        "--run", metavar="DIR", help="a training run's folder: transformer and heads of its last checkpoint"
    )
    sub.add_argument("--weights", choices=["raw", "ema"], default="raw", help="which of a run's weights (default raw)")
    sub.add_argument("--format", required=True, choices=["unialign", "diffusers", "stability", "bundle"])
    add_components(sub, "write")
    add_dtype(sub, "how to write the weights (default: as they are stored)")
    sub.add_argument(
        "--drop-text-positions",
        action="store_true",
        help="leave out a table of text positions, which PyTorch's formats cannot hold: images and texts then change",
    )

    lora_commands.add_commands(command, add_output, add_dtype)

    sub = command("inspect", INSPECT, "what is in a file, folder, bundle or run")
    sub.add_argument("path", metavar="PATH")
    sub.add_argument("--keys", action="store_true", help="list every tensor and what it maps to")
    sub.add_argument("--verify", action="store_true", help="check the hash of every file of a bundle")

    arguments = parser.parse_args(argv)
    if arguments.command == "export" and not (arguments.bundle or arguments.run):
        parser.error("export needs --bundle or --run")
    if arguments.command == "export" and arguments.format == "bundle" and not arguments.run:
        parser.error("--format=bundle makes a bundle of a run: give it by --run")
    if arguments.command == "export" and arguments.format == "bundle" and arguments.drop_text_positions:
        parser.error("--drop-text-positions goes with PyTorch's formats; a bundle keeps them")
    return arguments


def add_output(parser, text):
    parser.add_argument("--output", required=True, metavar="PATH", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")


def add_components(parser, verb):
    text = f"{verb} only these of transformer, text_encoder, autoencoder"
    parser.add_argument("--components", metavar="A,B", type=names, help=text)


def names(text):
    return [name.strip() for name in text.split(",")] if text else None


def add_dtype(parser, text):
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help=text)


def convert(arguments):
    from unialign_jax.conversion.importing import convert

    taken = ("text_encoder", "vae", "mask_embedding", "components", "heads", "tokenizer")
    config = convert(
        arguments.command,
        arguments.source,
        arguments.output,
        **{name: getattr(arguments, name) for name in taken},
        **common(arguments),
    )
    return f"{', '.join(config.components)} in {arguments.output}"


def common(arguments) -> dict:
    """The options of every conversion."""
    return {"dtype": arguments.dtype, "overwrite": arguments.overwrite, "progress": True}


def teacher(arguments):
    from unialign_jax.conversion.teacher import convert_teacher

    convert_teacher(arguments.source, arguments.output, tokenizer=arguments.tokenizer, **common(arguments))
    return f"the teacher in {arguments.output}"


def export(arguments):
    from unialign_jax import bundle
    from unialign_jax.conversion import exporting

    source = arguments.bundle and bundle.locate(arguments.bundle)
    options = {"weights": arguments.weights, "source": source, **common(arguments)}
    if arguments.format == "bundle":
        exporting.bundle_from_run(arguments.output, arguments.run, **options)
        return f"{arguments.output}, a bundle of the run"
    lost = exporting.export(
        arguments.output,
        format=arguments.format,
        run=arguments.run,
        components=arguments.components,
        drop_text_positions=arguments.drop_text_positions,
        **options,
    )
    for line in lost:
        print(f"left out, since {arguments.format} has no place for it: {line}")
    return f"{arguments.output} in the format {arguments.format}"


def inspect(arguments):
    from unialign_jax import bundle
    from unialign_jax.conversion import inspecting

    path = bundle.locate(arguments.path)
    for line in inspecting.inspect(path, keys=arguments.keys):
        print(line)
    if arguments.verify:
        inspecting.check_hashes(path)
        print("every file is as it was written")


def quiet_about_closed_loops(unraisable):
    """Hides what the storage library's threads report to a closed event loop after a failed write."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


COMMANDS = {"sd3": convert, "unialign": convert, "teacher": teacher, "export": export, "inspect": inspect}
COMMANDS |= lora_commands.COMMANDS


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("absl", "asyncio"):  # the storage library logs tracebacks of errors that it raises anyway
        logging.getLogger(name).setLevel(logging.CRITICAL)

    import jax

    jax.config.update("jax_platforms", "cpu")  # converting needs no accelerator, and must not take one from a run
    began = time.monotonic()

    def work():
        if written := COMMANDS[arguments.command](arguments):
            print(f"wrote {written} in {time.monotonic() - began:.0f} s")

    return run_command(work, traceback=arguments.traceback)


if __name__ == "__main__":
    sys.unraisablehook = quiet_about_closed_loops
    sys.exit(main())
