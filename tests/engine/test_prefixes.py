"""The store of prefixes: against a list of sequences, sharing, budget, and decoding from what it gives back."""

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import prefill
from teal_fast.engine.prefixes import BLOCK, PrefixStore
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.model import KVCache
from teal_fast.tests.engine.random_models import DEVICE, make
from teal_fast.tests.models import TINY

LENGTH = 24  # positions of a cache here
TOKEN = 2 * 2 * 4  # bytes of a token in it: keys and values of two layers, a head of one fp32


def marks(ids) -> list[int]:
    """A number for each position that tells all of the ids up to it, exact in fp32."""
    return list(accumulate(ids, lambda mark, id: (mark * 31 + id + 1) % 2**20, initial=7))[1:]


def cache_of(ids=(), made=(), length=LENGTH) -> KVCache:
    """A cache whose keys tell the ids up to their position, and whose values tell the sparsity."""
    rows = torch.full((4, 1, 1, length, 1), -1.0)
    rows[:2, 0, 0, : len(ids), 0] = torch.tensor(marks(ids), dtype=torch.float32)
    rows[2:, 0, 0, : len(ids), 0] = torch.tensor(made, dtype=torch.float32)
    return KVCache(list(rows[:2]), list(rows[2:]), torch.zeros(0))


def put(store: PrefixStore, ids, made=0.0) -> None:
    made = made if isinstance(made, list) else [made] * len(ids)
    store.put(ids, made, cache_of(ids, made, max(LENGTH, len(ids))))


def check(store: PrefixStore) -> None:
    """What holds of a store at any time."""
    assert store.nbytes == sum(block.kv.nbytes for block in store.parents) <= store.budget
    seen, blocks, depth = set(), [store.root], {store.root: 0}
    for block in blocks:  # grows
        assert not block.children or block is store.root or len(block.ids) == store.block
        for ids, child in block.children.items():
            assert store.parents[child] is block and child.ids == ids and 1 <= len(ids) <= store.block
            assert len(child.made) == len(ids) == child.kv.shape[2]
            joined = [*block.made[-1:], *child.made]
            assert joined == sorted(joined)
            assert not any(ids == other[: len(ids)] for other in block.children if other is not ids)
            depth[child] = depth[block] + 1
            blocks.append(child)
    assert set(blocks) - {store.root} == set(store.parents)
    for block, parent in store.parents.items():  # of a path, the end goes first
        assert block not in seen and parent not in seen
        seen.add(block)


def check_fetch(store: PrefixStore, prompt, sparsity: float, start: int, end: int) -> None:
    cache = cache_of()
    made = store.fetch(prompt, sparsity, start, end, cache)
    expected = torch.full((2, 2, LENGTH), -1.0)  # nothing else is touched
    expected[0, :, start:end] = torch.tensor(marks(prompt)[start:end], dtype=torch.float32)
    expected[1, :, start:end] = torch.tensor(made, dtype=torch.float32)
    assert torch.equal(torch.stack((*cache.k, *cache.v)).flatten(), expected.flatten())
    assert len(made) == end - start and made == sorted(made) and max(made, default=0) <= sparsity


IDS = st.lists(st.integers(0, 2), max_size=14)
SPARSITIES = st.sampled_from([0.0, 0.3, 0.5])
SEQUENCES = st.lists(st.tuples(IDS, st.lists(SPARSITIES, min_size=14, max_size=14).map(sorted)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.lists(st.tuples(IDS.filter(bool), SPARSITIES), max_size=12), st.integers(1, 5), st.data())
def test_it_knows_what_a_list_of_sequences_knows(sequences, prompts, block, data):
    store = PrefixStore(10**6, block)
    for ids, made in sequences:
        put(store, ids, made[: len(ids)])
        check(store)
    prompts += [([*ids, 9], sparsity) for ids, _ in sequences for sparsity in (0.0, 0.5)]
    for prompt, sparsity in prompts:
        expected = 0
        for ids, made in sequences:
            alike = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(ids))
            expected = max(expected, min(alike, len(prompt) - 1, bisect_right(made, sparsity)))
        assert store.known(prompt, sparsity) == expected
        start = data.draw(st.integers(0, expected))
        check_fetch(store, prompt, sparsity, start, data.draw(st.integers(start, expected)))
        check(store)


