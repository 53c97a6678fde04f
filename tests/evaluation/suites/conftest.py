"""A judge behind a real local server, for suites whose answers are judged."""

import http.server
import json
import threading

import pytest

from unialign_jax.data.endpoint import Endpoint
from unialign_jax.evaluation.judging import Journal, Judge


class JudgeServer(http.server.ThreadingHTTPServer):
    """Answers each request by `reply(body)`, a text, and keeps the bodies."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.reply = [], lambda body: "1"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        choice = {"message": {"content": self.server.reply(body)}, "finish_reason": "stop"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge_server():
    with JudgeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def text_judge(judge_server, tmp_path):
    """A judge that asks the server one question at a time, of eight attempts."""
    endpoint = Endpoint(judge_server.url, "judge-1", attempts=8, first_pause=0.01)
    judge = Judge(endpoint, Journal(tmp_path / "judgements.jsonl"), concurrency=1)
    yield judge
    judge.close()
