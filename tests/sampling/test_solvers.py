import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import flow
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling.solvers import SOLVERS, solver_table

SHAPE = (2, 4, 4, 3)
NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def sample_image_latents(velocity_fn, noise, table, inputs=None):
    """The latents after all evaluations of a table."""
    return image_sampler.advance(velocity_fn, image_sampler.start(noise), (table, inputs)).latents


def field(library, latents, sigma):
    """A smooth velocity field, nonlinear in the latents and in sigma."""
    return library.tanh(latents * (1.5 - sigma)) * (1 + sigma) + 0.3 * library.sin(3 * latents) - 0.7 * sigma


@jax.jit
def sample(table):
    return sample_image_latents(lambda latents, sigma, _: field(jnp, latents, sigma), NOISE, table)


def diffusers_scheduler(name, sigmas):
    """diffusers' scheduler over the given sigmas, ready for its first step."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    steps, sigmas = len(sigmas) - 1, torch.tensor(sigmas)
    if name == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif name == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])  # its own layout
    elif name == "dpmpp_2m":
        scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    else:
        scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
        sigmas = sigmas.clamp(max=np.float32(1 - 1e-6))  # as its set_timesteps does
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    return scheduler


def line(steps, shift=1.0):
    """The line from 1 to 0, shifted once."""
    return flow.shift_sigma(np.linspace(1, 0, steps + 1), shift).astype(np.float32)


GRIDS = (flow.sampling_sigmas(12), line(20, shift=3.0), flow.sampling_sigmas(1))
CASES = [(name, sigmas) for name in SOLVERS for sigmas in GRIDS]
CASES = [case for case in CASES if case[0] != "heun" or len(case[1]) > 2]  # diffusers' Heun has no single step


@pytest.mark.parametrize("name, sigmas", CASES, ids=[f"{name}-{len(sigmas) - 1}" for name, sigmas in CASES])
def test_equals_diffusers(name, sigmas):
    steps = len(sigmas) - 1
    scheduler, table = diffusers_scheduler(name, sigmas), solver_table(name, sigmas)
    torch = pytest.importorskip("torch")
    assert len(table.sigma) == len(scheduler.timesteps) == (2 * steps - 1 if name == "heun" else steps)

    latents = torch.tensor(NOISE)
    for sigma, timestep in zip(table.sigma, scheduler.timesteps, strict=True):
        velocity = field(torch, latents, torch.tensor(sigma))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    # Both compute in float32, diffusers its coefficients too; only Euler's are free of cancellation.
    np.testing.assert_allclose(sample(table), latents.numpy(), atol=1e-6 if name == "euler" else 1e-5)


MEAN, DEVIATION = 1.5, 0.7


@jax.jit
def sample_gaussian(table):
    """Clean ~ N(MEAN, DEVIATION²), noise ~ N(0, 1): each noise ends at MEAN + DEVIATION * noise."""

    def velocity(latents, sigma, _):
        variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
        # E[noise - clean | latents], by Gaussian conditioning.
        return (sigma - (1 - sigma) * DEVIATION**2) / variance * (latents - (1 - sigma) * MEAN) - MEAN

    return sample_image_latents(velocity, NOISE, table)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_order_of_convergence(name, order):
    errors = []
    for steps in (80, 160):
        errors.append(np.abs(sample_gaussian(solver_table(name, line(steps))) - (MEAN + DEVIATION * NOISE)).max())
    assert errors[1] < (0.02 if order == 1 else 5e-4)
    # On such a grid the error of 2M falls as log(N) / N², which from 80 to 160 steps reads as order 1.79.
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


CLEAN = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@jax.jit
def sample_line(table):
    return sample_image_latents(lambda latents, sigma, _: (latents - CLEAN) / sigma, NOISE, table)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_straight_line_is_exact_and_the_table_is_finite(name):
    # Towards one clean latent every step is exact, whatever its length. A last level of 1e-4 makes steps in lambda,
    # the multistep solvers' variable, as uneven as they get.
    for sigmas in ([1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.999, 0.3, 0.0], [0.9, 0.8, 0.1, 1e-4, 0.0]):
        table = solver_table(name, sigmas)
        assert all(column.dtype == np.float32 and np.isfinite(column).all() for column in table)
        np.testing.assert_allclose(sample_line(table), CLEAN, atol=1e-5)


@pytest.mark.parametrize(
    "name, sigmas, message",
    [
        ("ddim", [1.0, 0.0], "'ddim'; expected one of euler, heun, dpmpp_2m, unipc"),
        ("euler", [1.0], "expected at least 2"),
        ("euler", [1.0, 0.5], "to exactly 0"),
        ("euler", [1.0, 0.5, 0.5, 0.0], "decreasing"),
        ("euler", [1.1, 0.5, 0.0], "at most 1"),
        ("euler", [1.0, float("nan"), 0.0], "decreasing"),
    ],
)
def test_errors(name, sigmas, message):
    with pytest.raises(ValueError, match=message):
        solver_table(name, sigmas)
