"""A server over the tiny bundle, in a thread of this process."""

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
import uvicorn

from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.serving import api
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import Limits


@contextlib.contextmanager
def served(app):
    """The URL of an application that is served until the block ends."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def running():
    return served


@pytest.fixture(scope="session")
def limits():
    return Limits(request_bytes=2**18, image_pixels=2**16, samples=4, max_steps=8, max_side=64)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle):
    return Pipeline.from_bundle(tiny_bundle, max_batch=2)


@pytest.fixture(scope="module")
def server(tiny_pipeline, limits):
    """The URL of a server of the tiny bundle."""
    metrics = Metrics()
    engine = Engine([tiny_pipeline], observe=metrics.observe)
    metrics.watch(engine)
    with served(api.make_app(engine, model="tiny", limits=limits, metrics=metrics)) as url:
        yield url
