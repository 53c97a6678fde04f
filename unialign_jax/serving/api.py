"""The web API: OpenAI's paths for images and chats, with our options beside theirs, over an `Engine`.

POST /v1/images/generations      an image from a prompt
POST /v1/images/edits            an image changed (one sent), or a new one of its subjects (several)
POST /v1/chat/completions        a caption (an image alone) or an answer (an image and a question)
POST /v1/tasks/perceive          a canny, depth or pose map
GET  /v1/models  /health  /metrics
"""

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unialign_jax import __version__
from unialign_jax.files import first_line, parse_json, shown
from unialign_jax.inference.options import MAX_REFERENCES, OPTIONS, TEXT_TASKS
from unialign_jax.serving.engine import Busy, Closing, Engine, Ticket, TooLate, TooMuch
from unialign_jax.serving.metrics import Metrics
from unialign_jax.serving.requests import (
    TIERS,
    BadRequest,
    Limits,
    Work,
    check_fit,
    image_bytes,
    make_work,
    stamped_png,
    text_room,
)

log = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)  # without a key
API_PATHS = ("/v1/",)  # of programs; the others are opened in browsers too
STEP_SECONDS = 0.5  # between two looks at whether the server is to end
MOST_STOPS = 4  # texts of `stop`
# Of a chat, what would change the answer, and the values beside null that change nothing.
REFUSED = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
}
_KINDS = {"whole": int, "number": float, "text": str, "choice": str, "interval": tuple[float, float]}


def options_model(name: str, tasks: tuple[str, ...], **fields: Any) -> type[BaseModel]:
    """A model of pydantic with OpenAI's fields and the options of tasks, for the OpenAPI page."""
    ours = {
        key: (_KINDS[option.kind] | None, Field(None, description=f"{option.help} ({option.default_text})"))
        for key, option in OPTIONS.items()
        if set(tasks) & set(option.tasks) and key not in fields
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
    "ImageRequest", ("text_to_image",), prompt=(str, Field(description="what to show")), **_SHARED
)
EditRequest = options_model(
    "EditRequest",
    ("edit", "personalization"),
    prompt=(str, Field(description="what to change, or what to show of several images")),
    image=(str | list[str], Field(description="base64 or data URIs; several for a new image of their subjects")),
    **_SHARED,
)
PerceiveRequest = options_model(
    "PerceiveRequest",
    ("perception",),
    image=(str, Field(description="base64, or a data URI")),
    kind=(str, Field(description="canny, depth or pose")),
    instruction=text("instead of the kind's own"),
    quality=_SHARED["quality"],
    model=_SHARED["model"],
    lora=_SHARED["lora"],
)
ChatRequest = options_model(
    "ChatRequest",
    ("vqa",),
    messages=(
        list[dict[str, Any]],
        Field(description="read are the text of the user's last one, and its image or else the newest before it"),
    ),
    model=_SHARED["model"],
    lora=_SHARED["lora"],
    max_tokens=(int | None, Field(None, description="most tokens of the answer; clamped to what the model writes")),
    stop=(Any, Field(None, description="a text, or several, before which the answer ends")),
    stream=(bool | None, Field(None, description="server-sent events")),
    prefix=text("what a caption begins with"),
)


def edit_body() -> dict:
    """The body of an edit for the OpenAPI page, which FastAPI does not know: it is read by `read_edit`."""
    schema = EditRequest.model_json_schema()
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "or image[]"}
    form = schema | {"properties": schema["properties"] | {"image": files}}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


