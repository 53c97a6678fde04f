"""Adapters (LoRA, DoRA) of the transformer in files: written for others, and read from PEFT, diffusers and Kohya.

Names are those of `conversion.transformer`'s layouts. PEFT's and diffusers' files call the factors lora_A [rank, in]
and lora_B [out, rank]. Kohya's and ComfyUI's call them lora_down and lora_up, after Stability's names with "_" for ".",
where q, k and v are one layer. The change of a layer's weight is alpha / rank * B A.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.conversion import rules, safetensors_file, transformer
from unialign_jax.conversion.importing import DTYPES, check_space, with_progress
from unialign_jax.conversion.rules import Entry
from unialign_jax.conversion.sources import PICKLES, read_tensors
from unialign_jax.files import first_line, parse_json, read_json, shown
from unialign_jax.models.lora import adapted, adapters_by_path, matrix_axes, norms, to_matrices
from unialign_jax.models.mmdit import MMDiTConfig
from unialign_jax.training import base_model, runs

LAYOUTS = ("unialign", "diffusers", "kohya")
KOHYA_PREFIX = "lora_unet_"
PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "unet.")
FLAT_PREFIXES = (KOHYA_PREFIX, "lora_transformer_", "lycoris_")
OTHERS = ("text_encoder", "lora_te", "te1_", "te2_", "te3_")  # of the text encoders' adapters, which have no place here
POOLED = re.compile(r"(time_text_embed.text_embedder.linear_[12]|y_embedder.mlp.[02])$")  # SD3's, of CLIP's vector
SUFFIXES = {
    "down": re.compile(r"\.(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$"),
    "up": re.compile(r"\.(lora_B(\.\w+)?|lora_up|lora\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"\.(lora_magnitude_vector(\.\w+)*|dora_scale)$"),
}
METADATA = "lora_adapter_metadata"  # in a file of diffusers: the settings of its adapters, as JSON
MOST_METADATA = 2**20
MOST_RANK = 2**14
USUAL_NAMES = ("pytorch_lora_weights", "adapter_model")  # of diffusers' and PEFT's files; their folders tell them apart


class Lora(NamedTuple):
    """Adapters, ready to change a transformer's parameters.

    Attributes:
      name: for messages.
      changes: {path of a kernel: function of the kernel in float32 -> the changed kernel}, numpy on the host.
      notes: what was passed over, one line each.
    """

    name: str
    changes: dict[str, Callable[[np.ndarray], np.ndarray]]
    notes: list[str]

    def __call__(self, path: str, leaf: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """The array at `path` with `scale` times the change, in float32 where there is one."""
        if path not in self.changes or scale == 0:
            return leaf
        leaf = np.asarray(leaf, np.float32)
        changed = self.changes[path](leaf)
        return changed if scale == 1 else leaf + np.float32(scale) * (changed - leaf)


def parse_reference(text: str, default: float | None = None) -> tuple[str, float]:
    """(file, scale) of "FILE:SCALE"; of "FILE" with the scale `default`, 1 when None.

    Raises ValueError for a scale that is not finite.
    """
    path, _, scale = text.rpartition(":")
    try:
        value = float(scale) if path else math.nan
    except ValueError:
        value = math.nan if not path else None
    if value is None or not path:
        path, value = text, 1.0 if default is None else default
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no FILE:SCALE, expected a finite number such as 0.8 after the colon")
    return path, value


def new_name(path: str | Path, taken: Collection[str] = ()) -> str:
    """A name for the adapters at `path` that is not among `taken`: its own, or that with -2, -3, ... after it.

    A folder's own name is its whole name, "style-1.5"; a file's has no ending. A file that is called as diffusers or
    PEFT call all of theirs has its folder's.
    """
    place = Path(os.path.abspath(path))
    is_file = place.suffix in (".safetensors", *PICKLES) and not place.is_dir()
    if is_file and place.stem in USUAL_NAMES:
        place, is_file = place.parent, False
    own = (place.stem if is_file else place.name) or "lora"
    numbered = (f"{own}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([own], numbered) if name not in taken)


# --- Reading ---


class Factors(NamedTuple):
    """One module's adapter in a file."""

    down: np.ndarray  # [rank, in ...]
    up: np.ndarray  # [out, rank ...]
    scale: float
    magnitude: np.ndarray | None  # [out] of DoRA


