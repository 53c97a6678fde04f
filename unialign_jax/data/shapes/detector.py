"""Reads a picture of the shapes world: which things stand where, exactly or not at all.

Detection is by synthesis: for each cell of the grid all shapes, sizes, colours and small shifts are drawn, and what
explains the picture best is kept, as long as it explains the picture better than leaving the cell empty. Things
overlap their neighbours' cells, so the cells are fitted again, each with the others in place, until nothing changes.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from unialign_jax.data.shapes.render import BACKGROUND_RGB, COLOR_RGB, draw_scene
from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, GRID, SHAPES, SIZES, Scene, Thing

SHIFTS = (-0.022, -0.011, 0.0, 0.011, 0.022)  # of a thing in its cell, in picture widths; scenes draw within +-0.022
# A thing must lower the picture's squared error by this share of what its own full-contrast drawing would.
LEAST_GAIN = 0.35
RIVALS = 40  # things of a cell that are tried in the full drawing
# The mean absolute difference, in grey levels, between a picture and the drawing of what was found in it.
CLEAN = 6.0


class Detection(NamedTuple):
    """What a picture shows.

    `residual` is the mean absolute difference, in grey levels, between the picture and the drawing of `scene`; above
    `CLEAN` the picture holds what the scene does not say (a blob, a thing of no known shape, noise).
    """

    scene: Scene
    residual: float

    @property
    def is_clean(self) -> bool:
        return self.residual <= CLEAN


def detect(image: np.ndarray) -> Detection:
    """The scene that explains a picture best, uint8 [S, S, 3].

    Raises ValueError for another shape or dtype.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 [S, S, 3]")
    size = image.shape[0]
    picture = image.astype(np.float32)
    background = _background(picture)
    ground = np.broadcast_to(np.float32(BACKGROUND_RGB[background]), picture.shape)
    found: dict[int, Thing] = {}
    for _ in range(4):
        before = dict(found)
        for cell in range(GRID * GRID):
            found.pop(cell, None)
            # The others first, as if all were behind this one: what hides it is corrected by the drawing at the end.
            behind = _compose(ground, found.values(), size)
            thing, gain = _best_thing(picture, behind, cell, size)
            if gain > 0:
                found[cell] = thing
        if found == before:
            break
    found = _refine(picture, background, found, size)
    scene = Scene(background, tuple(sorted(found.values(), key=lambda thing: thing.cell)))
    return Detection(scene, _residual(picture, background, found, size))


def _residual(picture, background, found, size) -> float:
    return float(np.abs(picture - draw_scene(Scene(background, tuple(found.values())), size)).mean())


def _refine(picture, background, found, size):
    """Tries each thing's nearest rivals in the full drawing, where things hide one another."""
    if len(found) < 2:
        return found
    for cell, thing in list(found.items()):
        others = [other for other in found.values() if other is not thing]
        ground = np.broadcast_to(np.float32(BACKGROUND_RGB[background]), picture.shape)
        rivals = _ranked(picture, _compose(ground, others, size), cell, thing.color, size)[:RIVALS]
        errors = [_residual(picture, background, found | {cell: rival}, size) for rival in rivals]
        if min(errors) < _residual(picture, background, found, size):
            found[cell] = rivals[int(np.argmin(errors))]
    return found


def _background(picture: np.ndarray) -> str:
    """The background whose colour most pixels are nearest to, of all backgrounds and colours of things."""
    palette = np.float32([*BACKGROUND_RGB.values(), *COLOR_RGB.values()])
    distances = np.stack([np.square(picture - color).sum(-1) for color in palette])
    counts = np.bincount(distances.argmin(0).ravel(), minlength=len(palette))[: len(BACKGROUNDS)]
    return BACKGROUNDS[int(counts.argmax())]


class _Templates(NamedTuple):
    """All things that can stand in a cell: how much of each pixel they cover, in a window around the cell."""

    window: tuple[slice, slice]
    masks: np.ndarray  # float32 [T, h, w]
    things: list[Thing]  # colour not yet known: "red"


@functools.cache
def _templates(cell: int, size: int) -> _Templates:
    reach = 0.215  # the largest thing, shifted, in picture widths
    probe = Thing("circle", "red", "large", cell)
    x, y = probe.center
    edges = [
        slice(max(0, int((center - reach) * size)), min(size, int(np.ceil((center + reach) * size))))
        for center in (y, x)
    ]
    masks, things = [], []
    for shape, name, dx, dy in itertools.product(SHAPES, SIZES, SHIFTS, SHIFTS):
        thing = Thing(shape, "red", name, cell, dx, dy)
        drawn = draw_scene(Scene("black", (thing,)), size)[edges[0], edges[1], 0]
        masks.append(drawn.astype(np.float32) / COLOR_RGB["red"][0])
        things.append(thing)
    return _Templates((edges[0], edges[1]), np.stack(masks), things)


def _mask(thing: Thing, size: int) -> np.ndarray:
    alone = Scene("black", (Thing(thing.shape, "red", thing.size, thing.cell, thing.dx, thing.dy),))
    return draw_scene(alone, size)[..., :1].astype(np.float32) / COLOR_RGB["red"][0]


def _compose(ground: np.ndarray, things, size: int) -> np.ndarray:
    """The things drawn over the ground, far ones first."""
    picture = ground
    for thing in Scene("black", tuple(things)).far_to_near():
        mask = _mask(thing, size)
        picture = picture * (1 - mask) + mask * np.float32(COLOR_RGB[thing.color])
    return picture


def _ranked(picture, behind, cell, color, size) -> list[Thing]:
    """Things of one colour that can stand in a cell, those that explain it best over what is behind it first."""
    window, masks, things = _templates(cell, size)
    under = behind[window]
    drawn = under + masks[..., None] * (np.float32(COLOR_RGB[color]) - under)
    errors = np.square(picture[window] - drawn).sum((1, 2, 3))
    order = np.argsort(errors)
    return [Thing(t.shape, color, t.size, cell, t.dx, t.dy) for t in (things[i] for i in order)]


def _best_thing(picture, behind, cell, size) -> tuple[Thing, float]:
    """The thing that explains a cell best over what is behind it, and its gain less the least that it needs."""
    window, masks, things = _templates(cell, size)
    target, under = picture[window], behind[window]
    # With coverage m and colour c the error is |target - under - m (c - under)|^2, less |target - under|^2 without it.
    wanted = (target - under).reshape(-1, 3)
    flat = masks.reshape(len(masks), -1)
    best = (-np.inf, None)
    for color in COLORS:
        step = (np.float32(COLOR_RGB[color]) - under).reshape(-1, 3)
        cross = flat @ (wanted * step).sum(-1)
        power = np.square(flat) @ np.square(step).sum(-1)
        gains = 2 * cross - power
        number = int(gains.argmax())
        # A thing that is there exactly gains its own power.
        score = float(gains[number] - LEAST_GAIN * power[number])
        key = (float(gains[number]), score)
        if key[0] > best[0]:
            thing = things[number]
            best = (key[0], (Thing(thing.shape, color, thing.size, cell, thing.dx, thing.dy), score))
    thing, score = best[1]
    return thing, score
