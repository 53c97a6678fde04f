"""Who gets in, bodies that do not come, and paths that are not there: against a server, or the bare application."""

import asyncio
import contextlib
import io
import json
import socket
import threading

import pytest
import requests
from PIL import Image

from unialign_jax.serving import api
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import Limits

FRIEND = "https://friend.example"


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


class StillPipeline:
    """Gives grey images, without a model's work."""

    max_batch, edit_limit = 8, 1024

    def __init__(self, model):
        self.sizes, self.config, self.tokenizer = model.sizes, model.config, model.tokenizer

    def generate(self, prompts, **options):
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    def edit(self, prompts, images, **options):
        return self.generate(prompts)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def still(tiny_pipeline):
    return StillPipeline(tiny_pipeline)


@contextlib.contextmanager
def connected(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as found:
        yield found


def send_head(connection, length):
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())


def call(app, path="/v1/images/generations", *, headers=(), messages=()):
    """(status, JSON) of an application that is called without a server; status None without an answer."""
    left, sent = list(messages), []

    async def receive():
        return left.pop(0) if left else await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost"), *headers], "root_path": "", "scheme": "http", "client": None}
    asyncio.run(app(scope | {"server": ("localhost", 80), "asgi": {"version": "3.0"}}, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return (sent[0]["status"], json.loads(body)) if sent else (None, None)


def test_pages_of_other_origins_are_refused(still, running, metrics):
    app = api.make_app(Engine([still]), model="tiny", origins=[FRIEND + "/"], metrics=metrics)
    form = {"prompt": "make it green", "seed": "1"}
    picture = {"image": ("a.png", png())}
    with running(app) as url:
        place = url.removeprefix("http://")

        def edit(origin, host=place):
            headers = {"Host": host} | ({"Origin": origin} if origin else {})
            return requests.post(f"{url}/v1/images/edits", data=form, files=picture, headers=headers, timeout=60)

        assert edit(None).status_code == edit(url).status_code == edit(FRIEND).status_code == 200
        assert edit("https://name.example", host="name.example").status_code == 200  # a proxy speaks HTTPS
        assert edit("https://name.example:443", host="NAME.example").status_code == 200
        foreign = ["https://evil.example", "null", f"{url}0", "http://localhost", f"file://{place}", "https://friend"]
        for origin in foreign:
            answer = edit(origin)
            assert answer.status_code == 403 and "another origin" in answer.json()["error"]["message"], origin
        assert f'unialign_refused_total{{reason="origin"}} {len(foreign)}.0' in metrics.text().decode()

        def preflight(origin):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            return requests.options(f"{url}/v1/images/edits", headers=asked, timeout=60)

        allowed = preflight(FRIEND)
        assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == FRIEND
        assert edit(FRIEND).headers["Access-Control-Allow-Origin"] == FRIEND
        refused = preflight("https://evil.example")
        assert refused.status_code == 400 and "Access-Control-Allow-Origin" not in refused.headers


def test_any_origin_where_that_is_asked_for(still):
    app = api.make_app(Engine([still]), model="tiny", origins=["*"])
    whole = [{"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}]
    headers = [(b"origin", b"https://evil.example"), (b"content-type", b"application/json")]
    assert call(app, headers=headers, messages=whole)[0] == 200


def test_a_body_that_does_not_come(still, running, metrics):
    is_ending = threading.Event()
    limits = Limits(body_seconds=0.2)
    app = api.make_app(Engine([still]), model="tiny", limits=limits, metrics=metrics)
    with running(app) as url, connected(url) as slow:
        send_head(slow, 100)
        answer = b"".join(iter(lambda: slow.recv(2**16), b""))  # until the server closes it
        assert answer.startswith(b"HTTP/1.1 408") and b"did not come within 0.2 s" in answer
    assert 'reason="slow_body"} 1.0' in metrics.text().decode()
    app = api.make_app(Engine([still]), model="tiny", is_ending=is_ending.is_set)
    with running(app) as url, connected(url) as stalled, connected(url) as whole:
        send_head(stalled, 100)
        stalled.sendall(b"{")
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        is_ending.set()
        send_head(whole, 15)
        whole.sendall(b'{"prompt": "x"}')  # comes while the server ends, but it comes
        assert whole.recv(2**16).startswith(b"HTTP/1.1 200")
        assert stalled.recv(2**16).startswith(b"HTTP/1.1 503")


def test_a_client_that_leaves_before_its_body_is_whole(still):
    engine = Engine([still])
    app = api.make_app(engine, model="tiny")
    headers = [(b"content-type", b"application/json")]
    begun = {"type": "http.request", "body": b'{"prompt": "x"}', "more_body": True}
    assert call(app, headers=headers, messages=[begun, {"type": "http.disconnect"}]) == (None, None)
    assert not engine.counts().done
    ended = {"type": "http.request", "body": b"", "more_body": False}
    assert call(app, headers=headers, messages=[begun, ended])[0] == 200


@pytest.mark.parametrize("length, status", [(b"ten", 400), (b"-1", 400), (b"9" * 5000, 413), (b"33554433", 413)])
def test_a_content_length_that_cannot_be(still, length, status):
    app = api.make_app(Engine([still]), model="tiny")
    found, body = call(app, headers=[(b"content-length", length)])
    assert found == status
    assert ("Content-Length is" if status == 400 else "more than 33,554,432 bytes") in body["error"]["message"]


@pytest.mark.parametrize("has_page", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_paths_and_methods_that_are_not_served(still, running, has_page):
    app = api.make_app(Engine([still]), model="tiny")
    if has_page:
        page = pytest.importorskip("unialign_jax.serving.page", reason="Gradio is not installed")
        page.add_page(app, Engine([still]), model="tiny")
    with running(app) as url:
        for method, path, allowed in (
            ("GET", "/v1/images/generations", "POST"),
            ("DELETE", "/v1/chat/completions", "POST"),
            ("POST", "/v1/models", "GET, HEAD"),
            ("PROPFIND", "/v1/models/tiny", "GET, HEAD"),
        ):
            answer = requests.request(method, url + path, timeout=60)
            assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
            assert answer.json()["error"]["type"] == "invalid_request_error"
        for method, path in (("GET", "/v1/nothing"), ("POST", "/v1/embeddings"), ("GET", "/v1/")):
            answer = requests.request(method, url + path, timeout=60)
            assert answer.status_code == 404 and "no such path" in answer.json()["error"]["message"]
        for path in ("/health", "/v1/models", "/v1/models/tiny"):
            answer = requests.head(url + path, timeout=60)
            assert (answer.status_code, answer.content) == (200, b"")


def test_a_model_by_its_name(still, running):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with running(api.make_app(Engine([still], loras={"style": 1.0}), model="tiny")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [client.models.retrieve(model.id).id for model in client.models.list()] == ["tiny", "tiny:style"]
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve("gpt-5")
        assert error.value.code == "model_not_found"
