"""What a run of adapters stands on: the transformer that they change, and the two together.

The checkpoints of such a run hold the adapters alone. `base.json` in its folder says which weights they belong to.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unialign_jax import bundle, files
from unialign_jax.files.places import place, reaching, read_json
from unialign_jax.models.lora import adapted
from unialign_jax.training.caching import network_digest


class Base(NamedTuple):
    """The identity of a base.

    Attributes:
      source: the bundle or the run that has it; a bundle of the package by its name.
      weights, step: of a run, "raw" or "ema" and the checkpoint; "" and -1 of a bundle.
      digest: 16 hexadecimal digits that tell its weights from others.
    """

    source: str
    weights: str
    step: int
    digest: str


def find_base(source: str, weights: str, step: int) -> Base:
    """The base that `init_from` names; `step` is the checkpoint of a run, and of no account for a bundle."""
    folder = bundle.locate(source)
    if bundle.is_bundle(folder):
        lasting = source if bundle.is_packaged(source) else str(Path(source).absolute())
        return Base(lasting, "", -1, network_digest(folder, "transformer"))
    folder = place(source)
    checksums = folder / "checkpoints" / str(step) / "checksums.json"
    with reaching(folder):
        told = f"{weights} {step} ".encode() + (folder / "config.json").read_bytes()
        if checksums.is_file():  # a run that was killed has none of its last checkpoint
            told += checksums.read_bytes()
    return Base(str(folder), weights, step, hashlib.sha256(told).hexdigest()[:16])


def read_base(run: str | Path) -> Base:
    """What a run's base.json says. Raises FileNotFoundError or ValueError, in one line, where it says nothing."""
    path = place(run) / "base.json"
    content = read_json(path)
    kinds = {"source": str, "weights": str, "step": int, "digest": str}
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise ValueError(f"{path} lacks {key}: expected the identity of the weights that the run's adapters change")
    return Base(*(content[key] for key in kinds))


def write_base(base: Base, run: str | Path) -> None:
    files.write_json(Path(run) / "base.json", base._asdict())


def check_base(base: Base, run: str | Path) -> None:
    """Raises ValueError when the weights are not those of `base` any more, FileNotFoundError when they are gone."""
    here = f"the adapters of {run} belong to {base.source}"
    source = bundle.locate(base.source) if base.step < 0 else place(base.source)
    with reaching(source):
        is_there = (source / "config.json").is_file()
        has_step = base.step < 0 or (source / "checkpoints" / str(base.step)).is_dir()
    if not is_there:
        raise FileNotFoundError(
            f"{here}, which is not there: bring it back, or name where it is now in {run}/base.json"
        )
    if not has_step:
        raise FileNotFoundError(f"{here}, whose checkpoint {base.step} is not there: bring it back")
    found = find_base(base.source, base.weights, base.step)
    if found.digest != base.digest:
        raise ValueError(
            f"{here} as it was at the start ({base.digest}); its weights have changed since ({found.digest})"
        )


def adapted_leaves(
    leaves: Iterable[tuple[str, np.ndarray]], adapters: dict[str, dict], scale: float
) -> Iterator[tuple[str, np.ndarray]]:
    """The (path, array) pairs of a base with its adapters, on the host; adapted kernels become float32."""
    for path, leaf in leaves:
        yield path, adapted(path, leaf, adapters[path], scale) if path in adapters else leaf
        del leaf
