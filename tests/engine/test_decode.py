import pytest
import torch

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine import decode
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.decode import (
    FEWEST_ROWS,
    CapturedStep,
    Sample,
    can_fuse,
    compiled_prefill,
    decode_step,
    fast_step,
    fused_step,
    prefill,
    prompt_logits,
)
from teal_fast.engine.sampling import Sampling
from teal_fast.files.calibration import set_sparsity
from teal_fast.kernels import compact_gemv, decode_attention, gate_up
from teal_fast.kernels.backend import INTERPRETED, triton
from teal_fast.kernels.native import library
from teal_fast.sparse_model import leading_dense, sparse_layers
from teal_fast.tests.models import TINY
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output, output_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN = TINY | {"model_type": "qwen2", "tie_word_embeddings": True}
MISTRAL = TINY | {"model_type": "mistral", "sliding_window": 6}
PROMPT = list(range(5, 14))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after another: fewer and larger ones here, those of use in tests/kernels."""
    if INTERPRETED:
        monkeypatch.setattr(decode_attention, "PROGRAMS", 8)
        for module in (compact_gemv, gate_up):
            for format in module.DEFAULTS:
                monkeypatch.setitem(module.DEFAULTS, format, (1, 128, 32, 1))


def make(config: dict, dtype: torch.dtype, sparsity: float, length: int = 64):
    """A random model, calibrated, with PROMPT in its cache."""
    model = random_model(config, DEVICE, dtype, std=0.1)
    calibration = calibrate_on_random_tokens(model, tokens=256)
    set_sparsity(model, calibration, sparsity)
    model.setup_caches(1, length)
    with torch.no_grad():
        prefill(model, torch.tensor([PROMPT], device=DEVICE))
    return model, calibration


@torch.no_grad()
def follow(model, step, tokens: int) -> torch.Tensor:
    """Logits [tokens, vocab] of the greedy continuation of PROMPT."""
    token, logits = 7, []
    for position in range(len(PROMPT), len(PROMPT) + tokens):
        place = torch.tensor([position], device=DEVICE)
        logits.append(step(model, torch.tensor([[token]], device=DEVICE), place).float().clone())
        token = int(logits[-1].argmax())
    return torch.stack(logits)


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("config", [TINY, QWEN, MISTRAL], ids=["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_fused_step_equals_the_plain_one(config, sparsity):
    model, _ = make(config, torch.float32, sparsity)
    plain, fused = follow(model, decode_step, 2), follow(model, fused_step, 2)
    assert plain.std() > 0.1
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 64)], ids=["int8", "int4"])
def test_fused_step_with_quantized_weights(format):
    model, _ = make(TINY | {"intermediate_size": 256}, torch.float32, 0.5)
    for layer in sparse_layers(model).values():
        layer.weight = format.pack(layer.weight.dequantize())
    model.output = Int8Output.pack(model.output.weight)
    fused = follow(model, fused_step, 1)
    for layer in sparse_layers(
        model
    ).values():  # the plain step in int4 rounds factors on the CPU, which this one does not
        layer.weight = DenseWeight(layer.weight.dequantize())
    output = torch.nn.Linear(model.args.dim, model.args.vocab_size, bias=False)
    output.weight = torch.nn.Parameter(output_weight(model.output), requires_grad=False)
    model.output = output
    plain = follow(model, decode_step, 1)
    assert plain.std() > 0.1
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-3)  # products take 16 bits of what they are given


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=str)
def test_fused_step_in_half_precision(dtype, tolerance):
    model, _ = make(TINY, dtype, 0)  # dense: on a threshold, the last bit of a rounding decides
    plain, fused = follow(model, decode_step, 2), follow(model, fused_step, 2)
    assert (fused - plain).norm() / plain.norm() < tolerance


def test_a_cache_that_is_too_small_is_refused():
    model, _ = make(TINY, torch.float32, 0)
    tokens = decode.decode(
        model, decode_step, PROMPT, 60, Sampling(0.0), torch.Generator(DEVICE), frozenset(), Sample(len(PROMPT))
    )
    with pytest.raises(ValueError, match="9 prompt and 60 new tokens do not fit the cache of 64"):
        next(tokens)


def test_can_fuse():
    def answer(**changes):
        return can_fuse(random_model(TINY | changes, DEVICE, torch.float32))

    assert answer() and answer(model_type="qwen2") and answer(model_type="mistral")
    assert not answer(model_type="qwen3")  # normalises q and k
    assert not answer(mlp_bias=True) and not answer(attention_bias=True)
    assert not answer(head_dim=48) and not answer(head_dim=16)


@pytest.mark.parametrize("config", [TINY, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 5, 11, 12, 13])
@torch.no_grad()
def test_short_prompts_are_padded_and_answered_as_they_are(config, tokens):
    model, _ = make(config, torch.float32, 0)
    prompt, rows = torch.arange(5, 5 + tokens, device=DEVICE)[None], []

    def compute(model, padded, last):
        rows.append(padded.shape[1])
        return prompt_logits(model, padded, last)

    answers = []
    for answer in (
        lambda: prefill(model, prompt, compute),
        lambda: prompt_logits(model, prompt, prompt.new_tensor([-1])),
    ):
        model.setup_caches(1, 64)
        with leading_dense(model, tokens):
            first = answer()
        token, place = torch.tensor([[7]], device=DEVICE), torch.tensor([tokens], device=DEVICE)
        answers.append(torch.stack([first, *(decode_step(model, token, place + i) for i in range(3))]))
    assert rows == [max(tokens, FEWEST_ROWS)] and answers[0].std() > 0.1
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_may_be_shorter_than_the_padding():
    model, _ = make(TINY, torch.float32, 0)
    prompt = torch.arange(5, 9, device=DEVICE)[None]
    expected = prefill(model, prompt)
    for length in (4, 7):
        model.setup_caches(1, length)
        torch.testing.assert_close(prefill(model, prompt), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU")
def test_the_fast_step_on_the_cpu_is_the_compiled_one_or_plain(monkeypatch):
    model, _ = make(TINY, torch.float32, 0)
    assert library() is None or isinstance(fast_step(model), CpuStep)
    monkeypatch.setattr(decode, "library", lambda: None)
    assert fast_step(model) is decode_step


@torch.no_grad()
def test_compiled_prefill_serves_every_length():
    model, _ = make(TINY | {"num_hidden_layers": 1}, torch.float32, 0.5)
    compiled = compiled_prefill()
    prompts = [torch.arange(5, 5 + length, device=DEVICE)[None] for length in (9, 23, 40, 2, 1)]
    compiled(model, prompts[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in prompts:
            torch.testing.assert_close(compiled(model, prompt), prefill(model, prompt), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, QWEN, MISTRAL, TINY | {"model_type": "qwen3"}])
def test_captured_step_equals_eager_at_every_sparsity(config):
    model, calibration = make(config, torch.bfloat16, 0)
    captured = CapturedStep(model)
    eager = fused_step if can_fuse(model) else decode_step
    for sparsity in (0, 0.5, 0.25, 0):  # set between replays of one graph
        set_sparsity(model, calibration, sparsity)
        assert torch.equal(follow(model, captured, 20), follow(model, eager, 20))


@pytest.mark.gpu
def test_a_thousand_steps_repeat():
    model, _ = make(TINY, torch.bfloat16, 0.5, length=1024)
    captured, runs = CapturedStep(model), []
    for _ in range(2):
        sample = Sample(len(PROMPT))
        stop, greedy = frozenset(), Sampling(0.0)
        runs.append(list(decode.decode(model, captured, PROMPT, 1000, greedy, torch.Generator(DEVICE), stop, sample)))
    assert runs[0] == runs[1] and len(set(runs[0])) > 10


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_ahead_of_the_host_gives_the_same_tokens():
    model, _ = make(TINY, torch.float32, 0.5)
    expected = [int(prefill(model, torch.tensor([PROMPT], device=DEVICE)).argmax())]
    for position in range(len(PROMPT), len(PROMPT) + 11):
        token, place = torch.tensor([expected[-1:]], device=DEVICE), torch.tensor([position], device=DEVICE)
        expected.append(int(fused_step(model, token, place).argmax()))
    captured, greedy = CapturedStep(model), Sampling(0.0)
    for stop in (frozenset(), frozenset({expected[8]})):
        sample = Sample(len(PROMPT))
        tokens = list(decode.decode(model, captured, PROMPT, 12, greedy, torch.Generator(DEVICE), stop, sample))
        assert tokens == (expected[: expected.index(expected[8])] if stop else expected)
        assert len(sample.decode_s) == len(sample.tokens) - 1
