"""Streamed text: all of it is the decoded text up to the first stop string, however tokens cut it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


LETTERS = st.text("ab \n—é日🐳", max_size=5)


@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(LETTERS, max_size=20),
    stop=st.lists(LETTERS.filter(bool), max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), max_size=2),
)
def test_random_stop_strings_at_random_borders(tokenizer, pieces, stop, cuts):
    """Each piece is tokenized by itself, so that borders fall anywhere; some stop strings are cut from the text."""
    ids = [id for piece in pieces for id in tokenizer.encode(piece)]
    whole = tokenizer.decode(ids)
    stop += [cut for begin, length in cuts if (cut := whole[begin : begin + length])]
    expected = whole[: min((whole.find(s) for s in stop if s in whole), default=len(whole))]
    stream = TextStream(tokenizer, (), stop)
    streamed, sent = "", []
    for token in as_tokens(ids):
        streamed += stream.push(token)
        sent.append(streamed)
        if stream.stopped:
            break
    streamed += stream.flush()
    assert streamed == expected == "".join(stream_text(as_tokens(ids), tokenizer, (), stop))
    assert stream.stopped == any(s in whole for s in stop)
    assert all(expected.startswith(text) for text in sent)  # nothing that was sent had to be taken back


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
