"""transformers as a peer: a GGUF file's weights or random ones, in our model's type.

On the CPU the tokens are drawn in a loop of our own around its forward pass, which spares it what `generate` adds and a
prompt that is computed every time. On CUDA it is `generate` with a static cache, which compiles its decode step.
"""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from teal_fast.benchmarks.rows import Row, Task
from teal_fast.weights.formats import DTYPES

FEW = 8  # a short run of `generate`, to be subtracted with its prompt from a long one


def rows(task: Task) -> Iterator[Row]:
    import transformers

    cuda = task.device.type == "cuda"
    about = {
        "peer": "transformers" if cuda else f"transformers {task.format}",
        "peer_version": transformers.__version__,
        "mode": "compiled" if cuda else "plain",
        "sparsity": 0.0,
    }
    model = _load(task)
    if model.config.vocab_size != task.vocab_size:
        raise ValueError(f"{task.weights} has {model.config.vocab_size} tokens, the checkpoint {task.vocab_size}")
    for tokens in task.prompts:
        prompt = torch.tensor([tokens], device=task.device)
        decode = _generate(model, prompt, task.new_tokens) if cuda else _loop(model, prompt, task.new_tokens)
        yield Row(about | {"prompt_tokens": len(tokens)}, decode)


def _load(task: Task) -> nn.Module:
    import transformers

    dtype = DTYPES[task.format]
    if isinstance(task.weights, dict):
        options = {name: value for name, value in task.weights.items() if name != "model_type"}
        with torch.device(task.device):
            torch.set_default_dtype(dtype)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, eos_token_id=None))
            torch.set_default_dtype(torch.float32)
        return model.eval()
    return load_gguf(task.weights, dtype).to(task.device)


def load_gguf(path: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' model of a GGUF file, its weights dequantized, on the CPU."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    return model.eval()


@torch.no_grad()
def _loop(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> Callable[[], float]:
    filled = model(prompt, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> float:
        token, cache = filled.logits[:, -1].argmax(-1, keepdim=True), copy.deepcopy(filled.past_key_values)
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        return (new_tokens - 1) / (time.perf_counter() - started)

    return decode


def _generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> Callable[[], float]:
    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            cache_implementation="static",
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        torch.cuda.synchronize(prompt.device)
        return time.perf_counter() - started

    seconds(new_tokens), seconds(new_tokens)  # compiles
    return lambda: (new_tokens - FEW) / (seconds(new_tokens) - seconds(FEW))
