"""The decode loop, and its step: plain, or fast: C++ on the CPU (cpu_step.py), one CUDA graph of fused sparse kernels.

The captured step serves every prompt length, position and sparsity: position and thresholds are tensors that change in
place between replays. A layer is eight launches: norm and compaction, q/k/v, attention, its merge, o, norm and
compaction, gate/up, down. The residual stream stays in fp32.
"""

import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.engine.accounting import tally_kept
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.sampling import Sampling
from teal_fast.kernels.decode_attention import GROUP, decode_attention
from teal_fast.kernels.merge_attention import merge_attention
from teal_fast.kernels.native import library
from teal_fast.kernels.norm_compact import norm_compact
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, leading_dense, sparse_layers

FEWEST_ROWS = 12  # MKL's products of 5 to 11 rows depend on the number of threads, so shorter prompts are padded
Step = Callable[[Transformer, Tensor, Tensor], Tensor]
Prefill = Callable[[Transformer, Tensor], Tensor]
PromptLogits = Callable[[Transformer, Tensor, Tensor], Tensor]


def decode_step(model: Transformer, token: Tensor, input_pos: Tensor) -> Tensor:
    """One sparse step: logits [vocab] after token [1, 1] at input_pos [1]."""
    return model(token, input_pos)[0, -1]


def can_fuse(model: Transformer) -> bool:
    """Whether `fused_step` computes this model: no biases but those of q/k/v, no q/k norms, a head size it can take."""
    args = model.args
    biased = any(layer.bias is not None for name, layer in sparse_layers(model).items() if not name.endswith("wqkv"))
    whole = args.head_dim >= 32 and args.head_dim & (args.head_dim - 1) == 0
    return whole and not biased and not args.qk_norm and args.n_heads // args.n_kv_heads <= GROUP


def fused_step(model: Transformer, token: Tensor, input_pos: Tensor) -> Tensor:
    """`decode_step` on CUDA by the fused kernels; the same up to rounding."""
    eps = model.args.norm_eps
    keep_all = model.norm.weight.new_full(model.norm.weight.shape, KEEP_ALL, dtype=torch.float32)
    residual = model.tok_embeddings(token)[0, 0].float()
    update = None
    semaphores = new_semaphores(
        max(layer.weight.out_features for layer in sparse_layers(model).values()), residual.device
    )
    for layer, window in zip(model.layers, model.args.sliding_windows, strict=True):
        attention, ffn, cache = layer.attention, layer.feed_forward, layer.attention.kv_cache
        wqkv, wo, w13, w2 = attention.wqkv, attention.wo, ffn.w13, ffn.w2
        residual, x = norm_compact(residual, update, layer.attention_norm.weight, wqkv.threshold, eps)
        qkv = wqkv.weight.compact_matvec(x, semaphores)
        if wqkv.bias is not None:
            qkv += wqkv.bias
        shares = decode_attention(
            qkv, model.frequencies, cache.k[0], cache.v[0], input_pos, model.args.n_heads, window or 0
        )
        x = merge_attention(*shares, wo.threshold, cache.k.dtype)
        update = wo.weight.compact_matvec(x, semaphores)
        residual, x = norm_compact(residual, update, layer.ffn_norm.weight, w13.threshold, eps)
        x = w13.weight.compact_gate_up(x, w2.threshold, semaphores)
        update = w2.weight.compact_matvec(x, semaphores)
    _, x = norm_compact(residual, update, model.norm.weight, keep_all, eps)  # the whole vector as a list
    return model.output(x.value)[0]


