"""Streamed text: all of it is the decoded text up to the first stop string, however tokens cut it."""

import random

import pytest

from teal_fast.engine.request import Token
from teal_fast.engine.text import TextStream, split_stops, stream_text
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import train_sentencepiece, write

TEXT = "Call me Ishmael. Some years ago — never mind how long précisément — 日本語 🐳 aaaaab\n\nabab abac"


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.load(demo)


def as_tokens(ids, reason="length"):
    return [Token(id, None, 0.0, reason if i == len(ids) - 1 else None) for i, id in enumerate(ids)]


@pytest.mark.parametrize("stop", [(), ("zebra",), ("ago",), ("\n\n",), ("aab", "🐳"), ("abac",), ("c",), ("Call",)])
def test_the_text_ends_before_the_first_stop_string(tokenizer, stop):
    found = "".join(stream_text(as_tokens(tokenizer.encode(TEXT)), tokenizer, (), stop))
    assert found == TEXT[: min((TEXT.find(s) for s in stop if s in TEXT), default=len(TEXT))]


def test_random_stop_strings_at_random_borders(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab \n") for _ in range(40))
        stop = [text[(i := rng.randrange(40)) : i + rng.randrange(1, 6)] for _ in range(2)] + ["bbaabb"]
        ids = [id for piece in text for id in tokenizer.encode(piece)] if rng.random() < 0.5 else tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        expected = whole[: min((whole.find(s) for s in stop if s in whole), default=len(whole))]
        stream = TextStream(tokenizer, (), stop)
        pieces = []
        for token in as_tokens(ids):
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        assert "".join(pieces) + stream.flush() == expected
        assert stream.stopped == any(s in whole for s in stop)


def test_nothing_certain_is_held_back(tokenizer):
    stream, text = TextStream(tokenizer, (), ["zebra"]), ""
    for token in as_tokens(tokenizer.encode("a buzz of bees")):
        text += stream.push(token)
    assert text == "a buzz of bees"[: len(text)] and len(text) >= len("a buzz of bees") - 4


def test_the_text_goes_on_from_its_prompt(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": train_sentencepiece()}))
    prompt, whole = tokenizer.encode("In 2024"), tokenizer.encode("In 2024 people paid")
    tokens = as_tokens(whole[len(prompt) :])
    assert "".join(stream_text(tokens, tokenizer, prompt)) == " people paid"
    assert "".join(stream_text(tokens, tokenizer, ())) == "people paid"
    assert "".join(stream_text(tokens, tokenizer, prompt, [" paid"])) == " people"


def test_what_ends_an_answer_is_a_token_or_a_text(tokenizer):
    assert split_stops(tokenizer, ["<|im_start|>", "ago", "<file_sep>", "The"]) == ({1, 5}, ("ago", "The"))
    assert split_stops(tokenizer, []) == (set(), ())


def test_a_stop_token_has_no_text(tokenizer):
    ids = tokenizer.encode("The sea was calm")
    assert "".join(stream_text(as_tokens(ids, "stop"), tokenizer, ())) == tokenizer.decode(ids[:-1])


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tokenizer, (), [""])
