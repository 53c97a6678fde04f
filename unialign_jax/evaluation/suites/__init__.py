"""The benchmarks: a module for each, with its data, its jobs, its official layout and its scores."""

import importlib

from unialign_jax.evaluation.suite import Suite

# Name on the command line -> class in the module of that name.
SUITES = {
    "semgen": "SemGen",
    "geneval": "GenEval",
    "geneval2": "GenEval2",
    "dpg": "Dpg",
    "gedit": "GEdit",
    "imgedit": "ImgEdit",
    "mmbench": "MMBench",
    "mmmu": "MMMU",
    "mmvet": "MMVet",
    "captions": "Captions",
}


def find_suite(name: str) -> Suite:
    """The suite of a name."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), SUITES[name])()
