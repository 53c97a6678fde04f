"""A conversation of edits that branches."""

from pathlib import Path

import pytest

from unialign_jax.serving.edit_tree import EditTree


def grown():
    tree = EditTree(Path("0"))
    tree.add(0, Path("1"), "make it winter", 5)
    tree.add(1, Path("2"), "add a sledge", 6)
    return tree


def test_undo_and_redo_follow_the_way_that_led_here():
    tree = grown()
    tree.undo()
    tree.undo()
    assert (tree.at, tree.now.image, tree.before.image) == (0, Path("0"), Path("0"))
    with pytest.raises(ValueError, match="no edit to undo"):
        tree.undo()
    tree.redo()
    tree.redo()
    assert (tree.at, tree.before.image) == (2, Path("1"))
    with pytest.raises(ValueError, match="no edit to redo"):
        tree.redo()


def test_an_edit_of_an_earlier_step_is_a_branch_and_loses_nothing():
    tree = grown()
    tree.undo()
    tree.add(tree.at, Path("3"), "add a dog", 7)
    assert tree.labels() == [
        "0: the original",
        "1, from 0: make it winter (seed 5)",
        "2, from 1: add a sledge (seed 6)",
        "3, from 1: add a dog (seed 7)",
    ]
    tree.undo()
    tree.redo()
    assert tree.at == 3  # the branch that was shown last
    tree.go_to(2)
    tree.undo()
    tree.redo()
    assert tree.at == 2


def test_a_step_that_is_done_after_the_user_went_elsewhere_keeps_its_parent():
    tree = grown()
    tree.go_to(0)
    tree.add(2, Path("3"), "late", 1)
    assert (tree.now.parent, tree.before.image) == (2, Path("2"))
