"""Fourth stage: clusters the vectors, and chooses images of each cluster that are unlike each other.

Vectors are reduced to 128 principal components and joined by Ward's method (SciPy); above 10,000 images k-means makes
2,000 small clusters first, whose centres are joined. In each cluster images are ordered by k-center (Gonzalez 1985:
always the one that is farthest from those before), from a random first one.

images.jsonl has the images that were chosen, clusters.jsonl every image with its cluster and its place in the order.
"""

import collections
from pathlib import Path

import numpy as np

from unialign_jax.evaluation.building import pictures
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows
from unialign_jax.files import shown

COMPONENTS = 128
MOST_JOINED, SMALL_CLUSTERS = 10_000, 2_000


def parameters(build: Build) -> dict:
    return build.settings.part("duplicate_cosine", "clusters", "per_cluster", "seed", "exclude")


def work(build: Build, folder: Path) -> dict:
    given, rows = build.settings, build.rows("filter/images.jsonl")
    vectors = np.load(build.path("embed/vectors.npy"), allow_pickle=False)
    unknown = sorted(set(given.exclude) - {row["key"] for row in rows})
    if unknown:
        raise ValueError(f"--exclude names {shown(unknown[0])}, which is no image that the filters kept")
    twins = near_duplicates(vectors, given.duplicate_cosine)
    single = [number for number in range(len(rows)) if number not in twins]
    components = principal_components(vectors[single], COMPONENTS)
    labels, cut = clusters_of(components, given.clusters, given.per_cluster, given.seed)
    random = np.random.default_rng(given.seed)
    places: dict[int, dict] = {}
    for cluster in range(given.clusters):
        members = np.flatnonzero(labels == cluster)
        order = k_center(components[members], int(random.integers(len(members))))
        for rank, member in enumerate(members[order]):
            x, y = (round(float(value), 5) for value in components[member, :2])
            places[single[member]] = {"cluster": cluster, "rank": rank, "x": x, "y": y}
    listed, slots = [], collections.defaultdict(list)
    for number, row in enumerate(rows):
        twin = {"duplicate_of": rows[twins[number]]["key"]} if number in twins else {}
        listed.append({"key": row["key"]} | places.get(number, {}) | twin)
        if number in places:
            slots[places[number]["cluster"]].append((places[number]["rank"], row))
    chosen, names = [], labels_of(slots)
    for cluster in range(given.clusters):
        ordered = [row for _, row in sorted(slots[cluster], key=lambda place: place[0])]
        for position, row in enumerate(with_reserves(ordered, given.per_cluster, set(given.exclude), cluster)):
            image_id = cluster * given.per_cluster + position + 1
            chosen.append({"image_id": image_id, "cluster": {"id": cluster, "label": names[cluster]}} | row)
    write_rows(folder / "images.jsonl", chosen)
    write_rows(folder / "clusters.jsonl", listed)
    pictures.draw_scatter(listed, {row["key"] for row in chosen}, names).save(folder / "clusters.png")
    pictures.draw_contact_sheet(chosen, given.per_cluster).save(folder / "contact_sheet.png")
    sizes = [int((labels == cluster).sum()) for cluster in range(given.clusters)]
    said = (
        f"{len(chosen)} images of {given.clusters} clusters with {min(sizes)} to {max(sizes)}, seed {given.seed}; "
        f"{len(twins)} near-duplicates left out; pictures: select/clusters.png, select/contact_sheet.png"
    )
    return {"said": said, "sizes": sizes, "duplicates": len(twins), "cut": cut}


STAGE = Stage("select", ("filter/images.jsonl", "embed/vectors.npy"), parameters, work)


def near_duplicates(vectors: np.ndarray, most: float, block: int = 1024) -> dict[int, int]:
    """{number: an earlier one that stays, and is more alike than the cosine `most`} of vectors of length 1."""
    twins: dict[int, int] = {}
    for begin in range(0, len(vectors), block):
        cosines = vectors[begin : begin + block] @ vectors.T
        for line, column in np.argwhere(cosines > most):
            number, other = int(begin + line), int(column)
            if other < number and number not in twins and other not in twins:
                twins[number] = other
    return twins


