"""The application on loopback over answers that are written beforehand: what SDKs make of a dialect's frames."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import uvicorn

from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.app import make_app
from teal_fast.server.asked import Begun, Chat, Event, Settings
from teal_fast.server.service import Limits, Service
from teal_fast.server.worker import Worker


class Answer:
    prompt_tokens = 12

    def __init__(self, id: str, reading: float, said: Sequence[Event | Exception]):
        self.id, self.reading, self.said = id, reading, said
        self.closed = threading.Event()

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            await asyncio.sleep(self.reading)
            yield Begun(5, [])
            for event in self.said:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.close()

    def close(self) -> None:
        self.closed.set()


class Canned(Service):
    """said: what the next answers say. reading: how many seconds a prompt takes. answer: the last one."""

    vocab_size, reading = 100, 0.0

    def __init__(self, tokenizer: Tokenizer | None = None):
        loaded = SimpleNamespace(tokenizer=tokenizer, name="canned", close=lambda: None)
        super().__init__(Worker(lambda: loaded, 1, lambda error: None), Limits())
        self.said: Sequence[Event | Exception] = ()
        self.answer: Answer | None = None

    async def begin_chat(self, chat: Chat, settings: Settings, id: str) -> list[Answer]:
        self.answer = Answer(id, self.reading, self.said)
        return [self.answer]

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The address of the application, in a thread of its own."""
        server = uvicorn.Server(uvicorn.Config(make_app(self), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started or self.worker.loaded is None:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
