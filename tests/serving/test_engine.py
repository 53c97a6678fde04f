"""The engine with pipelines that make no images: batches, order, limits, failures, an end under load."""

import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unialign_jax.inference.jobs import make_job
from unialign_jax.inference.streaming import TextStep
from unialign_jax.sampling.programs import Program
from unialign_jax.serving.engine import Busy, Closing, Engine, Outlook, TooLate

IMAGE = Image.new("RGB", (8, 8))


class FakePipeline:
    """Answers with the words that it was asked; waits at a gate, and fails for some words."""

    def __init__(self, max_batch=4):
        self.max_batch, self.calls, self.gate = max_batch, [], threading.Event()
        self.sizes, self.edit_limit = SimpleNamespace(of_edit=lambda *size: (size, size)), 1024
        self.gate.set()

    def generate(self, prompts, seed, **options):
        self.calls.append(("text_to_image", list(prompts)))
        assert self.gate.wait(10)
        if "bad" in prompts:
            raise ValueError("a bad prompt")
        return [f"{prompt} {number}" for prompt, number in zip(prompts, seed, strict=True)]

    def choose_loras(self, scales, kept):
        self.chosen = dict(scales)

    def caption(self, images, seed, callback=None, **options):
        if callback is not None:
            callback(TextStep(1, tuple(range(len(images))), tuple(f"begin {number}" for number in seed)))
        self.calls.append(("caption", len(images)))
        assert self.gate.wait(10)
        return [f"caption {number}" for number in seed]


def job(prompt="a", task="text_to_image", **fields):
    if task == "caption":
        return make_job({"task": task, "image": "0", **fields}, Path(), inspect=lambda path: ("0", (8, 8)))
    return make_job({"task": task, "prompt": prompt, **fields}, Path())


@pytest.fixture
def pipeline():
    return FakePipeline()


@pytest.fixture
def make_engine(pipeline):
    engines = []

    def make(*more, **options):
        engines.append(Engine([pipeline, *more], **options))
        return engines[-1]

    yield make
    pipeline.gate.set()
    for engine in engines:
        engine.close(timeout=10)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hold(engine, pipeline):
    """A request in the making, so that what follows waits in the queue."""
    pipeline.gate.clear()
    ticket = engine.submit(job("first"))
    wait_for(lambda: pipeline.calls)
    return ticket


def test_requests_of_one_shape_share_batches_and_each_gets_its_own(make_engine, pipeline):
    engine = make_engine()
    first = hold(engine, pipeline)
    tickets = [engine.submit(job(f"p{i}", seed=10 * i, images_per_prompt=2)) for i in range(3)]
    other = engine.submit(job("other", steps=3))  # another shape
    pipeline.gate.set()
    assert first.future.result(10) == ["first 0"]
    assert [ticket.future.result(10) for ticket in tickets] == [
        ["p0 0", "p0 1"],
        ["p1 10", "p1 11"],
        ["p2 20", "p2 21"],
    ]
    assert other.future.result(10) == ["other 0"]
    sizes = [len(prompts) for _, prompts in pipeline.calls]
    assert sizes == [1, 4, 2, 1]
    assert tickets[1].batch_sizes == [4, 4] and tickets[2].batch_sizes == [2, 2]
    assert engine.counts().done == {"text_to_image": 8}


def test_short_work_passes_long_work_that_came_just_before_but_not_work_that_waits_longer(make_engine, pipeline):
    engine = make_engine()
    engine._seconds |= {"text_to_image": 0.5, "caption": 0.01}  # what a sample of each has taken
    hold(engine, pipeline)
    engine.submit(job("long"))
    engine.submit(job(task="caption"), [IMAGE])
    time.sleep(0.6)
    engine.submit(job(task="caption", temperature=0), [IMAGE])  # 0.6 s after a request that takes 0.5 s
    done = engine.submit(job("last", steps=2))
    pipeline.gate.set()
    done.future.result(10)
    assert [call[0] for call in pipeline.calls] == [
        "text_to_image",
        "caption",
        "text_to_image",
        "caption",
        "text_to_image",
    ]


def test_a_failure_is_its_own_and_the_engine_serves_the_next(make_engine, pipeline):
    engine = make_engine()
    hold(engine, pipeline)
    tickets = [engine.submit(job(prompt)) for prompt in ("good", "bad", "fine")]
    pipeline.gate.set()
    assert tickets[0].future.result(10) == ["good 0"]
    with pytest.raises(ValueError, match="a bad prompt"):
        tickets[1].future.result(10)
    assert tickets[2].future.result(10) == ["fine 0"]
    assert engine.submit(job("next")).future.result(10) == ["next 0"]
    assert engine.counts().failed == {"text_to_image": 1}


def test_what_no_pipeline_foresees_ends_no_thread(make_engine, pipeline):
    engine = make_engine()
    pipeline.generate = lambda prompts, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.submit(job()).future.result(10)
    del pipeline.generate
    assert engine.submit(job("next")).future.result(10) == ["next 0"]


