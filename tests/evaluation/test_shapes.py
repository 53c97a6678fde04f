"""The detector of the shapes world, its words read back, and the scores, against scenes whose truth is known."""

import dataclasses

import numpy as np
import pytest

from unialign_jax.data.shapes import words
from unialign_jax.data.shapes.detector import detect
from unialign_jax.data.shapes.render import draw_scene
from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene
from unialign_jax.data.shapes.tasks import caption_scene, shapes_example
from unialign_jax.evaluation import shapes

SEED = 77


def what(scene):
    """A scene without the shifts inside the cells."""
    return scene.background, sorted((t.cell, t.shape, t.color, t.size) for t in scene.things)


def changed(scene, rng):
    """The scene with one attribute of one thing, or the background, changed."""
    name = ("shape", "color", "size", "cell", "background")[rng.integers(5)]
    if name == "background":
        return Scene(rng.choice([b for b in BACKGROUNDS if b != scene.background]), scene.things)
    thing = scene.things[rng.integers(len(scene.things))]
    values = {"shape": SHAPES, "color": COLORS, "size": SIZES, "cell": range(9)}[name]
    taken = {t.cell for t in scene.things} if name == "cell" else {getattr(thing, name)}
    value = rng.choice([v for v in values if v not in taken])
    value = int(value) if name == "cell" else str(value)
    return Scene(
        scene.background, tuple(dataclasses.replace(t, **{name: value}) if t is thing else t for t in scene.things)
    )


@pytest.mark.slow
def test_true_pictures_are_read_as_they_are_and_changed_ones_are_not():
    """At least 0.99 of true renderings; none of the pictures that differ in one attribute from what is claimed."""
    rng = np.random.default_rng(0)
    right, fooled, count = 0, 0, 100
    for index in range(count):
        scene = shapes_example("text_to_image", SEED, index, image_size=8).scene
        claim = shapes.claim_of(scene)
        found = detect(draw_scene(scene, 64))
        right += what(found.scene) == what(scene) and found.is_clean
        fooled += shapes.score_text_to_image(draw_scene(changed(scene, rng), 64), claim)["exact"]
    assert right >= 0.99 * count and fooled == 0


def test_what_a_scene_does_not_say_is_not_clean():
    scene = shapes_example("text_to_image", SEED, 3, image_size=8).scene
    image = draw_scene(scene, 64)
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 30, image.shape), 0, 255).astype(np.uint8)
    assert detect(image).is_clean and not detect(noisy).is_clean
    assert detect(np.full((64, 64, 3), 128, np.uint8)).scene == Scene("gray", ())


def test_a_slightly_blurred_picture_is_read_too():
    scene = shapes_example("text_to_image", SEED, 5, image_size=8).scene
    image = draw_scene(scene, 64).astype(int)
    blurred = sum(np.roll(image, (dy, dx), (0, 1)) for dy in (0, 1) for dx in (0, 1)) // 4
    assert what(detect(blurred.astype(np.uint8)).scene) == what(scene)


def test_other_pictures_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        detect(np.zeros((64, 32, 3), np.uint8))


@pytest.mark.parametrize("stream", ["text_to_image", "edit", "perception", "personalization"])
def test_every_caption_of_the_world_parses_and_is_true(stream):
    for index in range(300):
        example = shapes_example(stream, SEED, index, image_size=8)
        claim = words.parse_caption(example.caption)
        assert claim is not None and words.is_true(claim, example.scene, example.view), example.caption


def test_a_caption_of_another_scene_is_false():
    scenes = [shapes_example("text_to_image", SEED, i, image_size=8).scene for i in range(60)]
    for scene, other in zip(scenes, scenes[1:], strict=False):
        claim = words.parse_caption(caption_scene(scene))
        assert words.is_true(claim, other) == (what(scene) == what(other))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red star",
        "a large red star at the left",
        "a large red star at the left on a pink background",
        "four large red stars on a gray background",
        "two large red star on a gray background",
        "a large red star at the left and on a gray background",
        "a red large star at the left on a gray background",
        "a depth map from near to far: small red star",
    ],
)
def test_what_is_no_sentence_of_the_world(text):
    assert words.parse_caption(text) is None


def test_a_relation_may_hold_for_either_order_but_not_the_opposite():
    things = [t for t in shapes_example("vqa", SEED, 0, image_size=8).scene.things][:1]
    left = dataclasses.replace(things[0], cell=3, shape="star", color="red", size="large")
    right = dataclasses.replace(things[0], cell=5, shape="cross", color="blue", size="small")
    scene = Scene("gray", (left, right))
    tell = lambda text: words.is_true(words.parse_caption(text), scene)  # noqa: E731
    assert tell("a large red star left of a small blue cross on a gray background")
    assert tell("a small blue cross right of a large red star on a gray background")
    assert not tell("a large red star right of a small blue cross on a gray background")
    assert not tell("a large red star above a small blue cross on a gray background")


def test_every_question_has_its_topic():
    topics = {words.question_topic(shapes_example("vqa", SEED, i, image_size=8).question) for i in range(200)}
    assert topics == {"count", "count of", "color", "shape", "size", "background", "exists", "relation", "position"}
    assert words.question_topic("why?") == "other"


def test_scores_of_true_maps_and_edits_are_one_and_of_wrong_ones_are_not():
    score = {"canny": shapes.score_edges, "depth": shapes.score_depth, "pose": shapes.score_keypoints}
    for index in range(12):
        example = shapes_example("perception", SEED, index)
        assert all(value == 1 for value in score[example.view](example.image, example.image).values())
        assert all(value < 0.5 for value in score[example.view](np.zeros_like(example.image), example.image).values())
        edit = shapes_example("edit", SEED, index)
        source = edit.conditions[0]
        assert shapes.score_edit(edit.image, source, edit.image, edit.scene) == {"exact": True, "unchanged": True}
        assert shapes.score_edit(source, source, edit.image, edit.scene) == {"exact": False, "unchanged": True}
        assert not shapes.score_edit(source + np.uint8(100), source, edit.image, edit.scene)["unchanged"]


def test_a_summary_has_means_and_standard_errors():
    found = shapes.summary([{"a": True, "b": 1.0}, {"a": False}, {"a": True}, {"a": True}])
    assert found["a"]["mean"] == 0.75 and found["a"]["count"] == 4 and found["b"]["count"] == 1
    assert found["a"]["standard_error"] == pytest.approx(0.25)  # sqrt(0.25 / 4)
