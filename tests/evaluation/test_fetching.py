"""launch/evaluate.py fetch, from a server on this machine: whole files, broken ones, cut connections, other hosts."""

import argparse
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unialign_jax.evaluation import fetching, official_files
from unialign_jax.evaluation.official_files import OfficialFile

BYTES = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """Serves `pages`; `how` says what goes wrong with a path, and `asked` what came."""

    daemon_threads = True

    def __init__(self):
        self.pages, self.how, self.asked = {}, {}, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, span = self.path, self.headers.get("Range")
        self.server.asked.append((path, span))
        how = self.server.how.get(path, [])
        fault = how.pop(0) if how else ""
        body = self.server.pages.get(path)
        if body is None or fault.isdigit():
            self.send_error(int(fault or 404))
            return
        if fault.startswith(("http", "/")):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        start = int(span[len("bytes=") : -1]) if span and fault != "ignores ranges" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: len(rest) // 2] if fault in ("cut", "hangs") else rest)
        if fault == "hangs":
            self.server.released.wait(5)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)


def official(path="a/f.bin", body=BYTES, **changes):
    hashes = {"sha256": hashlib.sha256(body).hexdigest()} | changes
    return OfficialFile(path, f"https://example.org/repo/{path}", "MIT", len(body), **hashes)


def fetch(server, folder, *files, **options):
    return fetching.fetch(files, folder, mirror=server.url, timeout=5.0, **options)


def test_a_file_is_fetched_checked_and_then_known(server, tmp_path):
    server.pages["/repo/a/f.bin"] = BYTES
    (one,) = fetch(server, tmp_path, official())
    assert (one.state, one.failure) == ("fetched", "") and (tmp_path / "a/f.bin").read_bytes() == BYTES
    (one,) = fetch(server, tmp_path, official())
    assert one.state == "was there" and len(server.asked) == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f.bin"]


def test_every_kind_of_hash_is_checked(server, tmp_path):
    body = b"hello\n"
    server.pages["/repo/f.txt"] = body
    # `git hash-object` of a file with "hello" and a line end, and md5sum of it.
    known = {"sha256": "", "git_blob": "ce013625", "md5": "b1946ac92492d2347c6235b4d2611184"}
    (one,) = fetch(server, tmp_path, official("f.txt", body, **known))
    assert one.failure == ""
    (tmp_path / "f.txt").unlink()
    for wrong in ({"git_blob": "ce013626"}, {"md5": "00"}):
        (one,) = fetch(server, tmp_path, official("f.txt", body, **known | wrong))
        assert "expected 00" in one.failure or "expected ce013626" in one.failure
        assert not any(tmp_path.iterdir())


def test_a_file_whose_hash_is_not_known_says_so(server, tmp_path):
    server.pages["/repo/f.json"] = b'{"a": 1}'
    (one,) = fetch(server, tmp_path, official("f.json", b'{"a": 1}', sha256=""))
    assert "not verified" in one.state
    server.pages["/repo/g.json"] = b"<html> "
    (one,) = fetch(server, tmp_path, official("g.json", b'{"a":2}', sha256=""))
    assert "is not JSON" in one.failure and not (tmp_path / "g.json").exists()


def test_a_cut_connection_goes_on_where_it_was_cut(server, tmp_path):
    server.pages["/repo/a/f.bin"] = BYTES
    server.how["/repo/a/f.bin"] = ["cut"]
    (one,) = fetch(server, tmp_path, official())
    assert one.failure == "" and (tmp_path / "a/f.bin").read_bytes() == BYTES
    assert server.asked[0][1] is None and server.asked[1][1] == f"bytes={len(BYTES) // 2}-"


def test_a_server_that_ignores_ranges_gives_the_whole_file(server, tmp_path):
    server.pages["/repo/a/f.bin"] = BYTES
    server.how["/repo/a/f.bin"] = ["cut", "ignores ranges"]
    (one,) = fetch(server, tmp_path, official())
    assert one.failure == "" and (tmp_path / "a/f.bin").read_bytes() == BYTES


def test_a_later_run_goes_on_from_what_an_earlier_one_got(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f.bin.partial").write_bytes(BYTES[:1000])
    server.pages["/repo/a/f.bin"] = BYTES
    (one,) = fetch(server, tmp_path, official())
    assert one.failure == "" and server.asked == [("/repo/a/f.bin", "bytes=1000-")]
    assert (tmp_path / "a/f.bin").read_bytes() == BYTES


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "how, words",
    [
        (["404"], ["/repo/a/f.bin answers with status 404"]),
        (["500"] * 3, ["answers with status 500", "3 attempts"]),
        (["cut"] * 3, ["it was cut", "resumes there"]),
        (["https://elsewhere.example/f.bin"], ["leads to another host", "elsewhere.example"]),
        (["/repo/a/f.bin"] * 9, ["redirects more than 5 times"]),
    ],
)
def test_failures_are_one_line_and_stop_no_other_file(server, tmp_path, how, words):
    server.pages |= {"/repo/a/f.bin": BYTES, "/repo/b": BYTES}
    server.how["/repo/a/f.bin"] = how
    one, other = fetch(server, tmp_path, official(), official("b"))
    assert other.state == "fetched" and one.state == "failed"
    assert "\n" not in one.failure and all(word in one.failure for word in words), one.failure
    assert not (tmp_path / "a/f.bin").exists()


