"""A judge of texts behind the local endpoint."""

import json
from types import SimpleNamespace

import pytest

from unialign_jax.data.endpoint import Endpoint
from unialign_jax.evaluation.judging import Journal, Judge


@pytest.fixture
def judge_server(chat_server):
    """The endpoint: it answers by `reply(body)`, a text, and keeps the bodies in `bodies`."""
    found = SimpleNamespace(reply=lambda body: "1", bodies=[], url=chat_server.url)

    def behave(name, times):
        body = json.loads(name)
        found.bodies.append(body)
        return 200, {}, chat_server.answer(found.reply(body))

    chat_server.behave = behave
    return found


@pytest.fixture
def text_judge(judge_server, tmp_path):
    """A judge that asks one question at a time, in eight attempts."""
    endpoint = Endpoint(judge_server.url, "judge-1", attempts=8, first_pause=0.01)
    judge = Judge(endpoint, Journal(tmp_path / "judgements.jsonl"), concurrency=1)
    yield judge
    judge.close()
