"""A model's parameters: read, cast or quantised, and placed on the device."""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import path_aware_map, unflatten_dict

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

    def __call__(self, name: str) -> dict:
        quantized, change = self._quantize and name in QUANTIZED, self._changes.get(name)
        if self._restore and not quantized and change is None:
            return self._restore(name)
        if name in self._on_host:
            return jax.device_put(self._on_host[name], self._device)
        keep = quantized and self._keep_on_host
        place = jax.local_devices(backend="cpu")[0] if keep else self._device

        def put(path, leaf):
            dtype = storage_dtype(path, self._dtype)
            if change is not None:
                leaf = change(path, leaf)
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
                self._resident[name] = self._load(name)
        return {name: self._resident[name] for name in names}

    def drop(self, name: str) -> None:
        """Forgets a component; `get` loads it anew."""
        self._resident.pop(name, None)

    def adapt(self, name: str, change: Callable[[str, np.ndarray], np.ndarray] | None) -> None:
        """Has a component read anew, with its arrays changed; see `Loader.adapt`."""
        self._load.adapt(name, change)
        self.drop(name)

    def settle(self, outputs: Any) -> None:
        """In low-memory mode waits for `outputs`: the memory of the weights that compute them is free only then."""
        if self._low_memory:
            jax.block_until_ready(outputs)
