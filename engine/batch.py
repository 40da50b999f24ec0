"""Several requests answered together: a step computes the next token of each, and reads the weights once for all.

Position, keys and values, sampling, seed, stop ids and limit are each sequence's own; the sparsity is one. A sequence
that is finished leaves its place to the last one, and costs nothing more.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from teal_fast.engine.cache import new_cache
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.cuda_step import capture
from teal_fast.engine.drawn import Drawing, unsound
from teal_fast.engine.ranks.layers import ranks_of
from teal_fast.engine.request import Request, Token
from teal_fast.model import Call, KVCache, Transformer
from teal_fast.sparse_model import DECODE
from teal_fast.weights.blocks import in_blocks

BatchLogits = Callable[[Tensor, Tensor], Tensor]  # tokens [n], positions [n] -> logits [n, vocab]


class BatchCache(KVCache):
    """Keys and values of several sequences, each with positions of its own; the first n of them take part in a step."""

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [n, kv_heads, 1, head_dim] of the positions [n]; all keys and values of those sequences."""
        rows = torch.arange(len(positions), device=positions.device)
        self.k[layer][rows, :, positions], self.v[layer][rows, :, positions] = k[:, :, 0], v[:, :, 0]
        return self.k[layer][: len(rows)], self.v[layer][: len(rows)]

    def sequence(self, row: int) -> KVCache:
        """One sequence's, as a view."""
        k, v = ([tensor[row : row + 1] for tensor in tensors] for tensors in (self.k, self.v))
        return KVCache(k, v, self.frequencies)

    def fill(self, row: int, cache: KVCache, length: int) -> None:
        """Copies the first positions of another cache's one sequence into a row."""
        for mine, theirs in zip((*self.k, *self.v), (*cache.k, *cache.v), strict=True):
            mine[row, :, :length] = theirs[0, :, :length]

    def swap(self, row: int, other: int) -> None:
        for tensor in (*self.k, *self.v):
            tensor[[row, other]] = tensor[[other, row]]


