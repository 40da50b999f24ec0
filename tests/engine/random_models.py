"""Random models with a prompt in their cache, and what steps make of them."""

import torch

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine.prefill import prefill
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import KVCache, Transformer
from teal_fast.tests.models import TINY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN = TINY | {"model_type": "qwen2", "tie_word_embeddings": True}
MISTRAL = TINY | {"model_type": "mistral", "sliding_window": 6}
PROMPT = list(range(5, 14))


def make(
    config: dict, dtype: torch.dtype, sparsity: float, length: int = 64
) -> tuple[Transformer, KVCache, Calibration]:
    """A random model at this sparsity, a cache that holds PROMPT, and the model's calibration."""
    model = random_model(config, DEVICE, dtype, std=0.1)
    calibration = calibrate_on_random_tokens(model, tokens=256)
    set_sparsity(model, calibration, sparsity)
    cache = model.new_cache(1, length)
    with torch.no_grad():
        prefill(model, cache, torch.tensor([PROMPT], device=DEVICE))
    return model, cache, calibration


@torch.no_grad()
def follow(step, tokens: int) -> torch.Tensor:
    """Logits [tokens, vocab] of the greedy continuation of PROMPT."""
    token, logits = 7, []
    for position in range(len(PROMPT), len(PROMPT) + tokens):
        place = torch.tensor([position], device=DEVICE)
        logits.append(step(torch.tensor([[token]], device=DEVICE), place).float().clone())
        token = int(logits[-1].argmax())
    return torch.stack(logits)
