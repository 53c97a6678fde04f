"""GenEval's rules on hand-worked cases, a few for every tag."""

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation.objects import Found, check, confident, crop, relations

IMAGE = Image.new("RGB", (100, 100), "red")


def thing(box=(0, 0, 10, 10), confidence=0.95, mask=None):
    return Found(tuple(map(float, box)), confidence, mask)


def at(x, y, size=10):
    """An object of size x size around a centre."""
    return thing((x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def no_colors(image, found, name):
    raise AssertionError("no color was asked for")


def verdict(objects, wanted, read_colors=no_colors, tag="single_object"):
    return check(IMAGE, confident(objects, tag), wanted, read_colors)


def test_an_object_counts_above_its_threshold():
    wanted = {"include": [{"class": "cow", "count": 1}]}
    assert verdict({"cow": [thing(confidence=0.31)]}, wanted) == (True, "")
    assert verdict({"cow": [thing(confidence=0.3)]}, wanted) == (False, "expected cow>=1, found 0")
    assert verdict({"dog": [thing()]}, wanted) == (False, "expected cow>=1, found 0")
    # More of them do no harm: a single object has no `exclude`.
    assert verdict({"cow": [thing()] * 3}, wanted) == (True, "")


def test_two_objects_must_both_be_there():
    wanted = {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1}]}
    assert verdict({"cow": [thing()], "dog": [thing()]}, wanted) == (True, "")
    assert verdict({"dog": [thing()]}, wanted) == (False, "expected cow>=1, found 0")


@pytest.mark.parametrize("number, is_right", [(2, False), (3, True), (4, False)])
def test_counting_refuses_one_more(number, is_right):
    wanted = {"include": [{"class": "cow", "count": 3}], "exclude": [{"class": "cow", "count": 4}]}
    assert verdict({"cow": [thing()] * number}, wanted, tag="counting")[0] is is_right


def test_counting_has_a_threshold_of_its_own():
    wanted = {"include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}
    cows = {"cow": [thing(confidence=c) for c in (0.91, 0.99, 0.9, 0.5)]}
    assert verdict(cows, wanted, tag="counting") == (True, "")
    assert verdict(cows, wanted, tag="two_object") == (False, "expected cow<3, found 4")


def test_at_most_sixteen_of_a_class_are_seen():
    kept = confident({"cow": [thing(confidence=0.5 + i / 100) for i in range(20)]}, "single_object")["cow"]
    assert [round(cow.confidence, 2) for cow in kept] == [round(0.69 - i / 100, 2) for i in range(16)]


def test_colors_are_read_on_the_surest_objects_alone():
    asked = []

    def read(image, found, name):
        asked.append(([cow.confidence for cow in found], name))
        return ["red" if cow.confidence > 0.8 else "blue" for cow in found]

    cows = {"cow": [thing(confidence=0.5), thing(confidence=0.9)]}
    assert verdict(cows, {"include": [{"class": "cow", "count": 1, "color": "red"}]}, read, "colors") == (True, "")
    assert asked == [([0.9], "cow")]
    assert verdict(cows, {"include": [{"class": "cow", "count": 1, "color": "blue"}]}, read, "colors") == (
        False,
        "expected blue cow>=1, found 1 red",
    )
    assert verdict(cows, {"include": [{"class": "cow", "count": 2, "color": "blue"}]}, read, "colors") == (
        False,
        "expected blue cow>=2, found 1 red, 1 blue",
    )


def test_color_attribution_needs_both_colors():
    colors = {"cow": "red", "dog": "blue"}
    wanted = {"include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "green"}]}
    objects = {"cow": [thing()], "dog": [thing()]}
    assert verdict(objects, wanted, lambda image, found, name: [colors[name]] * len(found)) == (
        False,
        "expected green dog>=1, found 1 blue",
    )
    colors["dog"] = "green"
    assert verdict(objects, wanted, lambda image, found, name: [colors[name]] * len(found)) == (True, "")


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (30, 0, {"right of"}),  # (30 - 0.1 * 20) / 30 = 0.93
        (-30, 0, {"left of"}),
        (0, 30, {"below"}),
        (0, -30, {"above"}),
        (30, 40, {"right of", "below"}),  # 28 / 50 = 0.56, 38 / 50 = 0.76
        (4, 0, set()),  # (4 - 2) / 4 = 0.5, which is not more than a half
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.512
        (2, 0, set()),  # just what 0.1 of the sizes takes away
        (0, 0, set()),
        (20, 40, {"below"}),  # 18 / 44.7 = 0.40
    ],
)
def test_places(x, y, expected):
    assert relations(at(50 + x, 50 + y), at(50, 50)) == expected


def test_a_larger_object_must_be_farther_away():
    # Sizes 10 and 50: 0.1 * 60 = 6 of the distance of 12 go, and a half is left.
    assert relations(at(62, 50, 10), at(50, 50, 50)) == set()
    assert relations(at(62.1, 50, 10), at(50, 50, 50)) == {"right of"}


def test_an_object_must_be_right_of_every_target():
    wanted = {"include": [{"class": "cow", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    dog = {"dog": [at(80, 50)]}
    assert verdict({"cow": [at(20, 50), at(40, 50)], **dog}, wanted) == (True, "")
    assert verdict({"cow": [at(20, 50), at(95, 50)], **dog}, wanted) == (
        False,
        "expected dog right of target, found left of target",
    )


def test_the_place_is_that_of_the_surest_object():
    wanted = {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]}
    left = Found((0.0, 45.0, 10.0, 55.0), 0.99)
    above = Found((45.0, 0.0, 55.0, 10.0), 0.5)
    assert verdict({"cow": [at(50, 50)], "dog": [above]}, wanted) == (True, "")
    assert not verdict({"cow": [at(50, 50)], "dog": [above, left]}, wanted)[0]


def test_without_a_target_the_place_is_wrong():
    wanted = {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]}
    assert verdict({"dog": [at(50, 50)]}, wanted) == (False, "expected cow>=1, found 0\nno target for dog to be above")


def test_any_excluded_class_makes_it_wrong():
    wanted = {"include": [], "exclude": [{"class": "cow", "count": 1}, {"class": "dog", "count": 2}]}
    assert verdict({"dog": [thing()]}, wanted) == (True, "")
    assert not verdict({"dog": [thing()] * 2}, wanted)[0]
    assert not verdict({"cow": [thing()]}, wanted)[0]


def test_a_crop_is_grey_outside_of_the_mask():
    mask = np.zeros((100, 100), bool)
    mask[10:20, 10:15] = True
    seen = np.asarray(crop(IMAGE, thing((10, 10, 20, 20), mask=mask)))
    assert seen.shape == (10, 10, 3)
    assert (seen[:, :5] == (255, 0, 0)).all() and (seen[:, 5:] == 0x99).all()
    assert (np.asarray(crop(IMAGE, thing((10, 10, 20.4, 19.6)))) == (255, 0, 0)).all()
