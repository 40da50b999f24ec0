"""Products of several tokens: in bf16 against fp64, on any number of threads, by columns, and on other processors."""

import time

import pytest
import torch
from torch import Tensor

import teal_fast.weights.product
from teal_fast.kernels.native import supported
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output, output_weight
from teal_fast.weights.product import BF16_PRODUCTS, has_bf16_products, product, product_by_columns, product_dtype

needs_bf16 = pytest.mark.skipif(not BF16_PRODUCTS, reason="this processor is not fast at bf16")
SIZES = [(65, 1), (100, 300), (576, 960), (4096, 128)]
MAKE = {
    "dense": lambda weight: DenseWeight(weight.bfloat16()),
    "fp16": lambda weight: DenseWeight(weight.half()),
    "int8": Format("int8").pack,
    "int4": Format("int4", 64).pack,
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def without_bf16(monkeypatch):
    """As on a processor without bf16 products."""
    monkeypatch.setattr(teal_fast.weights.product, "BF16_PRODUCTS", False)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(teal_fast.weights.product, "VALUES_AT_ONCE", 20_000)


@needs_bf16
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("K, N", SIZES)
def test_bf16_is_added_in_fp32(K, N, biased):
    x, weight = draw(1, 33, K, dtype=torch.bfloat16), draw(K, N, seed=1, dtype=torch.bfloat16)
    bias = draw(N, seed=2, dtype=torch.bfloat16) if biased else None
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    # One rounding of the sum, bias included; and of each term in fp32, by chance in both directions.
    order = 2**-24 * K * (x.double().abs() @ weight.double().abs()).amax() / K**0.5
    found = product(x, weight, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=order.item())


def fp32_depends_on_threads(set_threads) -> bool:
    """Whether PyTorch's own product does: MKL's on some processors."""
    x, weight, found = draw(13, 1000), draw(1000, 128, seed=1), []
    for threads in (1, 2):
        set_threads(threads)
        found.append(x @ weight)
    return not torch.equal(*found)


@pytest.mark.parametrize("name", MAKE)
def test_any_number_of_threads_gives_the_same_bits(name, set_threads, small_pieces):
    weight = MAKE[name](draw(1000, 128) / 30)
    if "amx" in supported():
        pytest.skip("products depend on threads on processors with AMX (findings/onednn-amx-threads.sh)")
    for dtype in (torch.bfloat16, torch.float16):
        exact_rows = product_dtype(draw(1, dtype=dtype)) == torch.bfloat16
        if not exact_rows and fp32_depends_on_threads(set_threads):
            continue
        x = draw(40, 1000, seed=1, dtype=dtype)
        for rows in (1, 2, 3, 5, 8, 11, 12, 13, 33) if exact_rows else (12, 13, 33):  # engine/prefill.py pads others
            found = []
            for threads in (1, 2, 3, 4, 7):
                set_threads(threads)
                found.append(weight.matmul(x[:rows]))
            assert all(torch.equal(found[0], other) for other in found[1:])


def recorded(weight: Tensor, calls: list) -> teal_fast.weights.product.Columns:
    def columns(begin: int, end: int, dtype: torch.dtype) -> Tensor:
        calls.append((begin, end, dtype))
        return weight[:, begin:end].to(dtype)

    return columns


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K, N", SIZES)
def test_by_columns_is_the_whole_product(K, N, dtype, biased, small_pieces):
    x, weight, calls = draw(2, 6, K, dtype=dtype), draw(K, N, seed=1, dtype=dtype), []
    bias = draw(N, seed=2, dtype=dtype) if biased else None
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    found = product_by_columns(x, recorded(weight, calls), N, bias)
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found.double() - exact).norm() <= max(torch.finfo(dtype).eps, 1e-6) * exact.norm()
    ends = [0, *(end for _, end, _ in calls)]
    assert [begin for begin, _, _ in calls] == ends[:-1] and ends[-1] == N
    assert all((end - begin) * K <= max(20_000, 64 * K) for begin, end, _ in calls)
    assert {dtype for _, _, dtype in calls} == {product_dtype(x)}


def test_half_precision_is_computed_in_fp32_elsewhere(without_bf16):
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = draw(12, 576, dtype=dtype), draw(576, 320, seed=1, dtype=dtype)
        assert product_dtype(x) == torch.float32
        assert torch.equal(DenseWeight(weight).matmul(x), (x.float() @ weight.float()).to(dtype))


@needs_bf16
def test_bf16_is_computed_in_bf16_and_nothing_else():
    for dtype, expected in ((torch.bfloat16,) * 2, (torch.float16, torch.float32), (torch.float32,) * 2):
        assert product_dtype(draw(3, dtype=dtype)) == expected


@pytest.mark.parametrize(
    "name, amx, bf16, answer",
    [
        ("Intel Xeon", True, True, True),
        ("Intel Xeon", False, True, False),
        ("AMD EPYC", False, True, True),
        ("AMD EPYC", False, False, False),
    ],
)
def test_pytorch_says_what_the_processor_has(monkeypatch, name, amx, bf16, answer):
    found = {"cpu_name": name, "amx_bf16": amx, "avx512_bf16": bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert has_bf16_products() == (answer and torch.backends.mkldnn.is_available())


def test_bf16_is_taken_where_it_is_faster_here(set_threads):
    """By far: a busy machine's times vary, and half as fast or twice is not what the rule is about."""
    set_threads(1)
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = draw(200, 1024, dtype=dtype), draw(1024, 1024, seed=1, dtype=dtype)
        runs = []
        for _ in range(15):
            begin = time.thread_time()
            product(x, weight)
            runs.append(time.thread_time() - begin)
        times.append(min(runs))
    assert times[0] < 1.3 * times[1] if BF16_PRODUCTS else times[0] > 0.7 * times[1]


def test_a_pytorch_that_does_not_say_has_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bf16_products()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_gradients_pass(name, elsewhere, request, small_pieces):
    if elsewhere:
        request.getfixturevalue("without_bf16")
    weight = MAKE[name](draw(300, 128))
    x = draw(2, 5, 300, seed=1, dtype=torch.float16 if name == "fp16" else torch.bfloat16).requires_grad_()
    (gradient,) = torch.autograd.grad(weight.matmul(x).float().square().sum() / 2, x)
    dense = weight.dequantize().double()
    expected = (x.detach().double() @ dense) @ dense.t()
    assert (gradient.double() - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize("name", MAKE)
def test_products_are_one_graph(name, small_pieces):
    torch._dynamo.reset()
    weight, x = MAKE[name](draw(300, 128)), draw(2, 5, 300, seed=1, dtype=torch.bfloat16)
    found = torch.compile(weight.matmul, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, weight.matmul(x))
    torch._dynamo.reset()


def test_int8_output_of_several_tokens_never_widens_whole(small_pieces, monkeypatch):
    output, sizes, columns = Int8Output.pack(draw(700, 64)), [], Int8Output._columns
    monkeypatch.setattr(Int8Output, "_columns", lambda self, *place: sizes.append(place) or columns(self, *place))
    x = draw(3, 64, seed=1)
    torch.testing.assert_close(output(x), x @ output_weight(output).t(), rtol=1e-5, atol=1e-4)
    assert len(sizes) == 3
