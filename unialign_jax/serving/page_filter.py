"""Around Gradio's application: what a browser needs of it, for pages of this origin, and files of its folder alone."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import unquote

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unialign_jax.data.images import open_image
from unialign_jax.files import first_line, shown
from unialign_jax.serving.api import STEP_SECONDS, is_own
from unialign_jax.serving.page_folder import Folder

MOST_FILES = 16  # of one upload
# What a browser fetches of Gradio's paths. Others could fetch addresses, or start functions past the queue.
PATHS = (
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    "/gradio_api/theme.css",
    "/gradio_api/info",
    "/gradio_api/startup-events",
    "/gradio_api/cancel",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
)
PREFIXES = ("/assets/", "/static/", "/svelte/", "/gradio_api/file=", "/gradio_api/heartbeat/")
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


class Filter:
    """Lets through PATHS and PREFIXES. Refuses requests that name a file outside of the folder, and uploads that are no
    pictures or for which the folder has no room.

    A heartbeat, which lasts as long as a page is open, ends with the server, so that an open page does not keep it.

    Args:
      refused: is told the reason of each refusal, for the metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        folder: Folder,
        is_ending: Callable[[], bool] = lambda: False,
        refused: Callable[[str], None] = lambda reason: None,
    ):
        self._app, self._folder, self._is_ending, self._refused = app, folder, is_ending, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # the page has no web sockets
        path = scope["path"].rstrip("/") or "/"
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if path != "/" and path not in PATHS and not path.startswith(PREFIXES):
            return await self._refuse("no_page", "there is no such page", 404)(scope, receive, send)
        origin = headers.get(b"origin")
        if origin is not None and not is_own(origin, headers.get(b"host", "")):
            return await self._refuse("origin", "this is a page of another origin", 403)(scope, receive, send)
        if path.startswith("/gradio_api/file=") and not self._is_ours(unquote(path.partition("=")[2])):
            return await self._refuse("no_page", "there is no such file", 404)(scope, receive, send)
        if path == "/gradio_api/queue/join":
            body = await _read(receive)
            if not self._has_only_ours(body):
                return await self._refuse("bad_request", "a file was not uploaded here", 400)(scope, receive, send)
            receive = _replayed(body, receive)
        if path == "/gradio_api/upload":
            body = await _read(receive)
            if reason := await _no_pictures(Headers(scope=scope), body):
                return await self._refuse("bad_request", reason, 415)(scope, receive, send)
            if not await asyncio.to_thread(self._folder.make_room, len(body)):
                full = f"there is no room for more pictures: the page keeps {self._folder.most:,} bytes"
                return await self._refuse("full", full, 507)(scope, receive, send)
            receive = _replayed(body, receive)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = message | {"headers": [*message.get("headers", ()), *own]}
            await send(message)

        if path.startswith("/gradio_api/heartbeat/"):
            await self._until_the_end(scope, receive, marked)
        else:
            await self._app(scope, receive, marked)

    def _refuse(self, reason: str, words: str, status: int) -> PlainTextResponse:
        self._refused(reason)
        return PlainTextResponse(words, status)

    def _is_ours(self, path: str) -> bool:
        """Whether a path lies in the folder of the page, links followed."""
        try:
            return Path(path).resolve().is_relative_to(self._folder.path)
        except (OSError, ValueError):
            return False

    def _has_only_ours(self, body: bytes) -> bool:
        """Whether all files that a request names lie in the folder. Gradio looks at that only in apps that it started
        itself, and fetches what is a URL."""
        try:
            left = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while left:
            value = left.pop()
            if isinstance(value, dict):
                named = value.get("path")
                if named is not None and not (isinstance(named, str) and self._is_ours(named)):
                    return False
                left += value.values()
            elif isinstance(value, list):
                left += value
        return True

    async def _until_the_end(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_whole = False

        async def watched(message: Message) -> None:
            nonlocal is_whole
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, watched))
        try:
            while not task.done() and not self._is_ending():
                await asyncio.wait({task}, timeout=STEP_SECONDS)
        finally:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if self._is_ending() and not is_whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read(receive: Receive) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _no_pictures(headers: Headers, body: bytes) -> str | None:
    """What is wrong with an upload, or None if all of its files begin as pictures do."""

    async def whole() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(headers, whole(), max_files=MOST_FILES, max_fields=0).parse()
    except (MultiPartException, ValueError, KeyError) as error:  # KeyError: it has no Content-Type
        return f"the upload cannot be read: {first_line(error)}"
    try:
        for name, file in form.multi_items():
            if name != "files" or not isinstance(file, UploadFile):
                return f"the upload has {shown(name)}, expected files alone"
            await asyncio.to_thread(open_image, await file.read(), shown(file.filename))
    except ValueError as error:
        return str(error)
    finally:
        await form.close()
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
