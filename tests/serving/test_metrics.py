"""The figures of a server, read as Prometheus reads them."""

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
from prometheus_client.parser import text_string_to_metric_families

from unialign_jax.inference.jobs import make_job
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.metrics import Metrics

IMAGE = Image.new("RGB", (32, 32), (200, 40, 40))
PARTS = {
    "text_to_image": {"encode_prompts", "sample", "decode_images"},
    "edit": {"encode_prompts", "encode_images", "sample", "decode_images"},
    "caption": {"encode_images", "write_text"},
}


def figures(metrics, name, *labels):
    """{the values of `labels`: the value} of a figure."""
    samples = [s for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples]
    return {tuple(s.labels[label] for label in labels): s.value for s in samples if s.name == f"unialign_{name}"}


def job(task, **fields):
    if task != "text_to_image":
        fields["image"] = "0"
    if task != "caption":
        fields |= {"steps": 2, ("instruction" if task == "edit" else "prompt"): "a red circle"}
    return make_job({"task": task, **fields}, Path(), inspect=lambda path: ("0", IMAGE.size))


def test_the_seconds_of_each_part(tiny_pipeline):
    metrics, heard = Metrics(), []
    engine = Engine([tiny_pipeline], observe=metrics.observe)
    metrics.watch(engine)
    tickets = [
        engine.submit(job("text_to_image")),
        engine.submit(job("edit"), [IMAGE]),
        engine.submit(job("edit", seed=1), [IMAGE], callback=lambda step: heard.append(step.images())),
        engine.submit(job("caption"), [IMAGE]),
        engine.submit(job("caption", seed=1), [IMAGE], hear=heard.append),
    ]
    for ticket in tickets:
        ticket.future.result(120)
    assert engine.close(timeout=60)
    assert len(heard) >= 3
    parts = figures(metrics, "part_seconds_sum", "task", "part")
    assert set(parts) == {(task, part) for task, named in PARTS.items() for part in named}
    assert min(parts.values()) > 0
    batches, counts = figures(metrics, "batch_seconds_sum", "task"), figures(metrics, "batch_seconds_count", "task")
    for task, named in PARTS.items():
        assert sum(parts[task, part] for part in named) <= batches[task,] + 1e-6
    for (task, _), count in figures(metrics, "part_seconds_count", "task", "part").items():
        assert count == counts[task,]


def test_requests_that_failed_inside_are_counted():
    metrics = Metrics()
    assert figures(metrics, "failed_requests_total") == {(): 0}
    metrics.failed()
    assert figures(metrics, "failed_requests_total") == {(): 1}
