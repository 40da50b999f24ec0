"""The engine: one model, its key/value cache and the one decode loop. Ids go in, tokens come out; text is text.py's.

The cache keeps the last conversation. A request computes only what comes after the longest common prefix of its prompt
and of what the cache holds. A prefix counts only as far as its keys and values were made at no higher sparsity than the
request's: at sparsity 0 all of it was made densely.
"""

import math
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from teal_fast.engine.accounting import recount
from teal_fast.engine.cache import new_cache
from teal_fast.engine.prefill import Prefill, prefill
from teal_fast.engine.request import Request, Token
from teal_fast.engine.steps import Step, fast_step
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.memory import memory_for
from teal_fast.files.paths import command
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import with_own_thresholds

DEFAULT_CONTEXT = 4096  # of an engine's cache, in tokens


class Engine:
    """A model that answers one request at a time, with a cache and thresholds of its own; its weights may be shared.

    calibration: what thresholds are read from; None serves sparsity 0 only. stop: ids that end an answer unless the
    request names others. context: the most tokens of a prompt with its answer; the model's own limit holds besides.
    make_step: makes the decode step over a model and its cache. prefill: the prompt's pass.
    """

    def __init__(
        self,
        model: Transformer,
        calibration: Calibration | None = None,
        stop: Iterable[int] = (),
        context: int = DEFAULT_CONTEXT,
        make_step: Callable[[Transformer, KVCache], Step] = fast_step,
        prefill: Prefill = prefill,
    ):
        self.model, self.calibration = with_own_thresholds(model), calibration
        self.cache = new_cache(self.model, min(context, model.args.max_position))
        self.stop, self.prefill, self.step = frozenset(stop), prefill, make_step(self.model, self.cache)
        self.ids: list[int] = []  # the tokens whose keys and values the cache holds, from position 0 on
        self.made: list[float] = []  # the highest sparsity at which those of a position or an earlier one were made
        self.sparsity = 0.0  # of the thresholds now set
        self._pending: float | None = None  # a sparsity to be set before the next step
        self._decoded = (0, 0)  # where the last answer's decoded tokens begin and end in the cache
        self._lock, self._owner = threading.Lock(), None

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.cache.length

    def stream(self, request: Request) -> Iterator[Token]:
        """Yields the answer's tokens as they are drawn; a stop token is the last one.

        Other threads' streams wait until this one is finished or closed. Raises ValueError at once on a request that
        can't be served: a prompt that is too long or outside the vocabulary, a sparsity without calibration.
        """
        room = self.context - len(request.prompt)
        if (request.max_new_tokens or 1) > room:
            needed = f"{len(request.prompt)} prompt and {request.max_new_tokens or 1} new tokens"
            raise ValueError(f"{needed} do not fit the context of {self.context}: shorten the prompt or the answer")
        self.model.args.check_ids(request.prompt)
        self._check_sparsity(request.sparsity)
        return self._stream(request, request.max_new_tokens or room)

    def set_sparsity(self, sparsity: float) -> None:
        """Changes the running answer from the next step on; a GPU has one step more on its way by then.

        Without a running answer it changes nothing, since each request brings its own.
        """
        self._check_sparsity(sparsity)
        self._pending = sparsity

    def forget(self) -> None:
        """Empties the cache: the next prompt is computed from its start."""
        with self._held():
            self._clear()

    def _clear(self) -> None:
        self.ids, self.made, self._decoded = [], [], (0, 0)

    def achieved_sparsity(self) -> dict[str, float]:
        """What the last finished answer's decoded tokens skip at the sparsity now set, by tensor kind and "all"."""
        with self._held(), self._on_device(), memory_for("another pass over the answer", "shorten it"):
            begin, end = self._decoded
            return recount(self.model, self.cache, begin, self.ids[begin:end])

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
        if self._owner == threading.get_ident():
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

    def _on_device(self) -> AbstractContextManager:
        """In the block, work goes to the model's GPU whatever the thread's current one is; never across a yield."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def dense(self) -> int:
        """How many of the cache's first positions were made densely."""
        return bisect_right(self.made, 0.0)

    def known(self, prompt: Sequence[int], sparsity: float) -> int:
        """How many of the prompt's first tokens a request at that sparsity need not compute: the cache holds them."""
        ids, made = self.ids, self.made
        most = min(len(prompt) - 1, len(ids), bisect_right(made, sparsity))
        return next((i for i in range(most) if prompt[i] != ids[i]), most)

    def _start(self, request: Request) -> Tensor:
        """Logits [vocab] after the prompt, of which the cache's prefix is not computed again."""
        prompt, start = request.prompt, self.known(request.prompt, request.sparsity)
        self.ids, self.made = self.ids[:start], self.made[:start]  # what holds should the pass be interrupted
        logits = self.prefill(self.model, self.cache, torch.tensor([prompt[start:]], device=self._device), start)
        for token in prompt[start:]:
            self._remember(token, 0.0)
        return logits

    @torch.no_grad()
    def _stream(self, request: Request, new_tokens: int) -> Iterator[Token]:
        with self._held():
            self._pending = None
            self._apply(request.sparsity)
            self._decoded = (len(request.prompt), len(request.prompt))
            with memory_for(f"a prompt of {len(request.prompt)} tokens and its answer", "shorten the prompt"):
                yield from self._decode(request, new_tokens)

    def _decode(self, request: Request, new_tokens: int) -> Iterator[Token]:
        """The loop. A GPU is given the next step before its last token is read, so that it never waits for the host."""
        device = self._device
        draw, generator = request.sampling.draw, _generator(device, request.seed)
        stop = self.stop if request.stop is None else request.stop
        ahead = 1 if device.type == "cuda" else 0
        with self._on_device():
            logits = self._start(request)
            token, largest = draw(logits, generator)
            position = torch.tensor([len(request.prompt)], device=device)
            drawn, launched, previous = deque([_Drawn(token, largest, logits, request.logprobs, 0.0)]), 1, None
        for count in range(1, new_tokens + 1):
            while launched < new_tokens and len(drawn) <= ahead:
                pending, self._pending = self._pending, None
                if pending is not None:
                    self._apply(pending)
                with self._on_device():
                    logits = self.step(token.view(1, 1), position)
                    (token, largest), position = draw(logits, generator), position + 1
                    drawn.append(_Drawn(token, largest, logits, request.logprobs, self.sparsity))
                launched += 1
            found = drawn.popleft()
            id, logprob = found.wait()
            if not math.isfinite(found.largest):
                self._clear()  # its keys and values may hold NaN as well
                raise ValueError(
                    f"the logits after {len(request.prompt) + count - 1} tokens hold NaN or inf: the checkpoint is "
                    "damaged, or its values are too large for fp16 (then use bf16 or fp32)"
                )
            if previous is not None:  # the step that gave this token has put that one into the cache
                self._remember(previous, found.sparsity)
                self._decoded = (self._decoded[0], len(self.ids))
            previous = id
            reason = "stop" if id in stop else "length" if count == new_tokens else None
            yield Token(id, logprob, found.sparsity, reason)
            self._owner = threading.get_ident()  # a stream may be taken on by another thread
            if reason:
                return

    def _remember(self, token: int, sparsity: float) -> None:
        """Notes that the cache holds the keys and values of one more token, made at this sparsity on those before."""
        self.made.append(max(sparsity, self.made[-1]) if self.made else sparsity)
        self.ids.append(token)


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class _Drawn:
    """A token on its way to the host: a copy that waits for the steps up to it, not for those enqueued since."""

    def __init__(self, token: Tensor, largest: Tensor, logits: Tensor, logprob: bool, sparsity: float):
        self.sparsity, self.copied = sparsity, None
        self.logprob = logits.float().log_softmax(-1)[token] if logprob else None
        self.token, self.largest = token, largest
        if token.is_cuda:
            self.token, self.largest = _to_host(token), _to_host(largest)
            self.logprob = None if self.logprob is None else _to_host(self.logprob)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(token.device))

    def wait(self) -> tuple[int, float | None]:
        """The token's id and, if asked for, its log-probability."""
        if self.copied is not None:
            self.copied.synchronize()
        return int(self.token), None if self.logprob is None else float(self.logprob)


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