class Guard:
    """Around the application: checks hosts, origins and keys, takes the body, and logs each request without its texts.

    A page that a browser shows may send a form to any address. The browser then names the page's origin, which is this
    server's own or one of `origins`. Programs name none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        hosts: Sequence[str],
        origins: Sequence[str],
        limits: Limits,
        metrics: Metrics,
        is_ending: Callable[[], bool],
    ):
        self._app, self._limits, self._metrics, self._is_ending = app, limits, metrics, is_ending
        self._keys, self._hosts = [key.encode() for key in keys], [host.lower() for host in hosts]
        self._origins = [origin.lower() for origin in origins]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = {name: value for name, value in scope["headers"]}
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                return await refusal(scope, receive, watched)
            try:
                body = await self._read(headers, receive)
            except Unread as error:
                self._metrics.refused(error.reason)
                closes = {"Connection": "close"}  # the rest of the body is not waited for
                return await problem(error.status, str(error), headers=closes)(scope, receive, watched)
            except ClientGone:
                status = 499
                return
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replayed() -> Message:
                return first.pop() if first else await receive()

            await self._app(scope, replayed, watched)
        finally:
            facts = {"method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(facts | {"seconds": round(time.monotonic() - began, 3)}))

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """The answer to a request that may not enter."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if self._hosts and host_name(host) not in self._hosts:
            self._metrics.refused("host")
            wrong = f"Host is {shown(host)}, expected {' or '.join(self._hosts)} (launch/serve.py --allow-host)"
            return problem(421, wrong)
        if origin and not is_own(origin, host) and not {origin.lower(), "*"} & set(self._origins):
            self._metrics.refused("origin")
            wrong = f"Origin is {shown(origin)}, a page of another origin, which may not call (--cors-origin)"
            return problem(403, wrong)
        if path not in OPEN_PATHS and not self._may_enter(path, headers.get(b"authorization", b"")):
            self._metrics.refused("key")
            return self._no_key(path)
        return None

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises Unread where it does not come, or is too large, and ClientGone."""
        most, told = self._limits.request_bytes, headers.get(b"content-length", b"0")
        too_large = Unread(413, "too_large", f"the request has more than {most:,} bytes")
        if not told.isdigit():
            found = shown(told.decode("latin-1"))
            raise Unread(400, "bad_request", f"Content-Length is {found}, expected a number of bytes")
        if len(told) > 15 or int(told) > most:
            raise too_large
        body, more, deadline = bytearray(), True, time.monotonic() + self._limits.body_seconds
        late = Unread(408, "slow_body", f"the body did not come within {self._limits.body_seconds:g} s")
        while more:
            coming = asyncio.ensure_future(receive())
            try:
                while not coming.done():
                    if self._is_ending() and late.status == 408:  # what was sent by now may still be on its way
                        late = Unread(503, "closing", "the server is shutting down, and the request was not whole")
                        deadline = min(deadline, time.monotonic() + STEP_SECONDS)
                    if (left := deadline - time.monotonic()) <= 0:
                        raise late
                    await asyncio.wait({coming}, timeout=min(left, STEP_SECONDS))
                message = coming.result()
            finally:
                coming.cancel()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
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

    def _no_key(self, path: str) -> JSONResponse:
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


class Unread(Exception):
    """A body that was not read to its end, with the status that says why, and the reason for the metrics."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


class ClientGone(Exception):
    """The client closed its connection before its answer was there."""


def is_own(origin: str, host: str) -> bool:
    """Whether an origin is that of the server which a request calls by `host`; a proxy may speak HTTPS for it."""
    name = lambda place: place.lower().removesuffix(":443").removesuffix(":80")  # noqa: E731
    scheme, _, place = origin.partition("://")
    return scheme.lower() in ("http", "https") and bool(place) and name(place) == name(host)


