"""The package's dependencies, from requirements.txt, and its packages: `unialign_jax`, and launch/ beside it."""

from pathlib import Path

from setuptools import find_packages, setup


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


text = Path("requirements.txt").read_text()
inference, text = text.split("# The server (`pip install '.[serve]'`).\n")
serving, training = text.split("# Training and its data, besides (`pip install '.[train]'`).\n")
setup(
    packages=[*find_packages(include=["unialign_jax*"]), "unialign_jax_commands.launch"],
    package_dir={"unialign_jax_commands": "."},
    install_requires=lines(inference),
    extras_require={
        "serve": lines(serving),
        "train": lines(training),
        "tpu": lines(Path("launch/tpu/requirements.txt").read_text()),
        "cuda": lines(Path("launch/slurm/requirements.txt").read_text()),
        "test": lines(Path("requirements-fast.txt").read_text() + Path("requirements-test.txt").read_text()),
    },
)
