"""The web page through Gradio's client and plain requests: its results, what it refuses, and who gets in."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed: pip install --no-deps -r requirements-page.txt")
import gradio_client

from unialign_jax import serving
from unialign_jax.data.shapes.tasks import shapes_example
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.inference.opening import ModelSource
from unialign_jax.inference.streaming import TextStep
from unialign_jax.serving import api, page, page_folder, page_worker
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.examples import GENERAL, examples_for
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import Limits

pytestmark = pytest.mark.slow

STEPS = 2


def png(size=(32, 32), value=100):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 50, 50)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stamp(tiny_bundle):
    return ModelSource(tiny_bundle).stamp(None, None)


@pytest.fixture(scope="module")
def engine(tiny_pipeline):
    return Engine([tiny_pipeline])


@pytest.fixture(scope="module")
def url(engine, limits, stamp, running):
    """A server of the tiny bundle with the page."""
    shared = {"model": "tiny", "limits": limits, "stamp": stamp, "metrics": Metrics(engine)}
    app = api.make_app(engine, **shared)
    is_ending = threading.Event()
    page.add_page(app, engine, **shared, is_ending=is_ending.is_set)
    with running(app) as url:
        yield url
        is_ending.set()


@pytest.fixture
def client(url, tmp_path):
    client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path))
    yield client
    client.close()


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photo.png").write_bytes(png())
    return gradio_client.handle_file(str(tmp_path / "photo.png"))


def generate(client, prompt="a red circle", *, size="auto", count=1, seed=7, is_random=False, steps=STEPS):
    """(status, gallery, seed, copies)."""
    made = client.predict(
        prompt, size, count, seed, is_random, "lossless", steps, None, False, "", api_name="/generate"
    )
    status, _, gallery, shown, *copies = made
    return status, gallery, shown, copies


def edit(client, instruction, seed):
    """(status, (before, after), history)."""
    made = client.predict(instruction, seed, False, "lossless", STEPS, None, False, "", api_name="/edit")
    slider, history, status = made[:3]
    return status, slider, history


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_everywhere(
    client, url, tiny_bundle, tiny_pipeline, launch_command, tmp_path
):
    def through_the_api(count):
        body = {"prompt": "a red circle", "n": count, "seed": 7, "steps": STEPS}
        answer = requests.post(f"{url}/v1/images/generations", json=body, timeout=60).json()
        return [base64.b64decode(item["b64_json"]) for item in answer["data"]]

    status, [item], _, _ = generate(client)
    made = Path(item["image"]).read_bytes()
    assert status.startswith("Done in") and Path(item["image"]).name == "unialign_7.png"
    assert through_the_api(1) == [made]
    output = tmp_path / "command.png"
    command = ["--task=text_to_image", "--prompt=a red circle", "--seed=7", f"--steps={STEPS}"]
    assert launch_command("generate").main([f"--bundle={tiny_bundle}", *command, f"--output={output}"]) == 0
    assert output.read_bytes() == made
    [expected] = tiny_pipeline.generate("a red circle", seed=7, steps=STEPS)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(made))), np.asarray(expected))
    _, gallery, _, _ = generate(client, count=2)
    assert through_the_api(2) == [Path(item["image"]).read_bytes() for item in gallery[:2]]


def test_a_drawn_seed_is_shown_and_brings_the_image_back(client):
    _, first, seed, _ = generate(client, is_random=True)
    _, second, other, _ = generate(client, is_random=True)
    assert seed != other
    _, again, shown, copies = generate(client, seed=seed)
    assert shown == seed and all(f"{seed}" in copy for copy in copies)
    assert Path(again[0]["image"]).read_bytes() == Path(first[0]["image"]).read_bytes()
    assert len(again) == 3  # the gallery keeps those before


@pytest.mark.slow
def test_a_conversation_of_edits_branches(client, photo, tiny_pipeline, tmp_path):
    assert client.predict("x", 1, False, "lossless", STEPS, None, False, "", api_name="/edit")[2].startswith("Not done")
    client.predict(photo, api_name="/edit_begin")
    talk = tiny_pipeline.conversation(Image.open(tmp_path / "photo.png"), steps=STEPS)
    for instruction, seed in (("make it green", 3), ("add a square", 4)):
        status, (before, after), history = edit(client, instruction, seed)
        np.testing.assert_array_equal(np.asarray(Image.open(before)), np.asarray(talk.image))
        talk.edit(instruction, seed=seed)
        np.testing.assert_array_equal(np.asarray(Image.open(after)), np.asarray(talk.image))
    slider, _, status = client.predict(api_name="/edit_undo")
    talk.undo()
    np.testing.assert_array_equal(np.asarray(Image.open(slider[1])), np.asarray(talk.image))
    assert status == "Step 1, from 0: make it green (seed 3)"
    assert client.predict(api_name="/edit_redo")[2] == "Step 2, from 1: add a square (seed 4)"
    client.predict(api_name="/edit_undo")
    _, slider, history = edit(client, "add a dot", 5)
    talk.edit("add a dot", seed=5)
    np.testing.assert_array_equal(np.asarray(Image.open(slider[1])), np.asarray(talk.image))
    assert [item["caption"] for item in history] == [
        "0: the original",
        "1, from 0: make it green (seed 3)",
        "2, from 1: add a square (seed 4)",
        "3, from 1: add a dot (seed 5)",
    ]


def test_a_photo_gets_a_caption_and_maps(client, photo, tiny_pipeline, tmp_path):
    wanted = ["caption", "canny", "pose"]
    status, caption, maps, _, *copies = client.predict(
        photo, wanted, 5, False, "lossless", STEPS, None, api_name="/perceive"
    )
    image = Image.open(tmp_path / "photo.png")
    assert status.startswith("Done") and caption == tiny_pipeline.caption(image, seed=5, steps=STEPS)[0]
    assert [item["caption"] for item in maps] == ["canny", "pose"]
    for item in maps:
        words = {"canny": "detect the edges", "pose": "find the keypoints"}[item["caption"]]
        [expected] = tiny_pipeline.perceive(item["caption"], image, instruction=words, seed=5, steps=STEPS)
        np.testing.assert_array_equal(np.asarray(Image.open(item["image"])), np.asarray(expected))
    assert len(copies[2].splitlines()) == 3


def test_questions_and_subjects(client, photo, tiny_pipeline, tmp_path):
    image = Image.open(tmp_path / "photo.png")
    _, answer, _, *_ = client.predict(photo, " What is it? ", 5, False, STEPS, 0.5, 24, api_name="/ask")
    expected = tiny_pipeline.answer(image, "What is it?", seed=5, steps=STEPS, temperature=0.5, max_tokens=24)
    assert answer == expected[0]
    _, caption, _, *_ = client.predict(photo, "", 5, False, STEPS, None, None, api_name="/ask")
    assert caption == tiny_pipeline.caption(image, seed=5, steps=STEPS)[0]
    subjects = [{"image": photo, "caption": None}]
    made = client.predict("it in a garden", subjects, 5, False, "lossless", STEPS, None, False, api_name="/personalize")
    [expected] = tiny_pipeline.personalize("it in a garden", image, seed=5, steps=STEPS)
    np.testing.assert_array_equal(np.asarray(Image.open(made[2][0]["image"])), np.asarray(expected))


def refused(url, reason):
    """How many requests the server's metrics count as refused for a reason."""
    figures = requests.get(f"{url}/metrics", timeout=60).text
    found = re.search(rf'unialign_refused_total\{{reason="{reason}"\}} (\S+)', figures)
    return float(found[1]) if found else 0.0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 9}, "steps is 9, expected at most 8 on this server"),
        ({"size": "96x96"}, "is 96, expected at most 64"),
        ({"size": "30x32"}, "width is 30, expected a multiple of 8"),
        ({"size": "huge"}, "expected WIDTHxHEIGHT"),
        ({"prompt": " "}, "not empty"),
    ],
)
def test_the_limits_are_those_of_the_api(client, url, change, words):
    before = refused(url, "bad_request")
    status, _, _, _ = generate(client, **change)
    assert refused(url, "bad_request") == before + 1
    assert status.startswith("Not done: ") and words in status and "\n" not in status


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, words",
    [(png((300, 300)), "is 300 x 300 pixels, expected at most 65,536"), (png()[:60], "cannot be decoded")],
)
def test_pictures_are_looked_at_as_those_of_the_api(client, tmp_path, content, words):
    (tmp_path / "bad.png").write_bytes(content)
    file = gradio_client.handle_file(str(tmp_path / "bad.png"))
    assert words in client.predict(file, "", 5, False, STEPS, None, None, api_name="/ask")[0]


