"""What the tests of the builder share: a COCO folder, a model behind HTTP that drafts and embeds, the command."""

import base64
import collections
import csv
import hashlib
import http.server
import io
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation.building import review

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
NAMES = ("person dog car bench kite train bottle chair pizza horse boat clock book umbrella bicycle sheep cup bird "
         "truck sofa").split()  # fmt: skip
WORDS = [
    a + b for a in "ba ce di fo gu la me ni po ru sa te vi zo ku".split() for b in "ran mel tis dor vux lip".split()
]
VERBS = "add paint remove move turn replace".split()


def write_picture(path, seed, size=(420, 420), cells=12, low=20, high=236):
    """Coloured cells with sharp borders."""
    pixels = np.random.default_rng(seed).integers(low, high, (cells, cells, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path, quality=70)


@pytest.fixture(scope="session")
def make_coco():
    """A function (folder, count, size) -> a COCO folder: images of 20 themes and two licenses, with two classes each.

    `spoil` replaces a picture: {number: options of write_picture}.
    """

    def make(folder, count, size=(420, 420), spoil=None):
        folder = Path(folder)
        (folder / "annotations").mkdir(parents=True)
        (folder / "val2017").mkdir()
        images, annotations, captions = [], [], []
        for number in range(count):
            name, theme = f"{number + 1:012d}.jpg", number % 20
            write_picture(folder / "val2017" / name, number, **{"size": size} | (spoil or {}).get(number, {}))
            url = f"http://farm.example/{number + 1}.jpg"
            width, height = size
            images.append({"id": number + 1, "file_name": name, "width": width, "height": height, "flickr_url": url,
                           "license": 4 if number % 2 else 1})  # fmt: skip
            for category in (theme, (theme + 1) % 20):
                annotations.append({"image_id": number + 1, "category_id": category + 1})
            draw = random.Random(number)
            for _ in range(5):
                words = [NAMES[theme]] * 3 + draw.sample(WORDS, 4)
                captions.append({"image_id": number + 1, "caption": " ".join(words)})
        licenses = [{"id": 1, "name": "Attribution-NonCommercial-ShareAlike License", "url": "http://cc/by-nc-sa/2.0/"},
                    {"id": 4, "name": "Attribution License", "url": "http://cc/by/2.0/"}]  # fmt: skip
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)]
        instances = {"images": images, "annotations": annotations, "categories": categories, "licenses": licenses}
        (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(instances))
        (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({"annotations": captions}))
        return folder

    return make


def group_of(text):
    """Which template a question was made of, by the form of the answer that it asks for."""
    marks = {"needs_reasoning": "rubric", '"edits"': "edit_multi", '"instruction"': "edit_complex"}
    marks |= {'"count"': "t2i_complex", '"prompt"': "t2i_long"}
    return next(group for mark, group in marks.items() if mark in text)


def good_answer(group, seed):
    """What a model answers that keeps all the rules; other words for another seed."""
    draw = random.Random(seed)
    words = lambda count: " ".join(draw.choice(WORDS) for _ in range(count))  # noqa: E731
    if group == "rubric":
        return {"needs_reasoning": True, "why": "things are compared"}
    if group == "t2i_long":
        return {"prompt": f"A {words(210)}."}
    if group == "t2i_complex":
        slots = {"count": "two", "color": "red", "relation": "next to", "background": f"a hall of {words(2)}"}
        return {"prompt": f"{words(4)}, two red {words(2)} next to {words(3)}, {slots['background']}."} | slots
    if group == "edit_multi":
        return {"edits": [f"{verb.capitalize()} the {words(5)}" for verb in draw.sample(VERBS, 3)]}
    return {"instruction": f"{draw.choice(VERBS).capitalize()} the {words(6)}.", "reasoning": words(5)}


class Model(http.server.ThreadingHTTPServer):
    """Drafts, and embeds. `behave(group, text, how often this was asked)` -> (status, body), or None for the usual."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.asked, self.groups = threading.Lock(), collections.Counter(), collections.Counter()
        self.bodies = []
        self.behave = lambda group, text, times: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def forget(self):
        self.asked.clear(), self.groups.clear(), self.bodies.clear()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body, server = json.loads(raw), self.server
        parts = body["messages"][0]["content"]
        text = "".join(part.get("text", "") for part in parts)
        digest = hashlib.sha256(raw).hexdigest()
        group = "embeddings" if self.path.endswith("/embeddings") else group_of(text)
        with server.lock:
            server.asked[digest] += 1
            server.groups[group] += 1
            server.bodies.append(
                (self.path, {k: v for k, v in body.items() if k != "messages"}, text, dict(self.headers))
            )
            times = server.asked[digest]
        status, content = server.behave(group, text, times) or (200, None)
        if content is None and group == "embeddings":
            url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
            pixels = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).resize((4, 4))
            content = json.dumps({"data": [{"embedding": (np.asarray(pixels).ravel() / 255 - 0.5).tolist()}]})
        elif content is None:
            choice = {"message": {"content": json.dumps(good_answer(group, digest))}, "finish_reason": "stop"}
            content = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 50}})
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *_):
        pass


def chat(text):
    """A whole chat answer that says `text`."""
    return json.dumps({"choices": [{"message": {"content": text}}]})


def filled(path, target, decide):
    """Writes the sheet `path` with the decisions of `decide(row)`, the columns that a reviewer fills in."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [row | decide(row) for row in csv.DictReader(file)]
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, review.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return target


@pytest.fixture(scope="module")
def model():
    with Model() as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture(scope="session")
def build(launch_command):
    """A function (*arguments) -> the status of `evaluate.py build-semgen`."""
    command = launch_command("evaluate")
    return lambda *arguments: command.main(["build-semgen", *map(str, arguments)])


@pytest.fixture(scope="session")
def small(make_coco, tmp_path_factory):
    """Options for a set of 2 x 2 images of 12, which has everything and takes a moment."""
    coco = make_coco(tmp_path_factory.mktemp("small") / "coco", 12, size=(48, 48))
    return SimpleNamespace(
        coco=coco,
        options=[f"--coco={coco}", "--min-side=32", "--clusters=2", "--per-cluster=2", "--embedder=histogram"],
    )
