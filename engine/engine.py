"""The engine: one model, its key/value cache and the one decode loop. Ids go in, tokens come out; text is text.py's.

The cache keeps the last conversation, and a store of prefixes those before it, if there is one. A request computes only
what comes after the longest common prefix of its prompt and of what they hold (held.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor

from teal_fast.engine.accounting import recount
from teal_fast.engine.adjust import Adjustment
from teal_fast.engine.cache import new_cache
from teal_fast.engine.drawn import Drawn
from teal_fast.engine.held import Held
from teal_fast.engine.prefill import Prefill, again, longest_by_steps, prefill, prefill_by_steps
from teal_fast.engine.prefixes import PrefixStore, usable
from teal_fast.engine.request import Request, Token
from teal_fast.engine.sampling import new_generator
from teal_fast.engine.scoring import Scored, parts, score
from teal_fast.engine.speculation.accept import accept
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
    pass, None for whole prompts. prefixes: keeps the conversations before the last one. drafts: models that may draft
    for lossless answers, besides this one.
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
        self.chunk, self.held = chunk, Held(self.cache, usable(prefixes, self.model))
        self.by_steps = longest_by_steps(self.model, self.step)  # tokens of a pass that the step reads, not `prefill`
        self.sparsity = 0.0  # of the thresholds now set
        self.reused = 0  # tokens of the last prompt that were not computed again
        self._pending: float | None = None  # a sparsity to be set before the next step
        self._decoded: list[float] = []  # the sparsity of each decoded token of the last answer in the cache, its last
        self._lock, self._owner = threading.Lock(), None

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
        with self._held(), self._computing(), memory:
            self._apply(sparsity)
            self.held.keep()
            self._clear()
            self.held.private = not cache
            with self._heard(between):
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

    def achieved_sparsity(self) -> dict[str, float]:
        """What the last answer's decoded tokens skipped, each at its own sparsity, by tensor kind and "all"."""
        with self._held(), self._computing(), memory_for("another pass over the answer", "shorten it"):
            found, begin, last = [], len(self.held.ids) - len(self._decoded), self.sparsity
            for sparsity, group in groupby(self._decoded):
                end = begin + len(list(group))
                self._apply(sparsity)
                found.append((end - begin, recount(self.model, self.cache, begin, self.held.ids[begin:end])))
                begin = end
            self._apply(last)
            kinds = found[0][1] if found else ()  # each token meets each layer once: spans count by their tokens
            return {kind: sum(n * by[kind] for n, by in found) / len(self._decoded) for kind in kinds}

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

    @property
    def _device(self) -> torch.device:
        return self.model.norm.weight.device

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """In the block, work goes to the model's GPU, whatever the thread's current one is, and keeps no gradients.

        Never across a yield: the thread's own settings would be lost there. Nor is `torch.no_grad` a decorator of the
        stream: it puts a generator around it, and Ctrl-C in that one leaves the stream itself open.
        """
        device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with device, torch.no_grad():
            yield

    @contextmanager
    def _heard(self, between: Callable[[], None] | None) -> Iterator[None]:
        """In the block, `between` is called before each layer."""
        hooks = [layer.register_forward_pre_hook(lambda *_: between()) for layer in self.model.layers if between]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
                with self._heard(between):
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

    def _decode(self, request: Request, new_tokens: int, between: Callable[[], None] | None) -> Iterator[Token]:
        """The loop. A GPU is given the next step before its last token is read, so that it never waits for the host."""
        device, prompt, sampling = self._device, request.prompt, request.sampling
        generator = new_generator(device, request.seed)
        constraint = request.constraint() if request.constraint else None
        adjust = Adjustment(sampling, prompt, self.model.args.vocab_size, device, constraint)
        stop = self.stop if request.stop is None else request.stop
        ahead = 1 if device.type == "cuda" and constraint is None and not request.lossless else 0

        def drawn_from(logits: Tensor, sparsity: float, achieved: float | None, best: tuple | None = None, draft=None):
            adjusted = adjust(logits)
            if best is not None and adjusted is logits and sampling.greedy:
                (token, told), largest = best, None
            else:
                (token, largest), told = accept(sampling, adjusted, draft, generator), None
            adjust.add(token)
            drawn = Drawn(request, token, largest, logits, sparsity, achieved, told)
            if constraint is not None:
                id, sound, *_ = drawn.wait()
                if sound:
                    constraint.accept(id)
            return drawn

        with self._computing():
            logits = self._start(request, between)
            last = drawn_from(logits, 0.0, None)
            position = torch.tensor([len(prompt)])  # on the host, where it is known
            drawn, launched, previous = deque([last]), 1, None
            cycles = self.lossless.begin(request, last, stop, adjust, generator) if request.lossless else None
        for count in range(1, new_tokens + 1):
            while launched < new_tokens and len(drawn) <= ahead:
                pending, self._pending = self._pending, None
                if pending is not None and cycles is None:
                    self._apply(pending)
                with self._computing():
                    if cycles is not None:
                        new = cycles.run(new_tokens - launched, drawn_from)
                    elif self.model.stretch(self.cache, int(position) + 1) and self.model.args.remakes_keys:
                        unread = [int(one.token) for one in drawn]
                        text = [*self.held.ids, *([] if previous is None else [previous]), *unread]
                        logits = again(self.prefill, self.model, self.cache, text, request.dense_tokens, self.chunk)
                        new = [drawn_from(logits, self.sparsity, None)]
                    else:
                        logits = self.step(last.token.view(1, 1), position)
                        achieved, best = (getattr(self.step, what, None) for what in ("achieved", "best"))
                        new = [drawn_from(logits, self.sparsity, achieved, best)]
                drawn.extend(new)
                last, position, launched = new[-1], position + len(new), launched + len(new)
            found = drawn.popleft()
            id, sound, logprob, top = found.wait()
            if not sound:
                self._clear()  # its keys and values may hold NaN as well
                raise ValueError(
                    f"the logits after {len(prompt) + count - 1} tokens hold NaN or inf: the checkpoint is damaged, or "
                    "its values are too large for fp16 (then use bf16 or fp32)"
                )
            if previous is not None:  # the step that gave this token has put that one into the cache
                self.held.add(previous, 0.0 if request.lossless else max(found.sparsity, self.lossless.stepped))
                self._decoded.append(found.sparsity)
            previous = id
            reason = "stop" if id in stop else "length" if count == new_tokens else None
            yield Token(id, logprob, found.sparsity, reason, found.achieved, top)
            self._owner = threading.get_ident()  # a stream may be taken on by another thread
            if reason:
                return