def batch_logits(model: Transformer, cache: BatchCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [n, vocab] after tokens [n] at positions [n], the next ones of n sequences, by the model itself."""

    def of_each(shared: Tensor | None) -> Tensor | None:
        return None if shared is None else shared[:, None, None]  # not of each token of a sequence

    x, windows = model.embed(tokens[:, None]), model.args.sliding_windows
    calls: list[Call] = [
        replace(call, cos=of_each(call.cos), sin=of_each(call.sin), growth=of_each(call.growth))
        for call in model.calls(positions, x.dtype, cache, True, DECODE)
    ]
    masks = {window: of_each(model.mask(positions, cache.length, window)) for window in set(windows)}
    for number, (layer, window) in enumerate(zip(model.layers, windows, strict=True)):
        x = layer(x, calls[number], masks[window], number)
    return model.logits(model.norm(x))[:, 0]


class CapturedBatch:
    """`batch_logits` as CUDA graphs, one for each number of sequences, recorded when that many are left."""

    def __init__(self, model: Transformer, cache: BatchCache):
        self.model, self.cache = model, cache
        self.tokens, self.positions = cache.k[0].new_zeros(2, len(cache.k[0]), dtype=torch.int64)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        now = [given[: len(tokens)] for given in (self.tokens, self.positions)]
        now[0].copy_(tokens), now[1].copy_(positions)
        if len(tokens) not in self.graphs:  # the run before it writes what this step does
            self.graphs[len(tokens)] = capture(partial(batch_logits, self.model, self.cache, *now), tokens.device)
        graph, logits = self.graphs[len(tokens)]
        graph.replay()
        return logits


def batch_step(model: Transformer, cache: BatchCache, mode: str) -> tuple[BatchLogits, CpuStep | None]:
    """The step of several sequences that belongs to a step of one (steps.py), and that of C++ if it is."""
    if mode == CpuStep.mode:
        step = CpuStep(model, cache)
        return step.batch, step
    if mode == "plain" or in_blocks(model) or ranks_of(model) is not None:
        return lambda tokens, positions: batch_logits(model, cache, tokens, positions), None
    return CapturedBatch(model, cache), None


@dataclass
class Answer:
    """One sequence: what draws its tokens, and those so far; keys and values lack the last one's."""

    number: int
    request: Request
    limit: int
    stop: frozenset[int]
    draw: Drawing
    tokens: list[Token] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the last token's keys and values go."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values are cached."""
        return [*self.request.prompt, *(token.id for token in self.tokens[:-1])]


class Batch:
    """Answers to several requests; an iterator over (number of the request, token), in the order they are drawn in.

    tokens: those so far, a list for each request. `run` computes, as the engine does.
    """

    def __init__(
        self,
        requests: tuple[Request, ...],
        model: Transformer,
        context: int,
        stop: frozenset[int],
        run: Callable[["Batch"], Iterator[tuple[int, Token]]],
    ):
        self.requests = requests
        limits = [request.max_new_tokens or context - len(request.prompt) for request in requests]
        ends = (len(request.prompt) + limit for request, limit in zip(requests, limits, strict=True))
        self.model, self.length = model, max(ends, default=0)
        if refused := unbatched(model, requests, self.length):
            raise ValueError(refused)
        self.answers = []
        for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            own_stop = stop if request.stop is None else request.stop
            draw = Drawing(request, model)
            self.answers.append(Answer(number, request, limit, own_stop, draw))
        self.rows: list[Answer] = []  # of the cache; the first `running` are not finished
        self.running = 0
        self._tokens = run(self)

    def __iter__(self) -> "Batch":
        return self

    def __next__(self) -> tuple[int, Token]:
        return next(self._tokens)

    def close(self) -> None:
        """Ends all answers."""
        self._tokens.close()

    @property
    def tokens(self) -> list[list[Token]]:
        return [answer.tokens for answer in self.answers]

    def open(self, mode: str) -> Iterator[tuple[Request, list[Answer]]]:
        """Makes cache and step; the prompts to be computed, each with the answers that begin with it."""
        cache = new_cache(self.model, self.length, len(self.requests))
        self.cache = BatchCache(cache.k, cache.v, cache.frequencies)
        self.step, self.native = batch_step(self.model, self.cache, mode)
        prompts: dict[tuple, list[Answer]] = {}
        for answer in self.answers:
            request = answer.request
            prompts.setdefault((request.prompt, request.sparse_prompt, request.cache), []).append(answer)
        return ((answers[0].request, answers) for answers in prompts.values())

    def enter(self, answers: Sequence[Answer], cache: KVCache, logits: Tensor) -> list[tuple[int, Token]]:
        """First tokens of answers whose prompt `cache` holds, from the logits [vocab] after it."""
        for answer in answers:
            self.rows.append(answer)
            self._swap(len(self.rows) - 1, self.running)
            self.cache.fill(self.running, cache, len(answer.request.prompt))
            self.running += 1
        return self._draw(answers, [logits] * len(answers), 0.0, None)

    def advance(self, sparsity: float) -> list[tuple[int, Token]]:
        """The next token of each answer that is not finished. sparsity: of the thresholds now set."""
        answers, device = self.rows[: self.running], self.model.norm.weight.device
        tokens = torch.tensor([answer.tokens[-1].id for answer in answers], device=device)
        positions = torch.tensor([answer.position for answer in answers], device=device)
        logits = self.step(tokens, positions)
        return self._draw(answers, logits, sparsity, None if self.native is None else self.native.achieved)

    def finish(self, number: int) -> None:
        """Ends a request's answer early, as at a stop string."""
        row = next((row for row in range(self.running) if self.rows[row] is self.answers[number]), None)
        if row is not None:
            self.running -= 1
            self._swap(row, self.running)

    def _swap(self, row: int, other: int) -> None:
        if row != other:
            self.cache.swap(row, other)
            self.rows[row], self.rows[other] = self.rows[other], self.rows[row]

    def _draw(
        self, answers: Sequence[Answer], logits: Iterable[Tensor], sparsity: float, achieved: float | None
    ) -> list[tuple[int, Token]]:
        drawn = [answer.draw(row, sparsity, achieved) for answer, row in zip(answers, logits, strict=True)]
        found = []
        for answer, one in zip(answers, drawn, strict=True):
            id, sound, logprob, top = one.wait()
            if not sound:
                raise unsound(answer.position + 1)
            length = "length" if len(answer.tokens) + 1 == answer.limit else None
            reason = "stop" if id in answer.stop else length
            answer.tokens.append(Token(id, logprob, sparsity, reason, achieved, top))
            found.append((answer.number, answer.tokens[-1]))
            if reason:
                self.finish(answer.number)
        return found

    def decoded(self) -> list[tuple[KVCache, list[int], list[float]]]:
        """Of each answer the cache, the ids that it holds, and the sparsity of the decoded ones, which are its last."""
        return [
            (self.cache.sequence(row), answer.held, [token.sparsity for token in answer.tokens[1:]])
            for row, answer in enumerate(self.rows)
        ]


def unbatched(model: Transformer, requests: Sequence[Request], length: int) -> str:
    """Why requests, the longest of which ends at `length` tokens, can't be answered together; "" where they can."""
    border, sparsities = model.args.longest_plain, sorted({request.sparsity for request in requests})
    if not requests:
        return "a batch of no requests: give at least one"
    if any(request.lossless for request in requests):
        return "a lossless request cannot be batched: leave lossless out, or stream it by itself"
    if len(sparsities) > 1:
        said = ", ".join(map(str, sparsities))
        return f"requests of a batch have one sparsity, got {said}: make a batch of those of each"
    if border is not None and length > border:
        said = f"this model turns texts of more than {border} tokens by their own lengths, got one of {length}"
        return f"{said}: lower max_new_tokens, or stream the requests one by one"
    return ""