class CapturedStep:
    """A decode step recorded once as a CUDA graph and replayed for every token, into the same logits each time."""

    @torch.no_grad()
    def __init__(self, model: Transformer, step: Step | None = None):
        """`step` None: the fastest that computes this model. The model's cache must be set up."""
        step = step or (fused_step if can_fuse(model) else decode_step)
        device = model.norm.weight.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.input_pos = torch.zeros(1, dtype=torch.long, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles the kernels; the cache's first row is written and means nothing yet
            step(model, self.token, self.input_pos)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(model, self.token, self.input_pos)

    def __call__(self, model: Transformer, token: Tensor, input_pos: Tensor) -> Tensor:
        self.token.copy_(token)
        self.input_pos.copy_(input_pos)
        self.graph.replay()
        return self.logits


def fast_step(model: Transformer) -> Step:
    """The fastest step there is for the model's device, ready to run; its cache must be set up.

    Captured on CUDA, in C++ on the CPU; plain there, as kernels/native.py says in a line, when C++ can't be built.
    """
    if not model.norm.weight.is_cuda:
        return decode_step if library() is None else CpuStep(model)
    started = time.perf_counter()
    step = CapturedStep(model)
    print(f"captured in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return step


@dataclass
class Sample:
    """One run of decoding: token ids, seconds to the first token, and seconds of each decode step after it."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    decode_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return len(self.decode_s) / sum(self.decode_s) if self.decode_s else 0.0


class Reading:
    """A token on its way to the host: a copy that waits for the steps up to it, not for those enqueued since."""

    def __init__(self, token: Tensor):
        self.token, self.copied = token, None
        if token.is_cuda:
            self.token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True).copy_(token, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> int:
        if self.copied is not None:
            self.copied.synchronize()
        return int(self.token)


def prompt_logits(model: Transformer, prompt: Tensor, last: Tensor) -> Tensor:
    """Fills the cache with prompt [1, T]; logits [vocab] after its token number `last` [1]."""
    return model.output(model.hidden(prompt)[0, last])[0]


def prefill(model: Transformer, prompt: Tensor, compute: PromptLogits = prompt_logits) -> Tensor:
    """Logits [vocab] after prompt [1, T], which fills the cache, computed without sparsity.

    The cache rows behind a padded prompt are written again before they are read.
    """
    tokens = prompt.shape[1]
    rows = min(FEWEST_ROWS, model.max_seq_length)
    padded = F.pad(prompt, (0, max(0, rows - tokens)))
    with leading_dense(model, sys.maxsize):  # not T, which would make a compiled `compute` one of each length
        return compute(model, padded, torch.tensor([tokens - 1], device=prompt.device))


def compiled_prefill() -> Prefill:
    """`prefill`, compiled on first use, once for all lengths."""
    return functools.partial(prefill, compute=torch.compile(prompt_logits, dynamic=True, fullgraph=True))


@torch.no_grad()
def decode(
    model: Transformer,
    step: Step,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    stop: frozenset[int],
    sample: Sample,
    first: Prefill = prefill,
) -> Iterator[int]:
    """Yields tokens as they are drawn, up to one in `stop` (not yielded); times and tokens go into `sample`.

    The model's cache must hold the prompt and all new tokens. A GPU is given the next step before its last token is
    read, so that it never waits for the host.
    """
    if len(prompt) + max_new_tokens > model.max_seq_length:
        needed = f"{len(prompt)} prompt and {max_new_tokens} new tokens"
        raise ValueError(f"{needed} do not fit the cache of {model.max_seq_length} tokens")
    device = model.norm.weight.device
    ahead = 1 if device.type == "cuda" else 0
    before = time.perf_counter()
    token = sampling.draw(first(model, torch.tensor([prompt], device=device)), generator)
    position = torch.tensor([len(prompt)], device=device)
    drawn, launched = deque([Reading(token)]), 1
    while len(sample.tokens) < max_new_tokens:
        while launched < max_new_tokens and len(drawn) <= ahead:
            token = sampling.draw(step(model, token.view(1, 1), position), generator)
            position = position + 1
            drawn.append(Reading(token))
            launched += 1
        sample.tokens.append(drawn.popleft().wait())
        now = time.perf_counter()
        if len(sample.tokens) == 1:
            sample.first_token_s = now - before
        else:
            sample.decode_s.append(now - before)
        before = now
        if sample.tokens[-1] in stop:
            return
        yield sample.tokens[-1]


@torch.no_grad()
def achieved_sparsity(model: Transformer, sample: Sample) -> dict[str, float]:
    """What decoding `sample` skipped, by tensor kind, counted by feeding its tokens through the cache once more.

    Counting inside the decode step would slow down what is being measured.
    """
    fed = sample.tokens[: len(sample.decode_s)]
    if not fed:
        return {}
    device = model.norm.weight.device
    positions = torch.arange(sample.prompt_tokens, sample.prompt_tokens + len(fed), device=device)
    with leading_dense(model, 0), tally_kept(model) as tally:
        model.hidden(torch.tensor([fed], device=device), positions)
    return tally.by_kind(model)
