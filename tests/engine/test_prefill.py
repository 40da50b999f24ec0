"""Prompts: padded when short, from their start or on a cache that is filled, compiled for any length."""

import pytest
import torch

import teal_fast.weights.product
from teal_fast.engine import prefill as prompts
from teal_fast.engine.cuda_step import plain_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import (
    FEWEST_BF16_ROWS,
    FEWEST_ROWS,
    compiled_prefill,
    fewest_rows,
    longest_piece,
    prefill,
    prompt_logits,
)
from teal_fast.engine.request import Request
from teal_fast.kernels.native import supported
from teal_fast.sparse_model import DENSE
from teal_fast.tests.engine import test_cpu_step_blocks as in_blocks
from teal_fast.tests.engine.random_models import DEVICE, MISTRAL, PROMPT, make
from teal_fast.tests.models import TINY


@pytest.mark.parametrize("config", [TINY, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 5, 11, 12, 13])
@torch.no_grad()
def test_short_prompts_are_padded_and_answered_as_they_are(config, tokens):
    model, _, _ = make(config, torch.float32, 0)
    prompt, rows = torch.arange(5, 5 + tokens, device=DEVICE)[None], []

    def compute(model, cache, padded, input_pos, last, phase):
        rows.append(padded.shape[1])
        return prompt_logits(model, cache, padded, input_pos, last, phase)

    answers = []
    for answer in (
        lambda cache: prefill(model, cache, prompt, compute=compute),
        lambda cache: prompt_logits(model, cache, prompt, None, prompt.new_tensor([-1]), DENSE)[0],
    ):
        cache = model.new_cache(1, 64)
        first = answer(cache)
        token, place = torch.tensor([[7]], device=DEVICE), torch.tensor([tokens], device=DEVICE)
        answers.append(torch.stack([first, *(plain_step(model, cache, token, place + i) for i in range(3))]))
    assert rows == [max(tokens, FEWEST_ROWS)] and answers[0].std() > 0.1
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
@pytest.mark.parametrize("elsewhere", [False, True])
@torch.no_grad()
def test_prompts_in_bf16_have_the_same_bits_on_any_number_of_threads(elsewhere, monkeypatch, set_threads):
    if not elsewhere and "amx" in supported():
        pytest.skip("oneDNN's products depend on threads where it has AMX (findings/onednn-amx-threads.sh)")
    if elsewhere:  # a processor without bf16 products
        monkeypatch.setattr(teal_fast.weights.product, "BF16_PRODUCTS", False)
    model, _, _ = make(TINY | {"hidden_size": 576, "num_hidden_layers": 1}, torch.bfloat16, 0)
    assert fewest_rows(model) == (FEWEST_BF16_ROWS if teal_fast.weights.product.BF16_PRODUCTS else FEWEST_ROWS)
    for tokens in (1, 2, 5, 8, 11, 12, 13, 40):
        found = []
        for threads in (1, 2, 3, 4):
            set_threads(threads)
            cache = model.new_cache(1, 64)
            logits = prefill(model, cache, torch.arange(5, 5 + tokens)[None])
            found.append(torch.cat([logits, *(part[:, :, :tokens].flatten() for part in (*cache.k, *cache.v))]))
        assert all(torch.equal(other, found[0]) for other in found[1:]) and found[0].std() > 0.01


@torch.no_grad()
def test_a_cache_may_be_shorter_than_the_padding():
    model, _, _ = make(TINY, torch.float32, 0)
    prompt = torch.arange(5, 9, device=DEVICE)[None]
    expected = prefill(model, model.new_cache(1, 64), prompt)
    for length in (4, 7):
        torch.testing.assert_close(prefill(model, model.new_cache(1, length), prompt), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("start, length", [(1, 64), (9, 64), (20, 64), (29, 30), (29, 35)])
@torch.no_grad()
def test_a_prompt_continues_a_filled_cache(config, start, length):
    model, _, _ = make(config, torch.float32, 0.9)  # thresholds, which a prompt does not meet
    prompt = torch.arange(5, 35, device=DEVICE)[None]
    expected = prefill(model, model.new_cache(1, 64), prompt)
    cache = model.new_cache(1, length)
    prefill(model, cache, prompt[:, :start])
    torch.testing.assert_close(prefill(model, cache, prompt[:, start:], start), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_compiled_prefill_serves_every_length():
    model, cache, _ = make(TINY | {"num_hidden_layers": 1}, torch.float32, 0.5)
    compiled, other = compiled_prefill(), model.new_cache(1, 64)
    prompts = [torch.arange(5, 5 + length, device=DEVICE)[None] for length in (9, 23, 40, 2, 1)]
    for start in (0, len(PROMPT)):
        compiled(model, cache, prompts[1], start)
        compiled(model, cache, prompts[0], start)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for prompt in prompts:
                prefill(model, other, torch.tensor([PROMPT], device=DEVICE))
                prefill(model, cache, torch.tensor([PROMPT], device=DEVICE))
                expected = prefill(model, other, prompt, start)
                torch.testing.assert_close(compiled(model, cache, prompt, start), expected, rtol=0, atol=1e-4)


def test_pieces_of_weights_in_blocks_bound_what_a_prompt_takes(monkeypatch):
    """By PyTorch, whose passes' memory grows with their tokens; the keys are those of the prompt as a whole."""
    model = in_blocks.make(next(iter(in_blocks.CASES)), 0, torch.float32)
    assert longest_piece(model, None) == longest_piece(model, 1024) == prompts.PIECE_IN_BLOCKS
    assert longest_piece(model, 7) == 7 and longest_piece(make(TINY, torch.float32, 0)[0], None) is None
    keys, passes = [], []

    def counting(model, cache, tokens, *rest):
        passes.append(tokens.shape[1])
        return prefill(model, cache, tokens, *rest)

    for most in (512, 8):
        monkeypatch.setattr(prompts, "PIECE_IN_BLOCKS", most)
        engine = Engine(model, None, (), 64, prefill=counting)
        engine.by_steps = 0
        list(engine.stream(Request(list(range(3, 23)), max_new_tokens=1)))
        keys.append(torch.stack([k[0, :, :20] for k in engine.cache.k]))
    torch.testing.assert_close(*keys, rtol=1e-4, atol=1e-4)
    assert keys[0].abs().max() > 0 and passes == [20, 6, 7, 7]
