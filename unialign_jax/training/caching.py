"""Runs frozen networks over a data folder and keeps what they give in its caches (`data.caches`).

Parameters are split over this process's devices by the sharding table, batches over the same devices. Several machines
take shares of the parts, so they need no communication.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.data import caches
from unialign_jax.data.records import RecordError
from unialign_jax.data.streams import Stream
from unialign_jax.models.autoencoder import from_pixels
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh


def local_mesh() -> jax.sharding.Mesh:
    """This process's devices, over which both weights and batches are split."""
    devices = jax.local_devices()
    return make_mesh(fsdp=len(devices), devices=devices)


def image_moments(params: dict, batch: dict[str, jax.Array], autoencoder: Any) -> dict[str, jax.Array]:
    """The moments of a batch's raw latents, float16 [B, h, w, 2C], and those of its conditions [B, K, h, w, 2C]."""
    images = batch["image"][:, None]
    if "conditions" in batch:
        images = jnp.concatenate([images, batch["conditions"]], axis=1)
    pixels = from_pixels(images.reshape(-1, *images.shape[2:]))
    moments = autoencoder.apply({"params": params}, pixels, method="encode")
    moments = jnp.concatenate([moments.mean, moments.log_variance], axis=-1).astype(jnp.float16)
    moments = moments.reshape(*images.shape[:2], *moments.shape[1:])
    found = {"image_moments": moments[:, 0]}
    return found | ({"condition_moments": moments[:, 1:]} if "conditions" in batch else {})


def row_shapes(function: Callable, params: dict, example: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of `function`'s arrays for one example."""
    batch = {name: jax.ShapeDtypeStruct((1, *value.shape), value.dtype) for name, value in example.items()}
    return {name: value.shape[1:] for name, value in jax.eval_shape(function, params, batch).items()}


class Examples:
    """Some arrays of a stream's examples, by index; None for a record that cannot be decoded."""

    def __init__(self, stream: Stream, names: Sequence[str]):
        self._stream, self._names = stream, names

    def __call__(self, index: int) -> dict[str, np.ndarray] | None:
        try:
            example = self._stream.load(index)
        except RecordError:
            return None
        return {name: example[name] for name in self._names if name in example}


def fill_cache(
    writer: caches.Writer,
    read: Callable[[int], dict[str, np.ndarray] | None],
    function: Callable,
    params: dict,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    num_threads: int = 0,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Computes the parts that are missing and writes them. Returns the number of records that cannot be decoded.

    Args:
      writer: of the cache.
      read: index -> the arrays of one record, or None.
      function: (params, batch of such arrays) -> the cache's arrays. It is compiled once, for `batch_size` rows.
      params: on the mesh.
      mesh: over which the batch is split; its size divides `batch_size`.
      num_threads: that read records; one for each core when 0.
      share: (i, n), to fill every n-th part from the i-th on.
      progress: is told of the records done.
    """
    compiled = jax.jit(function, out_shardings=sharding.replicated(mesh))
    place = sharding.batch_sharding(mesh)
    parts = writer.missing(share)
    bad = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool, jax.set_mesh(mesh):
        for part in parts:
            rows, pending = [], None
            for examples in _batches(pool, read, writer.description.part(part), batch_size):
                there = np.array([example is not None for example in examples])
                bad += int(np.sum(~there))
                given = None
                if any(there):
                    batch = _stack(examples, batch_size)
                    given = compiled(params, {name: jax.device_put(value, place) for name, value in batch.items()})
                if pending is not None:  # one batch late: the device computes while this thread copies
                    rows.append(_rows(writer, *pending))
                pending = there, given
                progress(len(examples))
            rows.append(_rows(writer, *pending))
            writer.write(part, {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    return bad


def _batches(pool, read, indices: range, size: int) -> Iterator[list]:
    """Lists of `size` examples, the last one shorter; the next list is read while one is in use."""
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    ahead = [pool.submit(read, index) for index in groups[0]]
    for number in range(len(groups)):
        current, ahead = ahead, []
        if number + 1 < len(groups):
            ahead = [pool.submit(read, index) for index in groups[number + 1]]
        yield [future.result() for future in current]


def _stack(examples, size):
    """Arrays of `size` rows; an example stands in where there is none."""
    filler = next(example for example in examples if example is not None)
    rows = [example or filler for example in examples] + [filler] * (size - len(examples))
    return {name: np.stack([row[name] for row in rows]) for name in filler}


def _rows(writer, there, given):
    """The cache's rows of one batch on the host, NaN where there was no example."""
    rows = {
        name: np.full((len(there), *shape), np.nan, np.float16) for name, shape in writer.description.arrays.items()
    }
    if given is not None:
        for name, value in jax.device_get(given).items():
            rows[name][there] = value[: len(there)][there]
    return rows


def network_digest(directory: str | os.PathLike, component: str) -> str:
    """Identifies a component of a bundle by its architecture and the hashes of its files: 16 hexadecimal digits."""
    content = json.loads((Path(directory) / "config.json").read_text())
    files = {name: entry for name, entry in content.get("files", {}).items() if name.startswith(f"{component}/")}
    told = json.dumps([content.get(component), files], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
