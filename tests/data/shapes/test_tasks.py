"""The procedural world: what the words say is what the pixels show, and every target is the true one."""

import collections
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unialign_jax.data.records import open_records
from unialign_jax.data.shapes import render, tasks
from unialign_jax.data.shapes.scene import Scene, Thing, attributes, oracle_features, sample_scene

NUM = 150
WORDS = {"one": 1, "two": 2, "three": 3}
# The world as the tests know it, written down apart from the code.
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 30),
    "purple": (125, 40, 165),
    "orange": (250, 130, 20),
    "cyan": (40, 205, 220),
    "pink": (250, 135, 190),
}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
PLACES = [a + b for a in ("top", "", "bottom") for b in (" left", "", " right")]
THING = re.compile(
    r"\ban? (small|large) (\w+) (\w+)(?: at the ((?:top|bottom)?(?: ?left| ?right)?|center)(?=,| and| on|$))?"
)


def blobs(image, color):
    """Connected regions of a plain colour: a list of (y, x, area), centre in picture widths."""
    near = np.abs(image.astype(int) - COLORS[color]).max(-1) <= 12
    labels, count = ndimage.label(near)
    found = []
    for i in range(1, count + 1):
        ys, xs = np.nonzero(labels == i)
        if len(ys) >= 5:
            found.append((ys.mean() / len(image), xs.mean() / len(image), len(ys)))
    return found


def place_of(y, x):
    name = PLACES[int(y * 3) * 3 + int(x * 3)].strip()
    return name or "center"


