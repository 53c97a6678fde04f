"""Where compiled programs are kept: the folder, its bound, and that it never stops a command."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as jax_cache

from unialign_jax.parallel import compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX without a cache, and a home for the user's own; afterwards the session's cache again."""
    options = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in options}
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_program(number):
    """Compiles a program that none before it was equal to, by its constant."""
    jax.jit(lambda x: jnp.sin(x) + number)(jnp.ones(3)).block_until_ready()


def kept(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_programs_are_kept_in_the_users_folder_within_a_bound(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    compiled.keep_compiled()
    folder = tmp_path / "home/unialign_jax/compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    compile_program(1.0)
    first = kept(folder)
    assert first
    size = max(path.stat().st_size for path in folder.glob("*-cache"))
    # A bound of two programs: of four, the first is gone, and the sum stays within it.
    jax.config.update("jax_compilation_cache_max_size", 2 * size + size // 2)
    jax_cache.reset_cache()
    for number in (2.0, 3.0, 4.0):
        compile_program(number)
    assert sum(path.stat().st_size for path in folder.glob("*-cache")) <= 2 * size + size // 2
    assert not set(first) & set(kept(folder))


def test_a_program_that_was_not_written_whole_is_removed_and_written_anew(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    compiled.keep_compiled(tmp_path / "kept")
    compile_program(5.0)
    (name,) = [name for name in kept(tmp_path / "kept") if "lambda" in name]
    # Killed between the program, half of it, and its time.
    program = tmp_path / "kept" / name
    whole = program.read_bytes()
    program.write_bytes(whole[: len(whole) // 2])
    program.with_name(name.removesuffix("-cache") + "-atime").unlink()

    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    compiled.keep_compiled(tmp_path / "kept")
    assert not program.exists()
    jax.clear_caches()
    compile_program(5.0)
    assert len(program.read_bytes()) >= 0.9 * len(whole)


def test_a_folder_that_cannot_be_used_is_one_warning(fresh, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    compiled.keep_compiled(tmp_path / "file")
    assert len(caplog.messages) == 1 and "compiled programs are not kept: cannot write into" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None
    compile_program(6.0)


def test_nothing_is_kept_when_switched_off_and_the_folder_of_jax_stays(fresh, tmp_path):
    compiled.keep_compiled("none")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    compiled.keep_compiled(tmp_path / "ours")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists() and not (tmp_path / "home").exists()


@pytest.mark.slow
def test_two_processes_at_once_share_a_folder(tmp_path):
    script = (
        "import sys, jax, jax.numpy as jnp\n"
        "from unialign_jax.parallel import compiled\n"
        "compiled.LEAST_SECONDS = 0.0\n"
        "compiled.keep_compiled()\n"
        "for number in range(20):\n"
        "    f = jax.jit(lambda x: jnp.sin(x) + number)\n"
        "    print(float(f(jnp.zeros(()))))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in started:
        printed, said = process.communicate(timeout=120)
        assert process.returncode == 0 and not said, said
        assert printed.split() == [str(float(number)) for number in range(20)]
    assert len(list((tmp_path / "unialign_jax/compiled").glob("*lambda*-cache"))) == 20
