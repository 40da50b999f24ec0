"""Answers that outgrow the original context of longrope and dynamic scaling, against transformers' generate."""

from typing import Any

import pytest
import torch

from teal_fast.engine.engine import Engine
from teal_fast.engine.prefixes import PrefixStore
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.drafters import DraftModel
from teal_fast.engine.steps import PlainStep
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.tests.family_models import make_family, write_family

BORDER, NEW = 32, 16
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "longrope": ("phi 4 mini", {}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": BORDER}),
}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    family, fields = CASES[request.param]
    folder, theirs = tmp_path_factory.mktemp(request.param), make_family(family, **fields)
    convert_huggingface(write_family(theirs, folder / "hf"), folder / "ours", None)
    return theirs, load_model(folder / "ours")


def prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 200, (length,), generator=torch.Generator().manual_seed(5)).tolist())


def generated(theirs, ids: tuple[int, ...]) -> list[int]:
    theirs(torch.tensor([[2]]))  # forgets longer texts: findings/dynamic-rope-remembers.sh
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def answer(engine: Engine, ids: tuple[int, ...], new: int = NEW, **more: Any) -> list[int]:
    request = Request(prompt=ids, sampling=Sampling(0.0), max_new_tokens=new, stop=frozenset(), **more)
    return [token.id for token in engine.stream(request)]


@pytest.mark.parametrize("length", [8, 25, 31, 32, 33, 50])  # short of the border, over it on the way, beyond
@pytest.mark.parametrize("options", [{}, {"make_step": PlainStep}, {"chunk": 7}], ids=["cpp", "plain", "chunks"])
def test_answers_are_those_of_generate(pair, length, options):
    theirs, model = pair
    engine = Engine(model, context=80, **options)
    expected = generated(theirs, prompt(length))
    assert answer(engine, prompt(length)) == expected
    assert len(set(expected)) > 3


def test_a_conversation_that_crosses_the_border_is_computed_anew(pair, capsys):
    theirs, model = pair
    engine = Engine(model, context=120, prefixes=PrefixStore(2**24))
    assert "prefixes are not kept" in capsys.readouterr().err
    short = prompt(10)
    first = (*short, *answer(engine, short))  # 26 tokens
    answer(engine, (*first, 7), 3)
    assert engine.reused > 20
    long = (*first, *prompt(10))
    assert answer(engine, long) == generated(theirs, long)
    assert engine.reused == 0
    assert answer(engine, short) == generated(theirs, short)
    assert engine.reused == 0


def test_lossless_answers_end_before_the_border(pair):
    theirs, model = pair
    lossless = {"lossless": True, "draft": "copy", "draft_tokens": 3}
    drafts = (DraftModel("copy", model, None, shared=True),)
    engine = Engine(model, context=BORDER, drafts=drafts)
    ids = prompt(BORDER - NEW)
    assert answer(engine, ids, **lossless) == generated(theirs, ids)
    assert engine.lossless.statistics.accepted[0] > 2
    with pytest.raises(ValueError, match=f"up to {BORDER} tokens, .* room for {BORDER + 1}: take a smaller context"):
        answer(Engine(model, context=BORDER + 1, drafts=drafts), ids, **lossless)


def test_a_model_takes_texts_as_long_as_scaling_is_for(pair):
    theirs, model = pair
    assert model.args.max_position == (512 if "longrope" in str(theirs.config.rope_parameters) else 4 * BORDER)