@settings(max_examples=40, deadline=None)
@given(SEQUENCES, st.integers(0, 30), st.integers(1, 5))
def test_it_keeps_its_budget_and_what_was_put_last(sequences, tokens, block):
    store = PrefixStore(tokens * TOKEN + 5, block)
    for ids, made in sequences:
        put(store, ids, made[: len(ids)])
        check(store)
        assert store.known([*ids, 9], 1.0) == min(len(ids), tokens)
        check_fetch(store, [*ids, 9], 1.0, 0, min(len(ids), tokens))


def test_conversations_share_what_they_begin_with():
    store, tools = PrefixStore(10**9), [5, 6] * BLOCK  # two blocks
    put(store, [*tools, 1, 2, 3])
    put(store, [*tools, 4])
    assert store.nbytes == (2 * BLOCK + 4) * TOKEN
    put(store, [*tools[:-1], 0])  # parts from them with a block's last token: that block is kept twice
    assert store.nbytes == (3 * BLOCK + 4) * TOKEN
    assert store.known([*tools, 1, 2, 9, 9], 0) == 2 * BLOCK + 2
    check(store)


def test_a_longer_tail_replaces_a_shorter_one():
    store = PrefixStore(10**6, 4)
    put(store, [1, 2, 3, 4, 5])
    put(store, [1, 2, 3, 4, 5, 6, 7])
    put(store, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    put(store, [1, 2, 3])  # is there already
    assert store.nbytes == 10 * TOKEN and len(store.parents) == 3
    check_fetch(store, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], 0, 3, 10)


def test_a_tail_that_grows_keeps_what_was_made_densely():
    store = PrefixStore(10**6, 8)
    put(store, [1, 2, 3], [0.0, 0.0, 0.5])
    put(store, [1, 2, 3, 4, 5], [0.0, 0.3, 0.3, 0.3, 0.5])
    assert [store.known([1, 2, 3, 4, 5, 6], sparsity) for sparsity in (0.0, 0.3, 0.5)] == [2, 4, 5]
    check_fetch(store, [1, 2, 3, 4, 5, 6], 0.5, 0, 5)


@pytest.mark.parametrize("first, second", [(0.5, 0.0), (0.0, 0.5)])
def test_dense_replaces_sparse_and_children_keep_their_own(first, second):
    store = PrefixStore(10**6, 4)
    put(store, list(range(10)), first)
    put(store, list(range(6)), second)
    assert store.known(list(range(11)), 0.0) == (6 if first else 10)
    assert store.known(list(range(11)), 0.5) == 10
    check_fetch(store, list(range(11)), 0.5, 0, 10)
    assert store.nbytes == 10 * TOKEN


def test_a_sibling_that_stays_dense_for_longer_is_found():
    store = PrefixStore(10**6, 4)
    put(store, [1, 2, 3, 4, 5], 0.5)
    put(store, [1, 2, 3, 0], 0.0)
    assert [store.known([1, 2, 3, 4, 5, 6], sparsity) for sparsity in (0.0, 0.5)] == [3, 5]


def test_what_was_used_least_recently_goes_first_and_ends_before_beginnings():
    store = PrefixStore(12 * TOKEN, 4)
    put(store, [1] * 8)
    put(store, [2] * 4)
    store.known([1] * 9, 0)
    put(store, [3] * 4)  # takes the place of the twos
    assert [store.known([id] * 9, 0) for id in (2, 1, 3)] == [0, 8, 4]
    put(store, [4] * 4)  # and now the end of the ones goes
    assert [store.known([id] * 9, 0) for id in (1, 3, 4)] == [4, 4, 4]
    store.known([1] * 9, 0)
    put(store, [3] * 8)
    assert [store.known([id] * 9, 0) for id in (4, 1, 3)] == [0, 4, 8]


