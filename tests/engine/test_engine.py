"""The engine: tokens against transformers and against recomputing, the prefix cache, the dial, threads, refusals."""

import json
import shutil
import threading
from itertools import islice

import pytest
import torch
import transformers

import teal_fast
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.engine.cuda_step import plain_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.load import load
from teal_fast.engine.measure import Sample, cache_length
from teal_fast.engine.prefill import prefill
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.files import memory
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import CONFIG, fingerprint
from teal_fast.files.load import load_model
from teal_fast.files.memory import OutOfMemoryError
from teal_fast.sparse_model import KEEP_ALL, Phase, sparse_layers

PROMPT = [504, 2217, 282, 260]
GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    """A copy of the tiny checkpoint with a calibration beside it."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("calibrated") / "tiny")
    ids = torch.randint(3, 40_000, (8, 50), generator=torch.Generator().manual_seed(0)).tolist()
    Calibration(measure_quantiles(load_model(folder), ids), fingerprint(folder), {}).save(folder / CALIBRATION)
    return folder


@pytest.fixture
def engine(calibrated):
    return load(calibrated, context=128)[0]


def ask(prompt=PROMPT, sparsity=0.5, new_tokens=12, sampling=GREEDY, **more) -> Request:
    return Request(prompt, sampling, sparsity, new_tokens, **{"stop": ()} | more)


def answer(engine, *arguments, **more) -> list[int]:
    return [token.id for token in engine.stream(ask(*arguments, **more))]


@torch.no_grad()
def recomputed(model, new_tokens):
    """Greedy tokens by running the whole sequence anew for each: no cache, no one-token kernel."""
    tokens = list(PROMPT)
    for _ in range(new_tokens):
        tokens.append(model(torch.tensor([tokens]), phase=Phase(len(PROMPT)))[0, -1].argmax().item())
    return tokens[len(PROMPT) :]


# --- what it decodes


def test_dense_decoding_gives_the_tokens_of_transformers(tiny_hf, engine):
    peer = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)
    expected = peer.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 4), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert answer(engine, sparsity=0, new_tokens=40) == expected[0, len(PROMPT) :].tolist()


def test_sparse_decoding_equals_recomputing_the_sequence(engine):
    tokens = answer(engine, new_tokens=24)
    assert tokens == recomputed(engine.model, 24)
    for layer in sparse_layers(engine.model).values():
        layer.threshold.fill_(-1)
    assert tokens != recomputed(engine.model, 24)  # the sparsity above did change something


def test_a_prompt_of_one_token_is_dense(engine):
    (token,) = engine.stream(ask([5], 0.9, 1))
    with torch.no_grad():
        assert token.id == engine.model(torch.tensor([[5]]))[0, -1].argmax()
    assert (token.sparsity, engine.sparsity) == (0, 0.9)


def test_a_stop_token_ends_the_answer_and_is_its_last(engine):
    tokens = answer(engine, new_tokens=20)
    stopped = list(engine.stream(ask(new_tokens=20, stop={tokens[7]})))
    assert [token.id for token in stopped] == tokens[: tokens.index(tokens[7]) + 1]
    assert [token.finish_reason for token in stopped] == [None] * (len(stopped) - 1) + ["stop"]
    engine.stop = frozenset({tokens[7]})  # the checkpoint's own
    assert len(list(engine.stream(Request(PROMPT, GREEDY, 0.5, 20)))) == len(stopped)


def test_it_fills_the_context_to_its_end(engine):
    tokens = list(engine.stream(Request(PROMPT, GREEDY, stop=())))
    assert len(tokens) == 124 and tokens[-1].finish_reason == "length"


def test_seeds(engine):
    hot = {"sampling": Sampling(1.0), "new_tokens": 20}
    assert answer(engine, seed=1, **hot) == answer(engine, seed=1, **hot)
    assert answer(engine, seed=1, **hot) != answer(engine, seed=2, **hot)
    assert answer(engine, **hot) != answer(engine, **hot)  # without one, a new one each time


def test_logprobs_are_the_models_own(engine):
    found = list(engine.stream(ask(sparsity=0, sampling=Sampling(2.0, top_k=5), seed=3, logprobs=True)))
    ids = torch.tensor([PROMPT + [token.id for token in found]])
    with torch.no_grad():
        logprobs = engine.model(ids)[0].log_softmax(-1)
    expected = [logprobs[len(PROMPT) - 1 + i, token.id].item() for i, token in enumerate(found)]
    assert [token.logprob for token in found] == pytest.approx(expected, abs=1e-4)
    assert all(token.logprob is None for token in engine.stream(ask()))


def test_the_dial_turns_between_two_tokens(engine):
    stream = engine.stream(ask(new_tokens=12, sparsity=0))
    found = list(islice(stream, 4))
    engine.set_sparsity(0.9)
    found += stream
    assert [token.sparsity for token in found] == [0] * 4 + [0.9] * 8
    assert [token.id for token in found][:4] == answer(engine, sparsity=0, new_tokens=4)
    assert engine.held.dense == len(PROMPT) + 3


# --- what it remembers


def computed(engine, request) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were computed for it."""
    return [token.id for token in engine.stream(request)], len(request.prompt) - engine.reused


