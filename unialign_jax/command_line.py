"""The part of the command line that the commands share.

Commands import it first, and it needs the standard library alone: so a missing package gives one line.
"""

import argparse
import contextlib
import gc
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from unialign_jax.files import first_line

ROOT = Path(__file__).resolve().parents[1]

# Imports and traced programs are a million objects that stay. With Python's own 700 the collector looks through them
# again and again for some that do not, which takes a tenth of a command's start.
gc.set_threshold(20_000)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the line breaks of its texts."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help explains\n")

    def check_least(self, arguments: argparse.Namespace, **least: float) -> None:
        """An error where the number of an option is below its least."""
        for name, low in least.items():
            if getattr(arguments, name) < low:
                self.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least {low}")


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, with another exit status."""

    status = 143


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_command(
    work: Callable[[], int | None],
    *,
    traceback: bool = False,
    hint: str = "",
    interrupted: str = "nothing was written",
) -> int:
    """Does the work of a command; returns its exit status. An error is one line and 1, Ctrl-C one line and 130.

    Args:
      traceback: raise errors instead.
      hint: ends the line of an error when memory did not suffice.
      interrupted: the line after Ctrl-C where the KeyboardInterrupt has none; its `status`, if any, is returned.
    """
    try:
        return work() or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if traceback:
            raise
        line = first_line(error, 2000)
        if isinstance(error, OSError) and error.strerror:  # without the system's error number
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        line = f"error: {line}{hint if 'RESOURCE_EXHAUSTED' in str(error) else ''}"
        print(missing_package(error) or line, file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop if stop.args else interrupted}", file=sys.stderr)
        return getattr(stop, "status", 130)


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


def explain_missing_packages() -> None:
    """From now on a missing package ends the process with one line that says what to install."""
    sys.excepthook = _report


def missing_package(error: BaseException, root: Path = ROOT, prefix: str = sys.prefix) -> str | None:
    """The message for an error that ended a command, or None when the error is not a missing package.

    Args:
      root: the folder of the code, where the launch scripts create .venv.
    """
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name in ("", "unialign_jax"):
        return None
    made = root / ".venv"
    activate = shlex.quote(os.path.relpath(made / "bin" / "activate"))
    if (root / "unialign_jax_commands").is_dir():  # installed, and `root` is site-packages
        do = "`pip install '.[train]'` in the folder of the code installs all that commands need"
    elif not (made / "bin" / "python").exists():
        do = "`bash launch/quickstart.sh` makes an environment, `pip install -r requirements.txt` fills this one"
    elif made.resolve() != Path(prefix).resolve():
        do = f"the environment that has it is not active: source {activate}"
    else:
        do = "`pip install -r requirements.txt -r requirements-test.txt` installs what this environment lacks"
    return f"error: {sys.executable} has no package {name}; {do}"


def _report(kind: type[BaseException], error: BaseException, trace) -> None:
    line = missing_package(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(line, file=sys.stderr)
