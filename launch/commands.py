"""Runs a command of an installed package by its name: unialign-jax --help"""

import ast
import runpy
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
HELP = """\
usage: unialign-jax COMMAND ...

{commands}

`unialign-jax COMMAND --help` says more of each; where it says `python launch/NAME.py`, write `unialign-jax NAME`.
A stage that comes with the package has a short name: --config=stage1, or --config=stage1:tiny.
"""


def commands() -> dict[str, Path]:
    """The commands' files by name."""
    files = sorted(LAUNCH.glob("*.py"))
    return {path.stem.replace("_", "-"): path for path in files if path != Path(__file__).resolve()}


def summary(path: Path) -> str:
    """The first line of a command's docstring."""
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].partition(": python ")[0]


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    found = commands()
    if name in ("--help", "-h"):
        listed = "\n".join(f"  {name:18} {summary(path)}" for name, path in found.items())
        print(HELP.format(commands=listed), end="")
    elif name in found:
        sys.argv = [f"unialign-jax {name}", *arguments]
        runpy.run_path(str(found[name]), run_name="__main__")
    else:
        sys.exit(f"error: no command {name}; there are {', '.join(found)}")


if __name__ == "__main__":
    main()