def test_a_second_turn_computes_only_what_is_new(engine, calibrated):
    first = answer(engine)
    prompt = [*PROMPT, *first, 7, 8, 9]
    tokens, rows = computed(engine, ask(prompt))
    assert rows == 3 + 1  # the last token of the answer was drawn, but not fed
    other = load(calibrated, context=128)[0]
    answer(other)
    assert tokens == answer(other, prompt)
    _, rows = computed(engine, ask([*prompt[:6], 11, 12]))
    assert rows == 2
    _, rows = computed(engine, ask([*prompt[:6], 11, 12]))
    assert rows == 1  # the same prompt again: its last token gives the logits
    _, rows = computed(engine, ask([1, 2, 3]))
    assert rows == 3


def test_a_dense_turn_reuses_only_what_was_made_densely(engine, calibrated):
    """A sparse turn, then a dense one: as a fresh dense run whose prompt is cut at the same place."""
    first = answer(engine, sparsity=0.9)
    prompt = [*PROMPT, *first, 7, 8, 9]
    tokens, rows = computed(engine, ask(prompt, 0, 20))
    assert rows == len(prompt) - len(PROMPT) and engine.held.dense == len(engine.held.ids)
    fresh = load(calibrated, context=128)[0]
    answer(fresh, PROMPT, 0, 1)
    assert tokens == answer(fresh, prompt, 0, 20)
    for ours, theirs in zip((*engine.cache.k, *engine.cache.v), (*fresh.cache.k, *fresh.cache.v), strict=True):
        assert torch.equal(ours[:, :, : len(engine.held.ids)], theirs[:, :, : len(fresh.held.ids)])
    sparse = load(calibrated, context=128)[0]
    answer(sparse, sparsity=0.5)
    assert (
        sparse.held.known(prompt, 0.4)
        == len(PROMPT)
        < sparse.held.known([*PROMPT, *answer(sparse, sparsity=0.5), 7], 0.5)
    )
    answer(sparse, [*PROMPT, *answer(sparse, sparsity=0.9), 7, 8, 9], 0.9, 20)  # a sparse turn builds on sparse keys
    assert sparse.held.dense == len(PROMPT) < len(sparse.held.ids)


def test_a_closed_or_failing_stream_leaves_a_sound_cache(engine, calibrated):
    stream = engine.stream(ask())
    begun = [token.id for token in islice(stream, 5)]
    stream.close()
    assert engine.held.ids == [*PROMPT, *begun[:-1]]

    def failing(model, cache, tokens, start, phase):
        prefill(model, cache, tokens, start, phase)
        raise KeyboardInterrupt

    engine.prefill, engine.by_steps, given = failing, 0, (engine.prefill, engine.by_steps)
    with pytest.raises(KeyboardInterrupt):
        answer(engine, [*PROMPT, 1, 2])
    engine.prefill, engine.by_steps = given
    assert engine.held.ids == PROMPT
    prompt = [*PROMPT, *begun, 7]
    other = load(calibrated, context=128)[0]
    answer(other, new_tokens=1)
    assert answer(engine, prompt) == answer(other, prompt)


