"""Batches: each answer as the request has it alone, its masks against dense math, what leaves, what is refused."""

import functools

import pytest
import torch
from torch import Tensor

from teal_fast.engine.batch import BatchCache, batch_logits
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.cuda_step import plain_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request, Token
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.steps import PlainStep
from teal_fast.files import memory
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.memory import OutOfMemoryError
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase, watch_inputs
from teal_fast.tests.engine import test_cpu_step as in_rows
from teal_fast.tests.engine import test_cpu_step_blocks as in_blocks

TOLERANCE = 2e-5  # fp32, logits of size 1: another order of summation
PARTED = 1e-3  # a margin below which the order of sums may decide which token is the likeliest
POSITIONS = (0, 63, 64, 130, 9, 200, 70, 5)
GREEDY, STEPS = Sampling(0.0), {"cpp": CpuStep, "plain": PlainStep}
CASES = ("llama", "ragged", "biases", "groups_of_7", "qwen3", "qwen2_window_on_a_layer", "mistral_small_window")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


def sequences(model: Transformer, count: int) -> BatchCache:
    """Random keys and values."""
    cache, generator = model.new_cache(count, in_rows.LENGTH), torch.Generator().manual_seed(2)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    return BatchCache(cache.k, cache.v, cache.frequencies)


@torch.no_grad()
def alone(model: Transformer, cache: BatchCache, tokens: Tensor, positions: Tensor, step=None) -> list[Tensor]:
    """Logits [n, vocab] of a step for each sequence by itself, and what it wrote."""
    step = step or (lambda cache, token, position: plain_step(model, cache, token, position))
    rows = [
        step(cache.sequence(row), tokens[row].view(1, 1), positions[row : row + 1]).float().clone()
        for row in range(len(tokens))
    ]
    return [torch.stack(rows), *(tensor.clone() for tensor in (*cache.k, *cache.v))]


@torch.no_grad()
def clear(model: Transformer, cache: BatchCache, positions: Tensor) -> Tensor:
    """A token for each sequence whose activations are not so near to thresholds that rounding decides."""
    found, before = [], [tensor.clone() for tensor in (*cache.k, *cache.v)]
    for row in range(len(positions)):
        for token in range(3 + row, model.args.vocab_size):
            near = []
            with watch_inputs(model, lambda _, layer, x, phase, near=near: near.append(
                (x.abs() - layer.threshold).abs().min().item()
            )):  # fmt: skip
                plain_step(model, cache.sequence(row), torch.tensor([[token]]), positions[row : row + 1])
            if min(near) > 1e-5:
                found.append(token)
                break
    for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
        tensor.copy_(old)
    return torch.tensor(found)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_step_is_that_of_each_sequence(case, count):
    """In fp32 at 50 %: masks of its own, its own keys, its own position."""
    model, positions = in_rows.make(case, 0.5), torch.tensor(POSITIONS[:count])
    cache = sequences(model, 8)
    tokens, before = clear(model, cache, positions), [tensor.clone() for tensor in (*cache.k, *cache.v)]
    expected = alone(model, cache, tokens, positions)
    for compute in (functools.partial(batch_logits, model, cache), CpuStep(model, cache).batch):
        for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
            tensor.copy_(old)
        found = [compute(tokens, positions), *cache.k, *cache.v]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4", "blocks"])
def test_dense_it_has_the_bits_of_each_sequence_in_cpp(format, threads, set_threads):
    set_threads(threads)
    dtype = torch.bfloat16 if format in ("bf16", "blocks") else torch.float32
    if format == "blocks":
        model = in_blocks.make("some", 0, dtype)
    else:
        model = in_rows.make("llama", 0, dtype, format=format if format in in_rows.FORMATS else None)
    cache, positions, tokens = sequences(model, 8), torch.tensor(POSITIONS), torch.arange(8) * 7 + 3
    before = [tensor.clone() for tensor in (*cache.k, *cache.v)]
    expected = alone(model, cache, tokens, positions, lambda cache, *given: CpuStep(model, cache)(*given))
    for tensor, old in zip((*cache.k, *cache.v), before, strict=True):
        tensor.copy_(old)
    step = CpuStep(model, cache)
    found = [step.batch(tokens, positions), *cache.k, *cache.v]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert step.achieved == 0


@pytest.mark.parametrize("format", ["int8", "blocks"])
def test_sparse_it_is_that_of_each_sequence_in_other_formats(format):
    model = in_blocks.make("tied", 0.5, torch.float32) if format == "blocks" else in_rows.make(
        "llama", 0.5, format=format
    )  # fmt: skip
    cache, positions = sequences(model, 4), torch.tensor(POSITIONS[:4])
    tokens = clear(model, cache, positions)
    expected = alone(model, cache, tokens, positions, lambda cache, *given: CpuStep(model, cache)(*given))[0]
    found = CpuStep(model, cache).batch(tokens, positions)
    assert ((found - expected).norm(dim=1) < 1e-3 * expected.norm(dim=1)).all()


