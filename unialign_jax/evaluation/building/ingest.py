"""First stage: lists the images that there are, with their captions, kinds of objects and licences.

Sources are COCO (annotations/instances_SPLIT.json, captions_SPLIT.json, SPLIT/), folders of images (a caption in a
`.txt` beside an image), and JSON lists (JSONL) with `image` (relative to the list), and if you have them `caption` or
`captions`, `classes`, `license`, `license_url`, `url` and `author`.
"""

import collections
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from unialign_jax.evaluation.building.stages import Build, Stage, read_rows, write_rows
from unialign_jax.files import check_regular, parse_json, sha256, shown

MAX_ANNOTATIONS = 2**31  # bytes; those of COCO's training images have 470 million
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def parameters(build: Build) -> dict:
    given = build.settings
    digests = {}
    if given.coco:
        digests = {str(path): sha256(path) for path in coco_files(given.coco, given.split)}
    for source in given.images:
        path = Path(source)
        if path.is_dir():
            found = [(str(file.relative_to(path)), file.stat().st_size) for file in listed(path)]
            digests[source] = found
        else:
            check_regular(path)
            digests[source] = sha256(path)
    return given.part("coco", "split", "images", "licenses", "image_license") | {"sources": digests}


def work(build: Build, folder: Path) -> dict:
    given, rows, rejected = build.settings, [], []
    if not given.coco and not given.images:
        raise ValueError("no images are named: give --coco=DIR, --images=PATH, or both")
    if given.coco:
        rows += read_coco(given.coco, given.split)
    for source in given.images:
        rows += read_folder(Path(source)) if Path(source).is_dir() else read_list(Path(source))
    kept = []
    for row in rows:
        if not row["license"] and row["license_id"] is None:
            row["license"] = given.image_license
        if given.licenses and not {str(row["license_id"]), row["license"]} & set(given.licenses):
            named = row["license"] or "none that is stated"
            rejected.append({"key": row["key"], "reasons": [f"license {row['license_id']} ({named}) is not asked for"]})
        else:
            kept.append(row)
    check_unique(kept)
    if not kept:
        raise ValueError(f"none of {len(rows)} images has a license that --licenses names")
    for row in tqdm(kept, desc="ingest", unit="image", disable=None):
        row["sha256"] = sha256(row["file"])
    write_rows(folder / "images.jsonl", kept)
    write_rows(folder / "rejected.jsonl", rejected)
    counts = collections.Counter(row["license"] or "not stated" for row in kept)
    said = f"{len(kept)} images" + (f", {len(rejected)} left out for their licenses" if rejected else "")
    return {"said": said, "images": len(kept), "rejected": len(rejected), "licenses": dict(counts)}


STAGE = Stage("ingest", (), parameters, work)


def entry(key: str, dataset: str, file: Path, **facts) -> dict:
    """An image as images.jsonl has it; `facts` replace what is not known."""
    unknown = {"license_id": None, "license": "", "license_url": "", "url": "", "author": "", "coco_image_id": None}
    return {"key": key, "dataset": dataset, "file": str(file), "captions": [], "classes": None} | unknown | facts


def coco_files(coco: str, split: str) -> list[Path]:
    """The two annotation files. Raises FileNotFoundError, in one line, where one is missing."""
    folder = Path(coco)
    paths = [folder / "annotations" / f"{name}_{split}.json" for name in ("instances", "captions")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no such file; --coco names a folder with annotations/ and {split}/, which "
                f"annotations_trainval2017.zip and {split}.zip of cocodataset.org unpack to"
            )
    return paths


