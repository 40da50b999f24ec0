"""What all dialects call: a chat or a text in, an answer's events out."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request, Token
from teal_fast.engine.scoring import Scored
from teal_fast.engine.text import TextStream
from teal_fast.files.store import short
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.asked import Begun, Chat, End, Event, Live, Reasoning, Settings, Text, Usage
from teal_fast.server.body import in_thread
from teal_fast.server.errors import ApiError
from teal_fast.server.metrics import Metrics
from teal_fast.server.tools import Grammars, Plan, plan
from teal_fast.server.worker import Done, Job, Loaded, Read, Work, Worker

REMEMBERED = 1000  # ids of ended requests, which a late PATCH is told of


@dataclass(frozen=True)
class Limits:
    """names: of the model, "*" for any. timeout: seconds that a request may take, waiting included."""

    names: tuple[str, ...] = ("*",)
    sparsity: float = 0.0
    timeout: float = 600.0
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()


class Service:
    """The model behind the API, which is there once the worker has loaded it."""

    def __init__(self, worker: Worker, limits: Limits):
        self.worker, self.limits = worker, limits
        self.metrics = Metrics(self)
        self.grammars: Grammars | None = None
        self._jobs: dict[str, list[Job]] = {}  # of the requests under way
        self._ended: OrderedDict[str, None] = OrderedDict()

    @property
    def loaded(self) -> Loaded:
        """Raises ApiError 503 while the model loads."""
        if self.worker.loaded is None:
            raise ApiError(503, "the model is loading: try again in a moment", code="loading", retry_after=2)
        return self.worker.loaded

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.engine.model.args.vocab_size

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for one that is not served."""
        names = self.limits.names
        if "*" in names:
            return name or self.loaded.name
        if name is not None and name not in names:
            said = f"model {name[:100]!r} is not served here: ask for {' or '.join(names)}"
            raise ApiError(404, said, "model", "model_not_found")
        return name or names[0]

    async def begin_chat(self, chat: Chat, settings: Settings, id: str) -> "list[Answer]":
        """Queues a chat's n answers. Raises ApiError: 400 for what can't be served, 429 where too many wait."""
        return self._begin([await self.plan(chat)], settings, id)

    async def plan(self, chat: Chat) -> Plan:
        """A chat's prompt, and how its answer is made and read. Templates and long texts take time: in a thread."""
        self.check_length(sum(len(message["content"]) for message in chat.messages))
        if self.grammars is None:
            self.grammars = Grammars(self.tokenizer, self.vocab_size)
        made = await in_thread(plan, chat, self.tokenizer, self.grammars)
        if chat.begun:
            made.ids.extend(self.tokenizer.encode(chat.begun, add_bos=False, control=False, start=False))
        return made

    def begin_texts(
        self, prompts: Iterable[list[int]], settings: Settings, id: str, score: int | None = None, decode: bool = True
    ) -> "list[Answer]":
        """Queues the n continuations of each text. score: log-probabilities of the prompt, see `Work`."""
        return self._begin(map(Plan, prompts), settings, id, score, decode)

    @cached_property
    def _most_characters(self) -> int:
        return self.engine.context * max(map(len, self.tokenizer.pieces.values()))

    def check_length(self, characters: int) -> None:
        """Raises ApiError 400 for a text that is too long by whatever tokens: 30 MB would take 10 s and 3 GB first."""
        if characters > self._most_characters:
            said = f"prompt is too long: {characters} characters, more than {self.engine.context} tokens can hold"
            raise ApiError(400, f"{said}: shorten it", code="context_length_exceeded")

    def _begin(
        self, plans: Iterable[Plan], settings: Settings, id: str, score: int | None = None, decode: bool = True
    ) -> "list[Answer]":
        answers: list[Answer] = []
        try:
            for made in plans:
                for index in range(settings.n):
                    answers.append(self._begin_one(made, numbered(settings, index), id, score, decode))
        except BaseException:
            close_all(answers)
            raise
        return answers

    def _begin_one(self, made: Plan, settings: Settings, id: str, score: int | None, decode: bool) -> "Answer":
        engine = self.engine
        room = engine.context - len(made.ids)
        if room < decode:  # an answer needs one token
            most = engine.context - decode
            # Anthropic's words, which Claude Code knows (as in its issue 16644).
            said = f"prompt is too long: {len(made.ids)} tokens > {most} maximum: shorten it"
            raise ApiError(400, said, code="context_length_exceeded")
        try:
            request = Request(
                made.ids,
                settings.sampling,
                settings.sparsity,
                min(settings.max_new_tokens or room, room) if decode else 1,
                () if settings.ignore_eos else None,
                settings.seed,
                settings.top_logprobs is not None,
                settings.top_logprobs or 0,
                settings.prefill == "full",
                settings.cache,
                made.constraint,
                settings.lossless,
                settings.draft,
                settings.draft_sparsity,
                settings.draft_tokens,
            )
            if decode:
                engine.check(request)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        answer = Answer(self, made, settings, Work(request, score, decode), id)
        self._jobs.setdefault(id, []).append(answer.job)
        try:
            self.worker.submit(answer.job)
        except ApiError:
            answer.close()
            raise
        return answer

    def check_count(self, answers: int) -> None:
        """Raises ApiError 400 where one request asks for more answers than may ever wait: to try again won't help."""
        if answers > (most := self.worker.max_queue):
            raise ApiError(400, f"{answers} answers are asked for, and {most} may wait: ask for fewer", "n")

    def check_sparsity(self, sparsity: float) -> None:
        """Raises ApiError where the model has no thresholds for it."""
        if sparsity and self.engine.calibration is None:
            raise ApiError(400, "this model has no calibration: only sparsity 0 is served", "sparsity")

    def set_sparsity(self, id: str, sparsity: float) -> None:
        """Changes the answers of a request from their next token on. Raises ApiError 404 or 409."""
        jobs = self._jobs.get(id, [])
        if any(job.work.request.lossless for job in jobs):
            raise ApiError(409, f"request {short(id)} is lossless: its text has no sparsity to change", "sparsity")
        if any([self.worker.set_sparsity(job, sparsity) for job in jobs]):
            return
        if jobs or id in self._ended:
            raise ApiError(409, f"request {short(id)} has ended", code="ended")
        raise ApiError(404, f"request {short(id)} is not known", code="not_found")

    def ended(self, id: str, job: Job) -> None:
        """Forgets an answer's job; of so many requests it is known for a while that they were."""
        jobs = self._jobs[id]
        jobs.remove(job)
        if not jobs:
            del self._jobs[id]
            self._ended[id] = None
            if len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)