def check_caption(caption, image):
    """Asserts that a caption of a scene says the truth about its picture, by looking at pixels alone."""
    background = re.search(r"on a (\w+) background$", caption).group(1)
    corners = [tuple(image[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]
    assert BACKGROUNDS[background] in corners
    plural = re.match(r"(two|three) (small|large) (\w+) (\w+?)(?:es|s) on a", caption)
    if plural:
        count, size, color, _ = plural.groups()
        found = blobs(image, color)
        assert len(found) == WORDS[count], caption
        assert not any(blobs(image, other) for other in COLORS if other != color)
        return
    told = THING.findall(caption)
    assert 1 <= len(told) <= 3, caption
    seen = {color: blobs(image, color) for color in COLORS}
    assert {color for color, found in seen.items() if found} == {color for _, color, _, _ in told}, caption
    middle = {}
    for size, color, _, place in told:
        y, x, area = max(seen[color], key=lambda blob: blob[2])
        middle[color] = (y, x)
        if place:
            assert place_of(y, x) == place.strip(), caption
        total = sum(area for *_, area in seen[color])
        assert (total > 125) == (size == "large") or 95 < total < 160, (caption, total)
    relation = re.search(r"(left of|right of|above|below)", caption)
    if relation:
        (ay, ax), (by, bx) = (middle[color] for _, color, _, _ in told)
        holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert holds[relation.group(1)], caption


@pytest.mark.parametrize("stream", ["text_to_image", "edit", "personalization"])
def test_captions_are_true(stream):
    for index in range(NUM):
        example = tasks.shapes_example(stream, 0, index)
        assert len(example.caption.split()) <= 31
        check_caption(example.caption, example.image)


def test_text_to_image_varies():
    examples = [tasks.shapes_example("text_to_image", 0, i, image_size=16) for i in range(600)]
    captions = " ".join(example.caption for example in examples)
    for word in ("three", "two", "left of", "right of", "above", "below", "large", "small", *COLORS, *BACKGROUNDS):
        assert word in captions
    assert len({example.caption for example in examples}) > 500


def test_edits_change_what_they_say_and_nothing_else():
    seen = collections.Counter()
    for index in range(NUM):
        example = tasks.shapes_example("edit", 0, index)
        (source,) = example.conditions
        target = example.image
        assert (source != target).any()
        text = example.instruction
        seen[text.split()[0]] += 1
        if recolor := re.fullmatch(r"make the (\w+) (\w+) (\w+)", text):
            old, _, new = recolor.groups()
            assert blobs(source, old) and not blobs(target, old) and blobs(target, new) and not blobs(source, new)
        elif move := re.fullmatch(r"move the (\w+) (\w+) to the (.+)", text):
            color, _, place = move.groups()
            (before,), (after,) = ([max(blobs(im, color), key=lambda b: b[2])] for im in (source, target))
            assert place_of(*after[:2]) == place != place_of(*before[:2])
        elif add := re.fullmatch(r"add a (?:small|large) (\w+) (\w+) at the (.+)", text):
            color, _, place = add.groups()
            assert not blobs(source, color)
            assert place_of(*max(blobs(target, color), key=lambda b: b[2])[:2]) == place
        elif remove := re.fullmatch(r"remove the (\w+) (\w+)", text):
            assert blobs(source, remove.group(1)) and not blobs(target, remove.group(1))
        else:
            old, old_shape, new, new_shape = re.fullmatch(
                r"replace the (\w+) (\w+) with an? (\w+) (\w+)", text
            ).groups()
            assert old_shape != new_shape
            assert not blobs(target, old) and not blobs(source, new)
            assert np.hypot(*np.subtract(blobs(source, old)[0][:2], blobs(target, new)[0][:2])) < 0.12
        # Far from both the thing's old and its new place, every pixel stays.
        changed = ndimage.label(ndimage.binary_dilation((source != target).any(-1), iterations=3))[1]
        assert changed <= 2, text
    assert set(seen) == {"make", "move", "add", "remove", "replace"} and min(seen.values()) > NUM / 10


def test_depth_is_the_draw_order():
    for index in range(200):
        example = tasks.shapes_example("perception", 1, index)
        if example.view != "depth":
            continue
        names = re.search(r"near to far: (.*)", example.caption).group(1).split(", ")
        assert len(names) == len(example.scene.things)
        source, depth = example.conditions[0], example.image[..., 0]
        assert (example.image == depth[..., None]).all()
        levels = []
        for name in names:
            (thing,) = (t for t in example.scene.things if f"{t.size} {t.shape}" == name)
            pixels = np.abs(source.astype(int) - COLORS[thing.color]).max(-1) <= 4
            values, counts = np.unique(depth[pixels], return_counts=True)
            levels.append(int(values[counts.argmax()]))
        assert levels == sorted(levels, reverse=True) and levels[0] == 255 and len(set(levels)) == len(levels)
        assert depth[np.abs(source.astype(int) - BACKGROUNDS[example.scene.background]).max(-1) == 0].max() == 0


def test_near_things_hide_far_ones():
    upper = Thing("square", "red", "large", 1, dy=0.02)
    lower = Thing("square", "blue", "large", 4, dy=-0.02)
    for things in ((upper, lower), (lower, upper)):
        image = render.draw_scene(Scene("white", things), 64)
        middle = round((0.29 - 0.02 + 0.5) / 2 * 64) - 4
        column = image[:, 32]
        blue = np.nonzero((column == COLORS["blue"]).all(-1))[0]
        red = np.nonzero((column == COLORS["red"]).all(-1))[0]
        assert len(blue) > len(red) and blue.min() > red.max() > middle - 12  # the lower one is whole


def test_canny_marks_the_outline_and_only_it():
    for background, color in (("gray", "green"), ("white", "yellow"), ("black", "purple"), ("gray", "cyan")):
        image = render.draw_scene(Scene(background, (Thing("circle", color, "large", 4),)), 64)
        edges = render.canny(image)
        ys, xs = np.nonzero(edges)
        radius = np.hypot(ys - 31.5, xs - 31.5)
        assert np.abs(radius - 0.148 * 64).max() < 1.5
        angles = np.sort(np.arctan2(ys - 31.5, xs - 31.5))
        assert np.diff(angles).max() < 0.35, "the ring is closed"
        assert len(ys) < 1.5 * 2 * np.pi * 0.148 * 64, "one pixel thin"
    assert not render.canny(np.full((32, 32, 3), 77, np.uint8)).any()


def test_canny_hysteresis_keeps_weak_edges_that_touch_strong_ones():
    image = np.zeros((40, 40, 3), np.uint8)
    ramp = np.linspace(12, 120, 40).astype(np.uint8)  # an edge along column 20 that grows from weak to strong
    image[:, 20:] = ramp[:, None, None]
    edges = render.canny(image, low=4.0, high=25.0)
    assert edges[:, 19:21].any(1).all()
    lonely = np.zeros((40, 40, 3), np.uint8)
    lonely[:, 20:] = 40  # a step that is weak everywhere
    assert not render.canny(lonely, low=4.0, high=25.0).any()
    assert render.canny(lonely, low=4.0, high=10.0)[:, 19:21].any(1).all()


@pytest.mark.parametrize("view", ["canny", "pose"])
def test_maps_sit_on_the_things(view):
    for index in range(120):
        example = tasks.shapes_example("perception", 2, index)
        if example.view != view:
            continue
        source = example.conditions[0]
        things = (np.abs(source.astype(int) - BACKGROUNDS[example.scene.background]).max(-1)) > 20
        lit = example.image.max(-1) > 60
        assert lit.any()
        assert not (lit & ~ndimage.binary_dilation(things, np.ones((3, 3)), iterations=2)).any()
        for color in {thing.color for thing in example.scene.things}:
            y, x, _ = max(blobs(source, color), key=lambda b: b[2])
            around = lit[max(0, int(y * 64) - 10) : int(y * 64) + 10, max(0, int(x * 64) - 10) : int(x * 64) + 10]
            assert around.any(), "every thing leaves a mark"


def test_personalization_references_hold_the_subjects():
    counts = collections.Counter()
    for index in range(NUM):
        example = tasks.shapes_example("personalization", 0, index)
        counts[len(example.conditions)] += 1
        places = re.findall(r"the (?:first|second|third) at the ([a-z ]+?)(?=,| and| on)", example.instruction)
        assert len(places) == len(example.conditions)
        assert not any(color in example.instruction for color in COLORS), "the prompt does not give the subject away"
        for reference, place in zip(example.conditions, places, strict=True):
            colors = [color for color in COLORS if blobs(reference, color)]
            assert len(colors) == 1
            y, x, area = max(blobs(reference, colors[0]), key=lambda b: b[2])
            assert place_of(y, x) == "center"
            y, x, target_area = max(blobs(example.image, colors[0]), key=lambda b: b[2])
            assert place_of(y, x) == place
            assert target_area > 0.4 * area
    assert set(counts) == {1, 2, 3} and min(counts.values()) > NUM / 5


def answer_by_looking(question, image):
    """The answer from pixels, or None where the question is about shape."""
    seen = {color: found for color in COLORS if (found := blobs(image, color))}
    if question == "what color is the background?":
        corners = collections.Counter(tuple(map(int, image[y, x])) for y in (0, 31, -1) for x in (0, 31, -1))
        return next(name for name, rgb in BACKGROUNDS.items() if rgb == corners.most_common(1)[0][0])
    if match := re.fullmatch(r"is the (\w+) \w+ small or large\?", question):
        total = sum(area for *_, area in seen[match.group(1)])
        return "large" if total > 140 else "small" if total < 100 else None
    if match := re.fullmatch(r"where is the (\w+) \w+\?", question):
        return place_of(*max(seen[match.group(1)], key=lambda b: b[2])[:2])
    if match := re.fullmatch(r"is the (\w+) \w+ (left of|right of|above|below) the (\w+) \w+\?", question):
        first, relation, second = match.groups()
        (ay, ax), (by, bx) = (max(seen[color], key=lambda b: b[2])[:2] for color in (first, second))
        return (
            "yes" if {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation] else "no"
        )
    if match := re.fullmatch(r"is there an? (\w+) \w+\?", question):
        return None if match.group(1) in seen else "no"
    if match := re.fullmatch(r"how many (\w+) shapes are there\?", question):
        found = seen.get(match.group(1), [])
        return ("zero", "one", "two", "three")[len(found)]
    return None


def test_vqa_answers_are_true_and_balanced():
    examples = [tasks.shapes_example("vqa", 0, i) for i in range(900)]
    looked = 0
    answers = collections.defaultdict(collections.Counter)
    for example in examples:
        expected = answer_by_looking(example.question, example.image)
        if expected is not None:
            looked += 1
            assert expected == example.answer, example.question
        for thing in example.scene.things:  # what the pixels cannot tell, the scene can
            if example.question == f"what color is the {thing.shape}?":
                assert example.answer == thing.color
            if example.question == f"what shape is {thing.color}?":
                assert example.answer == thing.shape
        if match := re.fullmatch(r"is there an? (\w+) (\w+)\?", example.question):
            is_there = match.groups() in {(thing.color, thing.shape) for thing in example.scene.things}
            assert example.answer == ("yes" if is_there else "no")
        if match := re.fullmatch(r"how many (\w+) are there\?", example.question):
            counted = match.group(1)
            count = sum(counted in (f"{t.shape}s", f"{t.shape}es", "shapes") for t in example.scene.things)
            assert example.answer == ("zero", "one", "two", "three")[count]
        topic = re.sub(r"\b(" + "|".join((*COLORS, *tasks.SHAPES)) + r")(es|s)?\b", "*", example.question)
        answers[topic][example.answer] += 1
    assert looked > 350
    assert len(answers) >= 12
    yes_no = [counts for counts in answers.values() if set(counts) == {"yes", "no"}]
    total = sum(yes_no, collections.Counter())
    assert 0.4 < total["yes"] / total.total() < 0.6
    of_a_kind = answers["how many * are there?"] + answers["how many * shapes are there?"]
    assert set(of_a_kind) == {"zero", "one", "two", "three"}
    assert max(of_a_kind.values()) < 2.2 * min(of_a_kind.values())


def test_everything_is_a_function_of_seed_and_index():
    for stream in tasks.STREAMS:
        first = tasks.shapes_record(stream, 3, 17)
        again = tasks.shapes_record(stream, 3, 17)
        assert (first.image, first.conditions, first.caption, first.question) == (
            again.image,
            again.conditions,
            again.caption,
            again.question,
        )
        assert np.array_equal(first.teacher_image, again.teacher_image)
        assert tasks.shapes_record(stream, 4, 17).image != first.image
        assert tasks.shapes_record(stream, 3, 18).image != first.image
    with pytest.raises(ValueError, match="unknown stream 'video'"):
        tasks.shapes_example("video", 0, 0)


def test_the_world_is_pinned():
    """Golden scenes and words: if this fails on purpose, raise WORLD_VERSION and put the new digest here."""
    digest = hashlib.sha256()
    for stream in tasks.STREAMS:
        for index in range(20):
            example = tasks.shapes_example(stream, 0, index, image_size=8)
            words = (example.caption, example.instruction, example.question, example.answer)
            digest.update(repr((words, example.view, example.scene)).encode())
    assert (tasks.WORLD_VERSION, digest.hexdigest()[:16]) == (1, "aa56c7c84dbbeb23")


def test_oracle_features():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(250)]
    image, text = (
        np.stack(part).astype(np.float64) for part in zip(*(oracle_features(s, 64) for s in scenes), strict=True)
    )
    assert image.shape == text.shape == (250, 64)
    assert oracle_features(scenes[0], 64)[0].dtype == np.float16
    # A projection: it is linear in the attributes, of full rank, and keeps their geometry roughly.
    values = np.stack([attributes(scene) for scene in scenes]).astype(np.float64)
    solution, *_ = np.linalg.lstsq(values, image, rcond=None)
    np.testing.assert_allclose(values @ solution, image, atol=0.02)
    assert np.linalg.matrix_rank(image) == 64
    # Zero mean, so that cosine tells scenes apart: unrelated ones average near 0, one thing moved stays near 1.
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    cosine = unit @ unit.T
    off_diagonal = cosine[~np.eye(250, dtype=bool)]
    assert abs(off_diagonal.mean()) < 0.1
    one = Scene("gray", (Thing("star", "red", "small", 0, dx=0.0),))
    shifted = Scene("gray", (Thing("star", "red", "small", 0, dx=0.01),))
    assert np.array_equal(oracle_features(one, 64)[0], oracle_features(shifted, 64)[0])
    # Image and text features are different projections; a map's features differ from the scene's.
    assert not np.allclose(image, text)
    assert not np.allclose(oracle_features(one, 64)[0], oracle_features(one, 64, "canny")[0])
    colors = [Scene("gray", (Thing("star", color, "small", 0),)) for color in ("red", "blue")]
    assert np.array_equal(oracle_features(colors[0], 64, "depth")[0], oracle_features(colors[1], 64, "depth")[0])
    assert not np.array_equal(oracle_features(colors[0], 64)[0], oracle_features(colors[1], 64)[0])


def test_write_shapes(tmp_path):
    assert tasks.write_shapes(tmp_path, 6, seed=2, image_size=32, teacher_width=8) == dict.fromkeys(tasks.STREAMS, True)
    for stream in tasks.STREAMS:
        source = open_records(tmp_path / stream)
        assert len(source) == 6 and source.metadata.kind == stream and source.metadata.teacher_width == 8
        assert "oracle" in source.metadata.parameters["teacher"]
        record = source[5]
        expected = tasks.shapes_record(stream, 2, 5, image_size=32, teacher_width=8)
        assert record.image == expected.image and record.conditions == expected.conditions
        assert record.caption == expected.caption and record.answer == expected.answer
        np.testing.assert_array_equal(record.teacher_text, expected.teacher_text)
        assert Image.open(io.BytesIO(record.image)).size == (32, 32)
    again = tasks.write_shapes(tmp_path, 6, seed=2, image_size=32, teacher_width=8)
    assert again == dict.fromkeys(tasks.STREAMS, False)
    with pytest.raises(FileExistsError, match="exists already"):
        tasks.write_shapes(tmp_path, 6, seed=3, image_size=32, teacher_width=8)
    only = tasks.write_shapes(tmp_path, {"vqa": 4}, image_size=32, teacher_width=0, streams=("vqa",), overwrite=True)
    assert only == {"vqa": True}
    assert open_records(tmp_path / "vqa")[3].teacher_image is None
    assert len(open_records(tmp_path / "edit")) == 6
