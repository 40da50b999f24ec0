"""The way back, from our tensors to theirs: rows of heads and values of norms."""

import pytest
import torch

from teal_fast.families.tensors import fold, unfold
from teal_fast.weights.formats import DTYPES


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("added, divisor", [(1.0, 1.0), (0.0, 8.0), (0.0, 10.0), (0.0, 0.3), (1.0, 3.0)])
def test_what_was_folded_is_found_again(dtype, added, divisor):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.cat((values, torch.tensor([0.0, 1.0, -1.0, 2.0**-14, 200.0], dtype=dtype)))
    folded = fold(values, added, divisor).to(dtype)
    assert torch.equal(fold(unfold(folded, added, divisor), added, divisor).to(dtype), folded)


def test_what_no_value_gives_is_told():
    assert unfold(torch.tensor([0.001], dtype=torch.bfloat16), 1.0, 1.0) is None
    assert unfold(torch.tensor([0.001], dtype=torch.float32), 1.0, 1.0) is None
