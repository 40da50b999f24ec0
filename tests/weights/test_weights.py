"""Every format of storage against plain products with the weight it stands for."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teal_fast.files.checkpoint import METADATA
from teal_fast.files.load import read_format
from teal_fast.kernels.int4 import unpack_int4
from teal_fast.quantization.gptq import factorize, gptq_round
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import BlockFormat, Format
from teal_fast.weights.output import Int8Output, output_weight

K, N = 80, 256
FORMATS = {"int8": Format("int8"), "int4": Format("int4", 64), "int4 in groups of 128": Format("int4", 128)}
# What rounding adds to normal weights, as a share of their norm: a step is 2 x 2.6 sigma / 2^bits, an error in the mean
# a step / sqrt(12).
ROUNDED = {"int8": 0.008, "int4": 0.11}
# A sum of K products in another order, in fp32, relative to the size of the sums; one rounding more in half precision.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# C++ rounds the factors of int4 rows to 8 bits: each is off by up to 1/254 of the largest of its eight, which is about
# twice a usual one, so by 1/220 in the mean (a rounding's size is its range / sqrt(12)).
FACTORS = 1 / 127


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name, dtype=torch.float32):
    return DenseWeight(draw(K, N, dtype=dtype)) if name == "dense" else FORMATS[name].pack(draw(K, N, dtype=dtype))


def assert_near(found, expected, share):
    """Equal but for an error of this share of the size of the numbers."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= share * expected.double().norm()


def layout(module):
    return {name: (p.dtype, p.shape, p.requires_grad) for name, p in module.named_parameters()}


every_format = pytest.mark.parametrize("name", ["dense", *FORMATS])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_follows_the_formula_and_is_near_the_weight(name):
    weight, format = make(name), FORMATS[name]
    assert (weight.format, weight.in_features, weight.out_features) == (format.name, K, N)
    values = weight.packed.float() if format.name == "int8" else unpack_int4(weight.packed, N, format.group)
    torch.testing.assert_close(weight.dequantize(), values * weight.scale, rtol=1e-6, atol=0)
    assert_near(weight.dequantize(), draw(K, N), ROUNDED[format.name])


def test_dequantize_of_dense_is_the_weight():
    assert torch.equal(make("dense").dequantize(), draw(K, N))


@every_format
@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)], ids=str)
def test_matmul(name, dtype, bias, shape):
    weight, x = make(name, dtype), draw(*shape, K, seed=1, dtype=dtype)
    bias = draw(N, seed=2, dtype=dtype) * 5 if bias else None
    expected = F.linear(x.float(), weight.dequantize().float().t(), None if bias is None else bias.float())
    y = weight.matmul(x, bias)
    assert y.dtype == dtype
    assert_near(y, expected, TOLERANCE[dtype])


@every_format
@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 100.0])  # all kept, all again, half of them, none
def test_sparse_matvec(name, dtype, bias, threshold):
    weight, x = make(name, dtype), draw(K, seed=1, dtype=dtype)
    bias = draw(N, seed=2, dtype=dtype) * 5 if bias else None
    thresholds = torch.full((K,), threshold)
    thresholds[:4] = thresholds[:4].clamp(max=50) * torch.tensor([0.0, 0.5, 1.0, 2.0])
    kept = torch.where(x.float().abs() > thresholds, x.float(), 0)
    y = weight.sparse_matvec(x, thresholds, bias)
    assert y.dtype == dtype
    expected = kept @ weight.dequantize().float() + (0 if bias is None else bias.float())
    assert_near(y, expected, 2 * TOLERANCE[dtype] + (FACTORS if weight.format == "int4" else 0))


@pytest.mark.parametrize("name", FORMATS)
def test_dropped_rows_are_not_read(name):
    weight, x, threshold = make(name), draw(K, seed=1), torch.full((K,), 0.7)
    before = weight.sparse_matvec(x, threshold)
    weight.packed[x.abs() <= 0.7] = 99
    assert torch.equal(weight.sparse_matvec(x, threshold), before)


@pytest.mark.parametrize("name", FORMATS)
def test_empty_weights_have_the_layout_of_packed_ones(name):
    empty, packed = FORMATS[name].empty(K, N), make(name)
    assert layout(empty) == layout(packed)
    for attribute in ("format", "in_features", "out_features"):
        assert getattr(empty, attribute) == getattr(packed, attribute)


