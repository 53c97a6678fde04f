"""Every option that a user may set, once; this module does not import JAX.

`Pipeline`, launch/generate.py, jobs files and docs/inference.md take names, ranges, defaults and help from OPTIONS.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import numbers
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from unialign_jax.data.kinds import PERCEPTION, TASKS
from unialign_jax.files import shown
from unialign_jax.sampling import DECODINGS
from unialign_jax.sampling.solvers import SOLVERS

IMAGE_TASKS, TEXT_TASKS = TASKS[:4], TASKS[4:]
CONDITION_TASKS = IMAGE_TASKS[1:]
MAX_REFERENCES = 4
MAX_STEPS = 1000
MAX_TOKENS = 4096
MAX_CHARACTERS = 2**20  # of a text, most of which no model reads
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
      kind: "whole", "number", "text", "choice" or "interval" (two numbers from 0 to 1).
      default: what holds when it is not given; None where `usual` says it in words.
      usual: the default in words, where it depends on the model or the task.
      low, high: the range of a number.
    """

    kind: str
    tasks: tuple[str, ...]
    help: str
    default: object = None
    usual: str = ""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The values that it may have, in words."""
        bounded = f"from {self.low} to {self.high}" if self.high < math.inf else f"of at least {self.low}"
        return {
            "whole": f"a whole number {bounded}",
            "number": f"a number {bounded}",
            "interval": "two numbers, 0 <= low <= high <= 1",
            "choice": f"one of {', '.join(self.choices)}",
            "text": f"a text of at most {MAX_CHARACTERS:,} characters",
        }[self.kind]

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.kind == "interval":
            return "{:g},{:g}".format(*self.default)
        return self.usual or (f"{self.default:g}" if self.kind in ("whole", "number") else self.default)

    def check(self, name: str, value: Any, show: Callable[[object], str] = shown):
        """The value, as a plain number where it is one. Raises ValueError that says what `name` was expected to be."""
        if self.kind == "whole" and is_whole(value) and self.low <= value <= self.high:
            return int(value)
        if self.kind == "number" and is_number(value) and self.low <= value <= self.high:
            return float(value)
        if self.kind == "interval" and isinstance(value, list | tuple | np.ndarray) and len(value) == 2:
            if all(map(is_number, value)) and 0 <= value[0] <= value[1] <= 1:
                return tuple(map(float, value))
        if self.kind == "choice" and isinstance(value, str) and value in self.choices:
            return value
        if self.kind == "text" and is_text(value):
            return value
        raise ValueError(f"{name} is {show(value)}, expected {self.expected}")

    def parse(self, text: str):
        """A command line's text as the value that a jobs file would have; what cannot be one is left to `check`."""
        try:
            if self.kind == "whole":
                return int(text)
            if self.kind == "number":
                return float(text)
            if self.kind == "interval":
                return [float(part) for part in text.split(",")]
        except ValueError:
            pass
        return text


OPTIONS = {
    "seed": Option("whole", TASKS, "seed of the noise; image i of several has seed + i", 0, low=0, high=SEEDS - 1),
    "images_per_prompt": Option("whole", IMAGE_TASKS, "images of each prompt", 1, low=1, high=2**16),
    "negative_prompt": Option("text", IMAGE_TASKS, "what guidance leads away from", "", "nothing"),
    "height": Option(
        "whole", IMAGE_TASKS, "pixels, in multiples of 16", usual="the model's; of an edit, its image's", low=1
    ),
    "width": Option("whole", IMAGE_TASKS, "likewise", usual="the model's; of an edit, its image's", low=1),
    "steps": Option(
        "whole", TASKS, "steps of the sampler", usual="the bundle's, or 28; with images 50; texts 32", low=1,
        high=MAX_STEPS,
    ),
    "guidance_scale": Option(
        "number", IMAGE_TASKS, "how strictly the text is followed; 1 is without guidance, at half the work",
        usual="the bundle's, or 7", low=0, high=100,
    ),
    "guidance_interval": Option("interval", IMAGE_TASKS, "noise levels that are guided (arXiv 2404.07724)", (0.0, 1.0)),
    "guidance_rescale": Option(
        "number", IMAGE_TASKS, "takes back contrast that guidance adds (arXiv 2305.08891)", 0.0, low=0, high=1
    ),
    "image_guidance_scale": Option(
        "number", CONDITION_TASKS, "how closely the images are followed, apart from the text (arXiv 2211.09800)",
        usual="text guidance alone", low=0, high=100,
    ),
    "solver": Option("choice", IMAGE_TASKS, "integrates the flow", "euler", choices=SOLVERS),
    "shift": Option(
        "number", IMAGE_TASKS, "spends more of the steps at high noise", usual="the bundle's, or 3", low=0.01, high=100
    ),
    "kind": Option("choice", ("perception",), "the map to make", usual="must be given", choices=tuple(PERCEPTION)),
    "slots": Option(
        "whole", ("personalization",), "fewer references are repeated to this number", 3, low=1, high=MAX_REFERENCES
    ),
    "prefix": Option("text", ("caption",), "what the caption begins with", "", "nothing"),
    "max_tokens": Option("whole", TEXT_TASKS, "most tokens of the text", usual="text_length", low=1, high=MAX_TOKENS),
    "decoding": Option(
        "choice", TEXT_TASKS, "in which order tokens are decided",
        usual="the bundle's, or captions ancestral, answers top_k", choices=DECODINGS,
    ),
    "temperature": Option(
        "number", TEXT_TASKS, "divides the logits before a token is drawn; 0 takes the likeliest",
        usual="the bundle's, or captions 1, answers 0", low=0, high=100,
    ),
    "threshold": Option("number", TEXT_TASKS, "probability that decoding=confidence asks for", 0.9, low=0, high=1),
    "entropy_bound": Option("number", TEXT_TASKS, "nats that decoding=entropy decides at once", 0.1, low=0),
    "text_length": Option("whole", TEXT_TASKS, "tokens of the text", usual="the model's", low=8, high=MAX_TOKENS),
}  # fmt: skip
ALIASES = {
    "seeds": "seed",
    "count": "images_per_prompt",
    "num_images_per_prompt": "images_per_prompt",
    "negative_prompts": "negative_prompt",
    "num_inference_steps": "steps",
}
# One for each sample, or dependent on the model: `Pipeline` checks these itself.
_CHECKED_LATER = ("seed", "negative_prompt", "height", "width", "prefix")


