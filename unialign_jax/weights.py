"""A bundle's parameters on their way to the device: which are there, and in which dtype."""

import contextlib

import jax

from unialign_jax import bundle
from unialign_jax.models.precision import storage_dtype
from unialign_jax.quantization import quantize_leaf

QUANTIZED = ("transformer", "text_encoder")


def abstract_component(config: bundle.BundleConfig, name: str, dtype, sharding=None):
    """A component's parameters as ShapeDtypeStructs, in the dtypes that inference keeps them in."""
    leaves = bundle.flatten(bundle.abstract_params(config, [name])[name])
    return bundle.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, storage_dtype(path, dtype), sharding=sharding)
            for path, leaf in leaves.items()
        }
    )


class BundleLoader:
    """Reads a bundle's components: `loader("text_encoder")` -> parameters on the device, in their dtypes.

    With a `quantize` mode the transformer and the text encoder are made int8 on the host, array by array, so that the
    device never holds them unquantised; `keep_on_host` then keeps them there too, for a component that comes back.
    """

    def __init__(self, directory, config, *, dtype, device, quantize=None, keep_on_host=False):
        self._directory, self._config, self._dtype, self._device = directory, config, dtype, device
        self._quantize, self._keep_on_host = quantize, keep_on_host
        self._on_host = {}

    def __call__(self, name):
        if not self._quantize or name not in QUANTIZED:
            place = jax.sharding.SingleDeviceSharding(self._device)
            abstract = abstract_component(self._config, name, self._dtype, place)
            return bundle.restore(self._directory, {name: abstract})[name]
        if name in self._on_host:
            return jax.device_put(self._on_host[name], self._device)
        host = jax.local_devices(backend="cpu")[0] if self._keep_on_host else self._device
        params = bundle.unflatten(
            {
                path: quantize_leaf(path, leaf, dtype=storage_dtype(path, self._dtype), device=host)
                for path, leaf in bundle.read_leaves(self._directory, name)
            }
        )
        if self._keep_on_host:
            self._on_host[name] = params
        return jax.device_put(params, self._device)


class Weights:
    """The components that are on the device: all that were ever used, or with `low_memory` those in use alone."""

    def __init__(self, load, low_memory=False):
        self._load, self._low_memory = load, low_memory
        self._resident = {}

    @contextlib.contextmanager
    def use(self, *names):
        """{name: parameters} of the named components; in low-memory mode the others leave the device first."""
        if self._low_memory:
            for name in [name for name in self._resident if name not in names]:
                del self._resident[name]
        for name in names:
            if name not in self._resident:
                self._resident[name] = self._load(name)
        yield {name: self._resident[name] for name in names}

    def settle(self, outputs):
        """In low-memory mode waits for what was computed: only then is the memory of its weights free."""
        if self._low_memory:
            jax.block_until_ready(outputs)
