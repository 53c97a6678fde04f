"""The environment: what the scripts install, in which versions, and what a command says where it is not active."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from unialign_jax.command_line import missing_package

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "generate", "convert", "prepare_data", "plan", "benchmark", "evaluate")
# The first version of each without a published vulnerability: what an older one lets in.
SOUND = {
    "pillow": "13.0",  # out-of-bounds writes and bombs of PSD, FITS and other readers, the last of them fixed in 13.0
    "transformers": "5.10",  # files outside the folder through a template's name (CVE-2026-9856)
    "sentencepiece": "0.2.1",  # a heap overflow by a model file (CVE-2026-1260)
    "tqdm": "4.66.3",  # options that are evaluated (CVE-2024-34062)
    "diffusers": "0.42.1",  # code of a pipeline's folder (GHSA-4prv-5hj7-c2xr)
    "torch": "2.13",  # the jit compiler (CVE-2025-3000)
    "pytest": "9.0.3",  # temporary folders of others (CVE-2025-71176)
}

TRAINING = ("tensorflow_datasets", "pyarrow", "grain", "array_record", "tensorboardX")


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


FILES = ("requirements.txt", "requirements-fast.txt", "requirements-test.txt")
REQUIRED = [requirement for name in FILES for requirement in requirements(name)]
LOCKED = {canonicalize_name(line.name): line for line in requirements("requirements.lock")}


def needed(names):
    """The distributions of this environment that are required, and what they require here in turn."""
    found, waiting = set(), [(canonicalize_name(name), frozenset([""])) for name in names]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((canonicalize_name(requirement.name), frozenset(["", *requirement.extras])))
    return {name for name, _ in found}


def test_lower_bounds_admit_no_known_vulnerability():
    for requirement in REQUIRED:
        (bound,) = requirement.specifier
        assert bound.operator in (">=", "=="), requirement
        assert Version(bound.version) >= Version(SOUND.get(requirement.name, "0")), requirement


def test_what_is_imported_is_required():
    homes = importlib.metadata.packages_distributions()
    required = {canonicalize_name(requirement.name) for requirement in requirements("requirements.txt")}
    own = {"unialign_jax"}
    tested = {"matplotlib", "torch", "diffusers", "libtpu"}  # of the test suite; where others need them they say so
    asked_for = {
        "apache_beam",
        "cv2",
        "datasets",
        "gradio",
        "openpyxl",
        "torchmetrics",
        "turbojpeg",
        "wandb",
    }  # options that say what to install
    missing = {}
    for path in [*(ROOT / "unialign_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *ROOT.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - own - tested - asked_for - sys.stdlib_module_names:
                if required.isdisjoint(map(canonicalize_name, homes.get(name, [name]))):
                    missing[name] = path.name
    assert not missing


def test_test_files_import_without_the_packages_of_the_whole_suite():
    """--fast imports them where only requirements-fast.txt is installed."""
    whole = {requirement.name for requirement in requirements("requirements-test.txt")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert whole.isdisjoint(name.partition(".")[0] for name in names), path


def test_the_lock_holds_a_version_for_everything_that_is_required():
    for requirement in LOCKED.values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement  # no local version: as on PyPI
    for requirement in REQUIRED:
        (pinned,) = LOCKED[canonicalize_name(requirement.name)].specifier
        assert pinned.version in requirement.specifier, requirement.name
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in needed(r.name for r in REQUIRED)}
    if any(installed[canonicalize_name(r.name)] not in LOCKED[canonicalize_name(r.name)].specifier for r in REQUIRED):
        pytest.skip("this environment has other versions: CONSTRAINTS=requirements.lock installs those")
    assert installed.keys() == LOCKED.keys()
    assert {name for name, version in installed.items() if version not in LOCKED[name].specifier} == set()


@pytest.fixture
def clone(tmp_path):
    """A folder with launch/environment.sh, where installing only writes down what was asked for."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
    for name in ("requirements.txt", "requirements.lock", "other.lock"):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$@" >>installed\n')
    python.chmod(0o755)

    def make(constraints):
        script = "source launch/environment.sh && make_environment requirements.txt"
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CONSTRAINTS": constraints}
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    def installs():
        lines = (tmp_path / "installed").read_text().splitlines()
        return [line.split("check ")[1] for line in lines]

    return make, installs


def test_constraints_are_installed_once_for_each_content(clone, tmp_path):
    make, installs = clone
    plain, locked = "-r requirements.txt", "-r requirements.txt -c requirements.lock"
    for constraints, expected in (
        ("", [plain]),
        ("", [plain]),
        ("requirements.lock", [plain, locked]),
        ("requirements.lock", [plain, locked]),
    ):
        assert make(constraints).returncode == 0
        assert installs() == expected
    (tmp_path / "requirements.lock").write_text("jax==0.10.2\n")
    assert make("requirements.lock").returncode == 0
    assert installs() == [plain, locked, locked]


