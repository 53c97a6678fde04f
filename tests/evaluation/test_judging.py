"""A judge behind a real HTTP server on this machine: what it is sent, what is kept, and what is asked again."""

import base64
import json
import logging
import threading
import time

import pytest
from PIL import Image

from unialign_jax.data.endpoint import Endpoint
from unialign_jax.evaluation import judging
from unialign_jax.evaluation.judging import FAILED, PARSED, UNPARSED, Journal, Judge, Question, Unparsed


def read_number(answer):
    if not answer.isdigit():
        raise Unparsed("no number")
    return int(answer)


def ask(item="a", text="How many?", **more):
    return Question(item, "count", text, read=read_number, **more)


@pytest.fixture
def make_judge(chat_server, tmp_path):
    """A function (changes of the endpoint) -> a judge with the journal of the test, which is closed at its end."""
    opened = []

    def make(concurrency=4, prices=(0.0, 0.0), **changes):
        for judge in opened:
            judge.close()
        settings = {"timeout": 2.0, "first_pause": 0.01, "attempts": 3} | changes
        endpoint = Endpoint(chat_server.url, "some-model", **settings)
        judge = Judge(endpoint, Journal(tmp_path / "judgements.jsonl"), concurrency=concurrency, prices=prices)
        opened.append(judge)
        return judge

    yield make
    for judge in opened:
        judge.close()


