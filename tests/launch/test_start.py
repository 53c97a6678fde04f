"""What commands import before they work: nothing that a help, or an error in the command line, would wait for."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))


def run_python(script, *arguments):
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_help_imports_nothing_that_takes_long():
    script = """
import contextlib, io, runpy, sys
heavy = ("jax", "flax", "orbax", "optax", "qwix", "torch", "tensorflow", "tensorflow_datasets", "transformers", "grain")
heavy += ("pandas", "matplotlib", "scipy", "tensorboardX", "IPython", "gradio", "fastapi")
for name in sys.argv[1:]:
    sys.argv = [f"launch/{name}", "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(f"launch/{name}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
    assert "usage: " in said.getvalue(), name
    found = [module for module in heavy if module in sys.modules]
    assert not found, f"{name} --help imports {found}"
"""
    run_python(script, *COMMANDS)


def test_pipeline_and_training_leave_out_what_they_do_not_use():
    script = """
import sys
def imported(*names):
    return [name for name in names if name in sys.modules]
from unialign_jax import Pipeline
assert Pipeline.generate
unused = "torch", "tensorflow", "transformers", "pandas", "matplotlib", "IPython"
print(imported(*unused, "optax", "qwix", "flax.nnx", "grain", "scipy.stats", "jax.experimental.pallas"))
import unialign_jax.training.loop
from unialign_jax.training.metrics import summary_writer
assert "tensorboardX" not in sys.modules
assert summary_writer().add_scalar
print(imported(*unused, "qwix", "google.cloud.storage"))
"""
    assert run_python(script).split("\n")[:2] == ["[]", "[]"]