def open_lora(path: str | Path, config: MMDiTConfig, shapes: rules.Shapes) -> Lora:
    """The adapters in a file, in a folder of PEFT or diffusers, or of a training run's newest checkpoint.

    Args:
      config, shapes: of the transformer that they are for.

    Raises FileNotFoundError or ValueError, in one line, for what cannot be read, is no LoRA or is another model's.
    """
    if runs.is_run(path):
        return _open_run(path, shapes)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder, expected a LoRA or a run that trained one")
    tensors = read_tensors(path)
    settings = _read_settings(path, tensors)
    names, changes = _modules(config, shapes), {}
    modules, notes = _read_modules(path, tensors, names, settings)
    for module, factors in modules.items():
        found = [entry for entry in names[module] if _fits(factors, rules.source_shape(entry, shapes))]
        entry = found[0] if found else names[module][0]
        _check_fit(path, module, factors, rules.source_shape(entry, shapes))
        changes.setdefault(entry.target, []).append((entry, factors))
    if not changes:
        raise ValueError(f"{path} holds no adapters of this model's transformer: {'; '.join(notes) or 'it is empty'}")
    change_of = lambda parts: lambda kernel: _change(kernel, parts)  # noqa: E731
    return Lora(str(path), {target: change_of(parts) for target, parts in changes.items()}, notes)


def _open_run(run, shapes):
    weights = "ema" if runs.has_average(run, runs.latest_step(run)) else "raw"
    adapters = runs.open_adapters(run, weights)
    changes = {}
    for path, adapter in adapters_by_path(adapters.tree).items():
        inputs, outputs = to_matrices(path, np.broadcast_to(np.float32(0), shapes[path])).shape[-2:]
        if (adapter["a"].shape[-2], adapter["b"].shape[-1]) != (inputs, outputs) or len(shapes[path]) < 1:
            raise ValueError(
                f"{run} has adapters of {path} for {adapter['a'].shape[-2]} inputs and {adapter['b'].shape[-1]} "
                f"outputs, this model has {inputs} and {outputs}: they were trained for another model"
            )
        changes[path] = lambda kernel, path=path, adapter=adapter: adapted(path, kernel, adapter, adapters.lora.scale)
    return Lora(str(run), changes, [])


def _modules(config: MMDiTConfig, shapes: rules.Shapes) -> dict[str, list[Entry]]:
    """{name of a layer, with "_" for ".": the entry of its weight} in every layout.

    A name has two entries where SD3's layer is a part of ours: the modulation of the last block's text half.
    """
    tables = [transformer.unialign_table(config)]
    if config.depth > 1:
        tables += [transformer.sd3_table(layout, config) for layout in ("diffusers", "stability")]
    names = {}
    for entry in itertools.chain.from_iterable(map(rules.expand, tables)):
        if entry.source.endswith(".weight") and entry.target in shapes:
            names.setdefault(entry.source.removesuffix(".weight").replace(".", "_"), []).append(entry)
    return names


