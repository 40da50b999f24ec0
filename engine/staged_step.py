"""The decode step on Hopper and later GPUs: three launches a layer (kernels/decode_stages.py) in a CUDA graph.

A graph's replay is a token: it takes the token that the replay before found likeliest, or has drawn, at the position
behind, unless the caller says otherwise. Sums have the same bits in any order (grids.py).
"""

import ctypes
import itertools
import math
import sys
import time

import torch
from torch import Tensor

from teal_fast.engine.cuda_step import capture
from teal_fast.engine.grids import Grids, measure_grids
from teal_fast.engine.ranks.layers import adds_bias, own_output, ranks_of
from teal_fast.engine.sampling import Sampling
from teal_fast.kernels.decode_stages import (
    SHORT,
    TOLD,
    DecodeStages,
    StageLayer,
    StageSampling,
    StageStep,
    added,
    defines,
)
from teal_fast.kernels.int4 import row_scales
from teal_fast.kernels.native import pointer
from teal_fast.kernels.nvrtc import CudaError
from teal_fast.kernels.packed import PackedWeight, bits
from teal_fast.kernels.rank_words import RankWords
from teal_fast.kernels.stage_shape import StageShape, cut
from teal_fast.kernels.tuning import find_tuned
from teal_fast.model import Block, KVCache, Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.weights.output import operand_of


def stage_shape(model: Transformer) -> StageShape:
    """The sizes that kernels are compiled for. Raises ValueError on weights that no kernel reads."""
    args, dtype = model.args, model.norm.weight.dtype
    if others := args.beyond_llama("qk_norm"):
        raise ValueError(f"no kernels for {others}")
    operands = {name: layer.weight.operand for name, layer in sparse_layers(model).items()}
    ours = {(".attention." in name, operand.bits, operand.group) for name, operand in operands.items()}
    mixed = len(ours) != 2 or dtype not in (torch.bfloat16, torch.float16)
    if (
        mixed
        or model.tok_embeddings.weight.dtype != dtype
        or any(operand.bits == 16 and operand.packed.dtype != dtype for operand in operands.values())
    ):
        raise ValueError("no kernels for fp32, nor for layers of different formats")
    found = {of_attention: (number, group) for of_attention, number, group in ours}
    output, ranks = operand_of(own_output(model)).packed, ranks_of(model)
    return StageShape(
        args.dim, args.n_heads, args.n_kv_heads, args.head_dim, args.ffn_dim, args.vocab_size, found[True][0],
        *found[False], bits(output), dtype == torch.float16, bool(args.qk_norm),
        1 if ranks is None else ranks.shard.ranks,
    )  # fmt: skip


def build_stages(model: Transformer, dependent: bool = True, delay: int = 0, **wanted: int) -> DecodeStages:
    """The kernels for this model on its GPU. Raises ValueError or CudaError saying why there are none.

    dependent, delay, wanted: for tests and sweeps; see `DecodeStages`, `defines` and `cut`. By default what
    was measured on this card is taken.
    """
    gpu = torch.cuda.get_device_properties(model.norm.weight.device)
    if gpu.major < 9:
        raise ValueError(f"no kernels for compute capability {gpu.major}.{gpu.minor}")
    shape = stage_shape(model)
    tuned = wanted or find_tuned(gpu.name, shape)
    constants = defines(shape, cut(shape, gpu.multi_processor_count, **tuned), delay)
    shared, arch = gpu.shared_memory_per_multiprocessor, f"sm_{gpu.major}{gpu.minor}"
    with torch.cuda.device(model.norm.weight.device):
        return DecodeStages(constants, arch, gpu.multi_processor_count, shared, dependent)


def rank_words(model: Transformer) -> RankWords | None:
    """By which the GPUs of ranks that share the model tell each other what they computed; None of one rank alone.

    Raises ValueError where they can't. All ranks call it at once.
    """
    if (ranks := ranks_of(model)) is None:
        return None
    return RankWords(ranks.group, max(model.args.dim, ranks.share(model.args.vocab_size)))


def addends(stages: DecodeStages) -> tuple[int, int, int]:
    """How many CTAs at most add to a column of q/k/v, of o's update and of the MLP's."""
    return tuple(stages.constants[f"ADDENDS_{stage}"] for stage in ("QKV", "O", "MLP"))


