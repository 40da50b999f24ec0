"""A request's body as JSON, within bounds, and an answer that is made only as long as somebody waits for it."""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect, Request

from teal_fast.files.store import one_line
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields

MOST_BYTES = 32 * 2**20  # of a body: a context of a million tokens is 4 MB
LARGE = 2**18  # bytes that are parsed in a thread: they take some milliseconds
SILENCE = 30  # seconds without a part of a body, after which nobody waits for the rest, nor does SIGTERM
DEEPEST = 200  # lists and objects within one another: what is read can be copied and written again on any stack
_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, CapacityLimiter] = WeakKeyDictionary()


async def read_body(request: Request) -> Fields:
    """The body's fields. Raises ApiError 413 where it is too large, 408 where it stops, 400 where it is no object."""
    data, now = bytearray(), asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(SILENCE) as limit:
            async for part in request.stream():
                limit.reschedule(now() + SILENCE)
                data += part
                if len(data) > MOST_BYTES:
                    raise ApiError(413, f"the body has more than {MOST_BYTES} bytes: send a shorter one")
    except TimeoutError:
        raise ApiError(408, f"nothing of the body came for {SILENCE} s: send all of it") from None
    parsed = await in_thread(parse_body, bytes(data)) if len(data) > LARGE else parse_body(bytes(data))
    return Fields(parsed)


async def in_thread(work: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What long work on a request gives, done in one of two threads: more would keep the engine's from the GIL."""
    limiter = _limiters.setdefault(asyncio.get_running_loop(), CapacityLimiter(2))
    return await to_thread.run_sync(partial(work, *given, **named), limiter=limiter)


def parse_body(data: bytes) -> Any:
    """The JSON value of a body. Raises ApiError 400; what an answer could not repeat as JSON in UTF-8 is none.

    That is NaN and infinities, which Python reads also from 1e999, and halves of surrogate pairs.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    def number(word: str) -> float:
        return value if math.isfinite(value := float(word)) else refuse(word[:20])

    try:
        value = json.loads(data.decode(), parse_constant=refuse, parse_float=number)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = one_line(error, 100, 60, 30)
        raise ApiError(400, f"the body is not JSON ({said}): send one JSON object in UTF-8") from None
    if data.count(b"[") + data.count(b"{") > DEEPEST and _is_deep(value):
        raise ApiError(400, f"the body has more than {DEEPEST} lists and objects within one another: make it flatter")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = list(chain.from_iterable(parts))
    return any(isinstance(part, dict | list) for part in level)


async def unless_gone(request: Request, answer: Coroutine) -> Any:
    """What the coroutine gives. It is cancelled when the client goes away, which raises ClientDisconnect."""
    working, listening = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