def test_empty_output_layers_have_the_layout_of_packed_ones():
    assert layout(Int8Output.empty(300, K)) == layout(Int8Output.pack(draw(300, K)))


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_has_less_output_error_than_nearest(name):
    x = draw(500, K // 4, seed=3) @ draw(K // 4, K, seed=4) + draw(500, K, seed=5)
    exact = x @ draw(K, N)
    round_to = partial(gptq_round, factor=factorize(x.t() @ x, len(x)))
    packed = FORMATS[name].pack(draw(K, N)), FORMATS[name].pack(draw(K, N), x.square().sum(0), round_to)
    plain, calibrated = (weight.matmul(x) - exact for weight in packed)
    assert calibrated.norm() < 0.8 * plain.norm()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_format_is_what_its_metadata_say(format):
    assert read_format(Path("folder"), METADATA | format.metadata()) == (format, "packed")


def test_format_of_a_gguf_file_is_what_its_metadata_say():
    parts = {"layers.0.attention.wqkv": (("Q4_K", 96), ("Q6_K", 32)), "tok_embeddings": (("Q8_0", 100),)}
    format = BlockFormat("Q4_K_M", parts, torch.bfloat16)
    assert read_format(Path("folder"), METADATA | format.metadata()) == (format, "weight")
    wide = BlockFormat("Q4_K_M", parts, torch.float32)
    assert read_format(Path("folder"), METADATA | format.metadata(), torch.float32) == (wide, "weight")
    assert METADATA["version"] == "2" and format.metadata()["version"] == "3"  # which older releases refuse
    assert read_format(Path("folder"), METADATA) == (None, "weight")


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_row_scales_of_int4_are_at_most_1(size):
    weight = draw(K, N) * size
    packed = Format("int4", 64).pack(weight)
    scales = packed.packed[:, N // 2 : N // 2 + 2 * (N // 64)].contiguous().view(torch.bfloat16).float().abs()
    assert scales.amax(0).min() > 0.5 and scales.max() <= 1
    assert (packed.dequantize() - weight).norm() < ROUNDED["int4"] * 1.2 * weight.norm()


@pytest.mark.parametrize(
    "outputs, format", [(N + 64, Format("int4", 128)), (N, Format("int4", 96)), (N, Format("int4", 0))]
)
def test_groups_that_do_not_fit_are_refused(outputs, format):
    for make_weight in (lambda: format.pack(draw(K, outputs)), lambda: format.empty(K, outputs)):
        with pytest.raises(ValueError, match=f"{outputs} outputs do not fall into groups of {format.group}"):
            make_weight()


@pytest.mark.parametrize("outputs", [4, 12, 77])
def test_outputs_that_do_not_suit_int8_are_refused(outputs):
    for make_weight in (lambda: Format("int8").pack(draw(K, outputs)), lambda: Format("int8").empty(K, outputs)):
        with pytest.raises(ValueError, match=str(outputs)):
            make_weight()


@every_dtype
@pytest.mark.parametrize("shape", [(), (1, 1), (3,), (2, 5)], ids=str)
def test_int8_output(dtype, shape):
    weight, x = draw(300, K, dtype=dtype), draw(*shape, K, seed=1, dtype=dtype)
    output = Int8Output.pack(weight)
    assert_near(output_weight(output), weight, ROUNDED["int8"])
    y = output(x)
    assert y.dtype == dtype
    # One token is rounded to 16 bits, so each entry by up to 1/65534 of the largest.
    assert_near(y, x.float() @ output_weight(output).t(), TOLERANCE[dtype] + 1e-4)


def test_output_weight_of_a_plain_layer():
    linear = nn.Linear(8, 5, bias=False, dtype=torch.bfloat16)
    assert torch.equal(output_weight(linear), linear.weight.float()) and output_weight(linear).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (2, 64), (1, 129)])  # two code paths: up to 128 tokens, and more
def test_prompts_on_cuda(name, shape):
    weight, x = make(name).cuda(), draw(*shape, K, seed=1).cuda()
    expected = x @ weight.dequantize()
    assert_near(weight.matmul(x), expected, 1e-5)
    x.requires_grad_()
    found = weight.matmul(x)
    assert_near(found, expected, 1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert_near(gradient, weight.dequantize().sum(1).expand_as(x), 1e-5)
