"""The commands of launch/convert.py on LoRAs: export-lora and merge-lora."""

import argparse
from collections.abc import Callable

EXPORT = """\
The adapters of a run that trained them (docs/finetuning.md) -> one safetensors file, without the base.

layouts
  diffusers   PEFT's keys after diffusers' names of SD3: for diffusers' load_lora_weights
  kohya       Kohya's and ComfyUI's keys: lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight
  unialign    as diffusers, with adapters of what SD3 lacks too: the text head and the last block's text half
"""
MERGE = """\
A bundle and LoRAs (of PEFT, diffusers, Kohya, export-lora or a run) -> a bundle with them in its weights.
"""


def add_commands(command: Callable, add_output: Callable, add_dtype: Callable) -> None:
    """Adds the two commands; the functions are those by which launch/convert.py adds its own."""
    sub = command("export-lora", EXPORT, "a run's adapters -> a file that diffusers or ComfyUI loads")
    add_output(sub, "a .safetensors file")
    sub.add_argument("--run", required=True, metavar="DIR", help="a training run's folder")
    sub.add_argument("--weights", choices=["raw", "ema"], help="default: its average, if it keeps one")
    sub.add_argument("--layout", choices=["unialign", "diffusers", "kohya"], default="diffusers")
    add_dtype(sub, "how to write the factors (default float32)")

    sub = command("merge-lora", MERGE, "a bundle and LoRAs -> a bundle")
    add_output(sub, "bundle to write")
    sub.add_argument("--bundle", required=True, metavar="DIR")
    sub.add_argument("--lora", required=True, action="append", metavar="FILE[:SCALE]", help="once for each")
    sub.add_argument("--scale", type=float, metavar="X", help="of those that name none (default 1)")


def export_lora(arguments: argparse.Namespace) -> str:
    from unialign_jax.conversion import lora

    options = {key: getattr(arguments, key) for key in ("layout", "weights", "dtype", "overwrite")}
    for line in lora.export_lora(arguments.output, arguments.run, **options):
        print(f"left out, since {arguments.layout} has no place for it: {line}")
    return f"{arguments.output} for {arguments.layout}"


def merge_lora(arguments: argparse.Namespace) -> str:
    from unialign_jax import bundle
    from unialign_jax.conversion import lora

    references = [lora.parse_reference(text, arguments.scale) for text in arguments.lora]
    options = {"overwrite": arguments.overwrite, "progress": True}
    for line in lora.merge_lora(arguments.output, bundle.locate(arguments.bundle), references, **options):
        print(line)
    return f"{arguments.output}, a bundle with {len(references)} LoRA{'s' * (len(references) > 1)} merged"


COMMANDS = {"export-lora": export_lora, "merge-lora": merge_lora}