def test_achieved_sparsity_is_that_of_the_decode_steps_and_changes_nothing(engine):
    tokens = answer(engine, new_tokens=40)
    kept = dict.fromkeys(sparse_layers(engine.model), 0)
    before = [cache.clone() for cache in (*engine.cache.k, *engine.cache.v)]
    achieved = engine.achieved_sparsity()
    assert all(torch.equal(a, b) for a, b in zip(before, (*engine.cache.k, *engine.cache.v), strict=True))
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, x, name=name: kept.update({name: kept[name] + (x[0].abs() > layer.threshold).sum().item()})
        )
        for name, layer in sparse_layers(engine.model).items()
    ]
    with torch.no_grad():
        for position, token in enumerate(tokens[:-1], start=len(PROMPT)):
            plain_step(engine.model, engine.cache, torch.tensor([[token]]), torch.tensor([position]))
    for hook in hooks:
        hook.remove()
    down = [name for name in kept if name.endswith("w2")]
    expected = 1 - sum(kept[name] for name in down) / (39 * 172 * len(down))
    assert achieved["down"] == pytest.approx(expected, abs=2e-3)
    assert set(achieved) == {"qkv", "o", "gate+up", "down", "all"}
    answer(engine, new_tokens=1)
    assert engine.achieved_sparsity() == {}


def test_a_sample_takes_the_time_of_every_step(engine):
    sample = Sample(len(PROMPT))
    tokens = list(sample.watch(engine.stream(ask(new_tokens=20))))
    assert tokens == sample.tokens and len(sample.decode_s) == 19
    assert sample.tokens_per_s > 0 and sample.first_token_s > 0
    assert [cache_length(engine.model, n) for n in (1, 256, 257, 500, 5000)] == [256, 256, 512, 512, 512]


# --- threads


@pytest.mark.parametrize("make_step", [fast_step, PlainStep], ids=["fast", "plain"])
def test_one_model_two_caches_two_threads(calibrated, make_step):
    """One prefills again and again while the other decodes: steps stay sparse, texts are those made alone."""
    model, calibration = load_model(calibrated), Calibration.load(calibrated / CALIBRATION)

    def make():
        return Engine(model, calibration, context=256, make_step=make_step)

    prompts = [list(range(9 + i, 60 + i)) for i in range(12)]
    decoding, prefilling = make(), make()
    alone = answer(decoding, sparsity=0.5, new_tokens=200)
    dense = answer(decoding, sparsity=0, new_tokens=200)
    firsts = [answer(prefilling, prompt, 0.5, 2) for prompt in prompts]
    assert alone != dense
    decoding, prefilling, found = make(), make(), {"first": [], "text": None}
    done = threading.Event()

    def prefill_on():
        while not done.is_set():
            prefilling.forget()
            found["first"].append([answer(prefilling, prompt, 0.5, 2) for prompt in prompts])

    thread = threading.Thread(target=prefill_on)
    thread.start()
    try:
        found["text"] = answer(decoding, sparsity=0.5, new_tokens=200)
    finally:
        done.set()
        thread.join()
    assert found["text"] == alone
    assert len(found["first"]) > 1 and all(first == firsts for first in found["first"])


def test_one_model_at_two_sparsities_in_two_threads(calibrated):
    """Weights are shared, thresholds are not: the dense text stays dense while the other is decoded sparsely."""
    model, calibration = load_model(calibrated), Calibration.load(calibrated / CALIBRATION)
    sparsities = (0, 0.9)
    alone = [answer(Engine(model, calibration, context=256), sparsity=s, new_tokens=200) for s in sparsities]
    engines, found = [Engine(model, calibration, context=256) for _ in sparsities], {}
    pairs = list(zip(engines, sparsities, strict=True))
    threads = [
        threading.Thread(target=lambda e=e, s=s: found.update({s: answer(e, sparsity=s, new_tokens=200)}))
        for e, s in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[s] for s in sparsities] == alone and alone[0] != alone[1]
    weights = [sparse_layers(engine.model)["layers.0.attention.wo"].weight.packed for engine in engines]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    assert all((layer.threshold == KEEP_ALL).all() for layer in sparse_layers(model).values())


def test_streams_of_several_threads_take_turns(engine):
    expected = {prompt: answer(engine, list(prompt)) for prompt in [(5, 6, 7), (8, 9), (10, 11, 12, 13)]}
    found = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: answer(engine, list(prompt))}))
        for prompt in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_thread_that_would_wait_for_itself_is_told(engine):
    stream = engine.stream(ask())
    next(stream)
    with pytest.raises(ValueError, match="in the middle of another answer: finish or close that stream first"):
        next(engine.stream(ask()))
    stream.close()
    assert len(answer(engine)) == 12


def test_a_stream_may_be_taken_on_by_another_thread(engine):
    expected, stream, found = answer(engine), engine.stream(ask()), []
    found.append(next(stream).id)
    thread = threading.Thread(target=lambda: found.extend(token.id for token in stream))
    thread.start()
    thread.join()
    assert found == expected == answer(engine)


# --- what it refuses


