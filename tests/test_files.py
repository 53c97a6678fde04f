"""Reading users' files with care, and writing files and folders whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from unialign_jax import files

bad_input = pytest.mark.bad_input


@bad_input
@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", ["is not JSON"]),
        (b"[1]", ["holds a JSON list", "an object"]),
        (b"null", ["holds a JSON NoneType"]),
        (b'"text"', ["holds a JSON str"]),
        (b"[" * 200_000, ["nested too deeply"]),
        (b"\xff\xfe{}", ["is not JSON"]),
        (b"1" * 10_000, ["is not JSON"]),
        (b"", ["is not JSON"]),
    ],
)
def test_json_that_is_none(tmp_path, refuses, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refuses(lambda: files.read_json(path), str(path), *words)


@bad_input
@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "device", "nul", "surrogate", "long", "large"])
def test_what_is_no_regular_file(tmp_path, refuses, kind):
    path = tmp_path / "x"
    words = {
        "absent": "no such file",
        "folder": "is a folder",
        "pipe": "is a device, pipe or socket",
        "device": "is a device, pipe or socket",
        "large": "expected at most 10",
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b"0" * 11)
    path = {"device": "/dev/zero", "nul": "a\0b", "surrogate": "a\ud800b", "long": "x" * 5000}.get(kind, path)
    refuses(lambda: files.check_regular(path, most=10), words.get(kind, "cannot be opened"))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing_file(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with files.replacing_file(path) as scratch:
        scratch.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole_and_the_users_neighbours_stay(tmp_path):
    for name in ("out.partial", "out.old", ".out.mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("half")
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == before
    for text in ("first", "second"):
        with files.replacing_folder(tmp_path / "out", overwrite=True) as scratch:
            (scratch / "a").write_text(text)
        assert (tmp_path / "out/a").read_text() == text and os.listdir(tmp_path / "out") == ["a"]
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~files._umask()


def test_a_folder_with_files_of_the_user_is_not_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("ours")
    (folder / "thesis.tex").write_text("the user's")
    foreign = lambda path: sorted({file.name for file in path.iterdir()} - {"a"})  # noqa: E731
    with pytest.raises(FileExistsError, match="thesis.tex"):
        with files.replacing_folder(folder, overwrite=True, foreign=foreign):
            pytest.fail("the block must not run")
    (folder / "thesis.tex").unlink()
    with pytest.raises(FileExistsError, match="--overwrite"):
        with files.replacing_folder(folder, foreign=foreign):
            pytest.fail("the block must not run")
    with pytest.raises(FileExistsError, match="thesis.tex"):  # it came while the block ran
        with files.replacing_folder(folder, overwrite=True, foreign=foreign):
            (folder / "thesis.tex").write_text("the user's")
    assert sorted(os.listdir(folder)) == ["a", "thesis.tex"]


def test_what_a_killed_writer_left_goes_and_what_a_running_one_writes_stays(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys
        from unialign_jax.files import replacing_folder
        with replacing_folder({str(tmp_path / "out")!r}) as scratch:
            (scratch / "a").write_text("half")
            print("ready", flush=True)
            sys.stdin.read()
        """
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    (running,) = tmp_path.iterdir()
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "out"):
        raise RuntimeError
    assert running.is_dir()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with files.replacing_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("whole")
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_that_was_cut_off_between_its_two_renames_is_taken_back(tmp_path):
    (tmp_path / ".out.x.replaced").mkdir()
    (tmp_path / ".out.x.replaced/out").mkdir()
    (tmp_path / ".out.x.replaced/out/a").write_text("old")
    (tmp_path / ".out.x.replaced" / files._CLAIM).touch()
    with pytest.raises(FileExistsError), files.replacing_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/a").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.bad_input
@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\ud800", "x" * 1000, "a\u2028b", "\0"])
def test_texts_of_strangers_in_one_line(text):
    line = files.one_line(text)
    assert line.isprintable() and line.encode() and len(line) <= 300
    assert files.one_line("It's “plain” é 猫") == "It's “plain” é 猫"


def test_an_older_folder_that_a_killed_process_was_removing_goes(tmp_path):
    for name in ("out", ".out.x.replaced/out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/a").write_text("new")
    (tmp_path / ".out.x.replaced" / files._CLAIM).touch()
    with files.replacing_folder(tmp_path / "out", overwrite=True) as scratch:
        (scratch / "a").write_text("newer")
    assert (tmp_path / "out/a").read_text() == "newer" and os.listdir(tmp_path) == ["out"]


def test_a_second_rename_that_fails_puts_the_older_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError), files.replacing_folder(tmp_path / "out", overwrite=True) as scratch:
        (scratch / "a").write_text("new")
    assert (tmp_path / "out/a").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@bad_input
def test_a_link_to_an_empty_folder_is_no_output(tmp_path, refuses):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    with pytest.raises(FileExistsError, match="is a link"), files.replacing_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").is_symlink()


@bad_input
def test_a_mount_point_is_no_output(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("out"))
    (tmp_path / "out").mkdir()
    refuses(lambda: files.refuse_existing(tmp_path / "out"), "mount point")
