"""The web API: OpenAI's paths for images and chats, with our options beside theirs, over an `Engine`.

POST /v1/images/generations      an image from a prompt
POST /v1/images/edits            an image changed (one sent), or a new one of its subjects (several)
POST /v1/chat/completions        a caption (an image alone) or an answer (an image and a question)
POST /v1/tasks/perceive          a canny, depth or pose map
GET  /v1/models  /health  /metrics
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unialign_jax import __version__
from unialign_jax.files import first_line, parse_json, shown
from unialign_jax.inference.options import OPTIONS, TEXT_TASKS
from unialign_jax.serving.engine import Busy, Closing, Engine, Ticket, TooLate
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import (
    TIERS,
    BadRequest,
    Limits,
    Work,
    check_size,
    image_bytes,
    make_work,
    stamped_png,
)

log = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)  # without a key
API_PATHS = ("/v1/",)  # of programs; the others are opened in browsers too
_KINDS = {"whole": int, "number": float, "text": str, "choice": str, "interval": tuple[float, float]}


def options_model(name: str, task: str, **fields: Any) -> type[BaseModel]:
    """A model of pydantic with OpenAI's fields and the options of a task, for the OpenAPI page."""
    ours = {
        key: (_KINDS[option.kind] | None, Field(None, description=f"{option.help} ({option.default_text})"))
        for key, option in OPTIONS.items()
        if task in option.tasks and key not in fields
    }
    return create_model(name, __config__=ConfigDict(extra="allow"), **fields, **ours)


def text(description: str, **limits: Any) -> tuple:
    return str | None, Field(None, description=description, **limits)


_SHARED = {
    "n": (int | None, Field(None, description="images")),
    "size": text("WIDTHxHEIGHT in pixels, or auto"),
    "quality": text(f"{' or '.join(TIERS)}; OpenAI's auto and high are lossless, medium and low fast"),
    "response_format": text("b64_json"),
    "model": text("the server's, or MODEL:LORA with one of its LoRAs; other names are not read"),
    "lora": (Any, Field(None, description="the name of a LoRA of the server, or an object {name: scale}")),
}
ImageRequest = options_model(
    "ImageRequest", "text_to_image", prompt=(str, Field(description="what to show")), **_SHARED
)
PerceiveRequest = options_model(
    "PerceiveRequest",
    "perception",
    image=(str, Field(description="base64, or a data URI")),
    kind=(str, Field(description="canny, depth or pose")),
    instruction=text("instead of the kind's own"),
    quality=_SHARED["quality"],
    model=_SHARED["model"],
    lora=_SHARED["lora"],
)
ChatRequest = options_model(
    "ChatRequest",
    "vqa",
    messages=(list[dict[str, Any]], Field(description="of the last one of the user, the image and the text are read")),
    model=_SHARED["model"],
    lora=_SHARED["lora"],
    max_tokens=(int | None, Field(None, description="most tokens of the answer; clamped to what the model writes")),
    stream=(bool | None, Field(None, description="server-sent events")),
    prefix=text("what a caption begins with"),
)


