"""The Starlette application: routes, who may ask, and errors in each dialect's shape."""

import asyncio
import hmac
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teal_fast.server import messages, responses, texts
from teal_fast.server.body import read_body
from teal_fast.server.chat_completions import chat_completions
from teal_fast.server.chat_page import PAGE
from teal_fast.server.completions import completions
from teal_fast.server.errors import ApiError, anthropic_shape, openai_shape
from teal_fast.server.openapi import openapi
from teal_fast.server.service import Limits, Service
from teal_fast.server.settings import MAX_SPARSITY


async def health(request: Request) -> Response:
    request.app.state.service.loaded  # noqa: B018 (503 while it loads)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    text = request.app.state.service.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def change_request(request: Request) -> Response:
    """PATCH /v1/requests/{id}: the sparsity of a running answer, from its next token on."""
    service: Service = request.app.state.service
    fields = await read_body(request)
    fields.required("sparsity")
    sparsity = fields.number("sparsity", None, 0, MAX_SPARSITY)
    service.check_sparsity(sparsity)
    service.set_sparsity(id := request.path_params["id"], sparsity)
    return JSONResponse({"id": id, "sparsity": sparsity})


ROUTES = [
    *PAGE,
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses.endpoint, methods=["POST"]),
    Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"]),
    Route("/v1/messages", messages.endpoint, methods=["POST"]),
    Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
    Route("/v1/models", texts.models),
    Route("/v1/models/{name:path}", texts.model),
    Route("/tokenize", texts.tokenize, methods=["POST"]),
    Route("/detokenize", texts.detokenize, methods=["POST"]),
    Route("/apply-template", texts.apply_template, methods=["POST"]),
    Route("/version", texts.version),
    Route("/props", texts.props),
    Route("/openapi.json", openapi),
    Route("/v1/requests/{id}", change_request, methods=["PATCH"]),
]


def make_app(service: Service) -> Starlette:
    """The application over a service, whose worker's thread it starts and, when it is done, waits for."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.thread.start()
        yield
        await run_in_threadpool(service.worker.close)

    limits = service.limits
    middleware = [Middleware(Guard, limits=limits)]
    if limits.allowed_origins:
        origins = list(limits.allowed_origins)
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods="*", allow_headers="*"))
    handlers = {ApiError: refuse, HTTPException: refuse_route, ClientDisconnect: gone, Exception: fail}
    app = Starlette(routes=ROUTES, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    app.state.service = service
    return app


class Guard:
    """Refuses who has no key, and pages of other sites, which a browser would let ask in their user's name.

    A request that is cancelled, as when the server ends without waiting for it any longer, is told so.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value for name, value in scope["headers"]}
        error = self._error(scope["path"], headers)
        if error is not None:
            return await shaped(scope["path"], error)(scope, receive, send)
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:  # uvicorn cancels nothing else, and would log it as a failure
            if not begun:
                await shaped(scope["path"], ApiError(503, "the server has stopped", retry_after=5))(
                    scope, receive, send
                )

    def _error(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        key, origin = self.limits.api_key, headers.get(b"origin")
        if key is None:  # whoever has a key is no stranger's page
            if origin is None or self._is_ours(origin.decode("latin-1"), headers.get(b"host", b"")):
                return None
            return ApiError(403, "pages of this origin may not ask: name it with --allowed_origin", code="origin")
        if is_open(path):
            return None
        bearer = headers.get(b"authorization", b"")
        given = bearer[7:] if bearer[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
        if hmac.compare_digest(given, key.encode()):
            return None
        said = "the API key is missing or wrong: send it as a Bearer token or in x-api-key"
        return ApiError(401, said, code="invalid_api_key")

    def _is_ours(self, origin: str, host: bytes) -> bool:
        """Whether a page's origin is allowed or is this server, by a name that no other site can take."""
        if origin in self.limits.allowed_origins or "*" in self.limits.allowed_origins:
            return True
        try:
            parts = urlsplit(origin)
            same = parts.netloc.lower() == host.decode("latin-1").lower()
            return same and (parts.hostname == "localhost" or bool(ipaddress.ip_address(parts.hostname or "")))
        except ValueError:
            return False


def is_open(path: str) -> bool:
    """What needs no key. The page and its files ask for it themselves."""
    return path in ("/", "/health") or path.startswith("/page/")


# --- errors


def shaped(path: str, error: ApiError) -> JSONResponse:
    shape = anthropic_shape if path.startswith("/v1/messages") else openai_shape
    return JSONResponse(shape(error), error.status, error.headers)


def _counted(request: Request, error: ApiError) -> Response:
    if request.url.path != "/health":  # asked again and again while the model loads
        request.app.state.service.metrics.refused.labels(error.status).inc()
    return shaped(request.url.path, error)


async def refuse(request: Request, error: ApiError) -> Response:
    return _counted(request, error)


async def refuse_route(request: Request, error: HTTPException) -> Response:
    said = {404: f"there is no {request.url.path[:200]} here", 405: f"{request.method} is not what this address takes"}
    response = _counted(request, ApiError(error.status_code, said.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def fail(request: Request, error: Any) -> Response:
    return _counted(request, ApiError(500, "the server failed on this request: its log says how"))
