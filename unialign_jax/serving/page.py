"""The web page, of Gradio, in the process of the API and over the same `Engine`.

A request of the page becomes a job by `requests.make_work`, as one of the API does: its limits, tiers, seeds and
batches are the API's. `add_page` mounts the page at /, beside the paths of the API.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from unialign_jax.files import first_line
from unialign_jax.inference.options import MAX_REFERENCES, OPTIONS, PERCEPTION
from unialign_jax.serving.edit_tree import EditTree
from unialign_jax.serving.engine import Engine, Ticket
from unialign_jax.serving.examples import Examples, examples_for
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.page_filter import Filter
from unialign_jax.serving.page_folder import Folder
from unialign_jax.serving.page_worker import Worker
from unialign_jax.serving.requests import SEED_BITS, TIERS, Limits

log = logging.getLogger(__name__)

SHOWN = 32  # images that a gallery keeps
MOST_SESSIONS = 1000
SWEEP_SECONDS = 600  # between two looks for old files, while nothing is asked
ASPECTS = {"square": 1, "landscape": 4 / 3, "portrait": 3 / 4, "wide": 16 / 9, "tall": 9 / 16}


def size_choices(pipeline: Any, limits: Limits) -> list[tuple[str, str]]:
    """(label, WIDTHxHEIGHT) of the aspects, each with about as many pixels as the images of the training."""
    side, multiple = pipeline.config.image_size, pipeline.sizes.multiple
    most = min(pipeline.sizes.largest, limits.max_side) // multiple * multiple
    choices, sizes = [("the model's own", "auto")], set()
    for name, aspect in ASPECTS.items():
        width, height = (
            min(most, max(multiple, round(side * stretch / multiple) * multiple))
            for stretch in (math.sqrt(aspect), 1 / math.sqrt(aspect))
        )
        if (width, height) not in sizes:
            sizes.add((width, height))
            choices.append((f"{name}, {width} x {height}", f"{width}x{height}"))
    return choices


def chosen_seed(seed: float | None, is_random: bool) -> int:
    """The seed of a request: a fresh one, or the given one."""
    return secrets.randbits(SEED_BITS) if is_random or seed is None else int(seed)


def address(request: Any) -> str:
    """The server's URL as the browser knows it."""
    scheme = request.headers.get("x-forwarded-proto", "http")
    return f"{scheme if scheme == 'https' else 'http'}://{request.headers.get('host', '127.0.0.1:8000')}"


def given(**fields: Any) -> dict[str, Any]:
    """The fields that a user filled in, whole numbers as such; what is no number is left to `make_work`."""
    fields = {key: value for key, value in fields.items() if value is not None and value != ""}
    for key, value in fields.items():
        if isinstance(value, str) and key in OPTIONS:
            fields[key] = OPTIONS[key].parse(value)
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in fields.items()
    }


def telling(handler: Callable, status: gr.Textbox) -> Callable:
    """An asynchronous handler whose failure is told in the status."""

    @functools.wraps(handler)
    async def told(*inputs):
        try:
            async for outputs in handler(*inputs):
                yield outputs
        except Exception as error:
            log.exception("the page could not show a result")
            yield {status: f"It failed: {first_line(error)}"}

    return told


