"""Trains the small frozen encoders of the `:tiny` configurations: python launch/pretrain_encoders.py --help"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

DESCRIPTION = """\
Trains an autoencoder of SD3's class and a T5 encoder on the shapes world, from fixed seeds, and writes both and the
world's tokenizer as a bundle in bfloat16. The defaults made those of the package's demo bundle, and take about an hour
of one CPU core.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION)
    parser.add_argument("--output", required=True, metavar="DIR", help="bundle to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--autoencoder-steps", type=int, default=13000, metavar="N", help="of 8 pictures (%(default)s)")
    parser.add_argument("--view-steps", type=int, default=4000, metavar="N", help="more, with a classifier of latents")
    parser.add_argument("--decoder-steps", type=int, default=8000, metavar="N", help="more, of the decoder alone")
    parser.add_argument("--text-encoder-steps", type=int, default=2000, metavar="N", help="of 32 texts (%(default)s)")
    parser.add_argument("--scenes", type=int, default=256, metavar="N", help="held out, for the score (%(default)s)")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, autoencoder_steps=2, view_steps=2, decoder_steps=2, text_encoder_steps=2, scenes=1)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda: pretrain(arguments))


def pretrain(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from unialign_jax import bundle
    from unialign_jax.data.tokenizer import load_tokenizer
    from unialign_jax.files import refuse_existing
    from unialign_jax.models import presets
    from unialign_jax.training import encoders

    began, tokenizer = time.monotonic(), load_tokenizer()

    def bar(name: str, steps: int):
        drawn = tqdm(total=steps, desc=name, unit="step", disable=None)

        def log(step, values, _params):
            drawn.update(step - drawn.n)
            drawn.set_postfix({key: f"{value:.3f}" for key, value in values.items()})

        return log

    refuse_existing(arguments.output, overwrite=arguments.overwrite, foreign=bundle.strangers)
    steps = arguments.text_encoder_steps
    text_config = presets.TEXT_ENCODER["tiny"]
    text_params = encoders.train_text_encoder(
        text_config, tokenizer, steps=steps, batch=32, length=32, learning_rate=1e-3, log=bar("text encoder", steps)
    )
    steps = (arguments.autoencoder_steps, arguments.view_steps, arguments.decoder_steps)
    image_config, image_params = encoders.train_autoencoder(
        presets.AUTOENCODER["tiny"],
        steps=steps[0],
        view_steps=steps[1],
        decoder_steps=steps[2],
        batch=8,
        image_size=64,
        log=bar("autoencoder", sum(steps)),
    )
    write(arguments, tokenizer, text_config, text_params, image_config, image_params)
    print(f"wrote {arguments.output} in {time.monotonic() - began:.0f} s")


def write(arguments: argparse.Namespace, tokenizer, text_config, text_params, image_config, image_params) -> None:
    """Writes the bundle; its provenance has the autoencoder's score on held-out scenes."""
    import jax
    import ml_dtypes

    from unialign_jax import bundle
    from unialign_jax.evaluation.reconstructions import reconstructions_exact

    params = jax.tree.map(
        lambda x: jax.device_get(x).astype(ml_dtypes.bfloat16),
        {"text_encoder": text_params, "autoencoder": image_params},
    )
    restored = reconstructions_exact(image_config, params["autoencoder"], arguments.scenes, image_size=64)
    print(f"scenes that the detector reads the same from their reconstruction: {100 * restored:.1f}%")
    config = bundle.BundleConfig(
        text_encoder=text_config,
        autoencoder=image_config,
        image_size=64,
        text_length=32,
        provenance={
            "made by": "launch/pretrain_encoders.py",
            "steps": {
                "autoencoder": [arguments.autoencoder_steps, arguments.view_steps, arguments.decoder_steps],
                "text_encoder": arguments.text_encoder_steps,
            },
            "reconstructions exact": {"share": restored, "scenes": arguments.scenes},
        },
    )
    bundle.save(arguments.output, config, params, tokenizer=tokenizer, overwrite=arguments.overwrite)


if __name__ == "__main__":
    sys.exit(main())
