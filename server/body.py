"""A request's body as JSON, within bounds, and an answer that is made only as long as somebody waits for it."""

import asyncio
import json
import re
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request

from teal_fast.files.store import one_line
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields

ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MOST_BYTES = 32 * 2**20  # of a body: a context of a million tokens is 4 MB


async def read_body(request: Request) -> Fields:
    """The body's fields. Raises ApiError 413 where it is too large, 400 where it is no JSON object."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES} bytes: send a shorter one")
    return Fields(parse_body(bytes(data)))


def parse_body(data: bytes) -> Any:
    """The JSON value of a body. Raises ApiError 400; NaN, infinities and halves of characters are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    try:
        value = json.loads(data.decode(), parse_constant=refuse)
        if ESCAPED_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # refuses half of a pair, which no answer could hold
        return value
    except (ValueError, RecursionError) as error:
        said = one_line(error, 100, 60, 30)
        raise ApiError(400, f"the body is not JSON ({said}): send one JSON object in UTF-8") from None


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