def test_rows_are_read_that_any_sequence_keeps():
    model, positions = in_rows.make("llama", 0.5), torch.tensor(POSITIONS)
    step = CpuStep(model, sequences(model, 8))
    shares = []
    for count in (1, 2, 4, 8):
        step.batch(torch.arange(count) * 7 + 3, positions[:count])
        shares.append(1 - step.achieved)
    assert 0.4 < shares[0] < 0.6 and shares == sorted(shares) and 0.9 < shares[-1] < 1


# --- the engine


@functools.cache
def engine(step: str = "cpp", case: str = "llama", dtype: torch.dtype = torch.float32) -> Engine:
    model, calibration = in_rows.made(case, dtype)
    return Engine(model, calibration, context=96, make_step=STEPS[step])


def requests(count: int, sparsity: float, sampling: Sampling = GREEDY, **more) -> list[Request]:
    """Prompts of 1 to 40 tokens, answers that end at different times."""
    return [
        Request([(11 * i + 5 * j + 7) % 500 for j in range(1 + (13 * i) % 40)], sampling, sparsity, 9 + (5 * i) % 13,
                **{"stop": (), "seed": i} | more)
        for i in range(count)
    ]  # fmt: skip


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@torch.no_grad()
def check_greedy(model: Transformer, request: Request, answer: list[int]) -> None:
    """The answer is greedy by dense math with the token's own mask: no cache, no kernel, no other sequence."""
    text = [*request.prompt, *answer]
    logits = model(torch.tensor([text]), phase=Phase(len(request.prompt)))[0, len(request.prompt) - 1 : -1]
    margins = logits.amax(-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
    assert (margins <= PARTED).all(), margins


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("step", STEPS)
def test_dense_answers_are_those_of_single_streams(step, count):
    asked = requests(count, 0.0)
    found = engine(step).generate(asked)
    for request, tokens in zip(asked, found, strict=True):
        check_greedy(engine(step).model, request, ids(tokens))
        if step == "cpp":  # bit for bit
            assert ids(tokens) == ids(engine(step).stream(request))
        assert len(tokens) == request.max_new_tokens and tokens[-1].finish_reason == "length"
    assert len({tuple(ids(tokens)) for tokens in found}) == count


@pytest.mark.parametrize("case", ["llama", "qwen2_window_on_a_layer"])
@pytest.mark.parametrize("step", STEPS)
def test_sparse_answers_are_those_of_dense_math_with_masks(step, case):
    asked = requests(8, 0.5)
    found = engine(step, case).generate(asked)
    for request, tokens in zip(asked, found, strict=True):
        set_sparsity(engine(step, case).model, engine(step, case).calibration, 0.5)
        check_greedy(engine(step, case).model, request, ids(tokens))
        assert [token.sparsity for token in tokens] == [0.0] + [0.5] * (len(tokens) - 1)


def test_each_request_has_its_own_sampling_and_seed():
    own = [
        Sampling(1.0),
        Sampling(0.7, top_k=20),
        Sampling(1.2, top_p=0.9),
        Sampling(0.0, repetition_penalty=1.7),
        Sampling(0.9, min_p=0.1, presence_penalty=1.0, logit_bias=((7, 3.0),)),
    ]
    asked = [
        Request(request.prompt, sampling, 0.0, 20, (), seed, top_logprobs=seed)
        for seed, (request, sampling) in enumerate(zip(requests(5, 0.0), own, strict=True))
    ]
    expected = [list(engine().stream(request)) for request in asked]
    found = engine().generate(asked)
    for mine, theirs in zip(found, expected, strict=True):
        assert [token[:4] + token[5:] for token in mine] == [token[:4] + token[5:] for token in theirs]  # but achieved


def test_finished_answers_leave_the_step(monkeypatch):
    asked = requests(4, 0.0)
    whole = [ids(engine().stream(request)) for request in asked]
    stopped = [Request(asked[0].prompt, GREEDY, 0.0, 20, {whole[0][3]}), *asked[1:]]
    counts, batch = [], CpuStep.batch
    monkeypatch.setattr(CpuStep, "batch", lambda self, *given: counts.append(len(given[0])) or batch(self, *given))
    found = engine().generate(stopped)
    assert ids(found[0]) == whole[0][: whole[0].index(whole[0][3]) + 1] and found[0][-1].finish_reason == "stop"
    assert [ids(tokens) for tokens in found[1:]] == whole[1:]
    assert sum(counts) == sum(len(tokens) - 1 for tokens in found) and counts == sorted(counts, reverse=True)
    assert [token.finish_reason for token in engine().generate([Request([5], GREEDY, 0.0, 1, ())])[0]] == ["length"]


def test_a_caller_may_end_an_answer_or_all():
    asked = requests(3, 0.0)
    expected = [ids(tokens) for tokens in engine().generate(asked)]
    batch = engine().batch(asked)
    for number, _ in batch:
        if number == 1 and len(batch.tokens[1]) == 4:
            batch.finish(1)
    assert [ids(tokens) for tokens in batch.tokens] == [expected[0], expected[1][:4], expected[2]]
    batch = engine().batch(asked)
    next(batch)
    with pytest.raises(ValueError, match="in the middle of another answer"):
        engine().generate(asked)
    batch.close()
    assert list(batch) == [] and len(engine().generate(asked)) == 3


def test_equal_prompts_are_computed_once(monkeypatch):
    asked = [Request(range(5, 35), Sampling(1.0), 0.0, 12, (), seed) for seed in range(4)]
    expected = [ids(engine().stream(request)) for request in asked]
    engine().forget()
    read, start = [], Engine._start
    monkeypatch.setattr(Engine, "_start", lambda self, *given: read.append(given[0].prompt) or start(self, *given))
    found = [ids(tokens) for tokens in engine().generate(asked)]
    assert found == expected and len(set(map(tuple, found))) == 4 and len(read) == 1


def test_what_a_batch_skips_is_counted():
    asked, own = requests(4, 0.5), engine()
    apart = [own.achieved_sparsity() for request in asked if ids(own.stream(request))]
    batch = own.batch(asked)
    read = [token.achieved for _, token in batch if token.achieved is not None]
    found = own.achieved_sparsity(batch)
    weights = [request.max_new_tokens - 1 for request in asked]
    for kind, share in found.items():
        mean = sum(weight * by[kind] for weight, by in zip(weights, apart, strict=True)) / sum(weights)
        assert share == pytest.approx(mean, abs=0.01)
    assert min(read) < 0.25 < found["all"]  # four sequences together need more rows than each


def test_the_dial_turns_all():
    batch = engine().batch(requests(2, 0.0))
    for _ in range(4):
        next(batch)
    engine().set_sparsity(0.5)
    list(batch)
    assert [token.sparsity for token in batch.tokens[0]][:4] == [0, 0, 0.5, 0.5]
    assert set(engine().achieved_sparsity(batch)) == {"qkv", "o", "gate+up", "down", "all"}


@pytest.mark.parametrize(
    "asked, said",
    [
        ([], "a batch of no requests: give at least one"),
        ([Request([5]), Request([6], sparsity=0.5)], r"one sparsity, got 0\.0, 0\.5: make a batch of those of each"),
        ([Request([5]), Request([6], lossless=True)], "lossless request cannot be batched: leave lossless out"),
        ([Request([5]), Request([6] * 96)], "96 prompt and 1 new tokens do not fit the context of 96"),
        ([Request([5]), Request([500])], "token id 500 is outside the model's vocabulary"),
    ],
)
def test_bad_input_is_one_line_at_once(asked, said):
    with pytest.raises(ValueError, match=said) as error:
        engine().batch(asked)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_memory_is_refused(monkeypatch):
    size = sum(tensor.nbytes for tensor in (*engine().cache.k, *engine().cache.v))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * size)
    with pytest.raises(OutOfMemoryError, match=r"8 times keys and values of 96 tokens .* or answer fewer requests at"):
        engine().generate([Request([5 + i]) for i in range(8)])


def test_texts_that_are_turned_by_their_length_are_refused():
    config = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}
    model = in_rows.random_model(in_rows.TINY | config, "cpu", torch.float32, std=0.1)
    own = Engine(model, context=80)
    with pytest.raises(ValueError, match="more than 32 tokens by their own lengths, got one of 40: lower"):
        own.generate([Request([5] * 10, GREEDY, max_new_tokens=30)])
    asked = [Request([5 + i] * 10, GREEDY, 0.0, 20, ()) for i in range(3)]
    assert [ids(tokens) for tokens in own.generate(asked)] == [ids(own.stream(request)) for request in asked]


def test_damaged_logits_end_the_batch():
    model = in_rows.random_model(in_rows.TINY, "cpu", torch.float32, std=0.1)
    model.output.weight[3] = torch.nan
    with pytest.raises(ValueError, match="the logits after 1 tokens hold NaN or inf"):
        Engine(model, context=32).generate([Request([5], GREEDY), Request([6], GREEDY)])