def upload(url, *contents, name="files"):
    files = [(name, ("a.png", content)) for content in contents]
    return requests.post(f"{url}/gradio_api/upload", files=files, timeout=60)


def test_a_body_beyond_the_limit_is_refused(url):
    assert upload(url, b"x" * 2**18).status_code == 413


def page_files():
    return {path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "contents, name, words",
    [
        ([os.urandom(999)], "files", "'a.png' cannot be decoded: it is no image of a known format"),
        ([png(), b""], "files", "'a.png' cannot be decoded: it is empty"),
        ([png()], "other", "the upload has 'other', expected files alone"),
        ([png()] * 17, "files", "Too many files"),
    ],
)
def test_uploads_that_are_no_pictures_are_refused(url, contents, name, words):
    before, files = refused(url, "bad_request"), page_files()
    answer = upload(url, *contents, name=name)
    assert answer.status_code == 415 and words in answer.text
    assert refused(url, "bad_request") == before + 1 and page_files() == files


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data", "multipart/form-data; boundary=a"])
def test_uploads_that_are_no_form_are_refused(url, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = requests.post(f"{url}/gradio_api/upload", data=b"--b\r\n", headers=headers, timeout=60)
    assert answer.status_code == 415 and "the upload cannot be read" in answer.text


def test_uploads_have_a_quota(tiny_pipeline, running, monkeypatch):
    monkeypatch.setattr(page_folder, "MOST_BYTES", 200_000)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # and then what it was
    engine = Engine([tiny_pipeline])
    metrics = Metrics(engine)
    app = api.make_app(engine, model="tiny", metrics=metrics)
    page.add_page(app, engine, model="tiny", metrics=metrics)
    examples, noise = page_files(), np.random.default_rng(0)
    with running(app) as url:

        def picture(side):
            buffer = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
            return buffer.getvalue()

        for number in range(9):  # each of 30 kB
            [name] = upload(url, picture(100)).json()
            os.utime(name, times=(time.time() - 100 + number,) * 2)
            assert sum(path.stat().st_size for path in page_files()) <= 200_000
        assert Path(name).exists() and len(page_files() - examples) < 7 and examples <= page_files()
        answer = upload(url, picture(300))
        assert answer.status_code == 507 and answer.text.startswith("there is no room for more pictures")
        assert refused(url, "full") == 1


# Who gets in, and to what


def join(url, data, **headers):
    body = {"data": data, "fn_index": 0, "session_hash": "abc"}
    return requests.post(f"{url}/gradio_api/queue/join", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/run/generate", "/gradio_api/api/generate", "/gradio_api/call/generate", "/proxy=http://x.org/",
        "/gradio_api/proxy=http://x.org/", "/gradio_api/vibe-edit", "/monitoring", "/nothing", "/gradio_api/deep_link",
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=http://x.org/a", "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd", "/file=/etc/passwd", "/file/etc/passwd",
    ],
)  # fmt: skip
def test_other_paths_of_gradio_are_closed(url, path):
    before = refused(url, "no_page")
    statuses = [getattr(requests, method)(f"{url}{path}", timeout=60).status_code for method in ("get", "post")]
    assert set(statuses) <= {404, 405} and refused(url, "no_page") == before + statuses.count(404)