class Layout:
    """The page's components and what they do. Handlers are asynchronous generators: each `yield` changes the page."""

    def __init__(self, worker: Worker, examples: Examples):
        self._worker, self._examples = worker, examples

    def build(self, name: str):
        """The page as `gradio.Blocks`.

        Args:
          name: the model's, for the title.
        """
        pipeline = self._worker.engine.pipeline
        trained = pipeline.config.tasks
        tabs = {
            "Text to image": (("text_to_image",), self._text_to_image),
            "Edit": (("edit",), self._edit),
            "Perception": (("perception",), self._perception),
            "Personalization": (("personalization",), self._personalization),
            "Caption and answer": (("caption", "vqa"), self._words),
        }
        with gr.Blocks(title=f"{name} - unialign_jax", analytics_enabled=False) as blocks:
            gr.Markdown(f"# {name}")
            for title, (tasks, fill) in tabs.items():
                if trained is None or set(tasks) & set(trained):
                    with gr.Tab(title, elem_id=f"tab_{fill.__name__.strip('_')}"):
                        fill()
        return blocks.queue(default_concurrency_limit=None, api_open=False)

    # What the tabs share. On a phone the columns of a row stand below each other: what is pressed and what comes of it
    # are above the options, the examples and what is copied.

    def _sampler(self, *, has_preview: bool = True) -> tuple[list, list]:
        """(seed and whether it is drawn, options of a sampler), with their components in place."""
        seeds = self._seeds()
        with gr.Accordion("Quality and options", open=False):
            tier = gr.Radio(list(TIERS), value="lossless", label="Quality", info="fast: 14 steps of unipc")
            with gr.Row():
                steps = self._number("Steps")
                guidance = self._number("Guidance")
            options = [tier, steps, guidance, self._lora()]
            if has_preview:
                info = "Slower, in no batch"
                if not getattr(self._worker.engine.pipeline, "reproducible", False):
                    info += "; pixels may differ by one grey level from those without it"
                options.append(gr.Checkbox(False, label="Live preview", info=info))
        return seeds, options

    @staticmethod
    def _seeds() -> list:
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**SEED_BITS - 1, min_width=120)
            is_random = gr.Checkbox(True, label="New seed each time", min_width=120)
        return [seed, is_random]

    def _lora(self) -> gr.Dropdown | gr.State:
        """The name of an adapter, or nothing."""
        loras = self._worker.engine.loras
        if not loras:
            return gr.State("")
        return gr.Dropdown([("none", ""), *loras], value="", label="LoRA", min_width=120)

    @staticmethod
    def _number(label: str) -> gr.Textbox:
        """A number that may be left out. In Gradio's own field what is left out becomes 0 when the field is shown."""
        return gr.Textbox("", label=label, placeholder="the model's", max_lines=1, min_width=120)

    def _copies(self, prefix: str) -> list:
        with gr.Accordion("Copy as code", open=False):
            note = "`image.png` is the picture that was sent; of a later edit, the one before it. "
            note += "In Python, the bundle's folder goes where its name stands."
            if self._worker.engine.loras:
                note += " So does a LoRA's file; jobs get it by `generate.py --lora=FILE`."
            gr.Markdown(note)
            return [
                gr.Code("", language=language, label=label, elem_id=f"{prefix}_{label.split()[0].lower()}", lines=2)
                for language, label in (("python", "Python"), ("shell", "curl"), ("json", "Job line"))
            ]

    def _run_row(self, prefix: str, label: str) -> tuple:
        """(run, status, tickets of what runs), with a button that cancels it."""
        tickets = gr.State([])
        with gr.Row():
            run = gr.Button(label, variant="primary", elem_id=f"{prefix}_run", min_width=120)
            cancel = gr.Button("Cancel", elem_id=f"{prefix}_cancel", min_width=120)
        status = gr.Textbox(
            "", show_label=False, container=False, interactive=False, lines=1, elem_id=f"{prefix}_status",
            placeholder="Nothing is asked yet.",
        )  # fmt: skip

        def end(tickets: list[Ticket]) -> None:
            for ticket in tickets:
                ticket.cancel()

        self._connect([cancel.click], end, [tickets], [], f"{prefix}_cancel")
        return run, status, tickets

    @staticmethod
    def _connect(triggers: list, handler: Callable, inputs: list, outputs: list, name: str, status=None) -> None:
        """With the component of the `status`, the handler's failure is told there."""
        if status is not None:
            handler = telling(handler, status)
        gr.on(triggers, handler, inputs, outputs, api_name=name, api_visibility="undocumented", show_progress="hidden")

    @staticmethod
    def _preview() -> gr.Image:
        return gr.Image(label="Preview", visible=False, interactive=False, format="jpeg")

    @staticmethod
    def _gallery(prefix: str, label: str, columns: int) -> gr.Gallery:
        return gr.Gallery(
            label=label, columns=columns, format="png", interactive=False, object_fit="contain", height="auto",
            elem_id=f"{prefix}_gallery",
        )  # fmt: skip

    @staticmethod
    def _photo(prefix: str) -> gr.Image:
        photo = gr.Image(
            label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300,
            elem_id=f"{prefix}_image",
        )  # fmt: skip
        # Gradio would open it, and tell nobody what is wrong with it.
        photo.preprocess = lambda payload: payload and payload.path
        return photo

    def _pairs(self, pairs, photo, text) -> None:
        """Examples of a picture and a text, or of texts alone."""
        if pairs and pairs[0][0] is not None:
            gr.Examples([[self._kept(image), words] for image, words in pairs], [photo, text], label="Examples")
        else:
            gr.Examples([[words] for _, words in pairs], text, label="Examples")

    def _kept(self, image: Image.Image) -> str:
        return str(self._worker.keep(image, 0))

    # Tabs

    def _text_to_image(self) -> None:
        worker = self._worker
        with gr.Row():
            with gr.Column(min_width=300):
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="generate_prompt")
                run, status, tickets = self._run_row("generate", "Generate")
            with gr.Column(min_width=300):
                preview, gallery = self._preview(), self._gallery("generate", "Images", 2)
        with gr.Row():
            size = gr.Dropdown(
                size_choices(worker.engine.pipeline, worker.limits), value="auto", label="Size, or WIDTHxHEIGHT",
                allow_custom_value=True, min_width=200,
            )  # fmt: skip
            count = gr.Slider(1, min(8, worker.limits.samples), 1, step=1, label="Images", min_width=200)
        seeds, options = self._sampler()
        negative = gr.Textbox(label="Negative prompt")
        gr.Examples([[text] for text in self._examples.prompts], prompt, label="Examples")
        copies, kept = self._copies("generate"), gr.State([])
        inputs = [prompt, size, count, *seeds, *options, negative, kept]
        outputs = [status, tickets, preview, kept, gallery, seeds[0], *copies]
        self._connect([run.click, prompt.submit], self._generate, inputs, outputs, "generate", status)

    async def _generate(
        self, prompt, size, count, seed, is_random, tier, steps, guidance, lora, live, negative, kept,
        request: gr.Request,
    ):  # fmt: skip
        fields = given(
            prompt=prompt, size=size, n=count, quality=tier, steps=steps, guidance_scale=guidance, lora=lora,
            negative_prompt=negative, seed=chosen_seed(seed, is_random),
        )  # fmt: skip
        async for outputs in self._images(("text_to_image", fields, []), live, kept, request):
            yield outputs

    async def _personalize(
        self, prompt, references, seed, is_random, tier, steps, guidance, lora, live, kept, request: gr.Request
    ):
        files = [Path(path) for path, _ in references or []]
        fields = given(
            prompt=prompt, quality=tier, steps=steps, guidance_scale=guidance, lora=lora,
            seed=chosen_seed(seed, is_random),
        )  # fmt: skip
        async for outputs in self._images(("personalization", fields, files), live, kept, request):
            yield outputs

    async def _images(self, asked, live, kept, request):
        """Outputs of a tab whose results go to a gallery: (status, tickets, preview, kept, gallery, seed, copies)."""
        nothing = gr.skip()
        async for now in self._worker.do([asked], live):
            preview = gr.update(value=now.preview, visible=now.preview is not None)
            if now.made is None:
                yield now.status, now.tickets, preview, nothing, nothing, asked[1]["seed"], *[nothing] * 3
                continue
            [(work, images)] = now.made
            first = work.job.seed
            new = [
                (
                    str(await asyncio.to_thread(self._worker.keep, image, first + number)),
                    f"{work.job.text} (seed {first + number})",
                )
                for number, image in enumerate(images)
            ]
            kept = [*new, *(item for item in kept if Path(item[0]).exists())][:SHOWN]
            copies = self._worker.copies([work], address(request))
            yield now.status, [], preview, kept, kept, first, *copies

    def _personalization(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                references = gr.Gallery(
                    label=f"Subjects: 1 to {MAX_REFERENCES} pictures", columns=MAX_REFERENCES, type="filepath",
                    interactive=True, sources=["upload", "clipboard"], file_types=["image"], height=200,
                    elem_id="personalize_images",
                )  # fmt: skip
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="personalize_prompt")
                run, status, tickets = self._run_row("personalize", "Generate")
            with gr.Column(min_width=300):
                preview, gallery = self._preview(), self._gallery("personalize", "Images", 2)
        seeds, options = self._sampler()
        shown = [[[self._kept(image) for image in images], text] for images, text in self._examples.references]
        if shown:
            gr.Examples(shown, [references, prompt], label="Examples")
        copies, kept = self._copies("personalize"), gr.State([])
        inputs = [prompt, references, *seeds, *options, kept]
        outputs = [status, tickets, preview, kept, gallery, seeds[0], *copies]
        self._connect([run.click, prompt.submit], self._personalize, inputs, outputs, "personalize", status)

    def _edit(self) -> None:
        tree = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=300):
                photo = self._photo("edit")
                instruction = gr.Textbox(label="What to change", lines=2, elem_id="edit_prompt")
                run, status, tickets = self._run_row("edit", "Edit")
                with gr.Row():
                    undo = gr.Button("Undo", elem_id="edit_undo", min_width=80)
                    redo = gr.Button("Redo", elem_id="edit_redo", min_width=80)
            with gr.Column(min_width=300):
                slider = gr.ImageSlider(
                    label="Before and after", format="png", interactive=False, elem_id="edit_slider", type="filepath"
                )
                preview = self._preview()
                history = gr.Gallery(
                    label="All steps: choose one to go on from it", columns=3, format="png", interactive=False,
                    allow_preview=False, object_fit="contain", elem_id="edit_history", height=320,
                )  # fmt: skip
        seeds, options = self._sampler()
        negative = gr.Textbox(label="Negative prompt")
        self._pairs(self._examples.edits, photo, instruction)
        copies = self._copies("edit")
        views = [tree, slider, history, status]
        self._connect([photo.change], self._begin_edits, [photo], views, "edit_begin")
        self._connect([undo.click], self._undo, [tree], views, "edit_undo")
        self._connect([redo.click], self._redo, [tree], views, "edit_redo")
        self._connect([history.select], self._pick_step, [tree], views, "edit_pick")
        inputs = [tree, instruction, *seeds, *options, negative]
        outputs = [*views, tickets, preview, seeds[0], *copies]
        self._connect([run.click, instruction.submit], self._edit_once, inputs, outputs, "edit", status)

    @staticmethod
    def _views(tree: EditTree, status: str) -> tuple:
        """(tree, slider, history, status)."""
        shown = [(str(step.image), label) for step, label in zip(tree.steps, tree.labels(), strict=True)]
        return tree, (str(tree.before.image), str(tree.now.image)), shown, status

    def _begin_edits(self, photo):
        if photo is None:
            return None, None, [], ""
        return self._views(EditTree(Path(photo)), "")

    def _moved(self, tree: EditTree | None, move: Callable[[EditTree], None]) -> tuple:
        nothing = gr.skip()
        if tree is None:
            return nothing, nothing, nothing, "There is no picture yet."
        try:
            move(tree)
        except (ValueError, IndexError) as error:
            return nothing, nothing, nothing, f"Not done: {first_line(error)}"
        return self._views(tree, f"Step {tree.labels()[tree.at]}")

    def _undo(self, tree):
        return self._moved(tree, EditTree.undo)

    def _redo(self, tree):
        return self._moved(tree, EditTree.redo)

    def _pick_step(self, tree, event: gr.SelectData):
        return self._moved(tree, lambda tree: tree.go_to(int(event.index)))

    async def _edit_once(
        self, tree, instruction, seed, is_random, tier, steps, guidance, lora, live, negative, request: gr.Request
    ):
        nothing = gr.skip()
        same = [nothing] * 3
        if tree is None:
            yield *same, "Not done: there is no picture to edit.", [], nothing, nothing, *same
            return
        parent = tree.at
        fields = given(
            instruction=instruction, quality=tier, steps=steps, guidance_scale=guidance, lora=lora,
            negative_prompt=negative, seed=chosen_seed(seed, is_random),
        )  # fmt: skip
        async for now in self._worker.do([("edit", fields, [tree.now.image])], live):
            preview = gr.update(value=now.preview, visible=now.preview is not None)
            if now.made is None:
                yield *same, now.status, now.tickets, preview, fields["seed"], *same
                continue
            [(work, [image])] = now.made
            kept = await asyncio.to_thread(self._worker.keep, image, work.job.seed)
            tree.add(parent, kept, work.job.text, work.job.seed)
            copies = self._worker.copies([work], address(request))
            yield *self._views(tree, now.status), [], preview, work.job.seed, *copies

    def _perception(self) -> None:
        everything = ["caption", *PERCEPTION]
        with gr.Row():
            with gr.Column(min_width=300):
                photo = self._photo("perceive")
                wanted = gr.CheckboxGroup(everything, value=everything, label="To make of it")
                run, status, tickets = self._run_row("perceive", "Again")
            with gr.Column(min_width=300):
                caption = gr.Textbox(label="Caption", interactive=False, elem_id="perceive_caption", lines=2)
                maps = self._gallery("perceive", "Maps", 2)
        seeds, options = self._sampler(has_preview=False)
        if self._examples.photos:
            gr.Examples([[self._kept(image)] for image in self._examples.photos], photo, label="Examples")
        copies = self._copies("perceive")
        inputs, outputs = [photo, wanted, *seeds, *options], [status, tickets, caption, maps, seeds[0], *copies]
        self._connect([photo.change, run.click], self._perceive, inputs, outputs, "perceive", status)

    async def _perceive(self, photo, wanted, seed, is_random, tier, steps, guidance, lora, request: gr.Request):
        nothing = gr.skip()
        if photo is None or not wanted:
            missing = "There is no picture yet." if photo is None else "Nothing is chosen to make of the picture."
            yield missing, [], "", [], nothing, *[nothing] * 3
            return
        seed, files = chosen_seed(seed, is_random), [Path(photo)]
        asked: list[tuple[str, dict, list[Path]]] = []
        for name in wanted:
            if name == "caption":
                asked.append(("caption", given(seed=seed, steps=steps, lora=lora), files))
            else:
                fields = given(kind=name, seed=seed, quality=tier, steps=steps, guidance_scale=guidance, lora=lora)
                if name in self._examples.map_instructions:
                    fields["instruction"] = self._examples.map_instructions[name]
                asked.append(("perception", fields, files))
        async for now in self._worker.do(asked):
            if now.made is None:
                yield now.status, now.tickets, now.said or nothing, nothing, seed, *[nothing] * 3
                continue
            said = [results[0] for work, results in now.made if work.job.task == "caption"]
            drawn = [
                (str(await asyncio.to_thread(self._worker.keep, results[0], seed)), work.job.options["kind"])
                for work, results in now.made
                if work.job.task == "perception"
            ]
            copies = self._worker.copies([work for work, _ in now.made], address(request))
            yield now.status, [], "".join(said), drawn, seed, *copies

    def _words(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                photo = self._photo("ask")
                question = gr.Textbox(
                    label="Question", placeholder="none: a caption of the picture", elem_id="ask_prompt"
                )
                run, status, tickets = self._run_row("ask", "Ask")
            with gr.Column(min_width=300):
                answer = gr.Textbox(label="Answer", interactive=False, lines=3, elem_id="ask_answer")
        seeds = self._seeds()
        with gr.Accordion("Options", open=False), gr.Row():
            steps = self._number("Steps")
            temperature = self._number("Temperature")
            most, lora = self._number("Most tokens"), self._lora()
        self._pairs(self._examples.questions, photo, question)
        copies = self._copies("ask")
        inputs, outputs = (
            [photo, question, *seeds, steps, temperature, most, lora],
            [status, tickets, answer, seeds[0], *copies],
        )
        self._connect([run.click, question.submit], self._ask, inputs, outputs, "ask", status)

    async def _ask(self, photo, question, seed, is_random, steps, temperature, most, lora, request: gr.Request):
        nothing = gr.skip()
        if photo is None:
            yield "There is no picture yet.", [], nothing, nothing, *[nothing] * 3
            return
        fields = given(
            question=question.strip(), seed=chosen_seed(seed, is_random), steps=steps, temperature=temperature,
            max_tokens=most, lora=lora,
        )  # fmt: skip
        async for now in self._worker.do([("vqa" if "question" in fields else "caption", fields, [Path(photo)])]):
            if now.made is None:
                yield now.status, now.tickets, now.said or nothing, fields["seed"], *[nothing] * 3
                continue
            [(work, [said])] = now.made
            yield now.status, [], said, work.job.seed, *self._worker.copies([work], address(request))


def add_page(
    app: FastAPI,
    engine: Engine,
    *,
    model: str,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    stamp: dict[str, Any] | None = None,
    metrics: Metrics | None = None,
    needs_key: bool = False,
    log_prompts: bool = False,
    is_ending: Callable[[], bool] = lambda: False,
) -> None:
    """Mounts the page at / of an application, after the paths that it has.

    Args:
      needs_key: whether the application asks for a key, for what is copied as code; it asks for the page's paths too.
      is_ending: whether the server is to end.
      model, limits, stamp, metrics, log_prompts: as in `api.make_app`.
    """
    folder = Path(tempfile.mkdtemp(prefix="unialign_page_")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # of a server that never began
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    worker = Worker(
        engine, folder, model=model, limits=limits, stamp=stamp or {}, metrics=metrics, needs_key=needs_key,
        log_prompts=log_prompts,
    )  # fmt: skip
    blocks = Layout(worker, examples_for(engine.pipeline.tokenizer)).build(model)
    blocks.state_session_capacity = MOST_SESSIONS
    worker.folder.keep_all()  # the examples
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        footer_links=[],
        allowed_paths=[],
        show_error=False,
        max_file_size=limits.request_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    mounted = app.router.routes[-1]
    mounted.app = Filter(mounted.app, worker.folder, is_ending, metrics.refused if metrics else lambda reason: None)
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def with_folder(app: FastAPI) -> AsyncIterator[Any]:
        sweeping = asyncio.ensure_future(_sweep_for_ever(worker.folder))
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            sweeping.cancel()
            shutil.rmtree(folder, ignore_errors=True)

    app.router.lifespan_context = with_folder


async def _sweep_for_ever(folder: Folder) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await asyncio.to_thread(folder.sweep)
