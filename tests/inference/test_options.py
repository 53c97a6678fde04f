"""The table of options: what it refuses, what stands for what, and that the documentation shows it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unialign_jax.data.kinds import TASKS
from unialign_jax.inference.options import (
    ALIASES,
    IMAGE_TASKS,
    OPTIONS,
    TEXT_TASKS,
    options_of,
    settings,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tasks", [IMAGE_TASKS, TEXT_TASKS])
def test_the_documentation_has_the_table(tasks):
    """Where it differs: put the table that this prints into docs/inference.md."""
    rows = ["| option | default | takes | |", "|---|---|---|---|"]
    for name, option in OPTIONS.items():
        if set(option.tasks) & set(tasks):
            whose = "" if set(tasks) <= set(option.tasks) else f" ({', '.join(t for t in option.tasks if t in tasks)})"
            rows.append(f"| `{name}` | {option.default_text} | {option.expected} | {option.help}{whose} |")
    table = "\n".join(rows)
    assert table in (ROOT / "docs/inference.md").read_text(), table


@pytest.mark.parametrize("name", OPTIONS)
def test_the_ends_of_a_range_fit_and_what_lies_beyond_does_not(name):
    option = OPTIONS[name]
    fitting, wrong = {
        "choice": (option.choices, ["", "Euler", None, ["euler"]]),
        "interval": ([(0, 1), [0.2, 0.2], np.array([0, 1])], [[0.5, 0.2], [0, 1.1], [-0.1, 1], [1], "ab", {0, 1}]),
        "text": (["", "été"], ["\ud800", 5, None, "x" * 2**21]),
    }.get(option.kind, ([v for v in (option.low, option.high) if v < np.inf], [option.low - 1, "7", True, np.nan]))
    for value in fitting:
        option.check(name, value)
    if option.default is not None:
        assert option.check(name, option.default) == option.default
    for value in wrong + ([option.high + 1] if option.high < np.inf else []):
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected "):
            option.check(name, value)


def test_settings_are_what_was_given_then_the_bundles_then_the_default():
    own = {"steps": 9, "guidance_scale": 2.0, "shift": 1.5}
    found = settings("text_to_image", {"num_inference_steps": np.int64(4), "guidance_scale": None}, own)
    assert (found.steps, found.guidance_scale, found.shift, found.solver) == (4, 2.0, 1.5, "euler")
    assert set(vars(found)) == set(options_of("text_to_image"))
    with pytest.raises(TypeError, match=r"caption takes no option max_token \(nearest: max_tokens\)"):
        settings("caption", {"max_token": 3}, {})
    with pytest.raises(TypeError, match="caption takes no option solver"):
        settings("caption", {"solver": "euler"}, {})


def test_aliases_stand_for_options_and_every_task_has_some():
    assert set(ALIASES.values()) <= set(OPTIONS) and not set(ALIASES) & set(OPTIONS)
    assert all(set(option.tasks) <= set(TASKS) for option in OPTIONS.values())


def test_options_are_known_without_jax():
    code = "import sys, unialign_jax.inference.options, unialign_jax.inference.inputs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