@pytest.mark.bad_input
@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/a.png", "file:///etc/passwd", 5, "a\0b"])
def test_files_that_were_not_uploaded_are_refused(url, path):
    meta = {"_type": "gradio.FileData"}
    before = refused(url, "bad_request")
    for data in ([{"path": path, "meta": meta}], [[{"image": {"path": path, "meta": meta}, "caption": None}]]):
        assert join(url, data).status_code == 400
    assert refused(url, "bad_request") == before + 2


def test_a_link_out_of_the_folder_is_not_followed(url):
    config = requests.get(f"{url}/config", timeout=60).text
    assert 'analytics_enabled":false' in config.replace(" ", "")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.name.startswith("unialign_page_") and folder.stat().st_mode & 0o077 == 0
    (folder / "link").symlink_to("/etc/passwd")
    answer = requests.get(f"{url}/gradio_api/file={folder}/link", timeout=60)
    (folder / "link").unlink()
    assert answer.status_code == 404


def test_pages_of_other_origins_are_refused(url):
    before = refused(url, "origin")
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}):
        assert join(url, [], **headers).status_code == 403
        answer = requests.get(f"{url}/config", headers=headers, timeout=60)
        assert answer.status_code == 403 and "Access-Control-Allow-Origin" not in answer.headers
    assert refused(url, "origin") == before + 6
    assert requests.get(f"{url}/config", headers={"Origin": url}, timeout=60).status_code == 200