def test_a_full_queue_says_when_to_come_back(make_engine, pipeline):
    engine = make_engine(max_waiting=4)
    engine._seconds["text_to_image"] = 2.0
    hold(engine, pipeline)
    engine.submit(job(images_per_prompt=3))
    with pytest.raises(Busy) as caught:
        engine.submit(job(images_per_prompt=2))
    assert caught.value.retry_after == pytest.approx(6.0)
    engine.submit(job())  # there is room for one
    with pytest.raises(ValueError, match="5 images are asked for at once, expected at most 4"):
        engine.submit(job(images_per_prompt=5))
    assert engine.counts().rejected == 2 and engine.counts().waiting == 4


def test_what_nobody_waits_for_is_not_done(make_engine, pipeline):
    engine = make_engine()
    hold(engine, pipeline)
    left = engine.submit(job("left", steps=5, images_per_prompt=3))
    left.cancel()
    pipeline.gate.set()
    engine.submit(job("stays")).future.result(10)
    wait_for(lambda: engine.counts().cancelled == 3)
    assert ["left"] not in [prompts for _, prompts in pipeline.calls]


def test_a_request_that_waited_too_long_is_told_so(make_engine, pipeline):
    engine = make_engine(time_limit=60)
    hold(engine, pipeline)
    late = engine.submit(job("late", steps=5), time_limit=0.05)
    time.sleep(0.1)
    pipeline.gate.set()
    with pytest.raises(TooLate, match="longer than it may"):
        late.future.result(10)
    assert engine.counts().expired == 1


def test_what_nobody_waits_for_leaves_room_at_once(make_engine, pipeline):
    engine = make_engine(max_waiting=4)
    hold(engine, pipeline)
    stays = engine.submit(job("stays"))
    left = engine.submit(job("left", images_per_prompt=3))
    with pytest.raises(Busy):
        engine.submit(job())
    left.cancel()
    assert (engine.counts().waiting, engine.counts().cancelled) == (1, 3)
    taken = engine.submit(job("taken", images_per_prompt=3))  # the batch is still in the making
    pipeline.gate.set()
    assert (stays.future.result(10), taken.future.result(10)) == (["stays 0"], ["taken 0", "taken 1", "taken 2"])


def test_a_deadline_is_kept_while_a_batch_hangs(make_engine, pipeline):
    engine = make_engine(max_waiting=2, time_limit=60)
    first = hold(engine, pipeline)
    later = engine.submit(job("later"), time_limit=0.2)
    late = engine.submit(job("late"), time_limit=0.05)  # before the deadline that is watched already
    for ticket in (late, later):
        with pytest.raises(TooLate, match="longer than it may"):
            ticket.future.result(10)
    assert not first.future.done()
    assert (engine.counts().waiting, engine.counts().expired) == (0, 2)
    taken = engine.submit(job("taken", images_per_prompt=2))
    pipeline.gate.set()
    assert taken.future.result(10) == ["taken 0", "taken 1"]


@pytest.mark.parametrize("max_batch", [4, 1])
def test_a_request_that_has_begun_has_no_deadline(max_batch):
    pipeline = FakePipeline(max_batch)
    engine = Engine([pipeline])
    pipeline.gate.clear()
    begun = engine.submit(job("begun", images_per_prompt=4), time_limit=2)
    wait_for(lambda: pipeline.calls)
    begun.deadline = 0.0
    late = engine.submit(job("late"), time_limit=0.1)
    with pytest.raises(TooLate):
        late.future.result(10)
    assert not begun.future.done()
    pipeline.gate.set()
    assert len(begun.future.result(10)) == 4
    assert engine.close(timeout=10)


def test_the_images_that_wait_are_bounded(make_engine, pipeline):
    engine = make_engine(max_waiting_pixels=150)
    hold(engine, pipeline)
    first = engine.submit(job(task="caption"), [IMAGE])
    engine.submit(job(task="caption", temperature=0), [IMAGE])
    assert engine.counts().waiting_pixels == 2 * 8 * 8
    with pytest.raises(Busy, match="128 pixels of images are waiting already"):
        engine.submit(job(task="caption"), [IMAGE])
    engine.submit(job("without images"))
    first.cancel()
    third = engine.submit(job(task="caption"), [IMAGE])
    with pytest.raises(ValueError, match="the images have 256 pixels, expected at most 150"):
        engine.submit(job(task="caption"), [IMAGE.resize((16, 16))])
    pipeline.gate.set()
    third.future.result(10)
    wait_for(lambda: engine.counts().waiting_pixels == engine.counts().waiting == 0)
    assert engine.counts().rejected == 1


def test_an_end_answers_all_that_was_taken_and_takes_no_more(make_engine, pipeline):
    engine = make_engine()
    first = hold(engine, pipeline)
    tickets = [engine.submit(job(f"p{i}")) for i in range(9)]
    ends = threading.Thread(target=engine.close)
    ends.start()
    wait_for(lambda: engine._is_closing)
    with pytest.raises(Closing):
        engine.submit(job())
    pipeline.gate.set()
    ends.join(10)
    assert not ends.is_alive()
    assert [ticket.future.result(0) for ticket in (first, *tickets)] == [["first 0"], *([f"p{i} 0"] for i in range(9))]


