"""Other programs, timed on the same shapes in the same run. Each is optional and imported only when asked for."""

import time
from collections.abc import Iterator

import torch


def transformers_decode(
    config: dict, device: torch.device, dtype: torch.dtype, prompt_tokens: list[int], new_tokens: int
) -> Iterator[dict]:
    """transformers' own `generate` with a static cache, which compiles its decode step on CUDA; random weights."""
    import transformers

    options = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, eos_token_id=None)).eval()
        torch.set_default_dtype(torch.float32)
    for length in prompt_tokens:
        prompt = torch.randint(config["vocab_size"], (1, length), device=device)

        def seconds(tokens: int, prompt: torch.Tensor = prompt) -> float:
            started = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                cache_implementation="static",
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - started

        seconds(new_tokens), seconds(new_tokens)  # compiles
        few = 8
        rates = sorted((new_tokens - few) / (seconds(new_tokens) - seconds(few)) for _ in range(3))
        about = {"peer_version": transformers.__version__, "prompt_tokens": length}
        yield about | {"tokens_per_s": rates[1], "tokens_per_s_spread": [rates[0], rates[2]]}


PEERS = {"transformers": transformers_decode}
