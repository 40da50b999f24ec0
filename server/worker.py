"""The engine's thread: it alone uses the engine, serves one job after another, and hears of a cancellation.

A job's tokens go to the event loop as they are drawn. What is made of them, text and JSON, happens there.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request, Token
from teal_fast.engine.scoring import Scored
from teal_fast.files.memory import OutOfMemoryError
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.errors import ApiError

log = logging.getLogger("teal_fast.server")


@dataclass(frozen=True)
class Work:
    """What the engine is to do. score: log-probabilities of the prompt's tokens, of so many of the likeliest ones.

    decode: whether an answer follows.
    """

    request: Request
    score: int | None = None
    decode: bool = True


@dataclass(frozen=True)
class Loaded:
    """What is served. name: the checkpoint's. close: called in the engine's thread when it ends."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    close: Callable[[], None] = lambda: None


class Read(NamedTuple):
    """The prompt is computed."""

    cached_tokens: int
    scored: list[Scored]


class Done(NamedTuple):
    """Nothing more comes. achieved: the mean over the answer, None where each token says it."""

    achieved: float | None


Item = Read | Token | Done


class Cancelled(Exception):
    """The client went away: raised in the engine's thread between two layers of a prompt's pass."""


class Job:
    """One request's way through the engine's thread. Created and read on the event loop."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop):
        self.work, self.loop = work, loop
        self.state = "waiting"  # then running, then ended
        self.cancelled = self.finished = False  # finished: the answer is complete, as by a stop string
        self.sparsity = work.request.sparsity
        self.items: asyncio.Queue[Item | Exception] = asyncio.Queue()

    def put(self, item: Item | Exception) -> None:
        """Called by the engine's thread."""
        self.loop.call_soon_threadsafe(self.items.put_nowait, item)

    async def stream(self) -> AsyncIterator[Item]:
        """Yields Read, tokens, Done. Raises ApiError where the request fails."""
        while True:
            item = await self.items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Done):
                return


class Worker:
    """A bounded queue of jobs and the thread that serves them.

    load: makes the engine, in that thread. stopped: called there when it ends, with the error that ended it.
    """

    def __init__(self, load: Callable[[], Loaded], max_queue: int, stopped: Callable[[BaseException | None], None]):
        self.load, self.max_queue, self.stopped = load, max_queue, stopped
        self.loaded: Loaded | None = None
        self.running: Job | None = None
        self._waiting: deque[Job] = deque()
        self._changed, self._closing = threading.Condition(), False
        self._seconds = 1.0  # of a job, a running mean
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Raises ApiError 503 while the model loads, 429 where the queue is full."""
        with self._changed:
            if self.loaded is None or self._closing:
                raise ApiError(503, "the server is starting or stopping: try again later", retry_after=5)
            if len(self._waiting) >= self.max_queue:
                seconds = max(1, min(60, round(self._seconds * len(self._waiting))))
                said = f"the queue of {self.max_queue} is full: try again in {seconds} s or raise --max_queue"
                raise ApiError(429, said, retry_after=seconds)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job that nobody waits for any more; the engine is free within a token or a prompt's layer."""
        job.cancelled = True
        with self._changed:
            if job.state == "waiting" and job in self._waiting:
                self._waiting.remove(job)
                job.state = "ended"

    def set_sparsity(self, job: Job, sparsity: float) -> bool:
        """Changes a job's sparsity from its next token on; False where it has ended."""
        with self._changed:
            if job.state == "ended":
                return False
            job.sparsity = sparsity
            if job.state == "running":
                self.loaded.engine.set_sparsity(sparsity)
            return True

    def close(self) -> None:
        """Lets the thread end once the queue is empty, and waits for it, unless it is still loading."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.loaded is not None:
            self.thread.join()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self.loaded = self.load()
            while (job := self._next()) is not None:
                began = time.monotonic()
                self._answer(job)
                if not self._waiting:  # else the next request would wait for the copy
                    self.loaded.engine.held.keep()
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
            self.loaded.close()
        except BaseException as error:  # without this thread nobody would be answered: the server is to end
            failure = error
            self._refuse_waiting()
        self.stopped(failure)

    def _refuse_waiting(self) -> None:
        with self._changed:
            self._closing = True
            while self._waiting:
                job = self._waiting.popleft()
                job.state = "ended"
                job.put(ApiError(503, "the server is stopping: try again later", retry_after=5))

    def _answer(self, job: Job) -> None:
        try:
            self._serve(self.loaded.engine, job)
        except Cancelled:
            pass
        except ApiError as error:  # of a constraint
            job.put(error)
        except (ValueError, OutOfMemoryError) as error:
            job.put(ApiError(400 if isinstance(error, ValueError) else 503, str(error)))
        except Exception:
            log.exception("a request failed")
            job.put(ApiError(500, "the server failed on this request: its log says how"))
        finally:
            with self._changed:
                job.state, self.running = "ended", None

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            self.running = self._waiting.popleft()
            self.running.state = "running"
            return self.running

    def _serve(self, engine: Engine, job: Job) -> None:
        work, request = job.work, job.work.request
        scored: list[Scored] = []

        def between() -> None:
            if job.cancelled:
                raise Cancelled

        between()
        if work.score is not None:
            dense = 1 if request.sparse_prompt else len(request.prompt)
            scored = engine.score(request.prompt, request.sparsity, dense, work.score, between, request.cache)
        if not work.decode:
            job.put(Read(0, scored))
            job.put(Done(None))
            return
        stream, begun, achieved = engine.stream(request, between), False, None
        try:
            for token in stream:
                if not begun:
                    begun = True
                    job.put(Read(0 if scored else engine.reused, scored))
                    with self._changed:  # changed while the prompt was read or before
                        if job.sparsity != request.sparsity:
                            engine.set_sparsity(job.sparsity)
                job.put(token)
                if job.cancelled or job.finished:
                    break
        finally:
            stream.close()
        if not job.cancelled and getattr(engine.step, "achieved", None) is None:
            try:
                achieved = engine.achieved_sparsity().get("all", 0.0)
            except OutOfMemoryError as error:  # the answer is whole without it
                log.warning("what an answer skipped was not counted: %s", error)
        job.put(Done(achieved))
