"""CIDEr-D against closed forms, and against pycocoevalcap's numbers."""

import math

import pytest

from unialign_jax.evaluation.cider import cider_d, words


def scores(captions, references):
    return cider_d([text.split() for text in captions], [[text.split() for text in group] for group in references])


def test_a_reference_said_again_has_ten():
    references = [["one two three four"], ["five six seven eight"]]
    assert scores(["one two three four", "five six seven eight"], references) == pytest.approx([10, 10], abs=1e-9)
    # Three words have no n-gram of four: three of the four orders are 1.
    assert scores(["one two three", "x"], [["one two three"], ["y"]]) == pytest.approx([7.5, 0], abs=1e-9)


def test_what_every_image_has_weighs_nothing():
    """ "a" is in the references of both images, so log(2 / 2) = 0: only "cat" and "a cat" count."""
    assert scores(["a", "a"], [["a cat"], ["a dog"]]) == [0, 0]
    [first, _] = scores(["a cat", "x"], [["a cat"], ["a dog"]])
    assert first == pytest.approx(10 * 2 / 4, abs=1e-9)  # two orders of four
    assert scores(["a cat"], [["a cat"]]) == [0]  # one image alone


def test_repetitions_are_clipped_and_lengths_punished():
    """ "cat cat" against "cat": min(2, 1) * 1 over norms 2 and 1 is a half, and one word more is exp(-1 / 72)."""
    [first, _] = scores(["cat cat", "x"], [["cat"], ["dog"]])
    assert first == pytest.approx(10 * 0.5 * math.exp(-1 / 72) / 4, abs=1e-9)


def test_references_are_averaged():
    [first, _] = scores(["cat", "x"], [["cat", "mouse"], ["dog"]])
    assert first == pytest.approx(10 * (1 + 0) / 2 / 4, abs=1e-9)


def test_pycocoevalcap_has_the_same_numbers():
    """Computed once by CiderScorer of pycocoevalcap 1.2 on these words."""
    captions = ["a red circle on a white table", "two dogs run", "a man 's hat", "a cat a cat a cat"]
    references = [
        ["a red circle on a table", "a round red thing on the white table"],
        ["two dogs run across the green grass", "dogs run in a field"],
        ["the hat of a man", "a man wears a hat on his head"],
        ["a cat", "a cat sleeps on a red mat"],
    ]
    assert scores(captions, references) == pytest.approx([4.31166988, 2.83148691, 1.90495145, 0.99886418], abs=1e-8)


def test_words():
    assert words("The man's t-shirt isn't red.") == ["the", "man", "'s", "t-shirt", "is", "n't", "red"]
    assert words('"Two dogs," (3.5 m) – run!') == ["two", "dogs", "3.5", "m", "run"]
    assert words("...") == []
