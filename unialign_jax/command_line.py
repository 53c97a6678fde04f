"""The part of the command line that the commands share; the standard library alone, so that --help needs no package."""

import argparse
import re
from collections.abc import Iterable


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"error: {message}; --help explains\n")


def split_changes(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """A command line -> (its other arguments, the changes of a stage's keys as "KEY=VALUE").

    A change is `--config.KEY=VALUE` or `--config.KEY VALUE`, or `--set KEY=VALUE`, an older spelling. One without a
    value comes back as "KEY".
    """
    others, changes, arguments = [], [], [str(argument) for argument in arguments]
    while arguments:
        argument = arguments.pop(0)
        match = re.fullmatch(r"(--?config\.|--set=|--set$)(.*)", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        change = match[2]
        if "=" not in change and arguments and not arguments[0].startswith("--"):
            change = "=".join(filter(None, (change, arguments.pop(0))))
        changes.append(change)
    return others, changes