@pytest.mark.parametrize(
    "request_, said",
    [
        (lambda: ask(list(range(100)), new_tokens=60), "100 prompt and 60 new tokens do not fit the context of 128"),
        (lambda: ask([5] * 128, new_tokens=1), "128 prompt and 1 new tokens do not fit"),
        (lambda: ask([5, 60_000]), "token id 60000 is outside the model's vocabulary of 49152: leave that token out"),
        (lambda: ask([-1]), "outside the model's vocabulary"),
        (lambda: ask([]), "the prompt is empty"),
        (lambda: ask(sparsity=1.5), "sparsity 1.5: expected a fraction"),
        (lambda: ask(sparsity=float("nan")), "sparsity nan: expected a fraction"),
        (lambda: ask(new_tokens=0), "max_new_tokens 0: expected at least 1"),
        (lambda: ask(seed=10**20), "seed 100000000000000000000: expected a whole number of at most 64 bits"),
    ],
)
def test_bad_requests_are_refused_at_once(engine, request_, said):
    with pytest.raises(ValueError, match=said):
        engine.stream(request_())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 50, 0.9)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_logits_of_nan_and_inf_end_in_one_line(tiny, place, bad, sampling):
    """In the prompt's pass (place 0) or a step; nothing of what was computed then is kept."""
    engine, _ = load(tiny, context=64)
    prefill, step, places = engine.prefill, engine.step, iter(range(100))

    def spoil(compute):
        def spoiled(*arguments):
            logits = compute(*arguments).clone()
            if next(places) == place:
                logits[77] = bad
            return logits

        return spoiled

    engine.prefill, engine.step, engine.by_steps = spoil(prefill), spoil(step), 0
    stream = engine.stream(ask(sparsity=0, sampling=sampling))
    assert len(list(islice(stream, place))) == place
    with pytest.raises(ValueError, match=f"the logits after {len(PROMPT) + place} tokens hold NaN or inf: the check"):
        next(stream)
    assert engine.held.ids == [] and engine.achieved_sparsity() == {}
    assert len(answer(engine, sparsity=0)) == 12


def test_a_context_that_no_memory_holds_is_one_line(tiny, tmp_path, monkeypatch):
    """It is valid, as the config says: keys and values of so many tokens are refused before they are asked for."""
    for name, size in (("limit", 3_000_000_000), ("used", 2_000_000_000)):
        (tmp_path / name).write_text(str(size))
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, "limit", "used"),))
    folder = shutil.copytree(tiny, tmp_path / "long")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"max_position_embeddings": 1 << 24}))
    with pytest.raises(OutOfMemoryError) as refused:
        load(folder, context=1 << 30)
    assert str(refused.value) == (
        "out of memory for keys and values of 16,777,216 tokens (8.6 GB asked for, cpu has 1.0 GB left): lower the "
        "context (--max_seq_length, --max_new_tokens)"
    )


def test_a_prompt_that_no_memory_holds_is_one_line(engine):
    """The allocator really refuses; what the cache holds stays sound."""
    by_steps, given, expected = engine.by_steps, engine.prefill, answer(engine)

    def greedy(model, cache, tokens, start, phase):
        return torch.empty(1 << 50) if tokens.shape[1] > 3 else given(model, cache, tokens, start, phase)

    engine.prefill, engine.by_steps = greedy, 0
    with pytest.raises(
        OutOfMemoryError, match=r"^out of memory for a prompt of 7 tokens and its answer \(4,503,599\.6 GB"
    ):
        answer(engine, [*PROMPT[:2], 9, 9, 9, 9, 9])
    engine.prefill, engine.by_steps = given, by_steps
    assert answer(engine) == expected


def test_sparsity_needs_a_calibration(tiny):
    engine, _ = load(tiny)
    assert len(answer(engine, sparsity=0)) == 12
    for refused in (lambda: engine.stream(ask(sparsity=0.5)), lambda: engine.set_sparsity(0.5)):
        with pytest.raises(ValueError, match=r"sparsity 0\.5 needs a calibration"):
            refused()


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none")
    for bad, said in (({"dtype": "float16"}, "dtype 'float16' is not known"), ({"context": 0}, "context 0: expected")):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "none", **bad)


def test_the_package_offers_them():
    assert teal_fast.load is load and teal_fast.Engine is Engine and teal_fast.Request is Request
    with pytest.raises(AttributeError, match="no attribute 'engines'"):
        teal_fast.engines  # noqa: B018
