"""The models that an evaluation compares: one model at several sparsities, by its thresholds or by pruned weights.

Both functions are generators, so that one pruned copy at a time is in memory.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from teal_fast.evaluation.perplexity import cut_windows
from teal_fast.evaluation.pruning import prune
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import Transformer

WANDA_SEQUENCES, WANDA_LENGTH = 16, 512  # they pass through the model at once, so memory limits them
Models = Iterator[tuple[float, Transformer]]  # nominal sparsities and models


def models_at(model: Transformer, calibration: Calibration | None, sparsities: list[float]) -> Models:
    """The model at each nominal sparsity, by its thresholds; without a calibration as it is."""
    for nominal in sparsities:
        if calibration is not None:
            set_sparsity(model, calibration, nominal)
        yield nominal, model


def pruned_models(
    load: Callable[[], Transformer], method: str, sparsities: list[float], tokens: Tensor | None
) -> Models:
    """A newly loaded model for each share of weights that `method` zeroes. tokens [B, T]: see `prune`."""
    for nominal in sparsities:
        model = load()
        if nominal:
            prune(model, method, nominal, tokens)
        yield nominal, model


def wanda_batch(ids: list[int], max_position: int, device: torch.device, prefix: Sequence[int]) -> Tensor:
    """Up to WANDA_SEQUENCES sequences of a text's token ids, spread evenly over it, after `prefix`: int64 [B, T]."""
    length = min(WANDA_LENGTH, max_position, len(ids))
    windows = cut_windows(ids, length, length, WANDA_SEQUENCES, prefix)
    return torch.tensor([window for window, _ in windows], device=device)
