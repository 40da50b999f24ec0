"""The decode step on the CPU: one call into C++ a token (kernels/csrc/decode_step.cpp), on a model's tensors in place.

Several tokens at once read the weights once. Those of one sequence are computed densely; each has the bits of a dense
step of its own. Those of several sequences, each the next one of its own, read the rows that any of them keeps.

Weights, thresholds and cache are handed over by address, so that thresholds change in place between two tokens.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from teal_fast.kernels.block_operand import Part, Parts, parts_of, tensors_of
from teal_fast.kernels.native import TYPES, library, pointer
from teal_fast.kernels.packed import PackedWeight
from teal_fast.model import Block, KVCache, Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.weights.output import operand_of


class CpuWeight(ctypes.Structure):
    """`Weight` of decode_step.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("data", "scale")),
        *((name, c_int64) for name in ("bits", "group")),
        ("part", ctypes.POINTER(Part)),
        ("parts", c_int64),
    ]


class CpuLayer(ctypes.Structure):
    """`Layer` of decode_step.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "attention_norm_behind", "ffn_norm_behind")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, CpuWeight) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, c_void_p) for name in ("wqkv_bias", "wo_bias", "w13_bias", "w2_bias")),
        *((name, c_void_p) for name in ("wqkv_threshold", "wo_threshold", "w13_threshold", "w2_threshold")),
        *((name, c_void_p) for name in ("k_cache", "v_cache")),
        *((name, c_int64) for name in ("window", "rope")),
    ]


class CpuModel(ctypes.Structure):
    """`Model` of decode_step.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("dim", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size")),
        *((name, c_int64) for name in ("max_seq_length", "layers")),
        *((name, c_int64) for name in ("ropes", "q_norm_width", "norm_behind", "tanh_gate")),
        *((name, c_double) for name in ("eps", "embedding_scale", "attention_scale", "attention_cap", "output_cap")),
        ("query_beta", c_double),
        ("query_step", c_int64),
        *((name, CpuWeight) for name in ("embeddings", "output")),
        *((name, c_void_p) for name in ("norm", "frequencies", "rope_sizes")),
        ("layer", ctypes.POINTER(CpuLayer)),
        ("kept", c_void_p),
    ]


@functools.cache
def native_steps(native: ctypes.CDLL) -> tuple[Callable, Callable, Callable]:
    """The decode step of the compiled kernels, dense ones of several tokens, and one of several sequences.

    Raises ValueError when its structures are not those of this file.
    """
    found = (c_int64 * 2)()
    native.teal_struct_sizes(found)
    expected = [ctypes.sizeof(CpuLayer), ctypes.sizeof(CpuModel)]
    if list(found) != expected:
        raise ValueError(
            f"decode_step.cpp's Layer and Model have {found[0]} and {found[1]} bytes, cpu_step.py's {expected[0]} and "
            f"{expected[1]}: give both files the same fields"
        )
    return native.teal_decode_step, native.teal_dense_steps, native.teal_batch_step


