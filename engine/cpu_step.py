"""The decode step on the CPU: one call into C++ a token (kernels/csrc/decode_step.cpp), on a model's tensors in place.

Several tokens at once are computed densely and read the weights once; each has the bits of a dense step of its own.

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
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, CpuWeight) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, c_void_p) for name in ("wqkv_bias", "wo_bias", "w13_bias", "w2_bias")),
        *((name, c_void_p) for name in ("wqkv_threshold", "wo_threshold", "w13_threshold", "w2_threshold")),
        *((name, c_void_p) for name in ("k_cache", "v_cache")),
        ("window", c_int64),
    ]


class CpuModel(ctypes.Structure):
    """`Model` of decode_step.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("dim", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size")),
        *((name, c_int64) for name in ("max_seq_length", "layers")),
        ("eps", c_double),
        *((name, CpuWeight) for name in ("embeddings", "output")),
        *((name, c_void_p) for name in ("norm", "frequencies")),
        ("layer", ctypes.POINTER(CpuLayer)),
        ("kept", c_void_p),
    ]


@functools.cache
def native_steps(native: ctypes.CDLL) -> tuple[Callable, Callable]:
    """The decode step of the compiled kernels, and dense ones of several tokens.

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
    return native.teal_decode_step, native.teal_dense_steps


class CpuStep:
    """The decode step in C++ over one model and one cache; the same as the plain step up to rounding.

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
        self.native, self.native_dense = native_steps(library())
        self.model = CpuModel(
            dim=args.dim,
            heads=args.n_heads,
            kv_heads=args.n_kv_heads,
            head_dim=args.head_dim,
            ffn_dim=args.ffn_dim,
            vocab_size=args.vocab_size,
            max_seq_length=cache.length,
            layers=args.n_layers,
            eps=args.norm_eps,
            embeddings=self._weight(operand_of(model.tok_embeddings)),
            output=self._weight(operand_of(model.output)),
            norm=self._address(model.norm.weight),
            frequencies=self._address(model.frequencies),
            layer=(CpuLayer * args.n_layers)(*map(self._layer, model.layers, args.sliding_windows, cache.k, cache.v)),
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

    def _layer(self, block: Block, window: int | None, k: Tensor, v: Tensor) -> CpuLayer:
        attention, ffn = block.attention, block.feed_forward
        tensors = {
            "attention_norm": block.attention_norm.weight,
            "ffn_norm": block.ffn_norm.weight,
            "q_norm": getattr(attention.q_norm, "weight", None),
            "k_norm": getattr(attention.k_norm, "weight", None),
            "k_cache": k,
            "v_cache": v,
        }
        weights = {}
        for name, linear in (("wqkv", attention.wqkv), ("wo", attention.wo), ("w13", ffn.w13), ("w2", ffn.w2)):
            weights[name] = self._weight(linear.weight.operand)
            tensors |= {f"{name}_bias": linear.bias, f"{name}_threshold": linear.threshold}
        addresses = {name: self._address(tensor) for name, tensor in tensors.items()}
        return CpuLayer(window=window or 0, **weights, **addresses)

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

    def _check(self, tokens: Sequence[int], position: int) -> None:
        for token in tokens:
            if not (0 <= token < self.model.vocab_size and 0 <= position < self.model.max_seq_length):
                raise ValueError(f"token {token} at position {position} is outside the vocabulary or the cache")
            position += 1
