"""Chats: where image and text come from, what is refused, where answers end, and whose fault an error is."""

import base64
import io
import json
import logging
import time

import pytest
import requests
from PIL import Image

from unialign_jax.serving import api
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import BadRequest


def shown(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def part(value):
    return shown(Image.new("RGB", (32, 32), (value, 50, 50)))


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


ANSWER = {"role": "assistant", "content": "a circle"}


class SayingPipeline:
    """Says how red the image is, what it was asked, and its sentence; or fails."""

    max_batch, edit_limit = 2, 1024
    sentence = "one two three four"

    def __init__(self, model):
        self.sizes, self.config, self.tokenizer = model.sizes, model.config, model.tokenizer
        self.error = None

    def answer(self, images, questions, *, callback=None, **options):
        if self.error:
            raise self.error
        return [f"{i.getpixel((0, 0))[0]} {q} {self.sentence}" for i, q in zip(images, questions, strict=True)]

    def caption(self, images, *, callback=None, **options):
        return [f"{image.getpixel((0, 0))[0]} {self.sentence}" for image in images]


@pytest.fixture(scope="module")
def saying(tiny_pipeline):
    return SayingPipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def url(saying, running, metrics):
    with running(api.make_app(Engine([saying]), model="tiny", metrics=metrics)) as url:
        yield url


def ask(url, messages, **more):
    return requests.post(f"{url}/v1/chat/completions", json={"messages": messages} | more, timeout=60)


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([user(part(10), text("what?"))], "10 what?"),
        ([user(part(10), text("what?")), ANSWER, user("and now?")], "10 and now?"),
        ([user(part(10)), ANSWER, user(text("and now?"))], "10 and now?"),
        ([user(part(10)), ANSWER, user(part(20), text("what?")), ANSWER, user("why?")], "20 why?"),
        ([user(part(10), part(11), text("x")), ANSWER, user(part(20), text("y"))], "20 y"),
        ([{"role": "system", "content": "be short"}, user(part(10))], "10 one"),
    ],
)
def test_text_of_the_last_message_and_the_newest_image(url, messages, expected):
    answer = ask(url, messages)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"].startswith(expected)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([user("hello")], "no image of the user"),
        ([{"role": "assistant", "content": [part(1)]}, user("hello")], "no image of the user"),
        ([user(part(10), part(11), text("x"))], "has 2 images, expected one"),
        ([user(part(10)), ANSWER, user(part(10), part(11)), ANSWER, user("x")], "has 2 images, expected one"),
        ([{"role": "user", "content": None}], "expected a text or a list of parts"),
        ([user(part(10), text("x" * 10_001))], "question has 10,001 characters"),
        ([user(part(10), text("\ud800"))], "half of a character"),
        ([user({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, text("x"))], "not fetched"),
    ],
)
def test_messages_that_cannot_be_answered(url, messages, words):
    answer = ask(url, messages)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert words in answer.json()["error"]["message"]


ONE = [user(part(10), text("what?"))]


@pytest.mark.parametrize(
    "name, value",
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", 5),
        ("n", 2),
    ],
)
def test_what_would_change_the_answer_is_refused(url, name, value):
    answer = ask(url, ONE, **{name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name) and error["message"].startswith(name)


def test_what_changes_nothing_is_taken(url):
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False, "n": 1}
    harmless |= {"top_logprobs": 0, "logit_bias": {}, "stop": [], "top_p": 1, "presence_penalty": 0, "user": "me"}
    for fields in (harmless, dict.fromkeys(harmless)):
        assert ask(url, ONE, **fields).status_code == 200


def test_what_vlmevalkit_sends(url):
    parts = [part(10), text("what?")]
    parts[0]["image_url"]["detail"] = "low"
    messages = [{"role": "system", "content": "You are helpful."}, user(*parts)]
    answer = ask(url, messages, model="tiny", n=1, max_tokens=2048, temperature=0)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"].strip().startswith("10 what?")


def test_an_answer_ends_before_a_stop(url):
    whole = ask(url, ONE).json()["choices"][0]
    assert whole["message"]["content"].endswith("one two three four")
    for stop, end in {"two": "one ", ("four", "three"): "one two ", "absent": "one two three four"}.items():
        found = ask(url, ONE, stop=stop).json()["choices"][0]
        assert found["message"]["content"].endswith(end), stop
    assert ask(url, ONE, stop="two").json()["choices"][0]["finish_reason"] == "stop"
    for stop, end in {"two": "one ", ("four", "three"): "one two ", "absent": "one two three four"}.items():
        events = [
            line.removeprefix("data: ") for line in ask(url, ONE, stop=stop, stream=True).text.splitlines() if line
        ]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert events[-1] == "[DONE]" and choices[-1]["finish_reason"] == "stop"
        assert "".join(choice["delta"].get("content", "") for choice in choices).endswith(end), stop


def test_what_may_become_a_stop_is_held_back():
    for answer, held in {"one tw": 2, "one two": 3, "one t": 1, "one": 0, "two one": 0}.items():
        assert api.begun_stop(answer, ["twoo", "tw!"]) == held, answer


def test_errors_of_ours_are_500_and_logged(url, saying, caplog, metrics):
    saying.error = ValueError("shapes do not match")
    try:
        for more in ({}, {"stream": True}):
            caplog.clear()
            with caplog.at_level(logging.ERROR):
                answer = ask(url, ONE, **more)
                deadline = time.monotonic() + 20  # uvicorn logs it after the answer
                while not any(r.exc_info and r.exc_info[1] is saying.error for r in caplog.records):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "the request failed: shapes do not match"
    finally:
        saying.error = None
    assert ask(url, ONE).status_code == 200
    assert "unialign_failed_requests_total 2.0" in metrics.text().decode()


@pytest.mark.slow
def test_an_answer_that_fills_its_room_says_length(running):
    """The demo model's answers are in words of one token each."""
    from unialign_jax.inference.pipeline import Pipeline

    pipeline = Pipeline.from_bundle("demo", max_batch=2)
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (16, 16, 48, 48))
    with running(api.make_app(Engine([pipeline]), model="demo")) as url:

        def reason(*parts, **more):
            answer = ask(url, [user(shown(image), *parts)], seed=1, **more).json()
            return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"], answer["warnings"]

        assert reason(max_tokens=2) == ("length", 2, [])
        assert reason(max_tokens=4, prefix="a")[0] == "length"
        assert reason()[0] == "stop"
        assert reason(text("what color is the square?"))[0] == "stop"
        assert reason(text("what color is the square?"), max_tokens=1)[:2] == ("length", 1)


def test_a_question_takes_part_of_the_room(url, saying, monkeypatch):
    """The tiny model's texts have 24 tokens; a question has 23 of them at most."""
    monkeypatch.setattr(saying, "answer", lambda images, questions, **options: ["red"])
    short = ask(url, [user(part(10), text("what color?"))]).json()
    assert short["choices"][0]["finish_reason"] == "stop" and short["warnings"] == []
    long = ask(url, [user(part(10), text("what color is the square? " * 12))]).json()
    assert long["choices"][0]["finish_reason"] == "length"
    [warning] = long["warnings"]
    assert "the model reads 23: its middle was left out" in warning


def test_messages_without_the_user():
    with pytest.raises(BadRequest, match="none of the user"):
        api.read_messages([ANSWER])