def test_an_end_in_a_hurry_fails_what_is_left(make_engine, pipeline):
    engine = make_engine()
    hold(engine, pipeline)
    left = engine.submit(job("left", steps=5))
    assert not engine.close(timeout=0.05)
    with pytest.raises(Closing, match="shut down before"):
        left.future.result(0)


def test_replicas_work_side_by_side(make_engine, pipeline):
    other = FakePipeline()
    engine = make_engine(other)
    pipeline.gate.clear()
    other.gate.clear()
    tickets = [engine.submit(job(f"p{i}", steps=i + 1)) for i in range(2)]
    wait_for(lambda: pipeline.calls and other.calls)
    pipeline.gate.set()
    other.gate.set()
    assert [ticket.future.result(10) for ticket in tickets] == [["p0 0"], ["p1 0"]]


def test_a_request_with_a_callback_has_its_batch_alone_and_hears_of_its_steps(make_engine, pipeline):
    engine, heard = make_engine(), []

    def generate(prompts, seed, callback=None, **options):
        pipeline.calls.append(("text_to_image", list(prompts)))
        if callback is not None:
            callback("a step")
        return list(prompts)

    first = hold(engine, pipeline)
    pipeline.generate = generate
    plain = [engine.submit(job("plain")) for _ in range(2)]
    told = engine.submit(job("told", images_per_prompt=2), callback=heard.append)
    pipeline.gate.set()
    for ticket in (first, *plain, told):
        ticket.future.result(10)
    assert heard == ["a step"]
    assert pipeline.calls[1:] == [("text_to_image", ["plain"] * 2), ("text_to_image", ["told"] * 2)]


def test_texts_that_are_heard_share_batches_with_others_and_each_hears_its_own(make_engine, pipeline):
    engine, heard = make_engine(), {}
    first = hold(engine, pipeline)
    tickets = [
        engine.submit(
            job(task="caption", seed=seed),
            [IMAGE],
            hear=(lambda text, seed=seed: heard.setdefault(seed, []).append(text)) if seed % 2 else None,
        )
        for seed in range(4)
    ]
    pipeline.gate.set()
    assert first.future.result(10) == ["first 0"]
    assert [ticket.future.result(10) for ticket in tickets] == [[f"caption {seed}"] for seed in range(4)]
    assert pipeline.calls[1:] == [("caption", 4)]
    assert heard == {1: ["begin 1"], 3: ["begin 3"]}


def test_a_batch_has_one_set_of_adapters(make_engine, pipeline):
    engine, chosen = make_engine(loras={"style": 1.0}), []
    generate = pipeline.generate
    pipeline.generate = lambda prompts, **options: chosen.append(pipeline.chosen) or generate(prompts, **options)
    hold(engine, pipeline)
    asked = [{}, {"style": 0.5}, {"style": 1.0}, {"style": 0.5}, {}]
    tickets = [engine.submit(job(f"p{i}"), loras=loras) for i, loras in enumerate(asked)]
    pipeline.gate.set()
    for ticket in tickets:
        ticket.future.result(10)
    assert [prompts for _, prompts in pipeline.calls[1:]] == [["p0", "p4"], ["p1", "p3"], ["p2"]]
    assert chosen == [{}, {}, {"style": 0.5}, {"style": 1.0}]


def test_what_may_be_expected_of_a_request(make_engine, pipeline):
    engine = make_engine()
    engine._seconds |= {"text_to_image": 4.0, "caption": 1.0}
    working = hold(engine, pipeline)
    two = engine.submit(job("b", images_per_prompt=2))
    caption = engine.submit(job(task="caption"), [IMAGE])
    last = engine.submit(job("c", steps=3))
    look = engine.outlook(working)
    assert look.before == 0 and 3 < look.seconds <= 4
    assert engine.outlook(caption) == Outlook(1, 1.0)  # passes the images; the one in the making it cannot
    assert engine.outlook(two) == Outlook(1 + 1, 1.0 + 2 * 4.0)
    assert engine.outlook(last) == Outlook(1 + 2 + 1, 2 * 4.0 + 1.0 + 4.0)
    pipeline.gate.set()


def test_batches_that_failed_or_compiled_say_nothing_of_what_a_task_takes(make_engine, pipeline):
    engine, program = make_engine(), Program(lambda params, x: params * x, "sample")

    def make(prompt, size):
        pipeline.generate = lambda prompts, seed, **_: [program(1.0, np.ones(size))] * len(prompts)
        if prompt == "bad":
            del pipeline.generate
        ticket = engine.submit(job(prompt))
        with contextlib.suppress(ValueError):
            ticket.future.result(10)

    make("a", 3)  # compiles
    assert engine._seconds == {}
    make("a", 3)
    expected = dict(engine._seconds)
    assert expected["text_to_image"] > 0
    make("a", 4)  # compiles too
    make("bad", 4)
    assert engine._seconds == expected
    make("a", 4)
    assert engine._seconds != expected
