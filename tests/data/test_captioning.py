"""Captions from an endpoint: a real HTTP server on this machine that fails, stalls and lies."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.captioning import Captioner, Journal, caption_images, image_digest
from unialign_jax.data.endpoint import MAX_ANSWER, Failed, Refused


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def answer(caption, **choice):
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return json.dumps({"choices": [{"message": {"content": caption}} | choice], "usage": usage}).encode()


def endpoint(server, **changes):
    settings = {"timeout": 2.0, "first_pause": 0.01, "attempts": 4} | changes
    return Captioner(server.url, "some-model", **settings)


def run(server, tmp_path, images, concurrency=4, **changes):
    asked = endpoint(server, **changes)
    journal = Journal(tmp_path / "captions.jsonl", asked)
    try:
        return caption_images(images, asked, journal, concurrency=concurrency), journal
    finally:
        journal.close()


def test_every_image_is_asked_once_and_many_at_a_time(server, tmp_path):
    server.behave = lambda grey, times: time.sleep(0.1) or (200, {}, answer(f" grey\n{grey} "))
    images = [png(value) for value in (10, 20, 30, 10, 40, 20)]
    done, journal = run(server, tmp_path, images, key="secret", max_side=30, prompt="What is it?")
    assert server.asked == {10: 1, 20: 1, 30: 1, 40: 1}
    assert server.most > 1
    assert journal[image_digest(images[1])] == "grey 20"
    assert (done.asked, done.answered, done.failed, done.prompt_tokens, done.answer_tokens) == (4, 4, 0, 400, 28)
    assert done.cost(1.0, 10.0) == pytest.approx((400 + 280) / 1e6)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert server.image_of(body).size == (30, 20)
    assert body["model"] == "some-model"
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}


def test_a_run_resumes_from_its_journal(server, tmp_path):
    images = [png(value) for value in (10, 20, 30)]
    run(server, tmp_path, images[:2])
    path = tmp_path / "captions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed while it wrote the second caption
    done, journal = run(server, tmp_path, images)
    assert done.asked == 2
    assert sum(server.asked.values()) == 4
    assert {journal[image_digest(image)] for image in images} == {"grey 10", "grey 20", "grey 30"}
    assert run(server, tmp_path, images)[0].asked == 0


@pytest.mark.parametrize(
    "first",
    [
        (500, {}, b"out of order"),
        (429, {"Retry-After": "0"}, b""),
        (503, {"Retry-After": "never"}, b""),
        (None, {}, b""),
        (200, {"Content-Length": "100"}, b"{"),
        (200, {}, b"<html>login</html>"),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        (200, {}, answer("   ")),
        (200, {}, answer("a\0b")),
        (200, {}, b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        (200, {}, answer("long " * 20_000)),
        (200, {}, b"x" * (MAX_ANSWER + 1)),
    ],
    ids=lambda first: repr(first)[:40],
)
def test_what_may_pass_is_asked_again(server, tmp_path, first):
    server.behave = lambda grey, times: first if times == 1 else (200, {}, answer("at last"))
    done, journal = run(server, tmp_path, [png(10)])
    assert journal[image_digest(png(10))] == "at last"
    assert done.retries == 1


def test_a_slow_answer_is_given_up_and_asked_again(server, tmp_path):
    drops = [b" "] * 40
    server.behave = lambda grey, times: (200, {}, drops if times == 1 else answer("soon"))
    began = time.monotonic()
    done, journal = run(server, tmp_path, [png(10)], timeout=0.5)
    assert journal[image_digest(png(10))] == "soon"
    assert done.retries == 1
    assert time.monotonic() - began < 3


def test_one_image_that_fails_does_not_stop_the_others(server, tmp_path):
    def behave(grey, times):
        replies = {
            20: (500, {}, b""),
            30: (400, {}, b"no such image"),
            40: (200, {}, answer("cut", finish_reason="length")),
        }
        return replies.get(grey, (200, {}, answer("fine")))

    server.behave = behave
    done, journal = run(server, tmp_path, [png(10), png(20), b"no image", png(30), png(40)])
    assert (done.answered, done.failed) == (1, 4)
    assert server.asked[20] == 4 and server.asked[30] == 1 and server.asked[40] == 1
    assert done.reasons["status 500"] == 1
    assert done.reasons["status 400: no such image"] == 1
    assert any("image cannot be decoded" in reason for reason in done.reasons)
    assert image_digest(png(20)) not in journal


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_all_requests_have_in_common_stops_at_once(server, tmp_path, status):
    server.behave = lambda grey, times: (status, {"Location": "http://elsewhere.example/"}, b"wrong key")
    with pytest.raises(Refused, match=f"status {status}"):
        run(server, tmp_path, (png(value) for value in range(0, 250, 5)), concurrency=2)
    assert sum(server.asked.values()) < 12


def test_captions_before_a_refusal_are_kept(server, tmp_path):
    server.behave = lambda grey, times: (401, {}, b"") if grey == 30 else (200, {}, answer("kept"))
    with pytest.raises(Refused):
        run(server, tmp_path, [png(10), png(20), png(30)], concurrency=1)
    server.behave = lambda grey, times: (200, {}, answer("new"))
    _, journal = run(server, tmp_path, [png(10), png(20), png(30)])
    assert journal[image_digest(png(10))] == "kept"
    assert journal[image_digest(png(30))] == "new"


def test_a_journal_of_something_else_is_refused(server, tmp_path):
    run(server, tmp_path, [png(10)])
    with pytest.raises(ValueError, match="captions of the prompt"):
        Journal(tmp_path / "captions.jsonl", endpoint(server, prompt="Another?"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="no journal of captions"):
        Journal(other, endpoint(server))
    assert other.read_text() == '{"a": 1}\n'


def test_a_server_that_is_not_there(tmp_path):
    asked = Captioner("http://127.0.0.1:9/v1", "m", attempts=2, first_pause=0.01)
    done = caption_images([png(10)], asked, Journal(tmp_path / "j", asked))
    assert done.failed == 1 and any("connection failed" in reason for reason in done.reasons)
    with pytest.raises(ValueError, match="expected a URL"):
        Captioner("localhost:8000", "m")
    assert issubclass(Failed, Exception)