def read_coco(coco: str, split: str) -> list[dict]:
    """The images of COCO. Raises ValueError or OSError, in one line, for other files and for missing images."""
    instances, captions = (read_annotations(path) for path in coco_files(coco, split))
    try:
        categories = {category["id"]: category["name"] for category in instances["categories"]}
        licenses = {found["id"]: found for found in instances["licenses"]}
        classes, texts = collections.defaultdict(set), collections.defaultdict(list)
        for annotation in instances["annotations"]:
            classes[annotation["image_id"]].add(categories[annotation["category_id"]])
        for annotation in captions["annotations"]:
            texts[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        rows = []
        for image in instances["images"]:
            license_of = licenses.get(image["license"], {})
            file = Path(coco) / split / image["file_name"]
            rows.append(
                entry(
                    f"coco/{Path(image['file_name']).stem}",
                    f"COCO {split}",
                    file.absolute(),
                    captions=texts[image["id"]],
                    classes=sorted(classes[image["id"]]),
                    license_id=image["license"],
                    license=license_of.get("name", ""),
                    license_url=license_of.get("url", ""),
                    url=image.get("flickr_url", ""),
                    coco_image_id=image["id"],
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{coco}: the annotations of {split} are not as COCO's: no {shown(error)}") from None
    if any(Path(row["file"]).parent != (Path(coco) / split).absolute() for row in rows):
        raise ValueError(f"{coco}: a file name in the annotations of {split} leads out of {split}/")
    missing = [row["file"] for row in rows if not Path(row["file"]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{Path(coco) / split} lacks {len(missing)} of {len(rows)} images of the annotations, such as "
            f"{Path(missing[0]).name}: download {split}.zip of cocodataset.org whole"
        )
    return rows


def read_annotations(path: Path) -> dict:
    check_regular(path, MAX_ANNOTATIONS)
    return parse_json(path.read_bytes(), str(path))


def listed(folder: Path) -> Iterator[Path]:
    """The images of a folder and its subfolders, in the order of their names."""
    return iter(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))


def read_folder(folder: Path) -> list[dict]:
    """The images of a folder, each with the caption beside it."""
    rows = []
    for path in listed(folder):
        text = path.with_suffix(".txt")
        try:
            captions = [" ".join(text.read_text().split())] if text.is_file() else []
        except UnicodeDecodeError:
            raise ValueError(f"{text} is no text: it is not UTF-8") from None
        inside = path.relative_to(folder).as_posix()
        rows.append(entry(f"{folder.name}/{inside}", folder.name, path.absolute(), captions=captions))
    if not rows:
        raise ValueError(f"--images={folder} holds no image ({', '.join(SUFFIXES)})")
    return rows


def read_list(path: Path) -> list[dict]:
    """The images of a JSON list. Raises ValueError or OSError, in one line that names the line."""
    rows = []
    for number, found in enumerate(read_rows(path), start=1):
        name = f"{path}, line {number}"
        if not isinstance(found.get("image"), str):
            raise ValueError(f"{name} has no `image`, the path of an image as a string")
        captions = found.get("captions", found.get("caption", []))
        captions, classes = [captions] if isinstance(captions, str) else captions, found.get("classes")
        for key, value in (("captions", captions), ("classes", [] if classes is None else classes)):
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise ValueError(f"{name}: {key} is {shown(value)}, expected a list of strings")
        texts = {key: found.get(key, "") for key in ("license", "license_url", "url", "author")}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise ValueError(f"{name}: {key} is {shown(value)}, expected a string")
        file = (path.parent / found["image"]).absolute()
        try:
            check_regular(file)
        except (OSError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        # Keys are published: they hold no folders of the user's.
        inside = found["image"] if file.is_relative_to(path.parent.absolute()) else file.name
        key = f"{path.stem}/{inside}"
        rows.append(entry(key, path.stem, file, captions=captions, classes=classes, **texts))
    if not rows:
        raise ValueError(f"--images={path} lists no image")
    return rows


def check_unique(rows: list[dict]) -> None:
    seen = set()
    for row in rows:
        if row["key"] in seen:
            raise ValueError(
                f"the image {row['key']} is there twice: name each image once, and folders by unlike names"
            )
        seen.add(row["key"])
