"""The settings in a source's config.json, each checked when it is read."""

import os
from pathlib import Path

from unialign_jax.files import read_json, shown


def read_settings(folder: str | Path) -> dict:
    """A folder's config.json, or {} when there is none. Raises ValueError for one that is not a JSON object."""
    path = Path(folder) / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def whole_number(settings: dict, key: str, default: int | None, name: str | Path, most: int = 2**20) -> int | None:
    """A setting that counts something, or `default` when it is absent or null; `name` is for messages.

    Raises ValueError unless it is a whole number from 1 to `most`.
    """
    value = settings.get(key)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a whole number from 1 to {most:,}")
    return value


def number(settings: dict, key: str, default: float, name: str | Path) -> float:
    """A setting that measures something, like `whole_number`. Raises ValueError unless it is a finite number."""
    value = settings.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{name}: {key} is {shown(value)}, expected a finite number")
    return float(value)


def section(settings: dict, key: str, name: str | Path) -> dict:
    """A setting that is an object, or {} when it is absent or null. Raises ValueError for anything else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: {key} is {shown(value)}, expected an object")
    return value or {}
