import os
import subprocess
import sys

import pytest
import torch

from teal_fast.kernels.backend import INTERPRETED, register
from teal_fast.kernels.checks import takes

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from teal_fast.kernels import compact_gemv, decode_attention, gate_up, merge_attention, norm_compact, quantized_gemm
from teal_fast.weights.dense import DenseWeight
x, weight = torch.randn(30), torch.randn(30, 50)
y = DenseWeight(weight).sparse_matvec(x, torch.zeros(30))
assert (y - x @ weight).abs().max() < 1e-4
"""


def test_the_cpu_needs_no_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch can run Triton's kernels")
def test_triton_is_not_imported_where_it_could_run_nothing():
    code = "import sys; import teal_fast.generate; print('triton' in sys.modules)"
    words, quiet = [sys.executable, "-c", code], {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run(words, env=quiet, capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's launchers run on the CPU")
def test_registered_functions_take_what_bundle_makes():
    op = register(
        "test_register",
        "(Tensor x, int a, int b) -> Tensor",
        cuda=lambda x, pair: x + pair[0] * 10 + pair[1],
        fake=lambda x, pair: torch.empty_like(x),
        bundle=lambda f: lambda x, a, b: f(x, (a, b)),
    )
    assert op(torch.zeros(2), 3, 4).tolist() == [34, 34]
    torch.library.opcheck(op, (torch.zeros(2), 3, 4))


CHECK = takes("op", "x [K] dtype; index [K, S] int32; y [2 * K] dtype or none; z [N, K]", "N")


def inputs():
    return [torch.zeros(3), torch.zeros(3, 5, dtype=torch.int32), torch.zeros(6), torch.zeros(4, 3).long()]


def test_what_fits_is_taken():
    CHECK(*inputs(), N=4)
    x, index, _, z = inputs()
    CHECK(x.half(), index, None, z, N=4)
    CHECK(x[:0], index[:0], None, z[:, :0], N=4)


@pytest.mark.parametrize(
    "number, change, found",
    [
        (0, lambda x: x.int(), "got x [3] int32, index"),
        (0, lambda x: None, "got no x, index"),
        (0, lambda x: x.half(), "got x [3] float16, index [3, 5] int32, y [6] float32"),
        (1, lambda index: index[0], "index [5] int32"),
        (1, lambda index: index[:2], "index [2, 5] int32"),
        (1, lambda index: index.t().contiguous().t(), "index [3, 5] int32 strided"),
        (2, lambda y: y[:5], "y [5] float32"),
        (3, lambda z: z[:3], "z [3, 3] int64"),
    ],
)
def test_what_does_not_fit_is_named(number, change, found):
    tensors = inputs()
    tensors[number] = change(tensors[number])
    with pytest.raises(ValueError) as error:
        CHECK(*tensors, N=4)
    expected = "op takes contiguous x [K] dtype, index [K, S] int32, y [2 * K] dtype or none, z [N, K], got "
    assert str(error.value).startswith(expected) and found in str(error.value) and "\n" not in str(error.value)
