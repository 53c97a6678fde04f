"""Scenes of the procedural world `shapes`: what there is to see, and the oracle features that say it in numbers."""

import functools
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "white")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
VIEWS = ("photo", "canny", "depth", "pose")

GRID = 3
RADIUS = {"small": 0.090, "large": 0.148}  # in picture widths
_CELL_CENTERS = (0.21, 0.50, 0.79)
_JITTER = 0.022

# The oracle must be the same function for every data set, so its seed is a constant and no data set's seed.
_ORACLE_SEED = 20250923


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `cell` is row * 3 + column; dx and dy shift it within the cell, in picture widths."""

    shape: str
    color: str
    size: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in picture widths, y downwards."""
        row, column = divmod(self.cell, GRID)
        return _CELL_CENTERS[column] + self.dx, _CELL_CENTERS[row] + self.dy

    @property
    def radius(self) -> float:
        return RADIUS[self.size]

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """One to three things in different cells on a plain background."""

    background: str
    things: tuple[Thing, ...]

    def far_to_near(self) -> tuple[Thing, ...]:
        """The draw order. As on a floor seen from the front, what reaches lower in the picture is nearer."""
        return tuple(sorted(self.things, key=lambda thing: (thing.center[1] + thing.radius, thing.cell)))


def sample_scene(rng: np.random.Generator, *, num_things: int | None = None, alike: bool = False) -> Scene:
    """A random scene.

    Args:
      num_things: 1 to 3; None draws it uniformly.
      alike: all things share shape, colour and size ("three small red stars"). Otherwise no two things share a
        shape and no two share a colour, so that "the star" and "the red one" always name one thing.
    """
    if num_things is None:
        num_things = int(rng.integers(1, 4))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    cells = rng.permutation(GRID * GRID)[:num_things]
    while alike and _any_touching(cells):  # two of one colour that touch would look like one
        cells = rng.permutation(GRID * GRID)[:num_things]
    shapes = rng.permutation(len(SHAPES))[:num_things]
    colors = rng.permutation(len(COLORS))[:num_things]
    sizes = rng.integers(len(SIZES), size=num_things)
    if alike:
        shapes[:], colors[:], sizes[:] = shapes[0], colors[0], sizes[0]
    jitter = np.round(rng.uniform(-_JITTER, _JITTER, size=(num_things, 2)), 4)
    things = tuple(
        Thing(SHAPES[shapes[i]], COLORS[colors[i]], SIZES[sizes[i]], int(cells[i]), *map(float, jitter[i]))
        for i in range(num_things)
    )
    return Scene(background, things)


def attributes(scene: Scene, view: str = "photo") -> np.ndarray:
    """The scene's true attributes as one vector, float32 [A].

    Every block is a one-hot code less its mean over a uniform draw, so that over many scenes each entry averages
    near zero and the cosine between two scenes says how alike they are. Besides single attributes, the products
    shape x colour, shape x cell and colour x cell say what belongs to what.

    Args:
      view: "photo", or the map the picture shows instead of the scene: "canny", "depth" or "pose". A map shows
        neither colours nor the background, so those blocks are zero.
    """
    shows_color = view == "photo"
    shape = np.zeros(len(SHAPES))
    color = np.zeros(len(COLORS))
    size = np.zeros(len(SIZES))
    cell = np.zeros(GRID * GRID)
    shape_color = np.zeros((len(SHAPES), len(COLORS)))
    shape_cell = np.zeros((len(SHAPES), GRID * GRID))
    color_cell = np.zeros((len(COLORS), GRID * GRID))
    for thing in scene.things:
        is_shape = _centered(SHAPES.index(thing.shape), len(SHAPES))
        is_color = _centered(COLORS.index(thing.color), len(COLORS)) * shows_color
        is_cell = _centered(thing.cell, GRID * GRID)
        shape += is_shape
        color += is_color
        size += _centered(SIZES.index(thing.size), len(SIZES))
        cell += is_cell
        shape_color += np.outer(is_shape, is_color)
        shape_cell += np.outer(is_shape, is_cell)
        color_cell += np.outer(is_color, is_cell)
    background = _centered(BACKGROUNDS.index(scene.background), len(BACKGROUNDS)) * shows_color
    count = _centered(len(scene.things) - 1, 3)
    seen_as = _centered(VIEWS.index(view), len(VIEWS)) if view != "photo" else np.zeros(len(VIEWS))
    blocks = (background, count, seen_as, shape, color, size, cell, shape_color, shape_cell, color_cell)
    return np.concatenate([block.ravel() for block in blocks]).astype(np.float32)


def oracle_features(scene: Scene, width: int, view: str = "photo") -> tuple[np.ndarray, np.ndarray]:
    """(image features, text features), each float16 [width]: two fixed random projections of `attributes`.

    They stand in for the frozen teacher's. The projections are random and depend on `width` alone.
    """
    values = attributes(scene, view)
    projections = _oracle_projections(len(values), width)
    return tuple((values @ projection).astype(np.float16) for projection in projections)


@functools.cache
def _oracle_projections(num_attributes: int, width: int) -> np.ndarray:
    rng = np.random.default_rng([_ORACLE_SEED, width])
    return rng.standard_normal((2, num_attributes, width), dtype=np.float32)


def _any_touching(cells: np.ndarray) -> bool:
    """Whether two cells are side by side or one above the other."""
    rows, columns = np.divmod(cells, GRID)
    distances = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns)
    return bool((distances == 1).any())


def _centered(index: int, size: int) -> np.ndarray:
    values = np.full(size, -1.0 / size)
    values[index] += 1.0
    return values
