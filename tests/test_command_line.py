"""How changes of a stage's keys are told from the other arguments of a command."""

import pytest

from unialign_jax.command_line import split_changes


@pytest.mark.parametrize(
    ("arguments", "others", "changes"),
    [
        (["--config=a.py", "--config.seed=1", "--workdir=b"], ["--config=a.py", "--workdir=b"], ["seed=1"]),
        (["--config.mesh.fsdp", "-1", "--config", "a.py"], ["--config", "a.py"], ["mesh.fsdp=-1"]),
        (["--config.name=a=b", "--config.init_from="], [], ["name=a=b", "init_from="]),
        (["--config.seed", "--config=a.py"], ["--config=a.py"], ["seed"]),  # no value
        (["--config.seed"], [], ["seed"]),
        (["--set", "seed=1", "--set=batch_size=2", "--settings=x"], ["--settings=x"], ["seed=1", "batch_size=2"]),
        (["--config.name=two\nlines"], [], ["name=two\nlines"]),
    ],
)
def test_changes_are_split_from_the_rest(arguments, others, changes):
    assert split_changes(arguments) == (others, changes)
