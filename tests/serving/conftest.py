"""A server over the tiny bundle, in a thread of this process."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

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


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory):
    """{name: file} of two LoRAs of the tiny bundle, in PEFT's names, with random factors."""
    folder, shapes = tmp_path_factory.mktemp("loras"), {"attn.to_q": (32, 32), "ff.net.2": (32, 128)}
    for seed, name in enumerate(("style", "water")):
        generator, tensors = np.random.default_rng(seed), {}
        for layer, (outputs, inputs) in shapes.items():
            for part, shape in {"lora_A": (2, inputs), "lora_B": (outputs, 2)}.items():
                value = 0.5 * generator.normal(size=shape)
                tensors[f"transformer.transformer_blocks.0.{layer}.{part}.weight"] = value.astype(np.float32)
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("style", "water")}


@pytest.fixture(scope="module")
def lora_engine(tiny_pipeline, lora_files):
    """An engine over `tiny_pipeline` whose requests may name the adapters of `lora_files`."""
    for name, file in lora_files.items():
        tiny_pipeline.load_lora(file, 0.0, name)
    tiny_pipeline.load()  # as a server does before it listens
    yield Engine([tiny_pipeline], loras={"style": 0.8, "water": 1.0})
    tiny_pipeline.unload_lora()


@pytest.fixture(scope="module")
def server(tiny_pipeline, limits):
    """The URL of a server of the tiny bundle."""
    metrics = Metrics()
    engine = Engine([tiny_pipeline], observe=metrics.observe)
    metrics.watch(engine)
    with served(api.make_app(engine, model="tiny", limits=limits, metrics=metrics)) as url:
        yield url