def options_of(task: str) -> dict[str, Option]:
    """The options that a task takes."""
    return {name: option for name, option in OPTIONS.items() if task in option.tasks}


def by_name(given: dict) -> dict:
    """The options under their own names, whatever aliases they came by. Raises ValueError for one given twice."""
    found = {}
    for alias, value in given.items():
        name = ALIASES.get(alias, alias)
        if name in found:
            raise ValueError(f"{name} is given twice, also as {next(a for a in given if ALIASES.get(a, a) == name)}")
        found[name] = value
    return found


def settings(task: str, given: dict, own: dict) -> SimpleNamespace:
    """A checked value for every option of `task`.

    Args:
      given: what the user set, under names or aliases; None where an option's default has no value is not set.
      own: the bundle's own values for some.

    Raises ValueError for a value out of range and TypeError for an option that the task does not take.
    """
    known, given = options_of(task), by_name(given)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"{task} takes no option {name}" + (f" (nearest: {near[0]})" if near else ""))
    values = {}
    for name, option in known.items():
        value = given.get(name, option.default)
        if value is None and option.default is None:
            value = own.get(name)
        elif name not in _CHECKED_LATER:
            value = option.check(name, value)
        values[name] = value
    return SimpleNamespace(**values)


def takes_options(task: str) -> Callable:
    """Decorates a method of `Pipeline`: its signature and its help list the options of `task`."""

    def document(method):
        signature = inspect.signature(method)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = {name: option for name, option in options_of(task).items() if name not in signature.parameters}
        parameters = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=o.default) for k, o in more.items()]
        method.__signature__ = signature.replace(parameters=named + parameters)
        lines = [f"  {name}: {option.help}; {option.expected} (default {option.default_text})."
                 for name, option in more.items()]  # fmt: skip
        method.__doc__ = "\n".join([inspect.cleandoc(method.__doc__), "", "Options:", *lines])
        return method

    return document


def flag(name: str) -> str:
    """An option, or another key of a job, on the command line: negative_prompt -> --negative-prompt."""
    return "--" + {"images": "image"}.get(name, name).replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every option, in a group for each set of tasks, and hidden ones for the aliases."""
    groups = {}
    for name, option in OPTIONS.items():
        if option.tasks not in groups:
            whose = "every task" if option.tasks == TASKS else ", ".join(option.tasks)
            groups[option.tasks] = parser.add_argument_group(f"options of {whose} (defaults in brackets)")
        metavar = "|".join(option.choices) or {"text": "TEXT", "interval": "LOW,HIGH"}.get(option.kind, "N")
        text = f"{option.help} ({option.default_text})"
        groups[option.tasks].add_argument(flag(name), metavar=metavar, type=option.parse, help=text)
    for alias, name in ALIASES.items():
        parser.add_argument(flag(alias), dest=name, type=OPTIONS[name].parse, help=argparse.SUPPRESS)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """The value. Raises ValueError when it is no whole number from `low` to `high`."""
    return Option("whole", (), "", low=low, high=high).check(name, value)


def check_range(name: str, value: Any, low: float, high: float) -> float:
    """The value. Raises ValueError when it is no number from `low` to `high`."""
    return Option("number", (), "", low=low, high=high).check(name, value)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def is_text(value: Any) -> bool:
    """Whether a tokenizer can read it: JSON and the command line may bring halves of characters (lone surrogates)."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return False
    return value.encode(errors="ignore").decode() == value