def test_nothing_comes_from_elsewhere(url):
    answer = requests.get(url, timeout=60)
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    for content in (answer.text, requests.get(f"{url}/theme.css", timeout=60).text):
        for word in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "unpkg"):
            assert word not in content
    assert requests.get(f"{url}/docs", timeout=60).status_code == 200  # the API's paths are as they were
    assert requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"


def test_the_page_asks_for_the_key(tiny_pipeline, running):
    engine = Engine([tiny_pipeline])
    app = api.make_app(engine, model="tiny", keys=["sécret"])
    page.add_page(app, engine, model="tiny", needs_key=True)
    with running(app) as url:
        paths = ["/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/assets/x"]
        for path in paths:
            answer = requests.get(f"{url}{path}", timeout=60)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic ")
            assert requests.get(f"{url}{path}", auth=("u", "wrong"), timeout=60).status_code == 401
        assert requests.post(f"{url}/gradio_api/upload", files={"files": b"x"}, timeout=60).status_code == 401
        assert join(url, []).status_code == 401
        right = ("anybody", "sécret".encode())
        assert requests.get(url, auth=right, timeout=60).status_code == 200
        assert requests.get(f"{url}/v1/models", auth=right, timeout=60).status_code == 401
        assert requests.get(f"{url}/v1/models", timeout=60).headers.get("WWW-Authenticate") is None
        bad = {"Authorization": "Basic !"}
        assert requests.get(url, headers=bad, timeout=60).status_code == 401


# Progress, cancelling, the end


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


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Browser:
    """A session as a browser has it: an event is queued, and a stream tells of it until it is closed."""

    def __init__(self, url):
        self.url, self.session = url, f"session{id(self)}"
        host, port = url.removeprefix("http://").split(":")
        self._host, self._port = host, int(port)
        config = requests.get(f"{url}/config", timeout=60).json()
        self._numbers = {call["api_name"]: call["id"] for call in config["dependencies"]}
        self.stream = None

    def ask(self, name, *data):
        body = {"data": data, "fn_index": self._numbers[name], "session_hash": self.session}
        assert requests.post(f"{self.url}/gradio_api/queue/join", json=body, timeout=60).status_code == 200
        self.stream = self.stream or self.open(f"/gradio_api/queue/data?session_hash={self.session}")

    def open(self, path):
        found = socket.create_connection((self._host, self._port))
        found.settimeout(20)
        found.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n\r\n".encode())
        return found

    def wait_for(self, words, stream=None):
        """Reads a stream until it says the words."""
        read = b""
        while words.encode() not in read:
            read += (stream or self.stream).recv(10**5)


def test_cancelling_and_leaving_and_an_end_with_an_open_page(tiny_pipeline, running, monkeypatch):
    slow = SlowPipeline(tiny_pipeline)
    engine, is_ending = Engine([slow]), threading.Event()
    app = api.make_app(engine, model="tiny")
    page.add_page(app, engine, model="tiny", is_ending=is_ending.is_set)
    submit, tickets = engine.submit, []
    monkeypatch.setattr(
        engine, "submit", lambda *given, **options: tickets.append(submit(*given, **options)) or tickets[-1]
    )
    options = ["auto", 1, 7, False, "lossless", None, None, None, False, "", None]
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.is_dir()
    with running(app) as url:
        try:
            first, second, third = (Browser(url) for _ in range(3))
            first.ask("generate", "first", *options)
            first.wait_for("Working")
            second.ask("generate", "second", *options)
            second.wait_for("Waiting: 1 before it")
            third.ask("generate", "third", *options)
            third.wait_for("Waiting: 2 before it")
            third.stream.close()  # the page is closed
            second.ask("generate_cancel", None)
            second.wait_for("Cancelled.")
            beat = first.open("/gradio_api/heartbeat/" + first.session)
            first.wait_for("ALIVE", beat)
            wait_for(lambda: tickets[1].future.cancelled() and tickets[2].future.cancelled())
            slow.gate.set()
            first.wait_for("Done in")
            wait_for(lambda: engine.counts().waiting == 0)
            assert slow.made == ["first"] and engine.counts().cancelled == 2
        finally:
            slow.gate.set()
            is_ending.set()
    while beat.recv(10**6):  # the server closed it
        pass
    assert not folder.exists()


