"""The engine: one model, its key/value cache and the one decode loop. Ids go in, tokens come out; text is text.py's.

The cache keeps the last conversation. A request computes what neither it nor a store of prefixes holds (held.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from teal_fast.engine.accounting import recount
from teal_fast.engine.batch import Batch
from teal_fast.engine.cache import new_cache
from teal_fast.engine.device import computing
from teal_fast.engine.drawn import Drawing, unsound
from teal_fast.engine.held import Held
from teal_fast.engine.prefill import Prefill, again, heard, longest_by_steps, longest_piece, prefill, prefill_by_steps
from teal_fast.engine.prefixes import PrefixStore, usable
from teal_fast.engine.request import Request, Token
from teal_fast.engine.scoring import Scored, parts, score
from teal_fast.engine.speculation.drafters import DraftModel
from teal_fast.engine.speculation.lossless import Lossless
from teal_fast.engine.steps import Step, fast_step
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.memory import memory_for
from teal_fast.files.paths import command
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DENSE, Phase, with_own_thresholds

DEFAULT_CONTEXT = 4096  # of an engine's cache, in tokens


class Engine:
    """A model that answers one request at a time, with a cache and thresholds of its own; its weights may be shared.

    calibration: what thresholds are read from; None serves sparsity 0 only. stop: ids that end an answer unless the
    request names others. context: the most tokens of a prompt with its answer; the model's own limit holds besides.
    make_step: makes the decode step over a model and its cache. prefill: the prompt's pass. chunk: the most tokens of a
    pass, None for `longest_piece`'s. prefixes: keeps the conversations before the last one. drafts: models that may
    draft for lossless answers, besides this one.
    """

    def __init__(
        self,
        model: Transformer,
        calibration: Calibration | None = None,
        stop: Iterable[int] = (),
        context: int = DEFAULT_CONTEXT,
        make_step: Callable[[Transformer, KVCache], Step] = fast_step,
        prefill: Prefill = prefill,
        chunk: int | None = None,
        prefixes: PrefixStore | None = None,
        drafts: Iterable[DraftModel] = (),
    ):
        self.model, self.calibration = with_own_thresholds(model), calibration
        self.cache = new_cache(self.model, min(context, model.args.max_position))
        self.stop, self.prefill, self.step = frozenset(stop), prefill, make_step(self.model, self.cache)
        self.lossless = Lossless(self.model, calibration, self.cache, self.step, make_step, drafts)
        self.chunk, self.held = longest_piece(self.model, chunk), Held(self.cache, usable(prefixes, self.model))
        self.by_steps = longest_by_steps(self.model, self.step)  # tokens of a pass that the step reads, not `prefill`
        self.sparsity = 0.0  # of the thresholds now set
        self.reused = 0  # tokens of the last prompt that were not computed again
        self._pending: float | None = None  # a sparsity to be set before the next step
        self._decoded: list[float] = []  # the sparsity of each decoded token of the last answer in the cache, its last
        self._lock, self._owner, self._device = threading.Lock(), None, self.model.norm.weight.device

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.cache.length

    def stream(self, request: Request, between: Callable[[], None] | None = None) -> Iterator[Token]:
        """Yields the answer's tokens as they are drawn; a stop token is the last one.

        Other threads' streams wait until this one is finished or closed. Raises ValueError at once on a request that
        can't be served: a prompt that is too long or outside the vocabulary, a sparsity without calibration.
        between: called before each layer of the prompt's pass, or before every few tokens where the step reads it; what
        it raises ends the stream, and the chunks that were computed by then are kept.
        """
        self.check(request)
        return self._stream(request, request.max_new_tokens or self.context - len(request.prompt), between)

    def generate(self, requests: Iterable[Request]) -> list[list[Token]]:
        """The answers to several requests, decoded together, in the requests' order; see `batch`."""
        batch = self.batch(requests)
        deque(batch, maxlen=0)
        return batch.tokens

    def batch(self, requests: Iterable[Request]) -> Batch:
        """Answers to several requests at once: yields (number of the request, token) as tokens are drawn.

        They have one sparsity, and none is lossless. Prompts are computed one after another, equal ones once, with what
        the cache holds of them; answers do not stay in it. Raises ValueError at once on what can't be served.
        """
        requests = tuple(requests)
        for request in requests:
            self.check(request)
        return Batch(requests, self.model, self.context, self.stop, self._batch)

    def check(self, request: Request) -> None:
        """Raises ValueError on a request that can't be served."""
        if (request.max_new_tokens or 1) > self.context - len(request.prompt):
            needed = f"{len(request.prompt)} prompt and {request.max_new_tokens or 1} new tokens"
            raise ValueError(f"{needed} do not fit the context of {self.context}: shorten the prompt or the answer")
        self.model.args.check_ids(request.prompt)
        self._check_sparsity(request.sparsity)
        if request.lossless:
            self.lossless.check(request)

    def score(
        self,
        text: Sequence[int],
        sparsity: float,
        dense_tokens: int,
        top: int = 0,
        between: Callable[[], None] | None = None,
        cache: bool = True,
    ) -> list[Scored]:
        """Log-probabilities of all tokens of a text but its first. Nothing is taken from the cache, which is filled.

        dense_tokens: how many of its first tokens are dense, the others being sparse; top: of how many of the likeliest
        tokens in each place. between: as `stream` has it. cache: whether the text may stay in the cache for others.
        Raises ValueError on what can't be served.
        """
        if len(text) > self.context:
            raise ValueError(f"{len(text)} tokens do not fit the context of {self.context}: shorten the text")
        self.model.args.check_ids(text)
        self._check_sparsity(sparsity)

        def done(end: int) -> None:
            for i in range(len(self.held.ids), end):
                self.held.add(text[i], 0.0 if i < dense_tokens else sparsity)

        memory = memory_for(f"a text of {len(text)} tokens", "shorten it")
        with self._held(), computing(self._device), memory:
            self._apply(sparsity)
            self.held.keep()
            self._clear()
            self.held.private = not cache
            with heard(self.model, between):
                return score(self.model, self.cache, text, dense_tokens, top, self.chunk, done)

    def set_sparsity(self, sparsity: float) -> None:
        """Changes the running answer from the next step on; a GPU has one step more on its way by then.

        Without a running answer it changes nothing, since each request brings its own; nor does it a lossless one.
        """
        self._check_sparsity(sparsity)
        self._pending = sparsity

    def forget(self) -> None:
        """Empties the cache: the next prompt is computed from its start."""
        with self._held():
            self._clear()

    def _clear(self) -> None:
        self.held.clear()
        self._decoded = []

    def achieved_sparsity(self, batch: Batch | None = None) -> dict[str, float]:
        """What the last answer's decoded tokens skipped, each at its own sparsity, by tensor kind and "all".

        batch: whose answers' tokens instead; what each of them dropped is more than what was read for none of them.
        """
        answers = [(self.cache, self.held.ids, self._decoded)] if batch is None else batch.decoded()
        with self._held(), computing(self._device), memory_for("another pass over the answer", "shorten it"):
            found, last = [], self.sparsity
            for cache, ids, decoded in answers:
                end = len(ids) - len(decoded)
                for sparsity, group in groupby(decoded):
                    begin, end = end, end + len(list(group))
                    self._apply(sparsity)
                    found.append((end - begin, recount(self.model, cache, begin, ids[begin:end])))
            self._apply(last)
            kinds = found[0][1] if found else ()  # each token meets each layer once: spans count by their tokens
            return {kind: sum(n * by[kind] for n, by in found) / sum(n for n, _ in found) for kind in kinds}

    def _check_sparsity(self, sparsity: float) -> None:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity {sparsity}: expected a fraction from 0 (dense) to 1")
        if sparsity and self.calibration is None:
            raise ValueError(
                f"sparsity {sparsity} needs a calibration, and the engine has none: run `{command('calibrate')}` first"
            )

    def _apply(self, sparsity: float) -> None:
        set_sparsity(self.model, self.calibration, sparsity)
        self.sparsity = sparsity

    @contextmanager
    def _held(self) -> Iterator[None]:
        """In the block, model and cache are this thread's. Raises where the thread has them already: it would wait."""
        if self._lock.locked() and self._owner == threading.get_ident():
            raise ValueError("the engine is in the middle of another answer: finish or close that stream first")
        with self._lock:
            try:
                self._owner = threading.get_ident()
                yield
            finally:
                self._owner = None

    def _start(self, request: Request, between: Callable[[], None] | None) -> Tensor:
        """Logits [vocab] after the prompt, of which the cache's prefix is not computed again."""
        prompt, dense = request.prompt, request.dense_tokens
        if self.model.stretch(self.cache, len(prompt)):
            self._clear()
        self.reused = self.held.reuse(request)
        for begin, end in parts(self.reused, len(prompt), self.chunk):
            if not request.sparse_prompt and end - begin <= self.by_steps:
                logits = prefill_by_steps(self.step, prompt[begin:end], begin, between)
            else:
                tokens = torch.tensor([prompt[begin:end]], device=self._device)
                phase = Phase(max(0, dense - begin)) if request.sparse_prompt else DENSE
                with heard(self.model, between):
                    logits = self.prefill(self.model, self.cache, tokens, begin, phase)
            for i in range(begin, end):
                self.held.add(prompt[i], 0.0 if i < dense else request.sparsity)
        return logits

    def _stream(self, request: Request, new_tokens: int, between: Callable[[], None] | None) -> Iterator[Token]:
        with self._held():
            self._pending, self._decoded = None, []
            self._apply(request.sparsity)
            with memory_for(f"a prompt of {len(request.prompt)} tokens and its answer", "shorten the prompt"):
                yield from self._decode(request, new_tokens, between)

    def _batch(self, batch: Batch) -> Iterator[tuple[int, Token]]:
        with self._held(), memory_for(f"{len(batch.requests)} answers", "answer fewer at once, or shorten them"):
            self._pending, self._decoded = None, []
            self._apply(batch.requests[0].sparsity)
            with computing(self._device):
                prompts = batch.open(self.step.mode)
            for request, answers in prompts:
                with computing(self._device):
                    found = batch.enter(answers, self.cache, self._start(request, None))
                yield from found
                self._owner = threading.get_ident()  # as in `_decode`
            while batch.running:
                self._turn_dial()
                with computing(self._device):
                    found = batch.advance(self.sparsity)
                yield from found
                self._owner = threading.get_ident()

    def _turn_dial(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._apply(pending)

    def _decode(self, request: Request, new_tokens: int, between: Callable[[], None] | None) -> Iterator[Token]:
        """The loop. A GPU is given the next step before its last token is read, so that it never waits for the host."""
        device, prompt = self._device, request.prompt
        draw = Drawing(request, self.model, None if request.lossless else self.step)
        stop = self.stop if request.stop is None else request.stop
        ahead = 1 if device.type == "cuda" and draw.constraint is None and not request.lossless else 0

        with computing(self._device):
            logits = self._start(request, between)
            last = draw(logits, 0.0, None)
            position = torch.tensor([len(prompt)])  # on the host, where it is known
            drawn, launched, previous = deque([last]), 1, None
            cycles = self.lossless.begin(request, last, stop, draw) if request.lossless else None
        for count in range(1, new_tokens + 1):
            while launched < new_tokens and len(drawn) <= ahead:
                if cycles is None:
                    self._turn_dial()
                with computing(self._device):
                    if cycles is not None:
                        new = cycles.run(new_tokens - launched)
                    elif self.model.stretch(self.cache, int(position) + 1) and self.model.args.remakes_keys:
                        unread = [int(one.token) for one in drawn]
                        text = [*self.held.ids, *([] if previous is None else [previous]), *unread]
                        logits = again(self.prefill, self.model, self.cache, text, request.dense_tokens, self.chunk)
                        new = [draw(logits, self.sparsity, None)]
                    else:
                        logits = self.step(last.token.view(1, 1), position)
                        achieved, best = (getattr(self.step, what, None) for what in ("achieved", "best"))
                        new = [draw(logits, self.sparsity, achieved, best)]
                drawn.extend(new)
                last, position, launched = new[-1], position + len(new), launched + len(new)
            found = drawn.popleft()
            id, sound, logprob, top = found.wait()
            if not sound:
                self._clear()  # its keys and values may hold NaN as well
                raise unsound(len(prompt) + count - 1, getattr(self.step, "lost", False))
            if previous is not None:  # the step that gave this token has put that one into the cache
                self.held.add(previous, 0.0 if request.lossless else max(found.sparsity, self.lossless.stepped))
                self._decoded.append(found.sparsity)
            previous = id
            reason = "stop" if id in stop else "length" if count == new_tokens else None
            yield Token(id, logprob, found.sparsity, reason, found.achieved, top)
            self._owner = threading.get_ident()  # a stream may be taken on by another thread
            if reason:
                return
