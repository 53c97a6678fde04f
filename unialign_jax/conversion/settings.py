"""What a source's config.json says, checked before anything is built from it."""

import os
from pathlib import Path

from unialign_jax.files import read_json


def read_settings(folder) -> dict:
    """A folder's config.json, or {} where there is none. Raises ValueError for one that is not a JSON object."""
    path = Path(folder) / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def whole_number(settings, key, default, name, most=2**20):
    """A setting that counts something; `default` where it is absent or null. `name` is for messages.

    Raises ValueError unless it is a whole number from 1 to `most`.
    """
    value = settings.get(key)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a whole number from 1 to {most:,}")
    return value


def number(settings, key, default, name):
    """A setting that measures something, as `whole_number`. Raises ValueError unless it is a finite number."""
    value = settings.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a finite number")
    return float(value)


def section(settings, key, name) -> dict:
    """A setting that is an object itself; {} where it is absent or null. Raises ValueError for anything else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: {key} is {shown(value)}, expected an object")
    return value or {}


def shown(value) -> str:
    """A JSON value in a message."""
    return f"a JSON {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:40]
