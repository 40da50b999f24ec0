"""llama.cpp as a peer, by the low-level API of llama-cpp-python: a GGUF file as it is, or its weights requantized.

It decodes with its own defaults (flash attention, repacked weights, keys and values in fp16) and our number of threads.
Our checkpoint was made of the same file, so that its bf16 holds the values that ours does. A requantized copy is kept
for the next run, in a line that says where.
"""

import ctypes
import functools
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from teal_fast.benchmarks.rows import Row, Task
from teal_fast.files.gguf_reader import file_type_name
from teal_fast.files.store import new_file
from teal_fast.kernels.native import cache_folder

FILE = "file"  # the format of a peer that has the file's own weights
BATCH = 512  # prompt tokens at once
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def rows(task: Task, format: str) -> Iterator[Row]:
    if not isinstance(task.weights, Path) or task.device.type != "cpu":
        raise ValueError("--peers llama.cpp decodes a GGUF file on the CPU: use it with --checkpoint and --device cpu")
    path = task.weights if format == FILE else requantized(task.weights, format)
    model = load(path)
    if not model:
        todo = "take another file" if format == FILE else "remove it to have it made again"
        raise ValueError(f"llama.cpp cannot load {path}: {todo}")
    format = type_of(model) if format == FILE else format
    vocab_size = native().llama_vocab_n_tokens(native().llama_model_get_vocab(model))
    if vocab_size != task.vocab_size:
        raise ValueError(f"{task.weights} has {vocab_size} tokens, the checkpoint {task.vocab_size}")
    about = {
        "peer": f"llama.cpp {format}",
        "peer_version": native().__version__,
        "format": format,
        "mode": "compiled",
        "sparsity": 0.0,
    }
    for prompt in task.prompts:
        decoder = Decoder(model, vocab_size, prompt, task.new_tokens)
        yield Row(about | {"prompt_tokens": len(prompt)}, decoder.decode, read=decoder.read)


@functools.cache
def native() -> ModuleType:
    """llama.cpp's C functions; what they would log is dropped."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENT, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def load(path: Path, vocab_only: bool = False) -> ctypes.c_void_p:
    """The model of a GGUF file, or its vocabulary alone; 0 where llama.cpp cannot load it."""
    options = native().llama_model_default_params()
    options.vocab_only = vocab_only
    return native().llama_model_load_from_file(str(path).encode(), options)


def type_of(model: ctypes.c_void_p) -> str:
    """What the model's file calls its mixture of tensor types, as our formats are called."""
    number = ctypes.create_string_buffer(32)
    found = native().llama_model_meta_val_str(model, b"general.file_type", number, len(number)) > 0
    return file_type_name(int(number.value) if found else -1)


def requantized(source: Path, format: str) -> Path:
    """The GGUF file `source` with its weights in `format`, made once and kept in the cache folder of the kernels."""
    about = source.stat()
    key = f"{source.resolve()} {about.st_size} {about.st_mtime_ns} {native().__version__}"
    target = cache_folder() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{format}.gguf"
    if not target.exists():
        options = native().llama_model_quantize_default_params()
        options.ftype = getattr(native(), f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
        options.allow_requantize, options.nthread = True, torch.get_num_threads()
        with new_file(target) as temporary:
            if native().llama_model_quantize(str(source).encode(), str(temporary).encode(), ctypes.byref(options)):
                raise ValueError(f"llama.cpp cannot convert {source} to {format}")
    size = target.stat().st_size / 1e9
    print(f"a copy for llama.cpp in {format} is kept, remove it at will: {target} ({size:.2f} GB)", file=sys.stderr)
    return target


class Decoder:
    """A context that holds a prompt, and decodes after it as often as asked."""

    def __init__(self, model: ctypes.c_void_p, vocab_size: int, prompt: list[int], new_tokens: int):
        options = native().llama_context_default_params()
        options.n_ctx, options.n_batch = len(prompt) + new_tokens, BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = native().llama_init_from_model(model, options)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {options.n_ctx} tokens")
        self.vocab_size, self.prompt, self.new_tokens = vocab_size, prompt, new_tokens
        self.read()

    def logits(self, tokens: list[int]) -> np.ndarray:
        """fp32 [vocab], of what comes after these tokens. They are llama.cpp's, and gone with the next step."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points there
        if code := native().llama_decode(self.context, native().llama_batch_get_one(ids, len(tokens))):
            raise ValueError(f"llama.cpp cannot decode: it says {code}")
        logits = native().llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))

    def step(self, tokens: list[int]) -> int:
        """The likeliest token after these."""
        # Not by PyTorch, whose threads would still wait for more work while llama.cpp's need the cores.
        return int(self.logits(tokens).argmax())

    def keep(self, tokens: int) -> None:
        """Forgets what comes after so many tokens."""
        native().llama_memory_seq_rm(native().llama_get_memory(self.context), 0, tokens, -1)

    def read(self) -> float:
        """Computes the whole prompt; seconds to the first token."""
        self.keep(0)
        started = time.perf_counter()
        for start in range(0, len(self.prompt), BATCH):
            self.first = self.step(self.prompt[start : start + BATCH])
        return time.perf_counter() - started

    def decode(self) -> float:
        self.keep(len(self.prompt))
        token, started = self.first, time.perf_counter()
        for _ in range(self.new_tokens - 1):
            token = self.step([token])
        return (self.new_tokens - 1) / (time.perf_counter() - started)
