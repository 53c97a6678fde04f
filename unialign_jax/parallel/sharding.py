"""Where arrays live: the device mesh, and one table from parameter path to PartitionSpec.

The mesh's axes all split the batch, except the last, and differ in what they do to weights:

    replica   repeats all: a slice each, over the network between slices, or parts of one large slice
    data      repeats the weights that compute, splits the state: masters, optimizer, average (ZeRO-1)
    encoder   as data; but splits the frozen text encoder's heads and hidden widths (and not its batch)
    fsdp      splits weights and state; a block's weights are gathered when the block runs
    tensor    splits heads and hidden widths of weights and activations; not the batch

On few chips the state decides and fsdp is right; on many, with few samples a chip, gathering weights in every pass
would bound the step, and data is. On TPUs an axis of the mesh should lie along one axis of the torus, for only there
does the compiler reduce-scatter: `training/meshes.py` chooses replica=4, data=16, encoder=4 on v5e:16x16.
All axes are Auto: `jax.jit` with these shardings is what used to be called pjit.
"""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unialign_jax.parallel import hardware
from unialign_jax.parallel.activations import BATCH_AXES

AXES = ("replica", "data", "encoder", "fsdp", "tensor")
BATCH = P(BATCH_AXES)
STATE_AXES = ("data", "encoder", "fsdp")  # what splits the state where "fsdp" splits the weights
ENCODER = ("encoder", "tensor")

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
    (r"token_embedding$", P(ENCODER, "fsdp")),
    (r"layers/(query|key|value|mlp_gate|mlp_up)/kernel$", P(None, "fsdp", ENCODER)),
    (r"layers/out/kernel$", P(None, ENCODER, None, "fsdp")),
    (r"layers/mlp_out/kernel$", P(None, ENCODER, "fsdp")),
    # Teacher's vision tower
    (r"vision/layers/.*qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"vision/merger_(hidden|out)/kernel$", P("fsdp", "tensor")),
    # Norms, biases, text positions, counters and the small autoencoder: everywhere.
    (r".*", P()),
)


def make_mesh(data=1, fsdp=-1, tensor=1, devices=None, *, replica=1, encoder=1) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    With several TPU slices `replica` must be a multiple of their number: only it goes over the network between them.
    On GPUs the devices of a host are neighbours, so that `replica`, or the first axis there is, goes between hosts.
    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = complete_mesh_shape((replica, data, encoder, fsdp, tensor), len(devices))
    slices = count_slices(devices)
    if sizes[0] % slices:
        raise ValueError(f"mesh replica={sizes[0]}, but there are {slices} slices: give a multiple of {slices}")
    if math.prod(sizes) == 1:  # no use in asking for the topology of all devices
        grid = np.array(devices).reshape(sizes)
    elif slices > 1:
        inside, across = (sizes[0] // slices, *sizes[1:]), (slices,) + (1,) * (len(AXES) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices) -> int:
    """Of how many TPU slices these devices are; of GPUs, where JAX gives each host a slice_index, 1."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def lines(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh whose first and last devices are no neighbours in a TPU slice's torus; others are rings."""
    chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
    if chip is None or not chip.axes:
        return ()
    places = np.array([device.coords[: chip.axes] for device in mesh.devices.flat])
    sides = np.ptp(places, axis=0) + 1
    closed = hardware.rings(chip.name, sides)[: chip.axes]
    places = places.reshape(*mesh.devices.shape, chip.axes)
    found = []
    for number, name in enumerate(mesh.axis_names):
        along = np.moveaxis(places, number, 0).reshape(mesh.shape[name], -1, chip.axes)[:, 0]
        steps = np.abs(along[0] - along[-1])
        if np.where(closed, np.minimum(steps, sides - steps), steps).sum() > 1:
            found.append(name)
    return tuple(found)


def complete_mesh_shape(sizes, device_count) -> tuple[int, ...]:
    """Replaces a -1 in `sizes`, those of AXES, by what `device_count` leaves for it; ValueError when it cannot."""
    shape = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size != 1) or "of one device"
    unknown = [i for i, size in enumerate(sizes) if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {shape}: sizes are positive, and at most one may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if device_count % known or (not unknown and known != device_count):
        raise ValueError(
            f"mesh {shape} does not fit {device_count} devices: sizes multiply to that, and one may be -1, the rest"
        )
    return tuple(device_count // known if size == -1 else size for size in sizes)


def mesh_sizes(mesh: dict) -> tuple[int, ...]:
    """A configuration's mesh, {axis: size}, in the order of AXES; an axis that is not named, or is 0, has size 1."""
    return tuple(mesh.get(name, 0) or 1 for name in AXES)


def path_string(path) -> str:
    """A tree path as "blocks/joint/image/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh, *, state=False) -> P:
    """The table's spec for a parameter, or for its part of the `state`; axes that do not divide evenly are left out."""
    spec = next(spec for pattern, spec in TABLE if re.search(pattern, path))
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but the sharding table gives it {len(spec)} axes: {spec}")
    return P(*(_dividing(axes, size, mesh, state) for axes, size in zip(spec, shape, strict=False)))


def _dividing(axes, size, mesh, state):
    """What of a spec's entry splits `size` evenly: the last axes of it, as many as do."""
    if state and axes == "fsdp":
        axes = STATE_AXES
    names = [axes] if isinstance(axes, str) else list(axes or ())
    names = [name for name in names if mesh.shape[name] > 1]
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop(0)
    return tuple(names) if len(names) > 1 else names[0] if names else None


def tree_shardings(abstract_tree, mesh: Mesh, *, state=False):
    """The NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh, state=state)),
        abstract_tree,
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


def computing(params, dtypes):
    """The state's parameters as those that compute: in `dtypes`, and whole along the axes that split the state alone.

    Gradients go the other way: reduced straight into the state's pieces (a reduce-scatter, where an all-reduce would
    move twice as much), and then made float32. To be called inside jit, under `jax.set_mesh`; without a mesh it casts.

    Args: `dtypes(path)` gives the dtype of the parameter at a path.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def convert(path, leaf):
        path = path_string(path)
        specs = None
        if not mesh.empty:
            specs = tuple(partition_spec(path, leaf.shape, mesh, state=state) for state in (False, True))
        return _gather(leaf, jax.numpy.dtype(dtypes(path)), specs)

    return jax.tree_util.tree_map_with_path(convert, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf, dtype, specs):
    leaf = leaf.astype(dtype)
    return leaf if specs is None else jax.lax.with_sharding_constraint(leaf, specs[0])


def _gather_forward(leaf, dtype, specs):
    return _gather(leaf, dtype, specs), None


def _gather_backward(dtype, specs, _, gradient):
    if specs is not None:
        gradient = jax.lax.with_sharding_constraint(gradient, specs[1])
    return (gradient.astype(jax.numpy.float32),)


_gather.defvjp(_gather_forward, _gather_backward)
