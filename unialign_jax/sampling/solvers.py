"""The solvers of the image sampler, as tables of coefficients.

Every solver here is linear in the latents, the velocity of the network and its earlier clean predictions, with
coefficients that depend on the noise levels alone. So a solver is a table that the host computes in float64, and
`sampling.image` runs any of them with one compiled loop.

The coefficients come from two views of the same ODE. In sigma, dx/dsigma = velocity. In the log signal-to-noise
ratio, lambda = log((1 - sigma) / sigma), a step from s to t is exactly
    x_t = sigma_t / sigma_s * x_s + sigma_t * integral from lambda_s to lambda_t of exp(lambda) * clean dlambda,
and the multistep solvers replace the clean prediction there by a polynomial through those already made.
"""

from typing import NamedTuple

import numpy as np

# The first level of UniPC, whose lambda would be -infinity at 1: diffusers' value.
UNIPC_FIRST = np.float32(1 - 1e-6)


class SolverTable(NamedTuple):
    """The coefficients of E evaluations of the network, float32 [E] each.

    Let x be the latents and v the velocity at sigma. The clean prediction of an evaluation is x - sigma * v; `last` and
    `before` are those of the last evaluation and of the one before it. The latents of the next evaluation are
        latents * x + velocity * v + clean * last + previous * before.
    """

    sigma: np.ndarray
    latents: np.ndarray
    velocity: np.ndarray
    clean: np.ndarray
    previous: np.ndarray


def solver_table(name: str, sigmas: np.ndarray) -> SolverTable:
    """The table of a solver over the given noise levels.

    - "euler": order 1, N evaluations. FlowMatchEulerDiscreteScheduler, which SD3 is sampled by.
    - "heun": order 2, 2N - 1 evaluations. FlowMatchHeunDiscreteScheduler: an Euler step, then the mean of the
      velocities at its two ends; Euler to sigma 0.
    - "dpmpp_2m": order 2, N evaluations. DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) in its midpoint form; the
      first step and that to sigma 0 are of order 1.
    - "unipc": order 2, N evaluations. UniPC-2 (arXiv 2302.04867) with B(h) = e^h - 1, predictor and corrector; the
      predictor of the first step and of that to sigma 0 is of order 1.

    The last two agree with diffusers' DPMSolverMultistepScheduler and UniPCMultistepScheduler under `use_flow_sigmas`
    over the same noise levels. (diffusers' own choice for them is nearly a line from 1 to 0, shifted once.) At sigma 1
    DPM-Solver++ takes the limit of its formula; UniPC starts at 1 - 1e-6.

    Args:
      sigmas: [N + 1], strictly decreasing from at most 1 to exactly 0; `diffusion.flow.sampling_sigmas` gives them.

    Raises ValueError for an unknown name and for other noise levels.
    """
    if name not in _MAKERS:
        raise ValueError(f"solver is {name!r}; expected one of {', '.join(SOLVERS)}")
    sigmas = np.asarray(sigmas, np.float32)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or not np.all(np.diff(sigmas) < 0):
        raise ValueError(f"sigmas are {sigmas.tolist()}; expected at least 2, decreasing from at most 1 to exactly 0")
    return SolverTable(*np.array(_MAKERS[name](sigmas), np.float32).T)


def _row(sigma, latents, now, clean=0.0, previous=0.0):
    """A row from the coefficients of x, of this evaluation's clean prediction x - sigma * v, and of earlier ones."""
    return sigma, latents + now, -sigma * now, clean, previous


def _euler(sigmas):
    sigmas = sigmas.astype(np.float64)
    return [(s, 1.0, t - s, 0.0, 0.0) for s, t in zip(sigmas[:-1], sigmas[1:], strict=True)]


def _heun(sigmas):
    rows = []
    for s, slope_at_s, step, *_ in _euler(sigmas):
        rows.append((s, slope_at_s, step, 0.0, 0.0))
        t = s + step
        if t > 0:
            # x is now x_s + step * v_s, and the last clean prediction is x_s - s * v_s, so v_s is their difference
            # over t; the row adds step * (v_t - v_s) / 2.
            rows.append((t, 1 - step / (2 * t), step / 2, step / (2 * t), 0.0))
    return rows


def _dpmpp_2m(sigmas):
    sigmas, steps = _log_snr_steps(sigmas)
    rows, last = [], len(steps) - 1
    for i, (s, t, h) in enumerate(zip(sigmas[:-1], sigmas[1:], steps, strict=True)):
        weight = -(1 - t) * np.expm1(-h)
        # The change of the clean prediction over half the step, as seen over the last step: first order without one.
        slope = 0.0 if i in (0, last) else h / steps[i - 1] / 2
        rows.append(_row(s, t / s, weight * (1 + slope), clean=-weight * slope))
    return rows


def _unipc(sigmas):
    sigmas, steps = _log_snr_steps(np.minimum(sigmas, UNIPC_FIRST))
    rows, last = [], len(steps) - 1
    # Arguments of the corrector of the last step: it replaces what the predictor added for the slope.
    arrived = None
    for i, (s, t, h) in enumerate(zip(sigmas[:-1], sigmas[1:], steps, strict=True)):
        # x as corrected, in terms of x, the clean prediction made now, the last one and the one before it.
        now, clean, previous = (0.0, 0.0, 0.0) if arrived is None else _unipc_correction(*arrived)
        weight = -(1 - t) * np.expm1(-h)
        ratio = None if i in (0, last) else -steps[i - 1] / h
        slope = 0.0 if ratio is None else 0.5 / ratio  # times (last - now)
        rows.append(
            _row(s, t / s, t / s * now + weight * (1 - slope), t / s * clean + weight * slope, t / s * previous)
        )
        arrived = weight, h, ratio
    return rows


def _unipc_correction(weight, h, ratio):
    """UniC: the correction of the latents that a step predicted, once the clean prediction at its end is known.

    It is given as coefficients of the clean predictions (at the step's end, at its start, before that).

    Args:
      weight, h: of the step; h is its length.
      ratio: place of the prediction before in units of h from the start (negative); None after a first-order step.
    """
    if ratio is None:
        return weight / 2, -weight / 2, 0.0
    phi_2 = np.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    first, second = phi_2 / np.expm1(-h), 2 * phi_3 / np.expm1(-h)
    # The two conditions of order: before + here = first, ratio * before + here = second.
    before = (first - second) / (1 - ratio)
    here = first - before
    slope = weight * (before - 0.5) / ratio  # the predictor's was weight * 0.5 / ratio
    return weight * here, -weight * here - slope, slope


def _log_snr_steps(sigmas):
    """(sigmas in float64, the steps' lengths in lambda [N]): the last is infinite, and the first one from sigma 1."""
    sigmas = sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):
        return sigmas, np.diff(np.log1p(-sigmas) - np.log(sigmas))


_MAKERS = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m, "unipc": _unipc}
SOLVERS = tuple(_MAKERS)
