"""diffusers' side of launch/benchmark.py sample: SD3Transformer2DModel of the same size, with random weights.

Called by sample.py, each function in a process of its own. On a GPU torch compiles the network, as diffusers'
documentation advises; on a CPU it runs as it is. No text encoder and no autoencoder: only the network is compared.
"""

import functools
import statistics
import timeit
from typing import Any

from unialign_jax.benchmarks import sample
from unialign_jax.conversion.exporting import sd3_settings
from unialign_jax.conversion.transformer import POOLED_WIDTH
from unialign_jax.training.metrics import memory_use


def open_network(settings: dict):
    """(config, SD3Transformer2DModel with random weights of the same size, device, dtype)."""
    import torch
    from diffusers import SD3Transformer2DModel

    config = sample.model_config(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = settings["dtype"] or ("bfloat16" if device == "cuda" else "float32")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as jax's default; nothing on a CPU
    with torch.device("meta"):
        network = SD3Transformer2DModel(**sd3_settings(config.transformer))
    network = network.to(getattr(torch, dtype)).to_empty(device=device).eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.normal_(0, 0.02)
    if device == "cuda":
        network = torch.compile(network, mode="max-autotune", fullgraph=True)
    return config, network, device, getattr(torch, dtype)


def taken_on(device: str, dtype: str) -> str:
    import diffusers
    import torch

    name = torch.cuda.get_device_name() + ", torch.compile" if device == "cuda" else "cpu, eager"
    return f"diffusers {diffusers.__version__}, torch {torch.__version__}, {name}, {str(dtype).removeprefix('torch.')}"


def wait(device: str) -> None:
    """Waits until a GPU has done all its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def torch_matmul(device: str, dtype: str) -> float:
    import torch

    side, calls = sample.MATMUL.get(device, sample.LARGE_MATMUL)
    x = torch.randn(side, side, device=device, dtype=dtype)

    def run():
        for _ in range(calls):
            x @ x
        wait(device)

    return sample.matmul_rate(side, calls, run)


def torch_inputs(settings: dict, config: Any, batch: int, device: str, dtype: str):
    """Noise, text embeddings and pooled text of `batch` samples, as diffusers takes them."""
    import torch

    (_, *latents), (_, *text) = sample.forward_shapes(settings, config)
    shapes = (latents[2], *latents[:2]), text, (POOLED_WIDTH,)
    return [torch.randn(batch, *shape, device=device, dtype=dtype) for shape in shapes]


def forward(settings: dict) -> dict:
    import torch

    config, network, device, dtype = open_network(settings)
    latents, text, pooled = torch_inputs(settings, config, 1, device, dtype)
    time_step = torch.full((1,), 500.0, device=device)

    def run():
        network(latents, text, pooled, time_step, return_dict=False)
        wait(device)

    with torch.no_grad():
        return sample.measure_forward(settings, config, run) | {
            "matmul": torch_matmul(device, dtype),
            "taken on": taken_on(device, dtype),
        }


def loop(settings: dict) -> dict:
    """The Euler loop with guidance, both halves in one forward, latents float32 between steps."""
    import torch

    from unialign_jax.diffusion.flow import sampling_sigmas

    config, network, device, dtype = open_network(settings)
    sigmas = sampling_sigmas(settings["steps"])
    scale = settings["guidance_scale"]
    halves = 1 if scale == 1 else 2

    def integrate(latents, text, pooled):
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            time_step = torch.full((len(text),), 1000 * float(sigma), device=device)
            velocity = network(latents.to(dtype).repeat(halves, 1, 1, 1), text, pooled, time_step, return_dict=False)[0]
            if halves == 2:
                unconditional, conditional = velocity.float().chunk(2)
                velocity = unconditional + scale * (conditional - unconditional)
            latents = latents + float(next_sigma - sigma) * velocity.float()
        wait(device)

    figures = {"loop: taken on": taken_on(device, dtype)}
    for batch in settings["batch"]:
        _, text, pooled = torch_inputs(settings, config, halves * batch, device, dtype)
        latents = torch_inputs(settings, config, batch, device, torch.float32)[0]
        with torch.no_grad():
            run = functools.partial(integrate, latents, text, pooled)
            seconds = timeit.repeat(run, number=1, repeat=1 + settings["rounds"])
        figures[f"image batch {batch}: loop, s"] = statistics.median(seconds[1:])
        figures[f"image batch {batch}: compiling, s"] = max(0.0, seconds[0] - statistics.median(seconds[1:]))
    if device == "cuda":
        figures["peak device memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        figures["peak device memory, GB"] = sample.not_measured("torch does not tell on a CPU")
    figures["peak host memory, GB"] = memory_use()["host_peak_gb"]
    return figures


if __name__ == "__main__":
    sample.answer((forward, loop))
