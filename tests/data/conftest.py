"""What the tests of data share: images of people, the command of preparation, and an endpoint for captions."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.records import open_records


@pytest.fixture(scope="session")
def picture():
    """A function (seed, format, size) -> the bytes of an image like no other."""

    def make(seed=0, image_format="JPEG", size=(64, 48), **options):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize(size).save(buffer, image_format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def prepare(launch_command, tmp_path, capsys):
    """A function (source, stream, *options) -> what the command wrote and said; by one process, images of any size."""

    def run(source, stream="text_to_image", *options, output="out"):
        folder = tmp_path / output
        given = [f"--source={source}", f"--stream={stream}", f"--output={folder}", "--min-side=1", "--processes=1"]
        capsys.readouterr()
        launch_command("prepare_data").main([*given, *options])
        found = open_records(folder)
        records = [found[number] for number in range(len(found))]
        return SimpleNamespace(folder=folder, records=records, said=capsys.readouterr().out)

    return run


@pytest.fixture
def server(chat_server):
    """`chat_server` as an endpoint for captions: it answers each image by its grey."""

    def image_of(body):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

    chat_server.image_of = image_of
    chat_server.name_of = lambda body: round(np.asarray(image_of(body)).mean())
    chat_server.behave = lambda grey, times: (200, {}, chat_server.answer(f"grey {grey}"))
    return chat_server
