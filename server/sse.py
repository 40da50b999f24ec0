"""Server-sent events: answers that are streamed."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from teal_fast.server.service import Answer, close_all

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # neither kept nor collected by what lies between

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each frame


def frame(data: Any, event: str | None = None) -> bytes:
    """One event: `data` as JSON, with a name where the dialect gives its events names."""
    text = ENCODER.encode(data)
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {text}\n\n".encode(errors="replace")


class EventStream(StreamingResponse):
    """The response. Its frames and answers are closed whatever becomes of it, such as a client that never reads."""

    def __init__(self, frames: AsyncGenerator[bytes], answers: Sequence[Answer]):
        super().__init__(frames, media_type="text/event-stream", headers=HEADERS)
        self.frames, self.answers = frames, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.frames):
                await super().__call__(scope, receive, send)
        finally:
            close_all(self.answers)  # frames that never began have closed nothing


async def with_pauses(events: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
    """An answer's events, with None after each so many seconds of waiting for the first: then a client may be told.

    After the first, which comes when the prompt is read, tokens follow each other fast enough.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        while not (await asyncio.wait((first,), timeout=seconds))[0]:
            yield None
        yield first.result()
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    async for event in events:
        yield event
