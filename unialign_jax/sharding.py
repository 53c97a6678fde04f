"""Where arrays live: the device mesh, and one table from parameter path to PartitionSpec.

Mesh axes: `data` repeats the parameters, `fsdp` splits them (both split the batch), `tensor` splits heads and hidden
widths. All axes are Auto: `jax.jit` with these shardings is what used to be called pjit.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first pattern found in a parameter's path ("/"-joined) gives its spec; a spec shorter than the shape leaves the
# last axes whole. Parameters of scanned layers have the layer as their first axis. Optimizer moments and the EMA have
# the parameter's path as the end of their own, so that they are split in the same way.
TABLE = (
    # MM-DiT blocks
    (r"blocks/.*/modulation/kernel$", P(None, "fsdp", None, "tensor")),
    (r"blocks/.*/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*/mlp_in/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*/mlp_out/kernel$", P(None, "tensor", "fsdp")),
    # MM-DiT ends, and the alignment heads
    (r"(patch_embed|text_embed|image_head|text_head)/kernel$", P("fsdp", "tensor")),
    (r"time_embed/(hidden|out)/kernel$", P("fsdp", "tensor")),
    (r"image_head_modulation/kernel$", P("fsdp", None, "tensor")),
    (r"heads/(image|text)_(hidden|out)/kernel$", P("fsdp", "tensor")),
    # T5 encoder
    (r"token_embedding$", P("tensor", "fsdp")),
    (r"layers/(query|key|value|mlp_gate|mlp_up)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"layers/mlp_out/kernel$", P(None, "tensor", "fsdp")),
    # Teacher's vision tower
    (r"vision/layers/.*qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"vision/merger_(hidden|out)/kernel$", P("fsdp", "tensor")),
    # Norms, biases, counters and the small autoencoder: everywhere.
    (r".*", P()),
)


def make_mesh(data=1, fsdp=-1, tensor=1, devices=None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = complete_mesh_shape((data, fsdp, tensor), len(devices))
    if math.prod(sizes) == 1:  # jax.make_mesh asks the topology of all devices, which one device does not need
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def complete_mesh_shape(sizes, device_count) -> tuple[int, ...]:
    """Replaces a -1 in `sizes` by what `device_count` leaves for it; ValueError when it does not come out even."""
    shape = "x".join(map(str, sizes))
    unknown = [i for i, size in enumerate(sizes) if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {shape} (data x fsdp x tensor): sizes are positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if device_count % known or (not unknown and known != device_count):
        raise ValueError(f"mesh {shape} (data x fsdp x tensor) does not fit {device_count} devices")
    return tuple(device_count // known if size == -1 else size for size in sizes)


def path_string(path) -> str:
    """A tree path as "blocks/joint/image/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The table's spec for a parameter; an axis that the mesh does not divide evenly stays whole."""
    spec = next(spec for pattern, spec in TABLE if re.search(pattern, path))
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but the sharding table gives it {len(spec)} axes: {spec}")
    fits = (axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=False))
    return P(*(axis if fit else None for axis, fit in zip(spec, fits, strict=False)))


def tree_shardings(abstract_tree, mesh: Mesh):
    """The NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh)), abstract_tree
    )


def with_shardings(abstract_tree, shardings):
    """ShapeDtypeStructs that carry where they will live, as the compiler and Orbax want them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_tree, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
