"""Where arrays live: one table from parameter path to PartitionSpec.

`unialign_jax.parallel.mesh` says what each axis of the mesh is for.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unialign_jax.parallel.activations import BATCH_AXES

BATCH = P(BATCH_AXES)
STATE_AXES = ("data", "state", "encoder", "fsdp", "context")  # split the state where "fsdp" splits the weights
ENCODER = ("encoder", "tensor")
KERNEL = "kernel(/(qvalue|scale))?"  # plain, or a qwix.QArray

# A parameter takes the spec of the first pattern found in its path ("/"-joined). A spec shorter than the shape leaves
# the last axes whole. Parameters of scanned layers have the layer as their first axis. The paths of optimizer moments
# and of the EMA end in the parameter's path, so that they are split like it.
TABLE = (
    # MM-DiT blocks; kernels of 8 bits have their values and their scales apart
    (r"blocks/.*/modulation/kernel$", P(None, "fsdp", None, "tensor")),
    (rf"blocks/.*/qkv/{KERNEL}$", P(None, "fsdp", None, "tensor", None)),
    (rf"blocks/.*/out/{KERNEL}$", P(None, "tensor", None, "fsdp")),
    (rf"blocks/.*/mlp_in/{KERNEL}$", P(None, "fsdp", "tensor")),
    (rf"blocks/.*/mlp_out/{KERNEL}$", P(None, "tensor", "fsdp")),
    # MM-DiT ends, and the alignment heads
    (r"(patch_embed|text_embed|image_head|text_head)/kernel$", P("fsdp", "tensor")),
    (r"time_embed/(hidden|out)/kernel$", P("fsdp", "tensor")),
    (r"image_head_modulation/kernel$", P("fsdp", None, "tensor")),
    (r"heads/(image|text)_(hidden|out)/kernel$", P("fsdp", "tensor")),
    # T5 encoder
    (r"token_embedding$", P(ENCODER, "fsdp")),
    (rf"layers/(query|key|value|mlp_gate|mlp_up)/{KERNEL}$", P(None, "fsdp", ENCODER)),
    (rf"layers/out/{KERNEL}$", P(None, ENCODER, None, "fsdp")),
    (rf"layers/mlp_out/{KERNEL}$", P(None, ENCODER, "fsdp")),
    # Teacher's vision tower
    (r"vision/layers/.*qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"vision/merger_(hidden|out)/kernel$", P("fsdp", "tensor")),
    # Norms, biases, text positions, counters and the small autoencoder: everywhere.
    (r".*", P()),
)

FEW_ROWS = re.compile(r"blocks/.*/modulation/kernel$")  # kernels that read one row a sample
ALONG_OUTPUTS = P(None, None, None, "fsdp")  # how their state is split where they stay split: parallel/few_rows.py
LARGE = re.compile(r"blocks/.*/mlp_(in|out)/kernel$")  # two thirds of the weights that are gathered

path_string = functools.partial(jax.tree_util.keystr, simple=True, separator="/")  # "blocks/joint/image/qkv/kernel"


def has_whole_weights(mesh: Mesh) -> bool:
    """Whether each device of a mesh computes with whole weights and whole samples."""
    return all(mesh.shape.get(name, 1) == 1 for name in ("fsdp", "context", "tensor"))


def table_spec(path: str, mesh: Mesh) -> P:
    """The spec for the parameter at a path, whatever its shape: the table's, or ALONG_OUTPUTS where it stays split."""
    if FEW_ROWS.search(path) and has_whole_weights(mesh):
        return ALONG_OUTPUTS
    return next(spec for pattern, spec in TABLE if re.search(pattern, path))


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh, *, state: bool = False) -> P:
    """The spec of a parameter, or with `state` of its optimizer state; axes that do not divide evenly are left out."""
    spec = table_spec(path, mesh)
    if len(spec) > len(shape):
        raise ValueError(f"{path} has shape {shape}, but the sharding table gives it {len(spec)} axes: {spec}")
    return P(*(_dividing(axes, size, mesh, state) for axes, size in zip(spec, shape, strict=False)))


