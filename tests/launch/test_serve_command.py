"""launch/serve.py as a user runs it: an end under load, a port that is taken, an open address without a key."""

import base64
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

pytest.importorskip("fastapi", reason="fastapi is not installed")

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "serve.py"


def taken(url):
    """How many samples a server has taken so far."""
    state = requests.get(f"{url}/health", timeout=60).json()
    done = re.search(
        r'unialign_done_total{task="text_to_image"} (\S+)', requests.get(f"{url}/metrics", timeout=60).text
    )
    return state["waiting"] + state["working"] + float(done[1])


@pytest.mark.slow
def test_an_end_under_load_answers_all_that_was_taken(tiny_bundle, compilation_cache):
    command = [sys.executable, str(COMMAND), f"--bundle={tiny_bundle}", "--port=0", "--warm-up=none", "--batch=2"]
    command += ["--queue=14"]
    with subprocess.Popen(
        [*command, f"--compilation-cache={compilation_cache}"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines, url = [], None
            for line in process.stderr:
                lines.append(line)
                if url := re.search(r'"url": "(http[^"]+)"', line):
                    break
            assert url, lines
            reader = threading.Thread(target=lambda: lines.extend(process.stderr))
            reader.start()
            port = url[1].split(":")[2].split("/")[0]
            second = subprocess.run(
                [sys.executable, str(COMMAND), f"--bundle={tiny_bundle}", f"--port={port}"],
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert second.returncode == 1
            assert second.stderr == (
                f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
            )
            body = {"prompt": "a secret prompt" * 40, "steps": 40, "seed": 1}

            def ask(number):
                answer = requests.post(f"{url[1]}/images/generations", json=body | {"seed": number}, timeout=120)
                [warning] = answer.json()["warnings"]
                assert warning.startswith("prompt is ") and "the rest was cut off" in warning
                return answer.status_code, answer.json()["data"][0]["b64_json"]

            ask(0)  # compiles
            many = requests.post(f"{url[1]}/images/generations", json=body | {"n": 15}, timeout=120)
            assert many.status_code == 400 and many.json()["error"]["param"] == "n", many.text
            stalled = socket.create_connection(("127.0.0.1", int(port)))  # the rest of its body never comes
            head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
            stalled.sendall(head.encode())
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                futures = [pool.submit(ask, number) for number in range(12)]
                # A connection that the server has not accepted yet is no request that it took.
                while taken(url[1][: -len("/v1")]) < 13:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                answers = [future.result() for future in futures]
            assert process.wait(60) in (0, -signal.SIGTERM)
            reader.join(10)
            assert stalled.recv(2**16).startswith(b"HTTP/1.1 503")
            stalled.close()
            assert {status for status, _ in answers} == {200}
            assert all(base64.b64decode(image).startswith(b"\x89PNG") for _, image in answers)
            log = "".join(lines)
            assert "secret" not in log
            entries = [json.loads(line) for line in lines if line.startswith('{"method"')]
            statuses = [entry["status"] for entry in entries if entry["path"] == "/v1/images/generations"]
            assert sorted(statuses) == [200] * 13 + [400, 503]
            assert all(isinstance(json.loads(line), dict) for line in lines)
        finally:
            process.kill()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host=0.0.0.0"], ["--host=0.0.0.0 can be reached", "UNIALIGN_API_KEYS", "--no-key"]),
        (["--bundle=nowhere"], ["nowhere", "no such bundle"]),
        (["--warm-up=big", "--bundle=demo"], ["--warm-up is 'big'", "512x512"]),
        (["--batch=0"], ["--batch is 0"]),
        (["--lora=style"], ["--lora is 'style'", "NAME=FILE:SCALE"]),
        (["--lora=a=x", "--lora=a=y"], ["--lora has a twice"]),
        (["--bundle=demo", "--lora=a=nowhere.safetensors"], ["nowhere.safetensors", "no such file"]),
        (["--host=192.0.2.1", "--no-key"], ["cannot listen on 192.0.2.1"]),
    ],
)
def test_what_cannot_be_served(command_refuses, monkeypatch, arguments, words):
    monkeypatch.delenv("UNIALIGN_API_KEYS", raising=False)
    command_refuses("serve", ["--port=0", *arguments], *words)


def test_keys_come_from_the_environment(launch_command, monkeypatch):
    monkeypatch.setitem(os.environ, "UNIALIGN_API_KEYS", " one, two ,,")
    command = launch_command("serve")
    assert command.hosts(command.parse_arguments(["--allow-host=me.local"])) == [*command.LOCAL, "me.local"]
    assert command.hosts(command.parse_arguments(["--host=0.0.0.0"])) == []
    assert command.api_keys(command.parse_arguments(["--host=0.0.0.0"])) == ["one", "two"]
