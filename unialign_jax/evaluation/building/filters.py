"""Second stage: leaves out images that are small, long, blurred, badly exposed, poor in objects, or there twice.

rejected.jsonl has a line for each, with all its reasons.
"""

import collections
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows

BLACK, WHITE = 5, 250  # greys at most and at least


def parameters(build: Build) -> dict:
    names = ("min_side", "min_aspect", "max_aspect", "min_sharpness", "min_brightness", "max_brightness")
    return build.settings.part(*names, "max_clipped", "min_classes")


def work(build: Build, folder: Path) -> dict:
    rows, kept, rejected, first = build.rows("ingest/images.jsonl"), [], [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measures = pool.map(measured, (row["file"] for row in rows))
        for row, measure in tqdm(zip(rows, measures, strict=True), "filter", len(rows), unit="image", disable=None):
            reasons = [measure] if isinstance(measure, str) else faults(measure, row["classes"], build.settings)
            if row["sha256"] in first:
                reasons = [*reasons, f"duplicate: the same file as {first[row['sha256']]}"]
            first.setdefault(row["sha256"], row["key"])
            if reasons:
                rejected.append({"key": row["key"], "reasons": reasons})
            else:
                kept.append(row | measure)
    write_rows(folder / "images.jsonl", kept)
    write_rows(folder / "rejected.jsonl", rejected)
    counts = collections.Counter(reason.partition(":")[0] for row in rejected for reason in row["reasons"])
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    said = f"{len(kept)} of {len(rows)} images" + (f" ({listed})" if listed else "")
    unlisted = sum(row["classes"] is None for row in kept)
    if unlisted:
        said += f"; of {unlisted} the source lists no objects, and that rule was left out"
    if not kept:
        raise ValueError(f"the filters leave no image of {len(rows)}: {listed}")
    return {"said": said, "kept": len(kept), "rejected": dict(counts), "without_classes": unlisted}


STAGE = Stage("filter", ("ingest/images.jsonl",), parameters, work)


def measured(path: str) -> dict | str:
    """What `measure` says of an image file, or why it cannot be read."""
    try:
        return measure(np.asarray(load_rgb(path).convert("L")))
    except (ValueError, OSError) as error:
        return f"unreadable: {error}"


def measure(grey: np.ndarray) -> dict:
    """Figures of a grey image, uint8 [height, width].

    Sharpness is the variance of the Laplacian (4 neighbours) over the pixels that are not at the border.
    """
    height, width = grey.shape
    values = grey.astype(np.float32)
    inner = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    return {
        "width": width,
        "height": height,
        "sharpness": round(float(inner.var()), 2) if inner.size else 0.0,
        "brightness": round(float(values.mean()), 2),
        "clipped": round(float(max((grey <= BLACK).mean(), (grey >= WHITE).mean())), 4),
    }


def faults(found: dict, classes: Iterable[str] | None, given: Settings) -> list[str]:
    """The reasons against an image, "RULE: what was found"."""
    side, aspect, reasons = min(found["width"], found["height"]), found["width"] / found["height"], []
    if side < given.min_side:
        reasons.append(f"side: {side} pixels, expected at least {given.min_side}")
    if not given.min_aspect <= aspect <= given.max_aspect:
        reasons.append(f"aspect: {aspect:.3f}, expected {given.min_aspect} to {given.max_aspect}")
    if found["sharpness"] < given.min_sharpness:
        reasons.append(f"blur: variance of the Laplacian {found['sharpness']}, expected at least {given.min_sharpness}")
    if not given.min_brightness <= found["brightness"] <= given.max_brightness:
        expected = f"{given.min_brightness:g} to {given.max_brightness:g}"
        reasons.append(f"exposure: mean grey {found['brightness']}, expected {expected}")
    if found["clipped"] > given.max_clipped:
        reasons.append(f"exposure: {found['clipped']:.1%} black or white, expected at most {given.max_clipped:.0%}")
    if classes is not None and len(set(classes)) < given.min_classes:
        reasons.append(f"objects: {len(set(classes))} kinds, expected at least {given.min_classes}")
    return reasons
