"""The web page in headless Chromium, clicked through on the demo model.

Its pictures for docs/serving.md are made by

    SCREENSHOTS=docs python -m pytest -n0 tests/serving/test_page_browser.py
"""

import io
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed: pip install --no-deps -r requirements-page.txt")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright import sync_api as playwright

from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.serving import api, page
from unialign_jax.serving.engine import Engine

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no browser: apt-get install chromium"),
]
PROMPT = "a large red circle at the left and a small blue square at the right on a white background"
WAIT = 60_000  # milliseconds, with compiling; of the assertions


@pytest.fixture(scope="module")
def url(running):
    engine = Engine([Pipeline.from_bundle("demo", max_batch=2)])
    app = api.make_app(engine, model="demo", keys=["key"])
    page.add_page(app, engine, model="demo", needs_key=True)
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """An open page, what it fetched, and what went wrong in it."""

    def __init__(self, browser, url, **context):
        self.context = browser.new_context(http_credentials={"username": "me", "password": "key"}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.fetched, self.errors = [], []
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.get_by_role("tab", name="Text to image").wait_for(timeout=WAIT)

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def fill(self, name, text):
        self.page.locator(f"#{name} textarea").fill(text)

    def run(self, name):
        """Presses a tab's button and waits for the end of its work."""
        self.page.locator(f"#{name}_status").locator("textarea, input").evaluate("field => field.value = ''")
        self.page.locator(f"#{name}_run").click()
        self.wait_for(name, "Done in")

    def take_seed(self, seed):
        """Sets the seed of the tab that is open."""
        self.page.get_by_label("New seed each time").locator("visible=true").uncheck()
        self.page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(seed))

    def wait_for(self, name, words):
        status = self.page.locator(f"#{name}_status").locator("textarea, input")
        playwright.expect(status).to_have_value(re.compile(words), timeout=WAIT)

    def sources(self, name):
        """The pictures of a component, loaded."""
        found = self.page.locator(f"#{name} img")
        found.first.wait_for(timeout=WAIT)
        return [image.get_attribute("src") for image in found.all()]

    def picture(self, address):
        return Image.open(io.BytesIO(self.context.request.get(address).body()))

    def upload(self, name, file):
        self.page.locator(f"#{name} input[type=file]").set_input_files(str(file))

    def show(self, name):
        """Keeps a picture of the window, where SCREENSHOTS names a folder."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.evaluate("window.scrollTo(0, 0)")
            self.page.wait_for_timeout(1500)
            shot = Image.open(io.BytesIO(self.page.screenshot()))
            shot.convert("RGB").quantize(200).save(Path(folder) / f"serving_{name}.png", optimize=True)


@pytest.fixture
def visit(browser, url):
    visit = Visit(browser, url, viewport={"width": 1000, "height": 760})
    yield visit
    visit.context.close()


def test_generate_edit_and_caption(visit, url, tmp_path):
    visit.fill("generate_prompt", PROMPT)
    visit.take_seed(7)
    visit.run("generate")
    [made] = visit.sources("generate_gallery")
    circle = visit.picture(made)
    assert circle.size == (64, 64) and PROMPT in circle.info["parameters"]
    visit.show("generate")
    (tmp_path / "circle.png").write_bytes(visit.context.request.get(made).body())

    visit.tab("Edit")
    visit.upload("edit_image", tmp_path / "circle.png")
    visit.fill("edit_prompt", "make the red circle blue")
    visit.sources("edit_history")
    visit.take_seed(1)
    visit.run("edit")
    visit.fill("edit_prompt", "add a small pink triangle at the top")
    visit.run("edit")
    visit.page.locator("#edit_undo").click()
    visit.wait_for("edit", "^Step 1, from 0: make the red circle blue")
    visit.fill("edit_prompt", "make the blue square green")
    visit.run("edit")
    before, after = visit.sources("edit_slider")[:2]
    assert visit.picture(before).tobytes() != visit.picture(after).tobytes()
    assert len(visit.sources("edit_history")) == 4
    visit.show("edit")
    visit.page.locator("#edit_history img").nth(2).click()
    visit.wait_for("edit", "^Step 2, from 1: add a small pink triangle")

    visit.tab("Caption and answer")
    visit.upload("ask_image", tmp_path / "circle.png")
    visit.sources("ask_image")
    visit.run("ask")
    said = visit.page.locator("#ask_answer textarea").input_value()
    assert "circle" in said or "background" in said
    visit.fill("ask_prompt", "what color is the background?")
    visit.run("ask")
    assert visit.page.locator("#ask_answer textarea").input_value() not in ("", said)

    visit.tab("Perception")
    visit.upload("perceive_image", tmp_path / "circle.png")  # begins at once
    visit.wait_for("perceive", "Done in")
    assert visit.page.locator("#perceive_caption textarea").input_value()
    assert len(visit.sources("perceive_gallery")) == 3
    visit.show("perceive")
    assert visit.errors == []
    assert [address for address in visit.fetched if not address.startswith((url, "data:", "blob:"))] == []


def test_options_that_are_left_out_are_the_models(visit):
    visit.fill("generate_prompt", PROMPT)
    visit.page.get_by_text("Quality and options").locator("visible=true").click()
    steps = visit.page.get_by_label("Steps").locator("visible=true")
    visit.run("generate")
    visit.page.get_by_text("Copy as code").locator("visible=true").click()
    job = visit.page.locator("#generate_job .cm-content")
    playwright.expect(job).to_contain_text("prompt")
    assert "steps" not in job.inner_text() and "guidance" not in job.inner_text()
    steps.fill("5")
    visit.run("generate")
    playwright.expect(job).to_contain_text('"steps": 5')
    steps.fill("many")
    visit.page.locator("#generate_run").click()
    visit.wait_for("generate", '^Not done: steps is "many", expected a whole number')


def test_a_file_that_is_no_picture_is_told(visit, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no picture")
    visit.tab("Perception")
    visit.upload("perceive_image", tmp_path / "photo.png")
    toast = visit.page.get_by_text("'photo.png' cannot be decoded")
    toast.wait_for(timeout=WAIT)
    visit.page.locator("#perceive_run").click()
    visit.wait_for("perceive", "^There is no picture yet")


def test_a_phone(browser, url):
    visit = Visit(browser, url, viewport={"width": 390, "height": 760}, has_touch=True, is_mobile=True)
    visit.fill("generate_prompt", PROMPT)
    visit.take_seed(7)
    visit.run("generate")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    box = visit.page.locator("#generate_run").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 390
    visit.show("phone")
    visit.context.close()


def test_no_key_no_page(browser, url):
    context = browser.new_context()
    answer = context.request.get(url)
    assert answer.status == 401
    context.close()