def stays_split(path: str, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether compute uses a kernel as its state is split, along its outputs: parallel/few_rows.py moves the rows."""
    if not FEW_ROWS.search(path) or not has_whole_weights(mesh):
        return False
    names = tuple(name for name in STATE_AXES if mesh.shape.get(name, 1) > 1)
    return bool(names) and partition_spec(path, shape, mesh, state=True)[-1] in (names, names[0])


def _dividing(axes, size, mesh, state):
    """The mesh axes of one entry of a spec that split `size` evenly: as many as do, the outermost left out first."""
    if state and axes == "fsdp":
        axes = STATE_AXES
    names = [axes] if isinstance(axes, str) else list(axes or ())
    names = [name for name in names if mesh.shape.get(name, 1) > 1]
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop(0)
    return tuple(names) if len(names) > 1 else names[0] if names else None


def tree_shardings(abstract_tree: Any, mesh: Mesh, *, state: bool = False):
    """The NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh, state=state)),
        abstract_tree,
    )


def with_shardings(abstract_tree: Any, shardings: Any):
    """ShapeDtypeStructs that carry their shardings, as the compiler and Orbax want them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_tree, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def params_for_compute(params: dict, dtypes: Callable[[str], jax.typing.DTypeLike], beside: Any = None):
    """The state's parameters, cast and gathered for compute: only the axes that split the weights still split them.

    The backward pass reduces gradients straight into the state's pieces (a reduce-scatter; an all-reduce would move
    twice the bytes) and casts them to float32. Call it inside jit, under `jax.set_mesh`; without a mesh it only casts.

    Args:
      dtypes: the compute dtype of the parameter at a path.
      beside: (scan, depth, operands) of other work in a loop of `depth` iterations; then (its result, parameters) is
        returned. scan(operands, function, tree) computes function(tree[i]) in iteration i too, and returns its result,
        which is not differentiated, and the stacked function values. If `depth` divides the number of blocks, each
        iteration gathers the LARGE weights of as many: XLA on TPU overlaps a gather with matmuls of the same iteration
        of a loop, and not with a whole loop. It overlaps the other gathers with the autoencoder.
    """
    mesh = jax.sharding.get_abstract_mesh()
    scan, depth, operands = beside or (None, 0, None)
    in_scan, specs_in_scan = {}, {}

    def convert(path, leaf):
        path, specs = path_string(path), None
        dtype = jax.numpy.dtype(dtypes(path))
        if not mesh.empty:
            split = stays_split(path, leaf.shape, mesh)
            specs = tuple(partition_spec(path, leaf.shape, mesh, state=state) for state in (split, True))
            if specs[0] != specs[1] and LARGE.search(path) and depth and leaf.shape[0] % depth == 0:
                in_scan[path] = leaf.astype(dtype).reshape(depth, -1, *leaf.shape[1:])
                specs_in_scan[path] = tuple(P(None, *spec) for spec in specs)
                return path
        return _gather(leaf, dtype, specs)

    params = jax.tree_util.tree_map_with_path(convert, params)
    if not beside:
        return params
    if not in_scan:
        return scan(operands), params
    result, gathered = _gather_in_scan(scan, tuple(specs_in_scan.items()), operands, in_scan)
    blocks = {path: leaf.reshape(-1, *leaf.shape[2:]) for path, leaf in gathered.items()}
    return result, jax.tree.map(lambda leaf: blocks[leaf] if isinstance(leaf, str) else leaf, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf, dtype, specs):
    leaf = leaf.astype(dtype)
    return leaf if specs is None else jax.lax.with_sharding_constraint(leaf, specs[0])


def _gather_backward(dtype, specs, _, gradient):
    if specs is not None:
        gradient = jax.lax.with_sharding_constraint(gradient, specs[1])
    return (gradient.astype(jax.numpy.float32),)


_gather.defvjp(lambda *args: (_gather(*args), None), _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_in_scan(scan, specs, operands, pieces):
    place = jax.lax.with_sharding_constraint
    of_a_block = {path: P(*of_compute[1:]) for path, (of_compute, _) in specs}
    pieces = {path: place(pieces[path], of_state) for path, (_, of_state) in specs}
    result, gathered = scan(operands, lambda pieces: place(pieces, of_a_block), pieces)
    return result, {path: place(gathered[path], of_compute) for path, (of_compute, _) in specs}


def _gather_in_scan_backward(scan, specs, _, cotangents):
    _, gradients = cotangents
    return None, {path: jax.lax.with_sharding_constraint(gradients[path], of_state) for path, (_, of_state) in specs}


_gather_in_scan.defvjp(lambda *args: (_gather_in_scan(*args), None), _gather_in_scan_backward)
