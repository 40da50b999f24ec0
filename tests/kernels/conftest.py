"""What every kernel test runs under."""

import pytest
import torch

from teal_fast.kernels import compact_gemv, decode_attention, gate_up
from teal_fast.kernels.backend import INTERPRETED


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fills every torch.empty with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after another: two share the rows of a product, not eight to 28.

    In four bits they have one load on its way, as others have in some other format.
    """
    if INTERPRETED:
        monkeypatch.setattr(decode_attention, "PROGRAMS", 16)
        for module in (compact_gemv, gate_up):
            for bits, (_, columns, warps, depth) in module.DEFAULTS.items():
                monkeypatch.setitem(module.DEFAULTS, bits, (2, columns, warps, 1 if bits == 4 else depth))
