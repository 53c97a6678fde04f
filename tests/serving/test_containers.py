"""The compose files as they are read; no container is built."""

import re
from pathlib import Path

import pytest

from unialign_jax.serving import page_folder

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "docker"


def service(name):
    [found] = yaml.safe_load((FOLDER / name).read_text())["services"].items()
    assert found[0] == "unialign"
    return found[1]


def test_only_the_second_file_asks_for_a_gpu():
    plain, gpu = service("compose.yaml"), service("compose.gpu.yaml")
    assert "deploy" not in plain and "nvidia" not in (FOLDER / "compose.yaml").read_text()
    assert plain["build"]["args"] == {"JAX": "cpu"}
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert gpu["build"] == {"args": {"JAX": "${JAX:-cuda13}"}} and gpu["image"] != plain["image"]


def test_what_is_built_is_there():
    build = service("compose.yaml")["build"]
    root = (FOLDER / build["context"]).resolve()
    assert root == ROOT
    commands = (root / build["dockerfile"]).read_text()
    for line in re.findall(r"^COPY (.+) \\S+$", commands, re.MULTILINE):
        assert all((root / name).exists() for name in line.split())


def test_the_container_is_closed():
    plain = service("compose.yaml")
    assert plain["read_only"] is True and plain["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in plain["ports"])
    [size] = re.fullmatch(r"/tmp:size=(\d+)g", plain["tmpfs"][0]).groups()
    assert 2**30 * int(size) // 2 < page_folder.MOST_BYTES < 2**30 * int(size)


def test_the_documented_commands_name_files_that_are_there():
    text = (ROOT / "docs" / "serving.md").read_text()
    named = set(re.findall(r"-f (launch/docker/\S+)", text))
    assert {"launch/docker/compose.yaml", "launch/docker/compose.gpu.yaml", "launch/docker/Dockerfile"} <= named
    assert all((ROOT / name).is_file() for name in named)
