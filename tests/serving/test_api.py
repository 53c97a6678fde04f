"""The API over HTTP: the openai client, plain requests, what is refused, and clients that leave."""

import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from unialign_jax.inference.streaming import TextStep
from unialign_jax.serving import api
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.metrics import Metrics

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai", reason="openai is not installed")

OPTIONS = {"steps": 2}


def png(size=(32, 32), value=100):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 50, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def asks(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_the_images_that_python_gets(client, tiny_pipeline):
    made = client.images.generate(prompt="a red circle", n=2, model="tiny", extra_body=OPTIONS | {"seed": 7})
    expected = tiny_pipeline.generate("a red circle", images_per_prompt=2, seed=7, **OPTIONS)
    assert [item.model_extra["seed"] for item in made.data] == [7, 8]
    for item, image in zip(made.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(item.b64_json), np.asarray(image))
    assert made.size == "32x32" and made.quality == "lossless"
    parameters = json.loads(Image.open(io.BytesIO(base64.b64decode(made.data[1].b64_json))).info["parameters"])
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("a red circle", 8, 2)


def test_edits_of_one_image_and_of_several(client, tiny_pipeline):
    one, other = png(), png(value=200)
    options = OPTIONS | {"seed": 3, "guidance_scale": 2.5}
    edited = client.images.edit(image=("a.png", one), prompt="make it green", extra_body=options)
    source = Image.open(io.BytesIO(one))
    [expected] = tiny_pipeline.edit("make it green", source, **options)
    np.testing.assert_array_equal(pixels(edited.data[0].b64_json), np.asarray(expected))
    both = client.images.edit(image=[("a.png", one), ("b.png", other)], prompt="both", extra_body=options)
    [expected] = tiny_pipeline.personalize("both", [source, Image.open(io.BytesIO(other))], **options)
    np.testing.assert_array_equal(pixels(both.data[0].b64_json), np.asarray(expected))


def test_a_json_edit_takes_base64_and_data_uris(server, client):
    form = client.images.edit(image=("a.png", png()), prompt="x", extra_body=OPTIONS | {"seed": 1}).data[0].b64_json
    for value in (uri(png()), base64.b64encode(png()).decode(), {"image_url": uri(png())}, [{"url": uri(png())}]):
        body = {"prompt": "x", "image": value, "seed": 1} | OPTIONS
        answer = requests.post(f"{server}/v1/images/edits", json=body, timeout=60)
        assert answer.json()["data"][0]["b64_json"] == form


def test_captions_answers_and_streams(client, tiny_pipeline):
    image = Image.open(io.BytesIO(png()))
    asked = {"model": "tiny", "extra_body": OPTIONS | {"seed": 5}, "temperature": 0.5}
    caption = client.chat.completions.create(messages=asks("", png()), **asked)
    assert caption.choices[0].message.content == tiny_pipeline.caption(image, seed=5, temperature=0.5, **OPTIONS)[0]
    answer = client.chat.completions.create(messages=asks("What is it?", png()), max_tokens=10**6, **asked)
    expected = tiny_pipeline.answer(image, "What is it?", seed=5, temperature=0.5, max_tokens=24, **OPTIONS)[0]
    assert answer.choices[0].message.content == expected
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(messages=asks("What is it?", png()), stream=True, max_tokens=24, **asked)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


class WritingPipeline:
    """Writes an answer in two parts, and waits between them until it is told to go on; it fails at a question."""

    max_batch, edit_limit = 2, 1024

    def __init__(self, model):
        self.sizes, self.config, self.tokenizer, self.gate = (
            model.sizes,
            model.config,
            model.tokenizer,
            threading.Event(),
        )

    def answer(self, images, questions, *, callback=None, **options):
        for text in ("", "a red", "a red circle on"):
            callback(TextStep(1, tuple(range(len(images))), (text,) * len(images)))
        assert self.gate.wait(30)
        if "fail" in questions:
            raise ValueError("it failed")
        return ["a red circle on white"] * len(images)


def test_words_are_streamed_as_they_settle(tiny_pipeline, running, monkeypatch):
    slow = WritingPipeline(tiny_pipeline)
    engine, tickets = Engine([slow]), []
    submit = engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda *given, **options: tickets.append(submit(*given, **options)) or tickets[-1]
    )
    with running(api.make_app(engine, model="tiny")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def stream(text):
            return client.chat.completions.create(model="tiny", messages=asks(text, png()), stream=True)

        events = iter(stream("what is it?"))
        words = [next(events).choices[0].delta.content for _ in range(3)]
        assert words == ["", "a red", " circle on"] and not slow.gate.is_set()
        slow.gate.set()
        rest = [(event.choices[0].delta.content, event.choices[0].finish_reason) for event in events]
        assert rest == [(" white", None), (None, "stop")]
        with pytest.raises(openai.APIError, match="the request failed: it failed"):
            list(stream("fail"))
        slow.gate.clear()
        left = stream("what?")
        assert next(iter(left)).choices[0].delta.content == "" and not tickets[-1].future.done()
        left.close()  # the client leaves while it is written
        deadline = time.monotonic() + 20
        while not tickets[-1].future.cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        slow.gate.set()
        assert len(list(stream("what is it?"))) == 5


def test_a_map_and_the_model_and_the_figures(server, client, tiny_pipeline):
    body = {"image": uri(png()), "kind": "canny", "seed": 2} | OPTIONS
    made = requests.post(f"{server}/v1/tasks/perceive", json=body, timeout=60).json()
    [expected] = tiny_pipeline.perceive("canny", Image.open(io.BytesIO(png())), seed=2, **OPTIONS)
    np.testing.assert_array_equal(pixels(made["data"][0]["b64_json"]), np.asarray(expected))
    [model] = client.models.list()
    assert (model.id, model.model_extra["image_size"]) == ("tiny", 32)
    figures = requests.get(f"{server}/metrics", timeout=60).text
    assert 'unialign_batch_size_count{task="perception"}' in figures
    assert "unialign_waiting 0.0" in figures
    assert requests.get(f"{server}/health", timeout=60).json()["status"] == "ok"
    assert (
        "steps"
        in requests.get(f"{server}/openapi.json", timeout=60).json()["components"]["schemas"]["ImageRequest"][
            "properties"
        ]
    )


def test_a_request_without_a_seed_gets_a_fresh_one(server):
    body = {"prompt": "x"} | OPTIONS
    made = [requests.post(f"{server}/v1/images/generations", json=body, timeout=60).json() for _ in range(2)]
    seeds = [answer["data"][0]["seed"] for answer in made]
    assert seeds[0] != seeds[1]
    again = requests.post(f"{server}/v1/images/generations", json=body | {"seed": seeds[0]}, timeout=60).json()
    assert again["data"][0]["b64_json"] == made[0]["data"][0]["b64_json"]


def test_the_fast_tier_sets_what_the_request_leaves_open(server):
    body = {"prompt": "x", "seed": 1, "quality": "fast", "steps": 2}
    made = requests.post(f"{server}/v1/images/generations", json=body, timeout=60).json()
    parameters = json.loads(Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"]))).info["parameters"])
    assert (parameters["solver"], parameters["steps"], made["quality"]) == ("unipc", 2, "fast")


BOMB = png((300, 300))  # more pixels than the server takes
BAD = {  # path, body or form -> words of the one line
    "no_prompt": ("images/generations", {}, "prompt: Field required"),
    "prompt_no_text": ("images/generations", {"prompt": 5}, "valid string"),
    "empty_prompt": ("images/generations", {"prompt": " "}, "not empty"),
    "unknown_key": ("images/generations", {"prompt": "x", "colour": 1}, "takes no colour"),
    "many": ("images/generations", {"prompt": "x", "n": 5}, "n is 5, expected 1 to 4"),
    "odd_size": ("images/generations", {"prompt": "x", "size": "30x32"}, "width is 30"),
    "size_no_size": ("images/generations", {"prompt": "x", "size": "big"}, "WIDTHxHEIGHT"),
    "large": ("images/generations", {"prompt": "x", "size": "96x96"}, "is 96, expected at most 64"),
    "steps": ("images/generations", {"prompt": "x", "steps": 9}, "steps is 9, expected at most 8"),
    "negative_steps": ("images/generations", {"prompt": "x", "steps": -1}, "steps is -1"),
    "seed": ("images/generations", {"prompt": "x", "seed": 2**32}, "seed is 4294967296"),
    "quality": ("images/generations", {"prompt": "x", "quality": "best"}, "quality is 'best'"),
    "url_form": ("images/generations", {"prompt": "x", "response_format": "url"}, "expected b64_json"),
    "surrogate": ("images/generations", {"prompt": "\ud800"}, "half of a character"),
    "url": ("images/edits", {"prompt": "x", "image": "https://example.org/a.png"}, "not fetched"),
    "file_url": ("images/edits", {"prompt": "x", "image": "file:///etc/passwd"}, "not fetched"),
    "path": ("images/edits", {"prompt": "x", "image": "../../etc/passwd"}, "no base64"),
    "no_image": ("images/edits", {"prompt": "x"}, "an edit needs one"),
    "no_picture": ("images/edits", {"prompt": "x", "image": "AAAA"}, "cannot be decoded"),
    "bomb": ("images/edits", {"prompt": "x", "image": uri(BOMB)}, "is 300 x 300 pixels, expected at most 65,536"),
    "cut": ("images/edits", {"prompt": "x", "image": uri(png()[:60])}, "cannot be decoded"),
    "mask": ("images/edits", {"prompt": "x", "image": uri(png()), "mask": "AAAA"}, "mask is not read"),
    "kind": ("tasks/perceive", {"image": uri(png()), "kind": "heat"}, "kind is"),
    "no_messages": ("chat/completions", {"messages": []}, "none of the user"),
    "no_image_to_ask": ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}, "have no image"),
    "two_images": ("chat/completions", {"messages": asks("?", png(), png())}, "2 images"),
    "max_tokens": ("chat/completions", {"messages": asks("?", png()), "max_tokens": 0}, "max_tokens is 0"),
    "two_answers": ("chat/completions", {"messages": asks("?", png()), "n": 2}, "n is above 1"),
    "message_no_object": ("chat/completions", {"messages": ["hello"]}, "messages"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_in_one_line(server, name):
    path, body, words = BAD[name]
    answer = requests.post(
        f"{server}/v1/{path}", data=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert words in message and "\n" not in message


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "body, headers, status, words",
    [
        (b'{"a": 1,}', {"Content-Type": "application/json"}, 400, "the request is no JSON: "),
        (b"[1]", {"Content-Type": "application/json"}, 400, "dictionary"),
        (b"\xff\xfe", {"Content-Type": "application/json"}, 400, ""),
        (b"x" * (2**18 + 1), {"Content-Type": "application/json"}, 413, "more than 262,144 bytes"),
        (b"[" * 100_000, {"Content-Type": "application/json"}, 400, ""),
    ],
)
def test_bodies_that_are_no_requests(server, body, headers, status, words):
    answer = requests.post(f"{server}/v1/images/generations", data=body, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_body_that_grows_beyond_the_limit_without_saying_so(server):
    pieces = (b"x" * 2**16 for _ in range(8))
    answer = requests.post(f"{server}/v1/images/generations", data=pieces, timeout=60)
    assert answer.status_code == 413


def test_two_hundred_bad_requests_between_good_ones(server):
    good = {"prompt": "a red circle", "seed": 1} | OPTIONS
    expected = requests.post(f"{server}/v1/images/generations", json=good, timeout=60).json()["data"]
    bad, session = list(BAD.values()), requests.Session()
    for number in range(200):
        path, body, _ = bad[number % len(bad)]
        answer = session.post(
            f"{server}/v1/{path}", data=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        if number % 40 == 0:
            assert session.post(f"{server}/v1/images/generations", json=good).json()["data"] == expected


def test_keys_are_asked_for_except_for_health(tiny_pipeline, running):
    with running(api.make_app(Engine([tiny_pipeline]), model="tiny", keys=["secret", "other"])) as url:
        for key, status in {"": 401, "secre": 401, "secret ": 200, "secret": 200, "other": 200, "sécret": 401}.items():
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert requests.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == status
        assert (
            requests.get(f"{url}/v1/models", headers={"Authorization": "Basic secret"}, timeout=60).status_code == 401
        )
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        assert requests.get(f"{url}/docs", timeout=60).status_code == 401
        assert (
            requests.get(f"{url}/v1/models", headers={"Origin": "https://evil.example"}, timeout=60).headers.get(
                "Access-Control-Allow-Origin"
            )
            is None
        )


def test_other_names_than_its_own_are_refused(tiny_pipeline, running):
    metrics = Metrics()
    app = api.make_app(
        Engine([tiny_pipeline]), model="tiny", keys=["secret"], hosts=["localhost", "::1", "me.local"], metrics=metrics
    )
    with running(app) as url:
        port = url.rpartition(":")[2]
        hosts = {f"localhost:{port}": 200, "LOCALHOST": 200, f"[::1]:{port}": 200, "me.local": 200}
        hosts |= {"evil.example": 421, f"evil.example:{port}": 421, "localhost.evil.example": 421, "[::1": 421, "": 421}
        for host, status in hosts.items():
            answer = requests.get(f"{url}/health", headers={"Host": host}, timeout=60)
            assert answer.status_code == status, host
        assert "expected localhost or ::1 or me.local" in answer.json()["error"]["message"]
        local = {"Host": "localhost"}
        assert requests.get(f"{url}/v1/models", headers=local, timeout=60).status_code == 401
        figures = requests.get(f"{url}/metrics", headers=local | {"Authorization": "Bearer secret"}, timeout=60).text
        assert 'unialign_refused_total{reason="host"} 5.0' in figures
        assert 'unialign_refused_total{reason="key"} 1.0' in figures


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_loses_no_request(server):
    with open("/dev/full", "w") as full:
        handler = logging.StreamHandler(full)
        ours = logging.getLogger("unialign_jax")
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        try:
            with pytest.raises(OSError):
                print("a line", file=full, flush=True)
            for _ in range(2):
                answer = requests.post(f"{server}/v1/images/generations", json={"prompt": "x"} | OPTIONS, timeout=60)
                assert answer.status_code == 200 and answer.json()["data"]
        finally:
            ours.removeHandler(handler)
            with contextlib.suppress(OSError):
                full.close()


class SlowPipeline:
    """Takes as long as it is told."""

    max_batch, edit_limit = 1, 1024

    def __init__(self, model):
        self.sizes, self.config, self.tokenizer = model.sizes, model.config, model.tokenizer
        self.gate, self.made = threading.Event(), []

    def generate(self, prompts, **options):
        assert self.gate.wait(30)
        self.made += prompts
        return [Image.new("RGB", (32, 32)) for _ in prompts]


def test_a_client_that_leaves_is_not_worked_for_and_a_full_queue_is_429(tiny_pipeline, running):
    slow = SlowPipeline(tiny_pipeline)
    engine = Engine([slow], max_waiting=2)
    with running(api.make_app(engine, model="tiny")) as url:
        host, port = url.removeprefix("http://").split(":")

        def send(prompt):
            body = json.dumps({"prompt": prompt}).encode()
            found = socket.create_connection((host, int(port)))
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            found.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            return found

        def wait_for(condition):
            deadline = time.monotonic() + 20
            while not condition(engine.counts()):
                assert time.monotonic() < deadline
                time.sleep(0.01)

        first = send("first")
        wait_for(lambda counts: counts.working == 1)
        leaves = send("leaves")
        wait_for(lambda counts: counts.waiting == 1)
        stays = send("stays")
        wait_for(lambda counts: counts.waiting == 2)
        answer = requests.post(f"{url}/v1/images/generations", json={"prompt": "one too many"}, timeout=60)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        leaves.close()
        time.sleep(0.5)  # the server looks every 0.1 s
        slow.gate.set()
        for connection in (first, stays):
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
            connection.close()
        wait_for(lambda counts: counts.cancelled == 1)
        assert slow.made == ["first", "stays"]