def collected(worker, *asked, **options):
    async def collect():
        return [moment async for moment in worker.do(*asked, **options)]

    return asyncio.run(collect())


def test_previews_come_only_where_they_are_asked_for(tiny_pipeline, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(page_worker, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(page_worker, "STATUS_SECONDS", 0.01)
    worker = page_worker.Worker(engine, tmp_path, model="tiny", limits=Limits(), stamp={})
    asked = [("text_to_image", {"prompt": "a", "seed": 3, "steps": 4}, [])]
    plain, live = collected(worker, asked), collected(worker, asked, live=True)
    assert all(moment.preview is None for moment in plain)
    assert any(moment.preview is not None and moment.preview.size == (32, 32) for moment in live)
    images = [np.asarray(moments[-1].made[0][1][0], int) for moments in (plain, live)]
    [expected] = tiny_pipeline.generate("a", seed=3, steps=4)
    np.testing.assert_array_equal(images[0], np.asarray(expected))
    assert np.abs(images[0] - images[1]).max() <= 1  # two programs, which round otherwise


class Call:
    """A step as the sampler hands it to a callback."""

    def __init__(self, index, members, count=28):
        self.index, self.members, self.count = index, members, count
        self.latents = SimpleNamespace(block_until_ready=lambda: None)

    def images(self):
        return [f"image {member} at {self.index}" for member in self.members]


def test_steps_are_told_where_there_is_a_callback(monkeypatch):
    monkeypatch.setattr(page_worker, "PREVIEW_SECONDS", 0.0)
    alone, several, pairs = (page_worker.Steps(images, True) for images in (1, 2, 5))
    alone(Call(7, (0,)))
    assert (alone.words, alone.image) == ("step 7 of 28", "image 0 at 7")
    several(Call(28, (0, 1)))
    assert (several.words, several.image) == ("step 28 of 28", None)  # the image itself comes
    words = []
    for index, members in ((27, (0, 1)), (28, (0, 1)), (1, (0, 1)), (28, (0, 1)), (3, (0,))):
        pairs(Call(index, members))
        words.append(pairs.words)
    assert words == [
        "step 27 of 28 for images 1 to 2 of 5", "step 28 of 28 for images 1 to 2 of 5",
        "step 1 of 28 for images 3 to 4 of 5", "step 28 of 28 for images 3 to 4 of 5",
        "step 3 of 28 for image 5 of 5",
    ]  # fmt: skip
    plain = page_worker.Steps(1, False)
    plain(Call(7, (0,)))
    assert (plain.words, plain.image) == ("step 7 of 28", None)


class SteppedPipeline:
    """Halts in the middle: of its steps where it has a callback, of a text's words, or of an image without either."""

    max_batch, edit_limit = 1, 1024

    def __init__(self, model, reproducible):
        self.sizes, self.config, self.tokenizer, self.reproducible = (
            model.sizes, model.config, model.tokenizer, reproducible,
        )  # fmt: skip
        self.gate = threading.Event()

    def generate(self, prompts, callback=None, **options):
        for index in range(1, 5):
            if callback:
                callback(Call(index, (0,), 4))
            if index == 3:
                assert self.gate.wait(30)
        return [Image.new("RGB", (32, 32))]

    def caption(self, images, callback=None, **options):
        callback(TextStep(1, (0,), ("a red",)))
        assert self.gate.wait(30)
        return ["a red circle"]


@pytest.mark.parametrize(
    "reproducible, live, words",
    [(False, True, "step 3 of 4, "), (True, False, "step 3 of 4, "), (False, False, "")],
)
def test_the_status_tells_the_step(tiny_pipeline, tmp_path, monkeypatch, reproducible, live, words):
    monkeypatch.setattr(page_worker, "STATUS_SECONDS", 0.01)
    pipeline = SteppedPipeline(tiny_pipeline, reproducible)
    worker = page_worker.Worker(Engine([pipeline]), tmp_path, model="tiny", limits=Limits(), stamp={})
    lines = []

    async def watch():
        async for moment in worker.do([("text_to_image", {"prompt": "a", "seed": 3, "steps": 4}, [])], live):
            lines.append(moment.status)
            if re.match(rf"Working: {words}\d", moment.status):
                pipeline.gate.set()

    asyncio.run(watch())
    assert pipeline.gate.is_set() and lines[-1].startswith("Done in")
    assert words or not any("step" in line for line in lines)


def test_a_text_is_shown_while_it_is_written(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(page_worker, "STATUS_SECONDS", 0.01)
    (tmp_path / "photo.png").write_bytes(png())
    pipeline = SteppedPipeline(tiny_pipeline, False)
    worker = page_worker.Worker(Engine([pipeline]), tmp_path, model="tiny", limits=Limits(), stamp={})
    said = []

    async def watch():
        async for moment in worker.do([("caption", {}, [tmp_path / "photo.png"])]):
            said.append(moment.said)
            if moment.said:
                pipeline.gate.set()
        return moment

    [(_, results)] = asyncio.run(watch()).made
    assert "a red" in said and results == ["a red circle"]


def test_a_text_that_is_not_read_whole_is_told(engine, tmp_path):
    worker = page_worker.Worker(engine, tmp_path, model="tiny", limits=Limits(), stamp={})
    asked = [("text_to_image", {"prompt": "circle " * 200, "steps": 1}, [])]
    status = collected(worker, asked)[-1].status
    assert re.match(r"Done in \S+ s\. prompt is \d+ tokens long", status)


def test_a_picture_that_is_gone_is_told(engine, tmp_path):
    worker = page_worker.Worker(engine, tmp_path, model="tiny", limits=Limits(), stamp={})
    [moment] = collected(worker, [("caption", {}, [tmp_path / "gone.png"])])
    assert moment.status == "Not done: the picture is no longer kept here: give it again" and moment.made is None


def test_what_cannot_be_kept_is_told_in_the_status(client, engine, monkeypatch):
    def full(self, image, seed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_worker.Worker, "keep", full)
    assert "No space left on device" in generate(client)[0]


def test_sizes_are_those_that_the_model_makes():
    pipeline = SimpleNamespace(config=SimpleNamespace(image_size=512), sizes=SimpleNamespace(multiple=16, largest=3072))
    assert page.size_choices(pipeline, Limits()) == [
        ("the model's own", "auto"),
        ("square, 512 x 512", "512x512"),
        ("landscape, 592 x 448", "592x448"),
        ("portrait, 448 x 592", "448x592"),
        ("wide, 688 x 384", "688x384"),
        ("tall, 384 x 688", "384x688"),
    ]
    pipeline.sizes.largest = 520  # no multiple
    assert ("wide, 512 x 384", "512x384") in page.size_choices(pipeline, Limits())


def test_the_examples_fit_the_model():
    shapes = examples_for(load_tokenizer())
    for text in shapes.map_instructions.values():  # what the shapes world says
        assert text in {shapes_example("perception", 0, index, image_size=16).instruction for index in range(40)}
    assert all(" background" in prompt for prompt in shapes.prompts) and shapes.photos[0].size == (64, 64)
    other = SimpleNamespace(token_ids=lambda text: [1, 2, 3])
    assert examples_for(other) is GENERAL


def test_without_gradio_the_api_is_served_alone(launch_command, monkeypatch, caplog):
    serve = launch_command("serve")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "unialign_jax.serving.page")
    monkeypatch.delattr(serving, "page")
    with caplog.at_level(logging.INFO):
        assert not serve.add_page(None, None)
    assert json.loads(caplog.messages[-1])["page"].startswith("not served: Gradio is not installed: pip install")
