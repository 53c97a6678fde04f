"""The `options` part of launch/benchmark.py: the cost and the effect of the options of sampling.

    python launch/benchmark.py options --bundle=bundles/tiny

It makes the same images (prompts and seeds) with the plain sampler, Euler at 28 steps, and with one option changed at a
time. Differences are root mean squares over all pixels, in 255ths: from the plain sampler's images, and from the
solution of the flow (Euler at --solution-steps). It also counts the evaluations of the network for captions.

Prompts and images are those of the shapes world (a seed that training does not use), which suit a bundle of
configs/stage1.py:tiny. With --prompts the prompts are its lines, and the images to caption are the ones made.
"""

import argparse
import timeit
from pathlib import Path

import numpy as np

PLAIN = "euler, 28 steps"
VARIANTS = {
    "euler, 20 steps": {"steps": 20},
    "euler, 14 steps": {"steps": 14},
    "euler, 10 steps": {"steps": 10},
    "heun, 14 steps": {"solver": "heun", "steps": 14},
    "dpmpp_2m, 28 steps": {"solver": "dpmpp_2m"},
    "dpmpp_2m, 14 steps": {"solver": "dpmpp_2m", "steps": 14},
    "dpmpp_2m, 10 steps": {"solver": "dpmpp_2m", "steps": 10},
    "unipc, 28 steps": {"solver": "unipc"},
    "unipc, 14 steps": {"solver": "unipc", "steps": 14},
    "unipc, 10 steps": {"solver": "unipc", "steps": 10},
    "guidance_interval=(0.2, 0.9)": {"guidance_interval": (0.2, 0.9)},
    "guidance_rescale=0.7": {"guidance_rescale": 0.7},
    "guidance_scale=1": {"guidance_scale": 1.0},
}
QUANTIZE = ("int8", "w8a8", "fp8")
DECODING_STEPS = {"ancestral": (32, 16, 8), "top_k": (32, 16, 8), "confidence": (32,), "entropy": (32,)}


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--bundle", required=True, help="a bundle written by launch/convert.py")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one a line")
    parser.add_argument("--count", type=int, default=16, help="prompts of the shapes world, default %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="default %(default)s, which suits tiny")
    parser.add_argument("--solution-steps", type=int, default=500, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="calls of which the fastest counts, default %(default)s")


def benchmark_options(arguments: argparse.Namespace) -> dict[str, str]:
    """{option: its cost and effect}. Raises ValueError or OSError for arguments that do not fit."""
    from unialign_jax import Pipeline, bundle
    from unialign_jax.benchmarks.sample import MOST_ROUNDS, Stopwatch, check_counts
    from unialign_jax.inference.options import MAX_STEPS, check_range

    check_counts(arguments, count=4096, rounds=MOST_ROUNDS, solution_steps=MAX_STEPS)
    check_range("--guidance-scale", arguments.guidance_scale, 0, 100)
    size = bundle.read_config(arguments.bundle).image_size
    prompts, pictures = read_inputs(arguments, size)

    def open_pipeline(quantize=None):
        return Pipeline.from_bundle(arguments.bundle, quantize=quantize, max_batch=len(prompts))

    pipeline = open_pipeline()
    options = {"guidance_scale": arguments.guidance_scale, "seed": 0}

    def maker(model=pipeline, **change):
        return lambda: np.stack([np.asarray(i, np.float32) for i in model.generate(prompts, **options | change)])

    make_plain = maker()
    plain, solution = make_plain(), maker(steps=arguments.solution_steps)()
    figures = {
        "images": f"{len(prompts)} at once, {size} px, guidance {arguments.guidance_scale:g}",
        PLAIN: f"{difference(plain, solution):.1f} from the solution",
    }
    makers = {name: maker(**change) for name, change in VARIANTS.items()}
    makers |= {f"quantize={mode}": maker(open_pipeline(mode)) for mode in QUANTIZE}
    for name, make in makers.items():
        images = make()
        # In turn, so that a busy moment of the machine meets both.
        seconds = [[timeit.timeit(call, number=1) for call in (make_plain, make)] for _ in range(arguments.rounds)]
        plain_seconds, own_seconds = map(min, zip(*seconds, strict=True))
        figures[name] = (
            f"{own_seconds / len(prompts):.4f} s an image, {plain_seconds / own_seconds:.2f} times the plain speed, "
            f"{difference(images, plain):.1f} from plain, {difference(images, solution):.1f} from the solution"
        )

    pictures = pictures or pipeline.generate(prompts, **options)
    watch = Stopwatch(pipeline)

    def evaluations(part):
        pipeline.caption(part, decoding=decoding, steps=steps)  # one batch
        return int(watch.results["loop"].evaluations)

    for decoding, tried in DECODING_STEPS.items():
        for steps in tried:
            alone, together = evaluations(pictures[:1]), evaluations(pictures)
            figures[f"{decoding}, {steps} steps"] = f"{alone} evaluations for 1 caption, {together} for {len(pictures)}"
    return figures


def read_inputs(arguments: argparse.Namespace, size: int):
    """(prompts, pictures to caption or None)."""
    from unialign_jax.files import check_regular

    if arguments.prompts:
        check_regular(arguments.prompts, 2**20)
        prompts = [line for line in arguments.prompts.read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{arguments.prompts} has no prompts, expected one a line")
        return prompts, None
    from PIL import Image

    from unialign_jax.data.shapes.tasks import shapes_example

    examples = [shapes_example("text_to_image", 1, index, image_size=size) for index in range(arguments.count)]
    return [example.caption for example in examples], [Image.fromarray(example.image) for example in examples]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square, in 255ths."""
    return float(np.sqrt(np.mean(np.square(a - b))))
