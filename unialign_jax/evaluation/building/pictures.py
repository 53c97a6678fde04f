"""Pictures of the clusters: a map of all images, and the ones that were chosen."""

import colorsys

from PIL import Image, ImageDraw

from unialign_jax.data.images import load_rgb

SIDE, MARGIN, LEGEND = 900, 30, 320  # pixels of the map
THUMB = 96  # pixels of a thumbnail's side


def color_of(cluster: int) -> tuple[int, int, int]:
    """A colour for each of 15 clusters: neighbours in number differ in brightness too."""
    red, green, blue = colorsys.hsv_to_rgb(cluster / 15, 0.9, (0.9, 0.6)[cluster % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_scatter(listed: list[dict], chosen: set[str], names: dict[int, str]) -> Image.Image:
    """All images by their first two principal components, coloured by cluster; those that were chosen are large."""
    points = [row for row in listed if "x" in row]
    sheet = Image.new("RGB", (SIDE + LEGEND, SIDE), "white")
    pen = ImageDraw.Draw(sheet)
    spans = []
    for axis in "xy":
        values = [row[axis] for row in points]
        low, high = min(values), max(values)
        spans.append((low, (SIDE - 2 * MARGIN) / max(high - low, 1e-9)))
    for row in sorted(points, key=lambda row: row["key"] in chosen):
        x, y = (MARGIN + (row[axis] - low) * scale for axis, (low, scale) in zip("xy", spans, strict=True))
        radius, outline = (7, "black") if row["key"] in chosen else (3, None)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color_of(row["cluster"]), outline=outline)
    for line, cluster in enumerate(sorted(names)):
        top = MARGIN + 24 * line
        pen.rectangle((SIDE, top, SIDE + 14, top + 14), fill=color_of(cluster))
        text = f"{cluster}  {names[cluster]}".encode("latin-1", "replace").decode("latin-1")
        pen.text((SIDE + 22, top), text[:46], fill="black")
    return sheet


def draw_contact_sheet(chosen: list[dict], per_cluster: int) -> Image.Image:
    """A row of thumbnails for each cluster, in the order of the numbers of the images."""
    clusters = sorted({row["cluster"]["id"] for row in chosen})
    sheet = Image.new("RGB", (30 + per_cluster * (THUMB + 4), len(clusters) * (THUMB + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, cluster in enumerate(clusters):
        top = line * (THUMB + 4) + 2
        pen.rectangle((2, top, 24, top + THUMB), fill=color_of(cluster))
        pen.text((6, top + 4), str(cluster), fill="white")
        for column, row in enumerate(row for row in chosen if row["cluster"]["id"] == cluster):
            sheet.paste(thumbnail(row["file"], THUMB), (30 + column * (THUMB + 4), top))
    return sheet


def thumbnail(path: str, side: int) -> Image.Image:
    """An image file fitted into a square."""
    image = load_rgb(path)
    image.thumbnail((side, side))
    return image