def test_of_what_exceeds_the_budget_the_beginning_is_kept():
    store = PrefixStore(6 * TOKEN + 1, 4)
    put(store, [7] * 3)
    put(store, list(range(10)))
    assert store.known(list(range(11)), 0) == 6 and store.known([7] * 4, 0) == 0
    assert store.nbytes == 6 * TOKEN
    nothing = PrefixStore(0)
    put(nothing, [1, 2])
    assert nothing.known([1, 2, 3], 1) == nothing.nbytes == 0


def test_the_last_token_of_a_prompt_is_always_computed():
    store = PrefixStore(10**6, 4)
    put(store, [1, 2, 3, 4])
    assert [store.known([1, 2, 3, 4][:length], 0) for length in (1, 2, 4)] == [0, 1, 3]


def test_clear():
    store = PrefixStore(10**6)
    put(store, [1, 2, 3])
    store.clear()
    assert (store.nbytes, store.known([1, 2, 3], 1)) == (0, 0)
    check(store)


def test_a_copy_that_fails_leaves_a_sound_store(monkeypatch):
    store = PrefixStore(10**6, 4)
    put(store, [1, 2, 3, 4, 5])
    stack, calls = torch.stack, []

    def fail_later(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("as a GPU does")
        return stack(rows)

    monkeypatch.setattr(torch, "stack", fail_later)
    with pytest.raises(torch.OutOfMemoryError):
        put(store, [1, 2, 3, 4, 5, 6, *range(10)])
    check(store)
    assert store.known([1, 2, 3, 4, 5, 6, *range(10), 9], 0) == 12


def test_a_prompt_of_40_000_tokens_is_compared_once(monkeypatch):
    store, ids = PrefixStore(10**9), [id % 1000 for id in range(40_000)]
    put(store, ids)
    compared = []
    monkeypatch.setattr("teal_fast.engine.prefixes._common", lambda a, b: compared.append(len(a)) or 0)
    assert store.known([*ids, 1], 0) == 40_000 // BLOCK * BLOCK
    assert len(compared) <= 1  # full blocks are found by their hash


# --- with a model


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@torch.no_grad()
def test_decoding_goes_on_as_from_the_cache_itself(sparsity):
    model, _, calibration = make(TINY, torch.float32, sparsity)
    engine = Engine(model, calibration, context=256)
    prompt = [(7 * i) % 490 + 3 for i in range(150)]
    for _ in engine.stream(Request(prompt, Sampling(0.0), sparsity, 20, ())):
        pass
    ids, made = list(engine.held.ids), list(engine.held.made)
    store = PrefixStore(10**9)
    store.put(ids, made, engine.cache)
    follow_up = [*ids, 11, 12, 13]
    assert store.known(follow_up, sparsity) == len(ids) == 169
    assert store.known(follow_up, 0.0) == (150 if sparsity else 169)

    start, rest = len(ids), torch.tensor([follow_up[len(ids) :]], device=DEVICE)
    expected = prefill(engine.model, engine.cache, rest, start)
    for part in (*engine.cache.k, *engine.cache.v):
        part.fill_(float("nan"))
    assert store.fetch(follow_up, sparsity, 0, start, engine.cache) == made
    assert torch.equal(prefill(engine.model, engine.cache, rest, start), expected)
    for part in (*engine.cache.k, *engine.cache.v):  # the copy is one: what becomes of the cache does not matter
        part[:, :, : start // 2].zero_()
    store.fetch(follow_up, sparsity, 0, start // 2, engine.cache)
    assert torch.equal(prefill(engine.model, engine.cache, rest, start), expected)
