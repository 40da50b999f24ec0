"""A dialect's endpoints on loopback over an answer that is written beforehand: what SDKs make of its frames."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from teal_fast.server import messages, responses
from teal_fast.server.asked import Chat, Event, Settings, TokenInfo
from teal_fast.server.errors import ApiError, anthropic_shape, openai_shape


class Answer:
    prompt_tokens = 12

    def __init__(self, id: str, events: Sequence[Event | Exception]):
        self.id, self.events = id, iter(events)

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        event = next(self.events, None)
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    async def close(self) -> None:
        pass


class Canned:
    """events: what the next answers say. asked: what the last one was asked."""

    def __init__(self) -> None:
        self.events: Sequence[Event | Exception] = ()
        self.asked: tuple[Chat, Settings] | None = None

    async def begin_chat(self, chat: Chat, settings: Settings, request_id: str) -> Answer:
        self.asked = chat, settings
        return Answer(request_id, self.events)

    def logprobs(self, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        return [{"token": str(token.id), "bytes": [], "logprob": token.logprob, "top_logprobs": []} for token in tokens]


def refuse(request: Request, error: Exception) -> Response:
    shape = anthropic_shape if "messages" in request.url.path else openai_shape
    return JSONResponse(shape(error), error.status)


@contextmanager
def serving(service: Canned) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    paths = {
        "/v1/responses": responses.endpoint,
        "/v1/messages": messages.endpoint,
        "/v1/messages/count_tokens": messages.count_tokens,
    }
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]
    app = Starlette(routes=routes, exception_handlers={ApiError: refuse})
    app.state.service = service
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