class CpuStep:
    """The decode step in C++ over one model and one cache; the same as the plain step up to rounding.

    The cache may be of several sequences, of which all calls but those of `batch` take the first.
    It holds on to the tensors of both, by address. Two steps may run at once in two threads.
    """

    mode = "compiled"

    def __init__(self, model: Transformer, cache: KVCache):
        args = model.args
        self.tensors: list[Tensor] = []
        self.logits = torch.empty(args.vocab_size)
        layers = list(sparse_layers(model).values())
        self.kept = torch.zeros(len(layers), dtype=torch.int64)
        self.row_bytes = torch.tensor([layer.weight.row_bytes for layer in layers])
        self.sparse_bytes = sum(layer.weight.row_bytes * layer.weight.in_features for layer in layers)
        self.type = TYPES[model.norm.weight.dtype]
        self.native, self.native_dense, self.native_batch = native_steps(library())
        beta, step = args.query_growth or (0.0, 0)
        per_layer = (args.sliding_windows, args.rope_of, cache.k, cache.v)
        self.model = CpuModel(
            dim=args.dim,
            heads=args.n_heads,
            kv_heads=args.n_kv_heads,
            head_dim=args.head_dim,
            ffn_dim=args.ffn_dim,
            vocab_size=args.vocab_size,
            max_seq_length=cache.length,
            layers=args.n_layers,
            ropes=len(args.ropes),
            q_norm_width=0 if args.qk_norm == "whole" else args.head_dim,
            norm_behind=args.qk_norm == "turned",
            tanh_gate=args.activation == "gelu_tanh",
            eps=args.norm_eps,
            embedding_scale=args.embedding_scale,
            attention_scale=args.attention_scale or args.head_dim**-0.5,
            attention_cap=args.attention_cap,
            output_cap=args.output_cap,
            query_beta=beta,
            query_step=step,
            embeddings=self._weight(operand_of(model.tok_embeddings)),
            output=self._weight(operand_of(model.output)),
            norm=self._address(model.norm.weight),
            frequencies=self._address(cache.frequencies),
            rope_sizes=self._address(model.rope_sizes),
            layer=(CpuLayer * args.n_layers)(*map(self._layer, model.layers, *per_layer)),
            kept=self._address(self.kept),
        )

    def _address(self, tensor: Tensor | None) -> int | None:
        assert tensor is None or tensor.is_contiguous()
        self.tensors.append(tensor)
        return pointer(tensor).value

    def _weight(self, operand: PackedWeight | Parts) -> CpuWeight:
        if not isinstance(operand, PackedWeight):
            self.tensors.extend(tensor for blocks, _ in operand for tensor in tensors_of(blocks))
            return CpuWeight(part=parts_of(operand), parts=len(operand))
        data, scale = map(self._address, operand[:2])
        return CpuWeight(data=data, scale=scale, bits=operand.bits, group=operand.group)

    def _layer(self, block: Block, window: int | None, rope: int, k: Tensor, v: Tensor) -> CpuLayer:
        attention, ffn = block.attention, block.feed_forward
        norms = {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
        norms |= {name: module for name, module in block.named_children() if "norm" in name}
        tensors = {name: getattr(norm, "weight", None) for name, norm in norms.items()}  # some are no norms
        tensors |= {"k_cache": k, "v_cache": v}
        weights = {}
        for name, linear in (("wqkv", attention.wqkv), ("wo", attention.wo), ("w13", ffn.w13), ("w2", ffn.w2)):
            weights[name] = self._weight(linear.weight.operand)
            tensors |= {f"{name}_bias": linear.bias, f"{name}_threshold": linear.threshold}
        addresses = {name: self._address(tensor) for name, tensor in tensors.items()}
        return CpuLayer(window=window or 0, rope=rope, **weights, **addresses)

    @property
    def achieved(self) -> float:
        """The share of the sparse layers' bytes that the last step skipped; those of scales of blocks do not count."""
        return 1 - int(self.kept @ self.row_bytes) / self.sparse_bytes

    def __call__(self, token: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [vocab] fp32 after token [1, 1] at input_pos [1], in the same tensor each time.

        Raises ValueError outside vocabulary or cache.
        """
        token, position = int(token), int(input_pos)
        self._check([token], position)
        with torch.profiler.record_function("teal::decode_step"):
            self.native(
                ctypes.byref(self.model),
                self.type,
                c_int64(token),
                c_int64(position),
                pointer(self.logits),
                torch.get_num_threads(),
            )
        return self.logits

    def dense(self, tokens: Sequence[int], position: int, wanted: int = 1) -> Tensor:
        """Logits [wanted, vocab] fp32 after the last ones of tokens at consecutive positions from `position` on.

        Thresholds count for nothing. Logits, keys and values have the bits of dense steps, one token after another.
        Earlier positions must be filled. Raises ValueError outside vocabulary or cache.
        """
        self._check(tokens, position)
        ids, logits = torch.tensor(tokens, dtype=torch.int64), torch.empty(wanted, self.model.vocab_size)
        with torch.profiler.record_function("teal::dense_steps"):
            self.native_dense(
                ctypes.byref(self.model),
                self.type,
                pointer(ids),
                c_int64(len(tokens)),
                c_int64(position),
                c_int64(wanted),
                pointer(logits),
                torch.get_num_threads(),
            )
        return logits

    def batch(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [n, vocab] fp32 after tokens [n] at positions [n], int64, of the cache's first n sequences.

        Each token drops its own channels; of each weight the rows are read that any of them keeps, in blocks all. Where
        none drops any, logits, keys and values have the bits of a step of its own. Raises ValueError outside vocabulary
        or cache.
        """
        for token, position in zip(tokens.tolist(), positions.tolist(), strict=True):
            self._check([token], position)
        logits = torch.empty(len(tokens), self.model.vocab_size)
        with torch.profiler.record_function("teal::batch_step"):
            self.native_batch(
                ctypes.byref(self.model),
                self.type,
                *map(pointer, (tokens, positions)),
                c_int64(len(tokens)),
                pointer(logits),
                torch.get_num_threads(),
            )
        return logits

    def _check(self, tokens: Sequence[int], position: int) -> None:
        for token in tokens:
            if not (0 <= token < self.model.vocab_size and 0 <= position < self.model.max_seq_length):
                raise ValueError(f"token {token} at position {position} is outside the vocabulary or the cache")
            position += 1