def problem(
    status: int,
    message: str,
    *,
    parameter: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
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
    origins: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    metrics: Metrics | None = None,
    log_prompts: bool = False,
    stamp: dict[str, Any] | None = None,
    is_ending: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application.

    Args:
      model: the name of the model in answers.
      stamp: goes into every image's parameters (`ModelSource.stamp`).
      keys: API keys, one of which requests must have; none are needed where there are none.
      hosts: the names that requests may call this server by (their Host header); any where there are none. A page of
        another origin can have its name lead to this machine, and a browser then takes the server for that origin.
      origins: of pages that may call beside the server's own, such as "https://example.org"; "*" is any.
      metrics: what `engine` reports to.
      log_prompts: whether texts of requests go into the log.
      is_ending: whether the server is to end; requests whose body is still on its way are then given up.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    metrics = metrics or Metrics(engine)
    app = FastAPI(title="unialign_jax", version=__version__, lifespan=lifespan)
    origins = [origin.rstrip("/") for origin in origins]
    app.add_middleware(
        Guard, keys=keys, hosts=hosts, origins=origins, limits=limits, metrics=metrics, is_ending=is_ending
    )
    if origins:  # around the guard: a browser asks without a key whether it may ask
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    image_size = engine.pipeline.config.image_size
    work_of = functools.partial(make_work, limits=limits, model=model, loras=engine.loras, image_size=image_size)
    reproducible = getattr(engine.pipeline, "reproducible", False)

    @app.exception_handler(BadRequest)
    async def bad_request(request: Request, error: BadRequest) -> JSONResponse:
        metrics.refused("bad_request")
        code = "model_not_found" if error.status == 404 else None
        return problem(error.status, str(error), parameter=error.parameter, code=code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        metrics.refused("bad_request")
        if first["type"] == "json_invalid":
            return problem(400, f"the request is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
        name = ".".join(str(part) for part in first["loc"] if part != "body")
        return problem(400, f"{name or 'the request'}: {first['msg']}", parameter=name or None)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return problem(error.status_code, message, headers=error.headers)

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
        try:
            return engine.submit(work.job, work.images, hear=hear, loras=work.loras)
        except TooMuch as error:
            raise BadRequest(str(error), error.parameter) from None

    def prepared(task: str, fields: dict, data: Sequence[bytes]) -> tuple[Work, list[str]]:
        """The work, and what its client is to be warned of; for a thread. Raises BadRequest."""
        work = work_of(task, fields, data)
        return work, check_fit(work.job, engine.pipeline)

    async def do(request: Request, work: Work) -> Ticket:
        """Queues the work and waits for it, unless its client leaves. Raises its error."""
        ticket = queue(work)
        try:
            await unless_gone(request, asyncio.wrap_future(ticket.future))
            return ticket
        finally:
            ticket.cancel()

    async def made(request: Request, task: str, fields: dict, data: Sequence[bytes]) -> dict:
        """The answer with the images of a request."""
        work, warnings = await asyncio.to_thread(prepared, task, fields, data)
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
            "warnings": warnings,
            "seconds": {"queued": round(ticket.queued or 0.0, 3), "working": round(ticket.working, 3)},
        }

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> PlainTextResponse:
        return PlainTextResponse("", 499)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        metrics.failed()
        return problem(500, f"the request failed: {first_line(error)}")

    @app.post("/v1/images/generations")
    async def generate(request: Request, body: ImageRequest) -> dict:
        return await made(request, "text_to_image", given(body), [])

    @app.post("/v1/images/edits", openapi_extra=edit_body())
    async def edit(request: Request) -> dict:
        fields, data = await read_edit(request)
        return await made(request, "edit" if len(data) == 1 else "personalization", fields, data)

    @app.post("/v1/tasks/perceive")
    async def perceive(request: Request, body: PerceiveRequest) -> dict:
        fields = given(body)
        data = [image_bytes(fields.pop("image"), "image")]
        return await made(request, "perception", fields, data)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> dict | StreamingResponse:
        fields = given(body)
        is_streamed, stream_options = fields.pop("stream", False), fields.pop("stream_options", None)
        stops = read_stops(fields.pop("stop", None))
        length = engine.pipeline.config.text_length
        work, warnings = await asyncio.to_thread(chat_work, fields, length, prepared)
        prompt_tokens = await asyncio.to_thread(token_count, engine.pipeline, work.job.text)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        head |= {"seed": work.job.seed, "task": work.job.task, "lora": work.loras, "reproducible": reproducible}
        head |= {"warnings": warnings}

        def ending(answer: str) -> tuple[str, dict]:
            """(reason of the end, usage) of an answer."""
            written = token_count(engine.pipeline, answer)
            before, room = text_room(work.job, engine.pipeline)
            room += before if work.job.task == "caption" else 0  # a caption begins with its prefix
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": written}
            return "length" if written >= room else "stop", usage | {"total_tokens": prompt_tokens + written}

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
                    ticket.future.result()
            except BaseException:
                ticket.cancel()
                raise
            wants_usage = isinstance(stream_options, dict) and stream_options.get("include_usage")
            events = chat_events(head, first, texts, ticket, stops, ending, bool(wants_usage), metrics.failed)
            return StreamingResponse(events, media_type="text/event-stream")
        ticket = await do(request, work)
        [answer] = ticket.future.result()
        reason, usage = await asyncio.to_thread(ending, answer)
        if len(cut := cut_at(answer, stops)) < len(answer):
            answer, reason = cut, "stop"
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return head | {"object": "chat.completion", "choices": [choice], "usage": usage}

    def served_models() -> dict[str, dict]:
        """{id: facts} of the model, alone and with each LoRA."""
        config = engine.pipeline.config
        facts = {"image_size": config.image_size, "text_length": config.text_length, "tasks": config.tasks}
        facts |= {"object": "model", "created": 0, "owned_by": "unialign_jax", "reproducible": reproducible}
        adapted = [{"id": f"{model}:{name}", "parent": model} | facts for name in engine.loras]
        return {found["id"]: found for found in ({"id": model} | facts, *adapted)}

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": list(served_models().values())}

    @app.head("/v1/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        found = served_models()
        if name not in found:
            raise BadRequest(f"there is no model {shown(name)}, served: {', '.join(found)}", "model", 404)
        return found[name]

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict:
        counts = engine.counts()
        return {"status": "ok", "waiting": counts.waiting, "working": counts.working}

    @app.get("/metrics")
    async def exposed() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type=metrics.content_type)

    async def no_path(scope: Scope, receive: Receive, send: Send) -> None:
        """What no path above is for: 405 where another method is, or else 404."""
        where, method = scope["path"], scope["method"]
        fits = [route for route in app.router.routes if isinstance(route, Route) and route.path_regex.match(where)]
        methods = sorted(set().union(*(route.methods or () for route in fits)))
        if methods:
            wrong = f"{method} {where} is not served, expected {' or '.join(methods)}"
            answer = problem(405, wrong, headers={"Allow": ", ".join(methods)})
        else:
            answer = problem(404, f"{method} {where}: there is no such path; see /docs", code="unknown_url")
        await answer(scope, receive, send)

    app.mount("/v1", no_path)
    return app


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
        return future.result()
    finally:
        leaves.cancel()


def given(body: BaseModel) -> dict:
    """The fields that a request has, those that we do not know among them."""
    return body.model_dump(exclude_unset=True)


async def read_edit(request: Request) -> tuple[dict, list[bytes]]:
    """(fields, encoded images) of a request for an edit: a form, as of OpenAI's clients, or JSON. Raises BadRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields, data = await asyncio.to_thread(read_json_edit, await request.body())
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


def read_json_edit(body: bytes) -> tuple[dict, list[bytes]]:
    """(fields, encoded images) of JSON. Raises BadRequest."""
    try:
        fields = parse_json(body, "the request")
    except ValueError as error:
        raise BadRequest(str(error)) from None
    values = [fields.pop(name) for name in ("image", "images", "image[]") if name in fields]
    values = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if len(values) > MAX_REFERENCES:
        raise BadRequest(f"{len(values)} images are given, expected at most {MAX_REFERENCES}", "image")
    names = [f"image {number}" if len(values) > 1 else "image" for number in range(len(values))]
    return fields, [image_bytes(value, name) for value, name in zip(values, names, strict=True)]


def from_form(name: str, value: str) -> Any:
    """A form's text as the value that JSON would have."""
    if name == "n":
        return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
    if name == "stream":
        return value.lower() == "true"
    if name == "lora" and value.startswith("{"):
        try:
            return parse_json(value, "lora")
        except ValueError as error:
            raise BadRequest(str(error), "lora") from None
    option = OPTIONS.get(name)
    return option.parse(value) if option else value


def chat_work(
    fields: dict, length: int, prepared: Callable[[str, dict, list[bytes]], tuple[Work, list[str]]]
) -> tuple[Work, list[str]]:
    """The caption or the answer that a chat asks for, made by `prepared`, and its warnings. Raises BadRequest.

    Args:
      length: tokens of the model's texts.
    """
    for name, harmless in REFUSED.items():
        if (value := fields.pop(name, None)) is not None and value not in harmless:
            raise BadRequest(f"{name} is {shown(value)}, which this model does not serve: leave it out", name)
    asked, image = read_messages(fields.pop("messages"))
    task = fields.pop("task", None) or ("vqa" if asked else "caption")
    if task not in TEXT_TASKS:
        raise BadRequest(f"task is {shown(task)}, expected one of {', '.join(TEXT_TASKS)}", "task")
    most = fields.pop("max_completion_tokens", None) or fields.pop("max_tokens", None)
    fields.pop("max_tokens", None)
    if most is not None:
        if type(most) is not int or most < 1:
            raise BadRequest(f"max_tokens is {shown(most)}, expected a whole number above 0", "max_tokens")
        own = fields.get("text_length")
        fields["max_tokens"] = min(most, own if type(own) is int and own > 0 else length)
    if fields.pop("n", 1) not in (None, 1):
        raise BadRequest("n is above 1, expected 1: ask again with another seed", "n")
    for name in ("top_p", "frequency_penalty", "presence_penalty", "parallel_tool_calls"):
        fields.pop(name, None)
    if task == "vqa":
        fields |= {"question": asked}
        fields.pop("prefix", None)
    try:
        return prepared(task, fields, [image_bytes(image, "image")])
    except BadRequest as error:
        if error.parameter in ("question", "image"):
            error.parameter = "messages"
        raise


def read_messages(messages: list[dict]) -> tuple[str, Any]:
    """(text, image) that a chat asks about: of the user's last message, whose image may be in one before it.

    Raises BadRequest.
    """
    spoken = [message.get("content") for message in messages if message.get("role") == "user"]
    if not spoken:
        raise BadRequest("messages has none of the user", "messages")
    said = spoken[-1]
    if not isinstance(said, str | list) or not all(isinstance(part, dict | str) for part in said):
        raise BadRequest(f"content is {shown(said)}, expected a text or a list of parts", "messages")
    texts = [said] if isinstance(said, str) else [p.get("text") for p in parts_of(said, "text", "input_text")]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("a part of type text has no text", "messages")
    images = next(filter(None, (parts_of(content, "image_url", "input_image") for content in reversed(spoken))), [])
    if len(images) != 1:
        found = f"a message has {len(images)} images" if images else "messages have no image of the user"
        raise BadRequest(f"{found}, expected one to write about", "messages")
    return "\n".join(texts).strip(), images[0].get("image_url")


def parts_of(content: Any, *kinds: str) -> list[dict]:
    """The parts of a message's content that are of some types."""
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") in kinds]


def read_stops(value: Any) -> list[str]:
    """The texts of `stop`. Raises BadRequest."""
    stops = [value] if isinstance(value, str) and value else value or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest(f"stop is {shown(value)}, expected a text, or at most {MOST_STOPS} of them", "stop")
    return stops


def cut_at(answer: str, stops: Sequence[str]) -> str:
    """The beginning of an answer, up to the first of the texts at which it is to stop."""
    return min((answer.partition(stop)[0] for stop in stops), key=len, default=answer)


def begun_stop(answer: str, stops: Sequence[str]) -> int:
    """The most characters at the end of an answer that one of the texts begins with."""
    return max((n for stop in stops for n in range(1, len(stop)) if answer.endswith(stop[:n])), default=0)


def token_count(pipeline: Any, said: str | None) -> int:
    return len(pipeline.tokenizer.token_ids(said)) if said else 0


async def chat_events(
    head: dict,
    text: str | None,
    texts: asyncio.Queue[str | None],
    ticket: Ticket,
    stops: Sequence[str],
    ending: Callable[[str], tuple[str, dict]],
    wants_usage: bool,
    failed: Callable[[], None],
) -> AsyncIterator[str]:
    """An answer as server-sent events, each with the words that are settled since the one before.

    Args:
      text: how the answer begins; None where it is whole.
      texts: what follows: longer beginnings, and None at the end.
      stops: texts before which it ends.
      ending: (reason, usage) of the whole answer.
      failed: is called where the answer fails after its first words.
    """

    def event(content: dict) -> str:
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk'} | content)}\n\n"

    def chunk(delta: dict, finish: str | None = None) -> str:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        said = ""
        while text is not None:
            settled = cut_at(text, stops)
            if settled == text:  # its end may be the beginning of a stop
                settled = text[: len(text) - begun_stop(text, stops)]
            if len(settled) > len(said):
                yield chunk({"content": settled[len(said) :]})
                said = settled
            text = await texts.get()
        error = ticket.future.exception()
        if error is None and not (answer := ticket.future.result()[0]).startswith(said):
            error = ValueError("the answer was made anew after a failure: ask again")
        if error is not None:  # the status is long sent
            log.error("a text failed while it was streamed", exc_info=error)
            failed()
            yield event({"error": {"message": f"the request failed: {first_line(error)}", "type": "server_error"}})
            return
        reason, usage = ending(answer)
        if len(cut := cut_at(answer, stops)) < len(answer):
            answer, reason = cut, "stop"
        if answer != said:
            yield chunk({"content": answer[len(said) :]})
        yield chunk({}, reason)
        if wants_usage:
            yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    finally:
        ticket.cancel()