def test_redirects_within_the_host_are_followed(server, tmp_path):
    server.pages |= {"/repo/a/f.bin": b"", "/moved": BYTES}
    server.how["/repo/a/f.bin"] = ["/moved"]
    (one,) = fetch(server, tmp_path, official())
    assert one.failure == "" and (tmp_path / "a/f.bin").read_bytes() == BYTES


@pytest.mark.bad_input
@pytest.mark.parametrize("body", [BYTES[:-1], BYTES + b"x", b"x" * len(BYTES)])
def test_another_file_is_not_kept(server, tmp_path, body):
    server.pages["/repo/a/f.bin"] = body
    (one,) = fetch(server, tmp_path, official())
    assert one.state == "failed" and not (tmp_path / "a/f.bin").exists()
    server.pages["/repo/a/f.bin"] = BYTES
    (one,) = fetch(server, tmp_path, official())
    assert one.state == "fetched" and (tmp_path / "a/f.bin").read_bytes() == BYTES


@pytest.mark.bad_input
def test_a_server_that_says_nothing_is_given_up(server, tmp_path):
    server.released = threading.Event()
    server.pages["/repo/a/f.bin"] = BYTES
    server.how["/repo/a/f.bin"] = ["hangs"] * 3
    (one,) = fetching.fetch([official()], tmp_path, mirror=server.url, timeout=0.2)
    server.released.set()
    assert one.state == "failed" and "3 attempts" in one.failure and "\n" not in one.failure
    assert [span for _, span in server.asked] == [None, "bytes=524288-", "bytes=786432-"]


def test_a_file_of_the_users_is_kept(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f.bin").write_bytes(b"mine")
    server.pages["/repo/a/f.bin"] = BYTES
    (one,) = fetch(server, tmp_path, official())
    assert "it is kept" in one.failure and (tmp_path / "a/f.bin").read_bytes() == b"mine"
    (one,) = fetch(server, tmp_path, official(), overwrite=True)
    assert one.state == "fetched"


@pytest.mark.bad_input
def test_a_host_that_does_not_answer_is_not_asked_for_every_file(tmp_path, monkeypatch, capsys):
    tries = []
    get = fetching._get
    monkeypatch.setattr(fetching, "_get", lambda *arguments: tries.append(arguments) or get(*arguments))
    monkeypatch.setattr(fetching, "of_suite", lambda suite: [official("whole"), *map(official, "abc")])
    (tmp_path / "whole").write_bytes(BYTES)
    fetching.run(
        argparse.Namespace(suite="mmmu", data=tmp_path, base_url="http://127.0.0.1:9", timeout=1.0, overwrite=False)
    )
    printed = capsys.readouterr().out
    assert len(tries) == fetching.ATTEMPTS and "object at" not in printed
    [failed] = [line for line in printed.splitlines() if line.startswith("failed: ")]
    assert failed.startswith("failed: a and 2 more: http://127.0.0.1:9/repo/a cannot be read: there is no connection")
    assert "whole  was there" in printed


def test_the_command_fetches_geneval_and_names_the_rest(server, tmp_path, launch_command, capsys, monkeypatch):
    data = Path(__file__).parents[3] / "shared" / "data" / "eval" / "geneval"
    if not data.is_dir():
        pytest.skip("the files of ../shared/data are not here")
    for file in official_files.of_suite("geneval"):
        if file.sha256:
            server.pages[file.url.partition(".com")[2]] = (data / file.path).read_bytes()
    arguments = ["fetch", "geneval", f"--data={tmp_path}/new", f"--base-url={server.url}"]
    assert launch_command("evaluate").main(arguments) == 1
    printed = capsys.readouterr().out
    assert "evaluation_metadata.jsonl       fetched  (MIT)" in printed
    assert "failed: evaluation_metadata_long.jsonl" in printed and "status 404" in printed
    assert "not fetched: The weights of the official detector" in printed
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"evaluation_metadata.jsonl", "object_names.txt"}


@pytest.mark.bad_input
def test_options_that_do_not_fit(command_refuses, tmp_path):
    command_refuses("evaluate", ["fetch", "chess", "--data=x"], "chess")
    command_refuses("evaluate", ["fetch", "geneval", f"--data={tmp_path}", "--timeout=0"], "--timeout is 0")


def test_addresses_name_a_commit_where_there_are_commits():
    from unialign_jax.evaluation.suites import SUITES

    for suite in SUITES:
        assert official_files.of_suite(suite) or official_files.ELSEWHERE[suite]
        for file in official_files.of_suite(suite):
            assert file.url.startswith("https://") and file.licence and not file.path.startswith("/")
            if "githubusercontent" in file.url:
                assert len(file.url.split("/")[5]) in (12, 40)
