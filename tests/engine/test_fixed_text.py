"""The largest sums on the fixed text: measured once a model, and kept."""

from itertools import chain

import pytest
import torch

from teal_fast.engine import fixed_text
from teal_fast.engine.fixed_text import PARTS, TOKENS, largest_sums, with_fixed_text
from teal_fast.engine.grids import measure_grids
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "teal-fast" / "sums"


def opened(folder):
    return with_fixed_text(load_model(folder), folder, Tokenizer.load(folder))


def same(one, other) -> bool:
    return all(map(torch.equal, chain(*one), chain(*other)))


def test_sums_are_those_of_the_text_and_kept_with_the_model(tiny, even, cache, monkeypatch):
    model = opened(tiny)
    assert [len(ids) for ids in model.fixed_text.ids] == [TOKENS] * 3
    sums = largest_sums(model)
    with torch.no_grad():
        norms = model.layers[0].attention_norm(model.embed(torch.tensor(model.fixed_text.ids)))
        expected = model.layers[0].attention.wqkv(norms).abs().amax((0, 1))
    torch.testing.assert_close(sums[0][0], expected, rtol=1e-5, atol=0)
    assert len(sums) == len(model.layers) and all(len(layer) == len(PARTS) for layer in sums)
    (path,) = cache.iterdir()
    largest_sums(opened(even))
    assert len(list(cache.iterdir())) == 2

    measure = fixed_text._measure
    monkeypatch.setattr(fixed_text, "_measure", lambda *_: pytest.fail("measured again"))
    assert same(largest_sums(opened(tiny)), sums)
    assert same(measure_grids(opened(tiny), (7, 16, 120)), measure_grids(model, (7, 16, 120)))
    monkeypatch.setattr(fixed_text, "_measure", measure)
    for damaged in (path.read_bytes()[:-100], b"", next(p for p in cache.iterdir() if p != path).read_bytes()):
        path.write_bytes(damaged)
        assert same(largest_sums(opened(tiny)), sums)


def test_a_model_without_a_tokenizer_takes_ids_over_its_vocabulary(tiny, cache):
    plain, known = largest_sums(load_model(tiny)), largest_sums(opened(tiny))
    assert same(plain, largest_sums(load_model(tiny))) and not same(plain, known)
