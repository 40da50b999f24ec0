"""What every kernel test runs under."""

import pytest
import torch

from teal_fast.kernels import compact_gemv, gate_up
from teal_fast.kernels.backend import INTERPRETED


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fills every torch.empty with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs programs one after another: two share the rows of a product, not eight to 28."""
    for module in (compact_gemv, gate_up) if INTERPRETED else ():
        for format, (_, *rest) in module.DEFAULTS.items():
            monkeypatch.setitem(module.DEFAULTS, format, (2, *rest))
