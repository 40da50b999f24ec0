"""Server-sent events: answers that are streamed."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # neither kept nor collected by what lies between


def frame(data: Any, event: str | None = None) -> bytes:
    """One event: `data` as JSON, with a name where the dialect gives its events names."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {text}\n\n".encode(errors="replace")


def event_stream(frames: AsyncIterator[bytes]) -> StreamingResponse:
    """The response. When its client goes away, the frames' generator is closed at the place where it waits."""
    return StreamingResponse(frames, media_type="text/event-stream", headers=HEADERS)
