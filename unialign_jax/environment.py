"""The error message for a missing package. Commands import this before anything but the standard library."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def explain_missing_packages() -> None:
    """From now on a missing package ends the process with one line that says what to install."""
    sys.excepthook = _report


def missing_package(error: BaseException, root: Path = ROOT, prefix: str = sys.prefix) -> str | None:
    """The message for an error that ended a command, or None when the error is not a missing package.

    Args:
      root: the folder of the code, where the launch scripts create .venv.
      prefix: the running environment's `sys.prefix`.
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
