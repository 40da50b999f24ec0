"""Server-sent events: answers that are streamed."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # neither kept nor collected by what lies between

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each frame


def frame(data: Any, event: str | None = None) -> bytes:
    """One event: `data` as JSON, with a name where the dialect gives its events names."""
    text = ENCODER.encode(data)
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {text}\n\n".encode(errors="replace")


def event_stream(frames: AsyncIterator[bytes]) -> StreamingResponse:
    """The response. When its client goes away, the frames' generator is closed at the place where it waits."""
    return StreamingResponse(frames, media_type="text/event-stream", headers=HEADERS)


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
