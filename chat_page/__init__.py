"""The chat page: its static files under /chat, and a route that renders Markdown for it.

The page is a client of /v1/chat/completions like any other; the server keeps nothing for it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ValidationError

from chat_page import dashboard
from chat_page.renderer import Refused, Renderer

SCRIPTS = (
    "blocks.js", "chat.js", "conversation.js", "document.js", "exchange.js", "files.js",
    "server.js", "storage.js", "texts.js", "turns.js",
)  # fmt: skip
FILES = {
    "/chat/": ("index.html", "text/html"),
    "/chat/icon.svg": ("icon.svg", "image/svg+xml"),
    "/chat/style.css": ("style.css", "text/css"),
    **{f"/chat/{name}": (name, "text/javascript") for name in SCRIPTS},
}
# What a browser fetches before it can send a key.
PUBLIC_PATHS = frozenset({"/chat", *FILES, "/dashboard", *dashboard.FILES})
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks each time whether its copy is still the newest.
    "Cache-Control": "no-cache",
}
_MAX_TEXT_BYTES = 64 * 2**10
BODY_TIMEOUT = 20.0


class RenderRequest(BaseModel):
    text: str


async def read_text(request: Request) -> str:
    """The body's text. Raises Refused if it is too large, too slow or malformed."""
    body = b""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_TEXT_BYTES:
                    raise Refused(413, f"the body is larger than {_MAX_TEXT_BYTES} bytes")
        return RenderRequest.model_validate_json(body).text
    except TimeoutError:
        raise Refused(408, "the body took too long; send it at once") from None
    except ValidationError:
        raise Refused(400, 'the body must be JSON such as {"text": "*hello*"}') from None


async def _while_connected(request: Request, work: Coroutine[Any, Any, str]) -> str | None:
    """What the work returns; None, and no more work, if the client disconnects first."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _static_file(name: str, media_type: str) -> Callable[[Request], Response]:
    """The route of one file, which may lie in a zip archive."""
    content = resources.files("chat_page").joinpath(name).read_bytes()
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve


async def rendered(request: Request, renderer: Renderer) -> Response:
    """The response to a text that is to be rendered."""
    try:
        text = await read_text(request)
        client = request.client.host if request.client else ""
        html = await _while_connected(request, renderer.render(text, client))
        if html is None:
            return Response(status_code=499)
    except Refused as error:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        detail = {"message": str(error), "type": kind, "param": None, "code": "not_rendered"}
        return JSONResponse({"error": detail}, error.status)
    return JSONResponse({"html": html})


def mount(
    app: FastAPI,
    describe: Callable[[], dict[str, Any]],
    observe: dashboard.Observe,
    facts: dashboard.Observe,
) -> None:
    """Add the routes of the page and of the dashboard.

    `describe` gives the model's name, defaults and so on once it is loaded, `observe` a sample of
    what the server does, and `facts` what its start decided.
    """
    renderer = Renderer()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(renderer.close)

    router = APIRouter(lifespan=lifespan, include_in_schema=False)
    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, _static_file(name, media_type), methods=["GET", "HEAD"])
    # Relative, as a proxy may have taken off a prefix.
    router.add_api_route("/chat", lambda: RedirectResponse("chat/"), methods=["GET", "HEAD"])
    router.add_api_route("/chat/config", describe)

    @router.post("/chat/render")
    async def render(request: Request) -> Response:
        return await rendered(request, renderer)

    dashboard.add_routes(router, _static_file, observe, facts)
    app.include_router(router)