@pytest.mark.bad_input
def test_constraints_that_are_not_there_are_one_line(clone):
    done = clone[0]("missing.lock")
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: CONSTRAINTS names missing.lock")


def test_ci_and_the_image_install_the_lock():
    assert "CONSTRAINTS=requirements.lock bash launch/test.sh" in (ROOT / ".ci/run").read_text()
    image = (ROOT / "launch/tpu/Dockerfile").read_text()
    assert "COPY requirements.txt requirements.lock" in image
    (install,) = re.findall(r"^RUN pip install .*", image, re.MULTILINE)
    assert install.endswith("-c requirements.lock")


def test_scripts_end_with_how_to_go_on():
    for script in ("quickstart.sh", "test.sh"):
        assert (ROOT / "launch" / script).read_text().endswith("\nsay_how_to_activate\n")


@pytest.mark.bad_input
@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_environment_a_command_says_so_in_one_line(command, tmp_path):
    """As in a new shell after quickstart.sh: Python without the packages, .venv beside the code."""
    for name in ("launch", "configs", "unialign_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    arguments = {
        "train": ["--config=configs/stage1.py:tiny", "--workdir=runs/x"],
        "generate": ["--bundle=b", "--task=t2i", "--prompt=a", "--output=a.png"],
        "convert": ["inspect", "bundles/x"],
        "prepare_data": ["--format=shapes", "--output=data/x"],
        "plan": ["--task=t2i"],
        "benchmark": ["train"],
        "evaluate": ["shapes", "--bundle=b", "--output=o"],
    }[command]
    bare = [sys.executable, "-E", "-S", f"launch/{command}.py"]  # without site-packages
    done = subprocess.run([*bare, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and " has no package " in line


def test_what_to_do_about_a_missing_package(tmp_path):
    absent = ModuleNotFoundError("No module named 'ml_collections'", name="ml_collections")
    assert missing_package(ValueError("no")) is None
    assert missing_package(ModuleNotFoundError("no", name="unialign_jax.nothing")) is None
    assert "`bash launch/quickstart.sh` makes an environment" in missing_package(absent, tmp_path, "/usr")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    said = missing_package(absent, tmp_path, "/usr")
    assert "no package ml_collections" in said and "is not active: source " in said
    assert said.endswith(".venv/bin/activate") and "\n" not in said
    assert "pip install -r" in missing_package(absent, tmp_path, str(tmp_path / ".venv"))
    (tmp_path / "unialign_jax_commands").mkdir()
    assert "pip install '.[train]'" in missing_package(absent, tmp_path, "/usr")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds what `pip install .` installs of this repository."""
    pytest.importorskip("setuptools")
    copy, built = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *FILES):
        shutil.copy(ROOT / name, copy)
    for name in ("unialign_jax", "launch", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", built]
    subprocess.run([*build, copy], check=True)
    (wheel,) = built.glob("*.whl")
    shutil.unpack_archive(wheel, built / "site", "zip")
    return built / "site"


def installed(site, tmp_path, *arguments):
    """`unialign-jax ARGUMENTS` of an installation without the packages of training and of the test suite."""
    script = importlib.metadata.Distribution.at(*site.glob("*.dist-info")).entry_points["unialign-jax"]
    code = f"import sys; sys.modules.update(dict.fromkeys({TRAINING + ('torch', 'diffusers')}))\n"
    code += f"sys.path.insert(0, {str(site)!r}); sys.argv = {['unialign-jax', *arguments]}\n"
    code += f"from {script.module} import {script.attr}; {script.attr}()"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installation_without_the_packages_of_training_makes_an_image(site, tmp_path, compilation_cache):
    (metadata,) = (importlib.metadata.Distribution.at(folder) for folder in site.glob("*.dist-info"))
    base = [line for line in map(Requirement, metadata.requires) if not line.marker]
    assert needed(line.name for line in base).isdisjoint(canonicalize_name(name) for name in TRAINING)
    besides = [r for r in metadata.requires if "train" in r or "serve" in r]
    assert {*base, *(Requirement(str(r).partition(";")[0]) for r in besides)} == set(requirements("requirements.txt"))
    options = ["--bundle=demo", "--task=t2i", "--prompt=a red circle", "--steps=2", "--output=circle.png"]
    options.append(f"--compilation-cache={compilation_cache}")
    done = installed(site, tmp_path, "generate", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "circle.png").is_file()


@pytest.mark.slow
def test_the_installed_command_finds_commands_and_stages(site, tmp_path):
    said = installed(site, tmp_path, "--help").stdout
    for path in (ROOT / "launch").glob("*.py"):
        assert path.stem == "commands" or f"  {path.stem.replace('_', '-')} " in said
    done = installed(site, tmp_path, "train", "--config=stage1:tiny", "--workdir=run")
    assert done.returncode == 1 and "; `pip install '.[train]'` in the folder" in done.stderr  # it has read the stage
    done = installed(site, tmp_path, "paint")
    assert done.returncode == 1 and done.stderr.startswith("error: no command paint; there are ")
