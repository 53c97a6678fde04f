"""The corpus of bad inputs: every test marked `bad_input`, in the files of the rooms that refuse them, counted here."""

from pathlib import Path

import pytest

FEWEST = 250


def test_the_corpus_does_not_shrink(request):
    """Each case is a test of its own (a parameter counts)."""
    items = request.session.items
    if {item.path for item in items} != set(Path(__file__).parent.rglob("test_*.py")):
        pytest.skip("only a part of the suite was collected")
    count = sum(item.get_closest_marker("bad_input") is not None for item in items)
    assert count >= FEWEST, f"{count} bad inputs are tried, expected at least {FEWEST}"
