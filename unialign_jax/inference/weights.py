"""A model's parameters: read, cast or quantised, and placed on the device."""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from unialign_jax import bundle
from unialign_jax.models.parameters import storage_dtype
from unialign_jax.models.quantization import quantize_leaf

log = logging.getLogger(__name__)

QUANTIZED = ("transformer", "text_encoder")


def abstract_component(config: bundle.BundleConfig, name: str, dtype: str) -> dict:
    """A component's parameters as ShapeDtypeStructs, in the dtypes of inference."""

    def abstract(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, storage_dtype("/".join(path), dtype))

    return path_aware_map(abstract, bundle.abstract_params(config, [name])[name])


class Loader:
    """A function, name of a component -> its parameters, on the device and in their dtypes, read at every call.

    With `quantize` transformer and text encoder become 8 bits on the host, array by array, before they are placed.
    """

    def __init__(
        self,
        leaves: Callable[[str], Iterable[tuple[str, np.ndarray]]],
        restore: Callable[[str], dict] | None = None,
        *,
        dtype: str,
        device: jax.Device,
        quantize: str | None = None,
        keep_on_host: bool = False,
    ):
        """Args:
        leaves: gives a component's (path, array) pairs.
        restore: gives all of a component's parameters at once, placed and cast, which is faster.
        keep_on_host: keep quantised components on the host, so that loading one again does not quantise it again.
        """
        self._leaves, self._restore, self._dtype, self._device = leaves, restore, dtype, device
        self._quantize, self._keep_on_host = quantize, keep_on_host
        self._on_host, self._changes = {}, {}

    def adapt(self, name: str, change: Callable[[str, np.ndarray], np.ndarray] | None) -> None:
        """Changes a component's arrays, `change(path, array)`, from the next call on; None leaves them as they are."""
        self._changes[name] = change
        self._on_host.pop(name, None)

    def __call__(self, name: str, unchanged: dict | None = None) -> dict:
        """The parameters; arrays that `adapt` changes nothing of are those of `unchanged`, where it is given."""
        quantized, change = self._quantize and name in QUANTIZED, self._changes.get(name)
        if self._restore and not quantized and change is None:
            return self._restore(name)
        if name in self._on_host:
            return jax.device_put(self._on_host[name], self._device)
        keep = quantized and self._keep_on_host
        place = jax.local_devices(backend="cpu")[0] if keep else self._device
        shared = {} if unchanged is None else flatten_dict(unchanged, sep="/")

        def put(path, leaf):
            dtype = storage_dtype(path, self._dtype)
            if change is not None:
                plain, leaf = leaf, change(path, leaf)
                if leaf is plain and path in shared:
                    return shared[path]
            if quantized:
                return quantize_leaf(path, leaf, self._quantize, dtype=dtype, device=place)
            return jax.device_put(leaf.astype(dtype), place)

        params = unflatten_dict({path: put(path, leaf) for path, leaf in self._leaves(name)}, sep="/")
        if keep:
            self._on_host[name] = params
        return jax.device_put(params, self._device)


def bundle_loader(
    directory: str | os.PathLike,
    config: bundle.BundleConfig,
    *,
    dtype: str,
    device: jax.Device,
    verify: bool = True,
    **options,
) -> Loader:
    """A `Loader` of a bundle's components; with `verify` each is checked against its hashes the first time it is read.

    Args:
      options: those of `Loader`.
    """
    to_verify = set(config.components) if verify else set()
    place = jax.sharding.SingleDeviceSharding(device)

    def leaves(name):
        yield from bundle.read_leaves(directory, name, verify=name in to_verify)
        to_verify.discard(name)

    def restore(name):
        as_kept = functools.partial(storage_dtype, dtype=dtype)
        params = bundle.restore_stored(directory, name, dtype=as_kept, sharding=place, verify=name in to_verify)
        to_verify.discard(name)
        return params

    return Loader(leaves, restore, dtype=dtype, device=device, **options)


class Weights:
    """The components on the device: all that were ever used, or with `low_memory` only those of the last `get`."""

    def __init__(self, load: Callable[[str], dict], low_memory: bool = False):
        self._load, self._low_memory = load, low_memory
        self._resident = {}
        self._keys = {}  # {name: the key of the set that is resident, or will be}
        self._sets = {}  # {(name, key): parameters}, the set that was used last at the end; () is unchanged

    def get(self, *names: str) -> dict:
        """{name: parameters} of the named components, loaded where they are not there yet.

        In low-memory mode the others are dropped first. They leave the device when the caller drops them too.
        """
        if self._low_memory:
            for name in [name for name in self._resident if name not in names]:
                del self._resident[name]
        for name in names:
            if name not in self._resident:
                log.info("reading the %s", name.replace("_", " "))
                unchanged = self._sets.get((name, ()))
                self._resident[name] = self._load(name) if unchanged is None else self._load(name, unchanged)
        return {name: self._resident[name] for name in names}

    def drop(self, name: str) -> None:
        """Forgets a component; `get` loads it anew."""
        self._resident.pop(name, None)

    def adapt(
        self,
        name: str,
        change: Callable[[str, np.ndarray], np.ndarray] | None,
        key: tuple = (),
        kept: int = 0,
    ) -> None:
        """Has a component read anew, with its arrays changed; see `Loader.adapt`.

        Args:
          key: tells this change from others; () is None's.
          kept: how many changed sets are in memory at most, beside the unchanged one, to be taken again by their keys.
        """
        if kept and not self._low_memory and name in self._resident:
            self._sets[name, self._keys.get(name, ())] = self._resident[name]
        self._keys[name] = key
        self._load.adapt(name, change)
        self.drop(name)
        if (name, key) in self._sets:
            self._resident[name] = self._sets[name, key] = self._sets.pop((name, key))
        room = kept - (key != () and (name, key) not in self._sets)  # what is read next takes a place
        changed = [found for found in self._sets if found[0] == name and found[1]]
        for found in changed[: max(0, len(changed) - room)]:
            del self._sets[found]

    def forget(self, name: str) -> None:
        """Drops the sets of a component that `adapt` kept."""
        self._sets = {found: params for found, params in self._sets.items() if found[0] != name}

    def settle(self, outputs: Any) -> None:
        """In low-memory mode waits for `outputs`: the memory of the weights that compute them is free only then."""
        if self._low_memory:
            jax.block_until_ready(outputs)
