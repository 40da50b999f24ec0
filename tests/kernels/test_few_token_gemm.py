"""The product of few tokens: what it computes, and that a token's bits are its own. Without CUDA, Triton's kernel."""

import pytest
import torch

from teal_fast.kernels.few_token_gemm import (
    COLUMNS,
    MOST_TOKENS,
    ROWS,
    _few_token_gemm_cuda,
    constants,
    cut,
    few_token_gemm,
    scale_bytes,
)
from teal_fast.kernels.nvrtc import compile_cuda
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.quantized_gemm import quantized_gemm_reference
from teal_fast.tests.kernels.compacted import DEVICE, normal
from teal_fast.tests.kernels.quantized import quantized
from teal_fast.tests.kernels.test_quantized_gemm import TOLERANCE, make
from teal_fast.tests.kernels.test_stage_shape import has_nvrtc

SHAPES = [(4096, 6144), (4096, 4096), (14336, 4096), (4096, 28672), (2048, 3072), (576, 960), (64, 64)]


@pytest.mark.parametrize("K, N", SHAPES)
def test_clusters_fit_a_gpu_and_have_channels(K, N):
    ctas, splits = cut(K, N, 132)
    assert ctas // splits * COLUMNS >= N  # every column has a CTA
    assert splits == 1 or ctas <= 115  # clusters of them fit an H200 at once
    assert (splits - 1) * ROWS < K  # none is without channels


@pytest.mark.parametrize("group", [64, 128, 192, 320, 14336])
def test_a_box_of_scales_holds_those_of_a_tile(group):
    for tile in range(40):
        first, last = ((tile * COLUMNS + at) // group * 2 for at in (0, COLUMNS - 1))
        assert first // 16 * 16 + scale_bytes(group) >= last + 2


@pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC here (nvidia-cuda-nvrtc)")
@pytest.mark.parametrize(
    "bits, group, fp16, tiles",
    [(16, 0, False, 1), (16, 0, True, 2), (8, 0, False, 1), (8, 0, True, 2), (4, 192, False, 1), (4, 64, True, 2)],
)
def test_the_source_compiles(bits, group, fp16, tiles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = compile_cuda("few_token_gemm.cu", "sm_90", constants(bits, group, fp16, tiles))
    assert code.startswith(b"\x7fELF")


@pytest.mark.parametrize("tokens, K, N, group", [(1, 96, 64, 0), (16, 100, 208, 0), (5, 64, 128, 64)])
def test_matches_reference_everywhere(tokens, K, N, group):
    inputs = make(tokens, K, N, group, torch.bfloat16)
    found, expected = _few_token_gemm_cuda(*inputs), quantized_gemm_reference(*inputs)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[torch.bfloat16] / 8, atol=TOLERANCE[torch.bfloat16])


def test_floats_everywhere():
    x, weight, bias = (
        normal(5, 96, dtype=torch.bfloat16),
        normal(96, 64, dtype=torch.bfloat16, seed=1),
        normal(64, seed=2),
    )
    bias = bias.bfloat16()
    expected = x.float() @ weight.float() + bias.float()
    torch.testing.assert_close(few_token_gemm(x, PackedWeight(weight), bias).float(), expected, rtol=0.01, atol=0.1)
    with pytest.raises(ValueError, match=r"^few_token_gemm takes a weight \[K, N\] in torch.bfloat16, or in int8 or"):
        few_token_gemm(x, PackedWeight(weight.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [None, 0, 64, "N"])
@pytest.mark.parametrize("K, N", [*SHAPES, (976, 1088), (1536, 576)])
def test_a_token_has_the_same_bits_among_others_as_alone(K, N, group, dtype):
    x, bias = normal(MOST_TOKENS, K, dtype=dtype), normal(N, dtype=dtype, seed=1)
    if group is None:
        weight = PackedWeight(normal(K, N, dtype=dtype, seed=2))
        expected = (x.float() @ weight.packed.float() + bias.float()).to(dtype)
    else:
        weight = quantized(K, N, N if group == "N" else group).weight
        expected = quantized_gemm_reference(x, weight, bias)
    whole = few_token_gemm(x, weight, bias)
    # Row scales and what they are multiplied by are rounded to the type, as in quantized_gemm; then sums are.
    allowed = 2 * torch.finfo(dtype).eps * (expected.float().abs() + expected.float().std())
    assert ((whole.float() - expected.float()).abs() <= allowed).all()
    others = x.roll(3, 0) * 7
    for first, count in ((0, 1), (3, 1), (2, 5), (0, 8), (5, 9)):
        part = x[first : first + count]
        assert torch.equal(few_token_gemm(part.contiguous(), weight, bias), whole[first : first + count])
        moved = torch.cat((part, others[: MOST_TOKENS - count]))
        assert torch.equal(few_token_gemm(moved, weight, bias)[:count], whole[first : first + count])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [None, 0, 64, "N"])
@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
def test_thousands_of_launches_give_the_same_bits(tokens, group, dtype):
    """A block overwritten while a warp still read it once changed up to 2 % of them, with one group a row."""
    K, N = 14336, 4096
    x = normal(tokens, K, dtype=dtype)
    if group is None:
        weight = PackedWeight(normal(K, N, dtype=dtype, seed=2))
    else:
        weight = quantized(K, N, N if group == "N" else group).weight
    first = few_token_gemm(x, weight)
    others = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(4000):
        others += (few_token_gemm(x, weight) != first).any()
    assert others.item() == 0


def test_bad_input_is_named():
    x, weight, _ = make(MOST_TOKENS + 1, 64, 64, 0, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^few_token_gemm takes 1 to 16 tokens, got 17$"):
        few_token_gemm(x, weight)
    with pytest.raises(ValueError, match=r"^few_token_gemm takes contiguous "):
        few_token_gemm(x[:2, :32].contiguous(), weight)
    assert x.device.type == DEVICE