class Answer:
    """One answer: iterate over its events, and close it whatever happens."""

    def __init__(self, service: Service, made: Plan, settings: Settings, work: Work, id: str):
        self.service, self.settings, self.id, self.prompt_tokens = service, settings, id, len(made.ids)
        loop = asyncio.get_running_loop()
        self.job = Job(work, loop)
        self.text = TextStream(service.tokenizer, made.ids, settings.stop, made.visible)
        self.splitter = made.splitter() if made.splitter else None
        self.began = time.monotonic()
        self._expiry = loop.call_later(service.limits.timeout, self._expire)
        self._pending: list[Scored] = []  # tokens whose log-probabilities go with the next piece of text
        self._reasoning = 0
        self._closed = False

    def _expire(self) -> None:
        self.service.worker.cancel(self.job)
        said = f"the request took over {self.service.limits.timeout:g} s: ask for less, or raise --request_timeout"
        self.job.items.put_nowait(ApiError(503, said, code="timeout", retry_after=10))

    def close(self) -> None:
        """Frees the engine if the answer has not ended."""
        if not self._closed:
            self._closed = True
            self._expiry.cancel()
            self.service.worker.cancel(self.job)
            self.service.ended(self.id, self.job)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yields Begun, pieces as they become certain, End."""
        metrics, tokens, skipped, before = self.service.metrics, 0, [], self.began
        cached, reason, achieved = 0, "length", None
        try:
            async for item in self.job.stream():
                if isinstance(item, Read):
                    cached = item.cached_tokens
                    yield Begun(cached, item.scored)
                elif isinstance(item, Token):
                    if self.text.stopped:  # drawn before the engine heard of it
                        continue
                    now = time.monotonic()
                    metrics.token(now - before, first=not tokens)
                    before, tokens = now, tokens + 1
                    if tokens > 1 and item.achieved is not None:
                        skipped.append(item.achieved)
                    for event in self._events(item):
                        yield event
                    reason = item.finish_reason or reason
                    yield Live(item.sparsity, item.achieved)
                    if self.text.stopped:
                        self.job.finished, reason = True, "stop"
                elif isinstance(item, Done):
                    achieved = item.achieved
            for event in self._split(self.text.flush()) + (self.splitter.flush() if self.splitter else []):
                yield self._with_tokens(event)
            if self._pending and self.splitter is None:  # scores of tokens without text, as the one that ends it
                yield self._with_tokens(Text(""))
            if achieved is None:
                achieved = sum(skipped) / len(skipped) if skipped else 0.0
            if self.splitter is not None and self.splitter.called and reason == "stop":
                reason = "tool_calls"
            usage = Usage(self.prompt_tokens, tokens, cached, self._reasoning, achieved)
            metrics.answer(usage, reason, time.monotonic() - self.began)
            yield End(reason, self.text.stopped_at, usage)
        finally:
            self.close()

    def _events(self, token: Token) -> list[Event]:
        """What becomes certain with one token."""
        if self.settings.top_logprobs is not None:
            self._pending.append(Scored(token.id, token.logprob, token.top))
        events = self._split(self.text.push(token))
        self._reasoning += any(isinstance(event, Reasoning) for event in events)
        if events and not any(isinstance(event, Text) for event in events):
            self._pending.clear()
        return [self._with_tokens(event) for event in events]

    def _split(self, text: str) -> list[Event]:
        if not text:
            return []
        return [Text(text)] if self.splitter is None else self.splitter.push(text)

    def _with_tokens(self, event: Event) -> Event:
        if not (self._pending and isinstance(event, Text)):
            return event
        tokens, self._pending = tuple(self._pending), []
        return event._replace(tokens=tokens)


def close_all(answers: "Iterable[Answer]") -> None:
    for answer in answers:
        answer.close()


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def numbered(settings: Settings, index: int) -> Settings:
    """The settings of the answer with this number: its seed counts on."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + index)