class Guard:
    """Around the application: checks keys and hosts, counts bytes, and logs each request without its content."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], hosts: Sequence[str], limits: Limits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys, self._hosts = [key.encode() for key in keys], [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = {name: value for name, value in scope["headers"]}
            host = headers.get(b"host", b"").decode("latin-1")
            if self._hosts and host_name(host) not in self._hosts:
                self._metrics.refused("host")
                wrong = f"Host is {shown(host)}, expected {' or '.join(self._hosts)} (launch/serve.py --allow-host)"
                return await problem(421, wrong)(scope, receive, watched)
            if scope["path"] not in OPEN_PATHS and not self._may_enter(
                scope["path"], headers.get(b"authorization", b"")
            ):
                self._metrics.refused("key")
                return await self._refusal(scope["path"])(scope, receive, watched)
            body = await self._read(headers, receive)
            if body is None:
                self._metrics.refused("too_large")
                too_large = f"the request has more than {self._limits.request_bytes:,} bytes"
                return await problem(413, too_large)(scope, receive, watched)
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replayed() -> Message:
                return first.pop() if first else await receive()

            await self._app(scope, replayed, watched)
        finally:
            facts = {"method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(facts | {"seconds": round(time.monotonic() - began, 3)}))

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when it is too large."""
        most, told = self._limits.request_bytes, headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told) > most:
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > most:
                return None
            more = message.get("more_body", False)
        return bytes(body)

    def _may_enter(self, path: str, authorization: bytes) -> bool:
        """Whether the header has one of the keys; the time that it takes says nothing of which, or how much of it."""
        if not self._keys:
            return True
        kind, _, given = authorization.partition(b" ")
        given, kinds = given.strip(), (b"bearer",)
        if kind.lower() == b"basic" and not path.startswith(API_PATHS):
            kinds = (b"basic",)
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        found = [hmac.compare_digest(given, key) for key in self._keys]
        return kind.lower() in kinds and any(found)

    def _refusal(self, path: str) -> JSONResponse:
        """401. Browsers ask for a name and a password where they open a page; the key is the password."""
        if path.startswith(API_PATHS):
            return problem(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
        message = "no valid API key: give it as the password, with any user name, or send Authorization: Bearer KEY"
        headers = {"WWW-Authenticate": 'Basic realm="API key as the password", charset="UTF-8"'}
        return problem(401, message, code="invalid_api_key", headers=headers)


def host_name(host: str) -> str:
    """The name in a Host header, in small letters: "[::1]:8000" -> "::1"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def problem(
    status: int,
    message: str,
    *,
    parameter: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
    return JSONResponse(content, status, headers)


def make_app(
    engine: Engine,
    *,
    model: str,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    metrics: Metrics | None = None,
    log_prompts: bool = False,
    stamp: dict[str, Any] | None = None,
) -> FastAPI:
    """The application.

    Args:
      model: the name of the model in answers.
      stamp: goes into every image's parameters (`ModelSource.stamp`).
      keys: API keys, one of which requests must have; none are needed where there are none.
      hosts: the names that requests may call this server by (their Host header); any where there are none. A page of
        another origin can have its name lead to this machine, and a browser then takes the server for that origin.
      metrics: what `engine` reports to.
      log_prompts: whether texts of requests go into the log.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    metrics = metrics or Metrics(engine)
    app = FastAPI(title="unialign_jax", version=__version__, lifespan=lifespan)
    app.add_middleware(Guard, keys=keys, hosts=hosts, limits=limits, metrics=metrics)
    work_of = functools.partial(make_work, limits=limits, model=model, loras=engine.loras)
    reproducible = getattr(engine.pipeline, "reproducible", False)

    @app.exception_handler(BadRequest)
    async def bad_request(request: Request, error: BadRequest) -> JSONResponse:
        metrics.refused("bad_request")
        code = "model_not_found" if error.status == 404 else None
        return problem(error.status, str(error), parameter=error.parameter, code=code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part != "body")
        metrics.refused("bad_request")
        return problem(400, f"{name or 'the request'}: {first['msg']}", parameter=name or None)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        metrics.refused("busy")
        headers = {"Retry-After": str(round(error.retry_after + 0.5))}
        return problem(429, str(error), code="rate_limit_exceeded", headers=headers)

    @app.exception_handler(Closing)
    async def closing(request: Request, error: Closing) -> JSONResponse:
        metrics.refused("closing")
        return problem(503, str(error), headers={"Retry-After": "10"})

    @app.exception_handler(TooLate)
    async def too_late(request: Request, error: TooLate) -> JSONResponse:
        metrics.refused("too_late")
        return problem(504, str(error))

    def queue(work: Work, hear: Callable[[str], None] | None = None) -> Ticket:
        """Queues the work."""
        if log_prompts:
            log.info(json.dumps({"task": work.job.task, "text": work.job.text}))
        check_size(work.job, engine.pipeline.sizes)
        return engine.submit(work.job, work.images, hear=hear, loras=work.loras)

    async def do(request: Request, work: Work) -> Ticket:
        """Queues the work and waits for it, unless its client leaves. Raises its error."""
        ticket = queue(work)
        try:
            await unless_gone(request, asyncio.wrap_future(ticket.future))
            return ticket
        finally:
            ticket.cancel()

    async def made(request: Request, work: Work) -> dict:
        """The answer with the images of a request."""
        ticket = await do(request, work)
        images = ticket.future.result()
        data = await asyncio.to_thread(lambda: [encoded(image, stamp) for image in images])
        job = work.job
        return {
            "created": int(time.time()),
            "data": [{"b64_json": content, "seed": job.seed + index} for index, content in enumerate(data)],
            "size": "{}x{}".format(*images[0].size),
            "output_format": "png",
            "quality": work.tier,
            "model": model,
            "lora": work.loras,
            "reproducible": reproducible,
            "seconds": {"queued": round(ticket.queued or 0.0, 3), "working": round(ticket.working, 3)},
        }

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> PlainTextResponse:
        return PlainTextResponse("", 499)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return problem(500, f"the request failed: {first_line(error)}")

    @app.post("/v1/images/generations")
    async def generate(request: Request, body: ImageRequest) -> dict:
        work = await asyncio.to_thread(work_of, "text_to_image", given(body), [])
        return await made(request, work)

    @app.post("/v1/images/edits")
    async def edit(request: Request) -> dict:
        fields, data = await read_edit(request)
        task = "edit" if len(data) == 1 else "personalization"
        return await made(request, await asyncio.to_thread(work_of, task, fields, data))

    @app.post("/v1/tasks/perceive")
    async def perceive(request: Request, body: PerceiveRequest) -> dict:
        fields = given(body)
        data = [image_bytes(fields.pop("image"), "image")]
        return await made(request, await asyncio.to_thread(work_of, "perception", fields, data))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> dict | StreamingResponse:
        fields = given(body)
        is_streamed, stream_options = fields.pop("stream", False), fields.pop("stream_options", None)
        work = await asyncio.to_thread(chat_work, fields, engine.pipeline, work_of)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        head |= {"seed": work.job.seed, "task": work.job.task, "lora": work.loras, "reproducible": reproducible}

        def ending(answer: str) -> tuple[str, dict]:
            """(reason of the end, usage) of an answer."""
            counted = {"prompt_tokens": token_count(engine.pipeline, work.job.text)}
            counted["completion_tokens"] = token_count(engine.pipeline, answer)
            most = work.job.options.get("max_tokens") or engine.pipeline.config.text_length
            reason = "length" if counted["completion_tokens"] >= most else "stop"
            return reason, counted | {"total_tokens": sum(counted.values())}

        if is_streamed:
            texts, loop = asyncio.Queue(), asyncio.get_running_loop()

            def hear(text: str | None) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(texts.put_nowait, text)

            ticket = queue(work, hear)
            ticket.future.add_done_callback(lambda _: hear(None))
            try:
                first = await unless_gone(request, asyncio.ensure_future(texts.get()))
                if first is None:  # an error before the first words has a status of its own
                    raise_as_ours(ticket.future)
            except BaseException:
                ticket.cancel()
                raise
            wants_usage = isinstance(stream_options, dict) and stream_options.get("include_usage")
            events = chat_events(head, first, texts, ticket, ending, bool(wants_usage))
            return StreamingResponse(events, media_type="text/event-stream")
        ticket = await do(request, work)
        [answer] = ticket.future.result()
        reason, usage = ending(answer)
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return head | {"object": "chat.completion", "choices": [choice], "usage": usage}

    @app.get("/v1/models")
    async def models() -> dict:
        config = engine.pipeline.config
        facts = {"image_size": config.image_size, "text_length": config.text_length, "tasks": config.tasks}
        facts |= {"object": "model", "created": 0, "owned_by": "unialign_jax", "reproducible": reproducible}
        adapted = [{"id": f"{model}:{name}", "parent": model} | facts for name in engine.loras]
        return {"object": "list", "data": [{"id": model} | facts, *adapted]}

    @app.get("/health")
    async def health() -> dict:
        counts = engine.counts()
        return {"status": "ok", "waiting": counts.waiting, "working": counts.working}

    @app.get("/metrics")
    async def exposed() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type=metrics.content_type)

    return app