def _read_settings(path: Path, tensors: Mapping) -> dict:
    """The settings beside or in a file: adapter_config.json of PEFT, or the metadata that diffusers writes."""
    beside = path / "adapter_config.json" if path.is_dir() else path.parent / "adapter_config.json"
    if beside.is_file() and (path.is_dir() or path.name == "adapter_model.safetensors"):
        return read_json(beside)
    file = next(iter(tensors.values())).file if tensors else path
    if file.suffix in PICKLES:
        return {}
    with safetensors.safe_open(file, "numpy") as opened:
        text = (opened.metadata() or {}).get(METADATA, "")
    if not text or len(text) > MOST_METADATA:
        return {}
    found = parse_json(text, f"{file}: {METADATA}")
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def _read_modules(path, tensors, names, settings) -> tuple[dict[str, Factors], list[str]]:
    found, unknown, passed, pooled = {}, [], [], []
    for key, info in tensors.items():
        kind = next((kind for kind, suffix in SUFFIXES.items() if suffix.search(key)), None)
        if key.startswith(OTHERS):
            passed.append(key)
            continue
        name = SUFFIXES[kind].sub("", key) if kind else ""
        module = _module(name, names) if kind else None
        if module is None and kind and POOLED.search(name):
            pooled.append(key)
            continue
        if module is None:
            unknown.append(key)
            continue
        if kind in found.setdefault(module, {}):
            raise ValueError(f"{path} names the layer {name} twice")
        found[module] |= {kind: info, "name": name}
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors of {len(tensors)} that are no adapters of this model's layers, such "
            f"as {shown(unknown[0], 120)}: it is another model's, or of another kind than LoRA and DoRA"
        )
    modules = {}
    for module, parts in found.items():
        if missing := {"down", "up"} - parts.keys():
            raise ValueError(f"{path} has only one of the two factors of {parts['name']}: {missing.pop()} is missing")
        down, up = (_read(path, parts[kind]) for kind in ("down", "up"))
        if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not 0 < down.shape[0] <= MOST_RANK:
            raise ValueError(
                f"{path}: the factors of {parts['name']} have shapes {down.shape} and {up.shape}, which do not make a "
                "product: expected [rank, in] and [out, rank]"
            )
        rank = down.shape[0]
        if "alpha" in parts:
            scale = float(_read(path, parts["alpha"]).ravel()[0]) / rank
        else:
            scale = _scale_of(path, settings, parts["name"], rank)
        magnitude = _read(path, parts["magnitude"]) if "magnitude" in parts else None
        if magnitude is not None and magnitude.ndim == 2 and magnitude.shape[0] == 1 < magnitude.shape[1]:
            raise ValueError(
                f"{path}: the magnitude of {parts['name']} has shape {magnitude.shape}, a norm for each input, as "
                "LyCORIS writes without wd_on_out: only norms of outputs can be read"
            )
        modules[module] = Factors(down, up, scale, magnitude if magnitude is None else magnitude.ravel())
    told = {"text encoders": passed, "SD3's layers for CLIP's pooled vector, which are not here,": pooled}
    return modules, [
        f"{path}: {len(keys)} tensors of adapters of {what} are passed over, such as {shown(keys[0], 120)}"
        for what, keys in told.items()
        if keys
    ]


def _read(path, info) -> np.ndarray:
    if info.size == 0:
        raise ValueError(f"{path} holds an empty tensor of shape {list(info.shape)}")
    value = safetensors_file.read_tensor(info).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path} holds values that are not finite: the LoRA is damaged, or its training failed")
    return value


def _module(name: str, names: Mapping[str, list[Entry]]) -> str | None:
    """The layer that a file's key names, as `names` has it; None for an unknown one."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    flat = name.replace(".", "_")
    for prefix in FLAT_PREFIXES:
        flat = flat.removeprefix(prefix)
    return flat if flat in names else None


def _scale_of(path, settings: dict, name: str, rank: int) -> float:
    """alpha / rank by PEFT's settings; 1, which means alpha = rank, without them."""
    alpha, patterns = settings.get("lora_alpha", rank), settings.get("alpha_pattern") or {}
    bare = name.removeprefix("base_model.model.").removeprefix("transformer.")
    try:
        for pattern, value in patterns.items():  # as PEFT reads them: the end of a layer's name
            if re.match(rf"(.*\.)?({pattern})$", bare):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"{path}: its settings have no readable lora_alpha: {first_line(error)}") from None


def _fits(factors: Factors, shape) -> bool:
    """Whether the product of the factors has the shape of a layer's weight."""
    return (factors.up.shape[0], *factors.down.shape[1:]) == tuple(shape) and math.prod(factors.up.shape[2:]) == 1


def _check_fit(path, module, factors, shape):
    if not _fits(factors, shape):
        found = [factors.up.shape[0], *factors.down.shape[1:]]
        raise ValueError(
            f"{path}: the adapter of {module} makes a weight of {found}, this model has {list(shape)}: the LoRA "
            "is another model's"
        )
    if factors.magnitude is not None and factors.magnitude.shape != (shape[0],):
        raise ValueError(f"{path}: the magnitude of {module} has {factors.magnitude.size} values, expected {shape[0]}")


