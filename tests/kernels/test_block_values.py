"""Values of some outputs have the bits of the whole weight's."""

import pytest
import torch

import teal_fast.kernels.block_values
from teal_fast.files.gguf_blocks import PARSERS
from teal_fast.kernels.block_operand import tensors_of
from teal_fast.kernels.block_values import (
    _block_columns,
    _block_outputs,
    block_columns,
    block_columns_reference,
    block_outputs,
    block_outputs_reference,
)
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.test_block_gemv import made

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=RUNNABLE)
def cpp(request, monkeypatch):
    """The kernels of an instruction set."""
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.block_values, "library", lambda: native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARSERS)
def test_bits_of_the_whole_weights(cpp, name, dtype):
    for N in (64, 320, 1300):
        blocks, _ = made(name, N)
        for begin, end in ((0, blocks.N), (0, 1), (N // 128 * 128 - 128, N - 3) if N > 128 else (0, 63)):
            found = block_columns(blocks, begin, end, dtype)
            assert found.dtype == dtype and torch.equal(found, block_columns_reference(blocks, begin, end, dtype))
        outputs = torch.tensor([0, N - 1, 17, 63, 17])
        found = block_outputs(blocks, outputs, dtype)
        assert found.dtype == dtype and torch.equal(found, block_outputs_reference(blocks, outputs, dtype))
    assert block_outputs(blocks, outputs[:0], dtype).shape == (0, blocks.K)


def test_opcheck():
    tensors = tensors_of(made("Q4_K", 192)[0])
    torch.library.opcheck(_block_columns, (tensors, 5, 128, 150, torch.bfloat16))
    torch.library.opcheck(_block_outputs, (tensors, 5, torch.tensor([3, 150]), torch.bfloat16))


def test_bad_input_is_refused():
    blocks, _ = made("Q4_K", 192)
    for begin, end in ((64, 128), (0, 193), (128, 128), (-128, 0)):
        with pytest.raises(ValueError, match=f"block_columns takes .*: got {begin}, {end}"):
            block_columns(blocks, begin, end, torch.float32)
    with pytest.raises(ValueError, match=r"block_outputs takes outputs \[T\] int64, got \[1\] torch.int32"):
        block_outputs(blocks, torch.tensor([1]).int(), torch.float32)
    for output in (-1, 192):
        with pytest.raises(IndexError, match="are not all from 0 to 191"):
            block_outputs(blocks, torch.tensor([1, output]), torch.float32)
