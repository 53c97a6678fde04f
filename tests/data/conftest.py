"""What the tests of data share: images of people, the command of preparation, and an endpoint for captions."""

import base64
import collections
import http.server
import io
import json
import threading
import time
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


def _answer(caption, **choice):
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return json.dumps({"choices": [{"message": {"content": caption}} | choice], "usage": usage}).encode()


class CaptionServer(http.server.ThreadingHTTPServer):
    """Answers each image by its grey: `behave(grey, how often it was asked)` -> (status, headers, body)."""

    daemon_threads = True
    answer = staticmethod(_answer)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.requests, self.running, self.most = collections.Counter(), [], 0, 0
        self.lock = threading.Lock()
        self.behave = lambda grey, times: (200, {}, _answer(f"grey {grey}"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        grey = round(np.asarray(image).mean())
        server = self.server
        with server.lock:
            server.asked[grey] += 1
            server.requests.append((self.path, dict(self.headers), body, image.size))
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            status, headers, content = server.behave(grey, server.asked[grey])
            if status is None:  # hangs up
                self.connection.close()
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in content if isinstance(content, list) else [content]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.1 if isinstance(content, list) else 0)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.running -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with CaptionServer() as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        found.shutdown()
