"""Pictures of `shapes` scenes: the scene itself and its maps (edges, depth, keypoints). uint8 RGB arrays."""

import math

import numpy as np
from PIL import Image, ImageDraw

from unialign_jax.data.shapes.scene import Scene, Thing

COLOR_RGB = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 30),
    "purple": (125, 40, 165),
    "orange": (250, 130, 20),
    "cyan": (40, 205, 220),
    "pink": (250, 135, 190),
}
BACKGROUND_RGB = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
DEPTH_LEVELS = (255, 175, 95)  # nearest first; the background, farthest of all, is 0
_SUPERSAMPLING = 4


def draw_scene(scene: Scene, image_size: int) -> np.ndarray:
    """The scene as uint8 [image_size, image_size, 3], antialiased, far things first."""
    colors = {thing: COLOR_RGB[thing.color] for thing in scene.things}
    return _draw(scene.far_to_near(), colors, BACKGROUND_RGB[scene.background], image_size)


def draw_reference(thing: Thing, background: str, image_size: int) -> np.ndarray:
    """One subject alone in the centre, at its own size."""
    alone = Thing(thing.shape, thing.color, thing.size, cell=4)
    return draw_scene(Scene(background, (alone,)), image_size)


def draw_depth(scene: Scene, image_size: int) -> np.ndarray:
    """Depth by draw order: the nearest thing white, those behind it darker, the background black."""
    near_to_far = scene.far_to_near()[::-1]
    levels = {thing: (level,) * 3 for thing, level in zip(near_to_far, DEPTH_LEVELS, strict=False)}
    return _draw(scene.far_to_near(), levels, (0, 0, 0), image_size)


def draw_edges(scene: Scene, image_size: int) -> np.ndarray:
    """The Canny edges of the rendered scene, white on black."""
    edges = canny(draw_scene(scene, image_size))
    return np.repeat(np.where(edges, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def draw_keypoints(scene: Scene, image_size: int) -> np.ndarray:
    """Every thing's skeleton on black: gray bones from its centre to white corner points, the centre red."""
    scale = image_size * _SUPERSAMPLING
    canvas = Image.new("RGB", (scale, scale), (0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    for thing in scene.far_to_near():
        center = np.array(thing.center) * scale
        points = keypoints(thing) * scale
        for point in points:
            pen.line([tuple(center), tuple(point)], fill=(110, 110, 110), width=max(1, scale // 64))
        for point in points:
            _dot(pen, point, scale / 56, (255, 255, 255))
        _dot(pen, center, scale / 48, (255, 40, 40))
    return np.asarray(canvas.reduce(_SUPERSAMPLING))


def keypoints(thing: Thing) -> np.ndarray:
    """The corner points [P, 2] of a thing (of a star its tips, of a circle four points), (x, y) in picture widths."""
    x, y = thing.center
    if thing.shape == "circle":
        offsets = _ring(4, thing.radius, start=0.0)
    elif thing.shape == "star":
        offsets = _outline(thing)[::2]
    elif thing.shape == "cross":
        offsets = _ring(4, 1.05 * thing.radius, start=0.0)
    else:
        offsets = _outline(thing)
    return np.asarray(offsets) + (x, y)


def canny(image: np.ndarray, *, low: float = 8.0, high: float = 20.0) -> np.ndarray:
    """Canny's detector (Canny 1986) in numpy: bool [H, W].

    5 x 5 Gaussian (sigma 1), Sobel gradients of the channel that changes most (so that two colours of one
    brightness still make an edge), thinning along the gradient, and hysteresis between two thresholds.

    Args:
      image: uint8 [H, W, 3].
      low, high: thresholds on the gradient's magnitude in gray levels per pixel; the defaults find every outline.
    """
    taps = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    taps /= taps.sum()
    smooth = _filter(_filter(image.astype(np.float64), taps, axis=0), taps, axis=1)
    difference, average = np.array([-0.5, 0.0, 0.5]), np.array([0.25, 0.5, 0.25])
    gradient_y = _filter(_filter(smooth, difference, axis=0), average, axis=1)
    gradient_x = _filter(_filter(smooth, difference, axis=1), average, axis=0)
    strongest = np.argmax(gradient_x**2 + gradient_y**2, axis=-1)[..., None]
    gradient_y = np.take_along_axis(gradient_y, strongest, axis=-1)[..., 0]
    gradient_x = np.take_along_axis(gradient_x, strongest, axis=-1)[..., 0]
    magnitude = np.hypot(gradient_x, gradient_y)

    # Thinning: keep what is at least as strong as its two neighbours along the gradient (in steps of 45 degrees).
    # Of two equal neighbours one must go, so one of the two comparisons is strict.
    sector = np.round(np.arctan2(gradient_y, gradient_x) / (math.pi / 4)).astype(int) % 4
    padded = np.pad(magnitude, 1)
    height, width = magnitude.shape
    thin = np.zeros_like(magnitude, dtype=bool)
    for number, (step_y, step_x) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = padded[1 + step_y : 1 + step_y + height, 1 + step_x : 1 + step_x + width]
        behind = padded[1 - step_y : 1 - step_y + height, 1 - step_x : 1 - step_x + width]
        thin |= (sector == number) & (magnitude > behind) & (magnitude >= ahead)

    from scipy import ndimage  # here, since it takes a third of a second to import

    weak = thin & (magnitude >= low)
    return ndimage.binary_propagation(thin & (magnitude >= high), np.ones((3, 3)), mask=weak)


def _draw(things, colors, background, image_size: int) -> np.ndarray:
    scale = image_size * _SUPERSAMPLING
    canvas = Image.new("RGB", (scale, scale), background)
    pen = ImageDraw.Draw(canvas)
    for thing in things:
        center = np.array(thing.center) * scale
        if thing.shape == "circle":
            _dot(pen, center, thing.radius * scale, colors[thing])
        else:
            corners = np.asarray(_outline(thing)) * scale + center
            pen.polygon([tuple(corner) for corner in corners], fill=colors[thing])
    return np.asarray(canvas.reduce(_SUPERSAMPLING))


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """The polygon of a thing around its own centre. Reaches differ so that areas look alike."""
    r = thing.radius
    if thing.shape == "square":
        half = 0.88 * r
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if thing.shape == "triangle":
        return _ring(3, 1.20 * r, start=-math.pi / 2)
    if thing.shape == "diamond":
        return [(0.0, -1.2 * r), (0.85 * r, 0.0), (0.0, 1.2 * r), (-0.85 * r, 0.0)]
    if thing.shape == "star":
        tips = _ring(5, 1.22 * r, start=-math.pi / 2)
        notches = _ring(5, 0.55 * r, start=-math.pi / 2 + math.pi / 5)
        return [point for pair in zip(tips, notches, strict=True) for point in pair]
    if thing.shape == "cross":
        arm, half = 1.1 * r, 0.40 * r
        quarter = [(half, -arm), (half, -half), (arm, -half)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
        return corners
    raise ValueError(f"unknown shape {thing.shape!r}")


def _ring(count: int, radius: float, start: float) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _dot(pen: ImageDraw.ImageDraw, center, radius: float, color) -> None:
    x, y = center
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def _filter(values: np.ndarray, taps: np.ndarray, axis: int) -> np.ndarray:
    """Correlation with `taps` along one axis; the border is repeated outwards."""
    reach = len(taps) // 2
    widths = [(reach, reach) if a == axis else (0, 0) for a in range(values.ndim)]
    padded = np.pad(values, widths, mode="edge")
    length = values.shape[axis]
    return sum(tap * np.take(padded, range(i, i + length), axis=axis) for i, tap in enumerate(taps))