def principal_components(vectors: np.ndarray, most: int) -> np.ndarray:
    """The vectors' first `most` principal components, or as many as there are: float64 [n, components]."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    if centred.shape[1] <= len(centred):
        values, axes = np.linalg.eigh(centred.T @ centred)
        components = centred @ axes[:, ::-1]
    else:
        values, axes = np.linalg.eigh(centred @ centred.T)
        components = axes[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0))
    return components[:, :most]


def clusters_of(points: np.ndarray, wanted: int, least: int, seed: int) -> tuple[np.ndarray, int]:
    """(the cluster of each point, 0 to `wanted` - 1; in how many the tree was cut).

    The tree of Ward's method is cut into `wanted` clusters; where some of these have fewer than `least` points, into as
    many as it takes for `wanted` of that size, and the points of the others go to the nearest centre of the largest.
    Clusters are numbered by size.

    Raises ValueError where no cut gives so many.
    """
    if len(points) < wanted * least:
        raise ValueError(
            f"{len(points)} images are left to choose from, fewer than {wanted} clusters with {least} each "
            f"({wanted * least}): give more images, or loosen the filters"
        )
    from scipy.cluster import hierarchy, vq

    small = np.arange(len(points))
    if len(points) > MOST_JOINED:
        _, small = vq.kmeans2(points, SMALL_CLUSTERS, minit="points", rng=np.random.default_rng(seed))
        small = np.unique(small, return_inverse=True)[1]
        points_joined = np.stack([points[small == number].mean(0) for number in range(small.max() + 1)])
    else:
        points_joined = points
    tree = hierarchy.linkage(points_joined, "ward")
    for cut in range(wanted, len(points_joined) + 1):
        joined = hierarchy.fcluster(tree, cut, "maxclust")[small] - 1
        sizes = np.bincount(joined)
        if (sizes >= least).sum() >= wanted:
            break
    else:
        raise ValueError(
            f"no cut of the tree gives {wanted} clusters with {least} images each: give more images or fewer --clusters"
        )
    large = np.argsort(-sizes, kind="stable")[:wanted]
    centres = np.stack([points[joined == number].mean(0) for number in large])
    labels = np.full(len(points), -1)
    for label, number in enumerate(large):
        labels[joined == number] = label
    rest = labels < 0
    if rest.any():
        labels[rest] = np.linalg.norm(points[rest, None] - centres[None], axis=-1).argmin(1)
    return labels, cut


def k_center(points: np.ndarray, first: int) -> list[int]:
    """All points in the order of Gonzalez: each is the one that is farthest from those before it."""
    order = [first]
    distance = np.linalg.norm(points - points[first], axis=1)
    for _ in range(len(points) - 1):
        distance[order[-1]] = -1
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[order[-1]], axis=1))
    return order


def with_reserves(ordered: list[dict], count: int, excluded: set[str], cluster: int) -> list[dict]:
    """The first `count` images; the next ones in the order take the places of those that are excluded.

    So the other images keep their numbers, and what was drafted and reviewed. Raises ValueError without a next one.
    """
    reserves = iter(row for row in ordered[count:] if row["key"] not in excluded)
    chosen = [row if row["key"] not in excluded else next(reserves, None) for row in ordered[:count]]
    if None in chosen:
        raise ValueError(f"cluster {cluster} has no more images to take the places of those that --exclude names")
    return chosen


def labels_of(slots: dict[int, list[tuple[int, dict]]]) -> dict[int, str]:
    """{cluster: the two kinds of objects that set it apart most}; "" where the sources list none."""
    shares = {}
    for cluster, places in slots.items():
        counts = collections.Counter(name for _, row in places for name in set(row["classes"] or ()))
        shares[cluster] = {name: count / len(places) for name, count in counts.items()}
    found = {}
    for cluster, own in shares.items():
        apart = {
            name: share - np.mean([other.get(name, 0) for other in shares.values()]) for name, share in own.items()
        }
        found[cluster] = ", ".join(sorted(apart, key=lambda name: (-apart[name], name))[:2])
    return found