def _change(kernel: np.ndarray, parts: list[tuple[Entry, Factors]]) -> np.ndarray:
    kernel = kernel.copy()
    for entry, factors in parts:
        part = kernel[entry.index]
        rank = factors.down.shape[0]
        product = factors.scale * (factors.up.reshape(-1, rank) @ factors.down.reshape(rank, -1))
        product = product.reshape(-1, *factors.down.shape[1:])
        if factors.magnitude is None:
            changed = part + entry.transform.forward(product, part.shape)
        else:
            weight = entry.transform.backward(part) + product
            size = np.sqrt(np.square(weight).sum(axis=tuple(range(1, weight.ndim)), keepdims=True))
            size[size == 0] = 1  # an output without weights has none at any norm
            weight = weight * (factors.magnitude.reshape(size.shape) / size)
            changed = entry.transform.forward(weight, part.shape)
        kernel[entry.index] = changed
    return kernel


# --- Writing ---


def export_lora(
    output: str | Path,
    run: str | Path,
    *,
    layout: str = "diffusers",
    weights: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes the adapters of a run's newest checkpoint as one safetensors file. Returns what had no place, a line each.

    alpha is multiplied into the second factor, so that readers need not know it; Kohya's files have it as their own.

    Args:
      layout: "unialign" has a place for all; "diffusers" and "kohya" lack what SD3 lacks.
      weights: "raw" or "ema"; the average where the run keeps one when None.
      dtype: "float32" (when None), "float16" or "bfloat16".

    Raises ValueError or OSError when there is nothing to write or it cannot be written; `output` is then as it was.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    output = Path(output).absolute()
    if output.suffix != ".safetensors" or output.is_dir():
        raise ValueError(f"{output}: a LoRA is one file, expected a name that ends in .safetensors")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or give --overwrite")
    step = runs.latest_step(run, verify=True)
    weights = weights or ("ema" if runs.has_average(run, step) else "raw")
    adapters = runs.open_adapters(run, weights, step)
    config = runs.component_configs(run, runs.read_settings(run))["transformer"]
    base = runs.open_base(run)
    by_path = adapters_by_path(adapters.tree)
    magnitudes = _magnitudes(by_path, base, adapters.lora.scale) if adapters.lora.dora else {}
    table = {"unialign": transformer.unialign_table}.get(layout) or (
        lambda config: transformer.sd3_table({"kohya": "stability"}.get(layout, layout), config)
    )
    tensors, covered = {}, dict.fromkeys(by_path, 0)
    for entry in rules.expand(table(config)):
        if entry.target not in by_path or not entry.source.endswith(".weight"):
            continue
        covered[entry.target] += math.prod(rules.part_shape(base.shapes[entry.target], entry.index))
        shape = base.shapes[entry.target]
        down, up = _factors(entry, by_path[entry.target], shape)
        magnitude = None
        if magnitudes:
            magnitude = _outputs(entry, magnitudes[entry.target][_outer(entry)].reshape(1, -1), shape)
        tensors |= _named(layout, entry.source.removesuffix(".weight"), down, up, magnitude, adapters.lora)
    kind = DTYPES[dtype or "float32"]
    about = {"rank": adapters.lora.rank, "alpha": adapters.lora.alpha, "targets": adapters.lora.targets}
    about |= {"step": step, "weights": weights, "base": base_model.read_base(run).digest}
    check_space(output, sum(value.size for value in tensors.values()) * kind.itemsize)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        announced = {key: (kind, value.shape) for key, value in tensors.items()}
        with safetensors_file.Writer(output, announced, {"unialign_jax": json.dumps(about)}) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
    except OSError as error:
        bundle.explain_full_disk(error, output)
        raise
    return [
        path if not size else f"{path}, its last block"
        for path, size in covered.items()
        if size < math.prod(base.shapes[path])
    ]


def _magnitudes(by_path, base, scale) -> dict[str, np.ndarray]:
    """The norm that the adapters give every output: (1 + gain) |W|, by the base's weights; see `norm_factors`."""
    magnitudes = {}
    for path, leaf in base.leaves(list(by_path)):
        adapter, matrices = by_path[path], to_matrices(path, np.asarray(leaf, np.float32))
        kept, alone = norms(matrices), norms(scale * (adapter["a"] @ adapter["b"]))
        magnitudes[path] = np.where(kept > 0, (1 + adapter["gain"]) * kept, alone)
    return magnitudes


def _outer(entry: Entry) -> tuple:
    """The index of an entry's matrices among those of its kernel's adapter."""
    return tuple(i for i in entry.index if isinstance(i, int))


def _outputs(entry: Entry, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[rows, outputs of the kernel] -> [outputs of the layer, rows], in the layer's order."""
    lead, inputs = matrix_axes(entry.target)
    blocks = 1 if lead else 0
    sizes = shape[blocks + inputs :]
    if lead == 2 and len(entry.index) > 1:  # one of q, k and v
        sizes = sizes[1:]
    rows = rows.reshape(len(rows), *sizes)
    if isinstance(entry.index[-1] if entry.index else None, slice):  # a part of the modulations
        rows = rows[:, entry.index[-1]]
    return entry.transform.backward(rows).reshape(-1, len(rows))


def _factors(entry: Entry, adapter: dict, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An entry's factors [rank, in] and [out, rank]; those of q, k and v in one layer lie along a diagonal."""
    a, b = (adapter[name][_outer(entry)] for name in ("a", "b"))
    if a.ndim == 3:
        parts, inputs, rank = a.shape
        a = a.swapaxes(0, 1).reshape(inputs, parts * rank)
        wide = np.zeros((parts, rank, parts, b.shape[-1]), np.float32)
        wide[np.arange(parts), :, np.arange(parts)] = b
        b = wide.reshape(parts * rank, -1)
    return a.T, _outputs(entry, b, shape)


def _named(layout, name, down, up, magnitude, lora) -> dict[str, np.ndarray]:
    """A layer's tensors by their keys."""
    if layout == "kohya":
        name = KOHYA_PREFIX + name.replace(".", "_")
        alpha = np.float32(lora.scale * down.shape[0]).reshape(())
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        return tensors if magnitude is None else tensors | {f"{name}.dora_scale": magnitude}
    name = f"transformer.{name}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": np.float32(lora.scale) * up}
    return tensors if magnitude is None else tensors | {f"{name}.lora_magnitude_vector": magnitude[:, 0]}


def merge_lora(
    output: str | Path,
    source: str | Path,
    references: Iterable[tuple[str, float]],
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Writes a bundle with LoRAs merged into its transformer, in the dtypes of `source`. Returns notes, one line each.

    Args:
      source: a bundle.
      references: (file, scale) pairs, merged in this order.

    Raises ValueError or OSError when a LoRA does not fit or the bundle cannot be written.
    """
    config = bundle.read_config(source)
    shapes = transformer_shapes(config, source)
    loras = [(open_lora(path, config.transformer, shapes), scale) for path, scale in references]
    check_space(output, sum(path.stat().st_size for path in Path(source).rglob("*") if path.is_file()))

    def merged(leaves):
        for path, leaf in leaves:
            changed = leaf
            for lora, scale in loras:
                changed = lora(path, changed, scale)
            yield path, changed.astype(leaf.dtype)

    with (
        bundle.Writer(output, overwrite=overwrite) as writer,
        tqdm(unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for name in config.components:
            bar.set_description(name)
            leaves = bundle.read_leaves(source, name)
            leaves = merged(leaves) if name == "transformer" else leaves
            writer.add(name, getattr(config, name), with_progress(leaves, bar))
        if (tokenizer := bundle.tokenizer_path(source)) is not None:
            writer.add_tokenizer(tokenizer, source)
        writer.sizes = {key: getattr(config, key) for key in bundle.SIZES}
        writer.tasks, writer.sampling = config.tasks, config.sampling
        told = [{"file": Path(lora.name).name, "scale": scale} for lora, scale in loras]
        writer.provenance = {"kind": "merged LoRA", "bundle": Path(source).name, "loras": told}
    return [note for lora, _ in loras for note in lora.notes]


def transformer_shapes(config: bundle.BundleConfig, name: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's transformer by path. Raises ValueError where it has none."""
    if config.transformer is None:
        raise ValueError(f"{name} has no transformer, which a LoRA changes")
    abstract = bundle.abstract_params(config, ["transformer"])["transformer"]
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(abstract, sep="/").items()}
