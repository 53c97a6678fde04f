"""From `configs/stage1.py:tiny` and `key=value` changes to a configuration; what is wrong with them is told at once."""

import ast
import importlib.machinery
import importlib.util
import os
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from unialign_jax.files import first_line, one_line
from unialign_jax.training.config import config_problems, flat_items, listed, nearest


def load_stage(reference: str) -> ConfigDict:
    """The configuration of a stage file: "configs/stage1.py", or "configs/stage1.py:tiny" for its size "tiny".

    Raises FileNotFoundError when there is no such file, ValueError when it gives no configuration, saying where.
    """
    file, _, size = reference.partition(":")
    if not os.path.isfile(file):
        found = f"{file!r} is a folder" if os.path.isdir(file) else f"there is no stage file {one_line(file)}"
        raise FileNotFoundError(f"{found}: name configs/stage1.py, stage2.py or stage3.py")
    try:
        loader = importlib.machinery.SourceFileLoader("stage", file)
        stage = importlib.util.module_from_spec(importlib.util.spec_from_loader("stage", loader))
        loader.exec_module(stage)
        if not callable(getattr(stage, "get_config", None)):
            raise ValueError("it has no function get_config")
        config = stage.get_config(size)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise ValueError(f"{reference} gives no configuration: {_place(file, error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{reference}: get_config returns {type(config).__name__}, expected a ConfigDict")
    return config


def read_config(reference: str, changes: list[str]) -> ConfigDict:
    """The configuration of a stage file with `changes` ("optimizer.learning_rate=1e-4", ...) made to it.

    Raises ValueError with all unknown keys and unreadable values, and whatever else is wrong with a configuration in
    which these are passed over; FileNotFoundError as `load_stage`.
    """
    config = load_stage(reference)
    problems = make_changes(config, changes)
    if problems:  # the device count is not known here; `Trainer` looks again with it
        problems += config_problems(config)
        raise ValueError(listed("the configuration cannot run", problems))
    return config


def make_changes(config: ConfigDict, changes: list[str]) -> list[str]:
    """Sets every "key=value" whose key is known and whose value is of its type; the others come back as problems."""
    problems, known = [], dict(flat_items(config))
    for change in changes:
        key, equals, text = change.partition("=")
        if key in known and not equals:
            problems.append(f"{key} has no value: write {key}=VALUE")
        elif key in known:
            try:
                value = parse_value(text, known[key])
            except ValueError as error:
                problems.append(f"{key} is {one_line(text, 60)!r}, expected {error}")
                continue
            *parents, last = key.split(".")
            branch = config
            for parent in parents:
                branch = branch[parent]
            branch[last] = value
        elif inside := [other for other in known if other.startswith(key + ".")]:
            problems.append(f"{key} is a group of keys: set one of {', '.join(inside)}")
        else:
            name = one_line(key, 100)
            problems.append(f"unknown key {name}{nearest(name, known)}")
    return problems


def parse_value(text: str, like):
    """`text` as a value of the type of `like`. Raises ValueError that says what was expected."""
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if isinstance(like, int | float):
        try:
            return type(like)(text)
        except ValueError:  # for int also a text of more digits than Python converts
            raise ValueError("a whole number" if isinstance(like, int) else "a number") from None
    if isinstance(like, tuple):
        return _parse_tuple(text, like)
    return text


def _parse_tuple(text, like):
    if not text:
        return ()
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last: nested too deeply
        values = text  # one bare word or regular expression
    values = tuple(values) if isinstance(values, tuple | list) else (values,)
    kind = type(like[0]) if like else str
    if not all(type(value) is kind for value in values):
        raise ValueError(f"a tuple of {kind.__name__}, such as {like or ('transformer/text_embed',)}")
    return values


def _place(file, error):
    """The error, with its line when the file itself made it."""
    reason = first_line(error)
    if isinstance(error, SyntaxError):
        return reason
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames and Path(frames[-1].filename).name in ("config.py", "stages.py"):
        return reason  # our own, which says all
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
    return (f"line {lines[-1]}: " if lines else "") + f"{type(error).__name__}: {reason}"