class StagedStep:
    """A decode step over one model and one cache as a CUDA graph; each replay fills the same logits [vocab] fp32.

    words: see `rank_words`.
    best: the likeliest token after the last call, or the one that was drawn, int64 [1]; and on the host, once the GPU
    is done, the same and the largest logit, fp32 [1], for as long as TOLD calls; with NaN among the logits, NaN.
    """

    mode = "captured"

    @torch.no_grad()
    def __init__(self, model: Transformer, cache: KVCache, stages: DecodeStages, words: RankWords | None = None):
        started = time.perf_counter()
        self.stages, self.cache, self.tensors = stages, cache, []
        args, self.device = model.args, model.norm.weight.device
        zeros = lambda *size, dtype=torch.float32: self._kept(torch.zeros(size, dtype=dtype, device=self.device))  # noqa: E731
        self.token, self.input_pos = zeros(1, 1, dtype=torch.int64), zeros(1, dtype=torch.int64)
        self.logits, self.largest = zeros(args.vocab_size), zeros(1)
        self.beyond, self.calls = zeros(1, dtype=torch.int32), 0  # how many addends left their grid in so many calls
        self.sampling, self.drawn = zeros(ctypes.sizeof(StageSampling), dtype=torch.uint8), False
        self.told = self._kept(torch.zeros(TOLD, 2, dtype=torch.int64, pin_memory=True))
        self.at: int | None = None  # the position in input_pos, where the host knows it
        self.residual, self.o_update, self.mlp_update = zeros(2, args.dim), zeros(2, args.dim), zeros(args.dim)
        output = operand_of(own_output(model))
        self.step = StageStep(
            residual=tuple(row.data_ptr() for row in self.residual),
            o_update=tuple(row.data_ptr() for row in self.o_update),
            mlp_update=self._address(self.mlp_update),
            qkv=self._address(zeros((args.n_heads + 2 * args.n_kv_heads) * args.head_dim)),
            partial=self._address(zeros(args.n_heads, stages.constants["SPLITS"], args.head_dim + 2)),
            embedding=self._address(model.tok_embeddings.weight),
            token=self._address(self.token),
            position=self._address(self.input_pos),
            frequencies=self._address(cache.frequencies),
            output=self._address(output.packed),
            output_scale=self._address(output.scale),
            norm=self._address(model.norm.weight),
            logits=self._address(self.logits),
            largest=self._address(self.largest),
            best=self._address(zeros(1, dtype=torch.int64)),
            arrived=self._address(zeros(1, dtype=torch.int32)),
            beyond=self._address(self.beyond),
            told=self._address(self.told),
            sampling=self._address(self.sampling),
            length=cache.length,
            eps=args.norm_eps,
        )
        self.words = words
        if words is not None:
            self.step.words[: words.ranks], self.step.rank = words.addresses, words.rank
            self.step.calls, self.step.lost = words.calls.data_ptr(), words.lost.data_ptr()
        grids = measure_grids(model, addends(stages))
        self.layers = list(map(self._layer, model.layers, grids, cache.k, cache.v, args.sliding_windows))
        self.longest = max(
            min(window or cache.length, cache.length) for window in args.sliding_windows
        )  # attended over
        ways = itertools.product({False, self.longest > SHORT}, (False, True))
        self.graphs = {way: self._capture(*way) for way in ways}
        self.beyond.zero_()  # captures count too
        print(f"captured in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    @property
    def beyond_grids(self) -> float:
        """The share of addends that left their columns' grids so far, so that sums need not have the same bits again.

        Of four columns next to each other, which count together. The GPU is waited for.
        """
        return self.beyond.item() / max(1, self.calls * len(self.layers) * added(self.stages.constants))

    @property
    def lost(self) -> bool:
        """Whether another rank's values were waited for in vain."""
        return self.words is not None and bool(self.words.lost)

    @property
    def best(self) -> tuple[Tensor, list[Tensor]]:
        told = self.told[(self.at - 1) % TOLD]
        return self.token.view(1), [told[:1], told.view(torch.float32)[2:3]]

    def __call__(self, token: Tensor, input_pos: Tensor) -> Tensor:
        """Logits after token [1, 1] at input_pos [1], which is best given on the host: else its copy is waited for."""
        position = int(input_pos)
        if position != self.at:
            self.input_pos.fill_(position)
        if token.data_ptr() != self.token.data_ptr():
            self.token.copy_(token)
        self.graphs[min(position + 1, self.longest) > SHORT, self.drawn].replay()
        self.at, self.calls = position + 1, self.calls + 1
        return self.logits

    def draw(self, sampling: Sampling, seed: int) -> None:
        """From the next call on `best` is drawn so, the likeliest where that is greedy; of penalties nothing is known.

        The same seed, of 64 bits, draws the same token from the same logits at the same position.
        """
        self.drawn = not sampling.greedy
        if self.drawn:
            vocab, top_p = self.logits.numel(), 1.0 if sampling.top_p is None else sampling.top_p
            kept = top_p, sampling.min_p or 0.0, min(sampling.top_k or vocab, vocab)
            how = StageSampling(math.log2(math.e) / sampling.temperature, *kept, seed % 2**64)
            # From pageable memory, which is copied before the call returns, so that it need not be waited for.
            self.sampling.copy_(torch.frombuffer(bytearray(how), dtype=torch.uint8), non_blocking=True)

    def _capture(self, long: bool, drawn: bool) -> torch.cuda.CUDAGraph:
        # The run before it loads the kernels; the cache's first row is written and means nothing yet.
        graph, _ = capture(lambda: self.stages.launch(self.step, self.layers, long, drawn), self.device)
        self.token.zero_()
        self.input_pos.zero_()
        return graph

    def _kept(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def _address(self, tensor: Tensor | None) -> int | None:
        assert tensor is None or tensor.is_contiguous()
        return pointer(tensor if tensor is None else self._kept(tensor)).value

    def _layer(self, layer: Block, grids: Grids, k: Tensor, v: Tensor, window: int | None) -> StageLayer:
        attention, ffn = layer.attention, layer.feed_forward
        parts = {"qkv": attention.wqkv, "o": attention.wo, "gate_up": ffn.w13, "down": ffn.w2}
        operands: dict[str, PackedWeight] = {name: part.weight.operand for name, part in parts.items()}
        gate_up = operands["gate_up"]
        tensors = {f"{name}_scale": operand.scale for name, operand in operands.items()}
        tensors |= {f"{name}_bias": part.bias if adds_bias(part) else None for name, part in parts.items()}
        tensors |= {f"{name}_threshold": part.threshold for name, part in parts.items()}
        tensors |= {
            name: operand.packed for name, operand in zip(("wqkv", "wo", "w13", "w2"), operands.values(), strict=True)
        }
        tensors |= {f"{name}_grid": grid for name, grid in grids._asdict().items()}
        turned = row_scales(gate_up.packed, gate_up.N, gate_up.group).t().contiguous() if gate_up.bits == 4 else None
        norms = {name: getattr(getattr(attention, name), "weight", None) for name in ("q_norm", "k_norm")}
        tensors |= norms | {"attention_norm": layer.attention_norm.weight, "ffn_norm": layer.ffn_norm.weight}
        tensors |= {"gate_up_groups": turned, "k": k, "v": v}
        return StageLayer(window=window or 0, **{name: self._address(tensor) for name, tensor in tensors.items()})


def staged_step(model: Transformer, cache: KVCache) -> StagedStep | None:
    """The step in three stages, or None, saying why in a line, where the GPU or the model is not for it."""
    ranks, stages, words, why = ranks_of(model), None, None, ""
    try:
        stages = build_stages(model)
    except (ValueError, CudaError) as error:
        why = str(error)
    if ranks is not None and ranks.mean({"built": float(stages is not None)})["built"] < 1:  # all of them, or none
        stages, why = None, why or "no kernels for another rank"
    if stages is not None:
        try:
            words = rank_words(model)
        except ValueError as error:
            stages, why = None, str(error)
    if stages is None:
        instead = "by eight kernels a layer, some 15 % slower" if ranks is None else "in plain PyTorch, slowly"
        print(f"{why}: decoding {instead}", file=sys.stderr)
        return None
    return StagedStep(model, cache, stages, words)