def text_of(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


@pytest.fixture
def server(chat_server):
    """The fake judge: requests by their text, all answered by "5"."""
    chat_server.name_of = text_of
    chat_server.behave = lambda text, times: (200, {}, chat_server.answer("5"))
    return chat_server


def test_what_the_judge_is_sent(server, make_judge, tmp_path):
    for name, color in (("first.png", "red"), ("second.jpg", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    paths = (tmp_path / "first.png", tmp_path / "second.jpg")
    judge = make_judge(key="secret", max_tokens=33)
    questions = [
        ask(text="after", images=paths),
        ask(text="before", images=paths, images_first=True, system="Be strict.", max_tokens=3, more={"top_p": 1}),
        ask(text="alone"),
    ]
    judge.ask(questions)
    sent = {text_of(body): (headers, body) for _, headers, body in server.requests}
    headers, body = sent["after"]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-model", 0, 33)
    [message] = body["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "image_url"]
    urls = [part["image_url"]["url"] for part in message["content"][1:]]
    assert [url.partition(";")[0] for url in urls] == ["data:image/png", "data:image/jpeg"]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [path.read_bytes() for path in paths]
    _, body = sent["before"]
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "image_url", "text"]
    assert (body["max_tokens"], body["top_p"]) == (3, 1)
    assert sent["alone"][1]["messages"] == [{"role": "user", "content": "alone"}]


def test_nothing_is_asked_twice(server, make_judge):
    questions = [ask(str(number), f"question {number % 3}") for number in range(6)]
    settled = []
    found = make_judge().ask(questions, settled.append)
    assert [judgement.value for judgement in found] == [5] * 6 and len(settled) == 6
    assert server.asked == {f"question {number}": 1 for number in range(3)}
    settled.clear()
    judge = make_judge()
    assert [judgement.value for judgement in judge.ask(questions, settled.append)] == [5] * 6
    assert sum(server.asked.values()) == 3 and len(settled) == 6
    assert judge.describe()["questions"] == 3 and judge.describe()["prompt_tokens"] == 300
    make_judge().ask([ask("0", "question 0", max_tokens=9)])  # another question
    assert server.asked["question 0"] == 2


def test_answers_that_cannot_be_read_are_asked_again_at_higher_temperatures(server, make_judge):
    server.behave = lambda text, times: (200, {}, server.answer("5" if times == 3 else f"many {times}"))
    judge = make_judge(first_pause=30.0)  # it does not wait for a judge that answers
    began = time.monotonic()
    [found] = judge.ask([ask()])
    assert time.monotonic() - began < 5
    assert (found.status, found.value, found.answers) == (PARSED, 5, ("many 1", "many 2", "5"))
    assert [body["temperature"] for _, _, body in server.requests] == [0, 0.2, 0.4]
    assert (found.prompt_tokens, found.answer_tokens) == (300, 21)


def test_a_judge_that_never_says_it_is_kept_and_not_asked_again(server, make_judge):
    server.behave = lambda text, times: (200, {}, server.answer(f"many {times}", finish_reason="length"))
    [found] = make_judge().ask([ask()])
    assert (found.status, found.value) == (UNPARSED, None)
    assert found.answers == ("many 1", "many 2", "many 3")
    assert found.reason == "no number (it is cut at max_tokens)"
    [again] = make_judge().ask([ask()])
    assert again == found and server.asked["How many?"] == 3


@pytest.mark.parametrize("reply", [(500, {}, b""), (429, {"Retry-After": "0"}, b""), (None, {}, b"")], ids=repr)
def test_what_was_not_answered_is_asked_by_the_next_run(server, make_judge, reply):
    """Also when it was answered once, by what could not be read."""
    server.behave = lambda text, times: (200, {}, server.answer("many")) if times == 1 else reply
    [found] = make_judge().ask([ask()])
    assert found.status == FAILED and found.value is None and found.answers == ("many",)
    server.behave = lambda text, times: (200, {}, server.answer("5"))
    judge = make_judge()
    [found] = judge.ask([ask()])
    assert found.value == 5 and server.asked["How many?"] == 4
    assert {name: judge.describe()[name] for name in judging.STATUSES} == {"parsed": 1, "unparsed": 0, "failed": 0}


def test_the_temperature_stays_where_the_endpoint_was_down(server, make_judge):
    server.behave = lambda text, times: (503, {}, b"") if times < 3 else (200, {}, server.answer("5"))
    make_judge().ask([ask()])
    assert [body["temperature"] for _, _, body in server.requests] == [0, 0, 0]


def test_a_slow_answer_and_one_that_breaks_off(server, make_judge):
    def behave(text, times):
        if text == "slow" and times == 1:
            return 200, {}, [b" "] * 40
        if text == "torn" and times == 1:
            return 200, {"Content-Length": "100"}, b'{"choices'
        return 200, {}, server.answer("5")

    server.behave = behave
    found = make_judge(timeout=0.4).ask([ask(text="slow"), ask(text="torn")])
    assert [judgement.value for judgement in found] == [5, 5]


def test_what_a_judge_refuses_for_all_ends_at_once(server, make_judge, refuses):
    server.behave = lambda text, times: (401, {}, b'{"error": "who are you?"}')
    questions = [ask(text=str(number)) for number in range(40)]
    refuses(lambda: make_judge(concurrency=2).ask(questions), "401", "without an API key", "who are you?")
    assert sum(server.asked.values()) < 10
    refuses(lambda: make_judge(key="old").ask(questions), "401", server.url)


def test_an_endpoint_that_is_down_is_given_up(server, make_judge, refuses, monkeypatch):
    monkeypatch.setattr(judging, "GIVE_UP", 6)
    server.behave = lambda text, times: (200, {}, server.answer("5")) if int(text) < 3 else (500, {}, b"")
    questions = [ask(text=str(number)) for number in range(60)]
    refuses(lambda: make_judge(concurrency=2, attempts=1).ask(questions), "answered none of 6", "status 500")
    assert sum(server.asked.values()) < 25
    server.behave = lambda text, times: (200, {}, server.answer("5"))
    make_judge().ask(questions)
    assert all(server.asked[str(number)] == 1 for number in range(3))


def test_an_interruption_keeps_what_is_answered(server, make_judge):
    go = threading.Event()

    def behave(text, times):
        if int(text) >= 2:
            go.wait(5)
        return 200, {}, server.answer("5")

    server.behave = behave
    settled = []

    def stop(judgement):
        settled.append(judgement)
        if len(settled) == 2:
            go.set()
            raise KeyboardInterrupt

    judge = make_judge(concurrency=1)
    with pytest.raises(KeyboardInterrupt):
        judge.ask([ask(text=str(number)) for number in range(20)], stop)
    asked = dict(server.asked)
    assert len(asked) < 20
    found = make_judge().ask([ask(text=str(number)) for number in range(20)])
    assert [judgement.value for judgement in found] == [5] * 20
    assert all(server.asked[text] == 1 for text in asked)


def test_a_torn_line_is_dropped_and_a_strangers_file_refused(server, make_judge, tmp_path, refuses):
    path = tmp_path / "judgements.jsonl"
    make_judge(concurrency=1).ask([ask(text="one"), ask(text="two")])
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the second
    judge = make_judge()
    assert len(judge.journal.judgements) == 1
    judge.ask([ask(text="one"), ask(text="two")])
    assert server.asked == {"one": 1, "two": 2}
    assert len(path.read_text().splitlines()) == 3
    for content, words in (
        ('{"a": 1}\n', "holds no judgements"),
        ("hello\n", "not JSON"),
        (json.dumps({"format": judging.FORMAT}) + '\n{"key": "k"}\n', "line 2 is no judgement"),
    ):
        (tmp_path / "other.jsonl").write_text(content)
        refuses(lambda: Journal(tmp_path / "other.jsonl"), words)
        assert (tmp_path / "other.jsonl").read_text() == content


def test_one_process_at_a_time_has_a_journal(tmp_path, refuses):
    journal = Journal(tmp_path / "j.jsonl")
    refuses(lambda: Journal(tmp_path / "j.jsonl"), "another process")
    journal.close()
    Journal(tmp_path / "j.jsonl").close()


def test_the_cost_is_told_before_and_after(server, make_judge, tmp_path, caplog):
    caplog.set_level(logging.INFO, "unialign_jax")
    Image.new("RGB", (57, 28)).save(tmp_path / "wide.png")  # three squares of 28 pixels by one
    judge = make_judge(max_tokens=50, prices=(1000.0, 10_000.0))
    judge.ask([ask(text="x" * 40, images=(tmp_path / "wide.png",)), ask(text="y" * 41)])
    before, after = caplog.messages
    assert "asked 2 of 2 questions" in before
    assert "about 24 tokens and writes 100 at most" in before  # 10 + 3, 11
    assert before.endswith("1.02 by the prices given")  # 24 * 1000 + 100 * 10000, for a million
    assert "2 answers parsed, 0 not, 0 without an answer; 200 tokens read, 14 written, 0.34 by" in after
    caplog.clear()
    judge.ask([ask(text="y" * 41)])
    assert not caplog.messages


def test_settings_hold_no_secret(make_judge, chat_server, tmp_path):
    endpoint = Endpoint("http://me:secret@host:1/v1?key=secret", "m", "secret")
    judge = Judge(endpoint, Journal(tmp_path / "j.jsonl"))
    described = judge.describe()
    judge.close()
    assert described["url"] == "http://host:1/v1" and "secret" not in json.dumps(described)