class ClientGone(Exception):
    """The client closed its connection before its answer was there."""


def encoded(image: Image.Image, stamp: dict[str, Any] | None) -> str:
    """An image as base64 of a PNG, with the parameters that made it."""
    return base64.b64encode(stamped_png(image, stamp or {})).decode()


async def gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def unless_gone(request: Request, future: asyncio.Future) -> Any:
    """What comes of a future. Raises its error, or ClientGone if the client leaves before."""
    leaves = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({future, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            future.cancel()
            raise ClientGone
        return raise_as_ours(future)
    finally:
        leaves.cancel()


def raise_as_ours(future: asyncio.Future | concurrent.futures.Future) -> Any:
    """What came of a future that is done. Raises its error; BadRequest for a ValueError."""
    error = future.exception()
    if isinstance(error, ValueError):
        raise BadRequest(first_line(error))
    return future.result()


def given(body: BaseModel) -> dict:
    """The fields that a request has, those that we do not know among them."""
    return body.model_dump(exclude_unset=True)


async def read_edit(request: Request) -> tuple[dict, list[bytes]]:
    """(fields, encoded images) of a request for an edit: a form, as of OpenAI's clients, or JSON. Raises BadRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            fields = parse_json(await request.body(), "the request")
        except ValueError as error:
            raise BadRequest(str(error)) from None
        values = [fields.pop(name) for name in ("image", "images", "image[]") if name in fields]
        values = [part for value in values for part in (value if isinstance(value, list) else [value])]
        data = [image_bytes(value, f"image {number}") for number, value in enumerate(values)]
    elif kind == "multipart/form-data":
        fields, data = {}, []
        async with request.form(max_files=16, max_fields=100) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]", "mask"):
                        raise BadRequest(f"{shown(name)} is a file, expected image", name)
                    content = await value.read()
                    if name == "mask":
                        fields["mask"] = content
                    else:
                        data.append(content)
                else:
                    fields[name] = from_form(name, value)
    else:
        raise BadRequest(f"Content-Type is {shown(kind)}, expected multipart/form-data or application/json")
    if not data:
        raise BadRequest("image is not given: an edit needs one", "image")
    return fields, data


def from_form(name: str, value: str) -> Any:
    """A form's text as the value that JSON would have."""
    if name == "n":
        return int(value) if value.isascii() and value.isdigit() else value
    if name == "stream":
        return value.lower() == "true"
    if name == "lora" and value.startswith("{"):
        try:
            return parse_json(value, "lora")
        except ValueError as error:
            raise BadRequest(str(error), "lora") from None
    option = OPTIONS.get(name)
    return option.parse(value) if option else value


def chat_work(fields: dict, pipeline: Any, work_of: Callable[..., Work]) -> Work:
    """The caption or the answer that a chat asks for, by `work_of` (`make_work`). Raises BadRequest."""
    asked, values = read_messages(fields.pop("messages"))
    if len(values) != 1:
        raise BadRequest(f"the user's last message has {len(values)} images, expected one to write about", "messages")
    task = fields.pop("task", None) or ("vqa" if asked else "caption")
    if task not in TEXT_TASKS:
        raise BadRequest(f"task is {shown(task)}, expected one of {', '.join(TEXT_TASKS)}", "task")
    most = fields.pop("max_completion_tokens", None) or fields.pop("max_tokens", None)
    fields.pop("max_tokens", None)
    if most is not None:
        if type(most) is not int or most < 1:
            raise BadRequest(f"max_tokens is {shown(most)}, expected a whole number above 0", "max_tokens")
        fields["max_tokens"] = min(most, pipeline.config.text_length)
    if fields.pop("n", 1) not in (None, 1):
        raise BadRequest("n is above 1, expected 1: ask again with another seed", "n")
    for name in ("top_p", "frequency_penalty", "presence_penalty", "stop", "response_format", "logprobs", "tools"):
        fields.pop(name, None)
    if task == "vqa":
        fields |= {"question": asked}
        fields.pop("prefix", None)
    return work_of(task, fields, [image_bytes(values[0], "image")])


def read_messages(messages: list) -> tuple[str, list]:
    """(text, images) of the user's last message. Raises BadRequest."""
    spoken = [message for message in messages if message.get("role") == "user"]
    if not spoken:
        raise BadRequest("messages has none of the user", "messages")
    content = spoken[-1].get("content")
    if isinstance(content, str):
        return content.strip(), []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRequest(f"content is {shown(content)}, expected a text or a list of parts", "messages")
    texts = [part.get("text") for part in content if part.get("type") in ("text", "input_text")]
    images = [part.get("image_url") for part in content if part.get("type") in ("image_url", "input_image")]
    if not all(isinstance(part, str) for part in texts):
        raise BadRequest("a part of type text has no text", "messages")
    return "\n".join(texts).strip(), images


def token_count(pipeline: Any, said: str | None) -> int:
    return len(pipeline.tokenizer.token_ids(said)) if said else 0


async def chat_events(
    head: dict,
    text: str | None,
    texts: asyncio.Queue[str | None],
    ticket: Ticket,
    ending: Callable[[str], tuple[str, dict]],
    wants_usage: bool,
) -> AsyncIterator[str]:
    """An answer as server-sent events, each with the words that are settled since the one before.

    Args:
      text: how the answer begins; None where it is whole.
      texts: what follows: longer beginnings, and None at the end.
      ending: (reason, usage) of the whole answer.
    """

    def event(content: dict) -> str:
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk'} | content)}\n\n"

    def chunk(delta: dict, finish: str | None = None) -> str:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        said = ""
        while text is not None:
            if len(text) > len(said):
                yield chunk({"content": text[len(said) :]})
                said = text
            text = await texts.get()
        error = ticket.future.exception()
        if error is None and not (answer := ticket.future.result()[0]).startswith(said):
            error = ValueError("the answer was made anew after a failure: ask again")
        if error is not None:  # the status is long sent
            yield event({"error": {"message": f"the request failed: {first_line(error)}", "type": "server_error"}})
            return
        if answer != said:
            yield chunk({"content": answer[len(said) :]})
        reason, usage = ending(answer)
        yield chunk({}, reason)
        if wants_usage:
            yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    finally:
        ticket.cancel()
