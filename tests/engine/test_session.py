"""A chat at a terminal: it keeps its prefix, drops its oldest turns when the context is full, and counts its cost."""

import sys
from types import SimpleNamespace

import pytest

from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.load import load
from teal_fast.engine.measure import Sample
from teal_fast.engine.request import Token
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.session import Page, Session, describe_cost, encode_prompt, summarize
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import train_sentencepiece, write

SYSTEM = {"role": "system", "content": "Answer briefly."}


@pytest.fixture(scope="module")
def opened(tiny):
    return load(tiny, context=128)


def make(opened, chat, max_new_tokens=8, context=None):
    engine, tokenizer = opened
    engine.forget()
    return Session(engine, tokenizer, Sampling(0.0), 0.0, max_new_tokens, 1, chat)


def test_a_second_turn_reads_only_what_is_new(opened, capsys):
    session = make(opened, [SYSTEM])
    session.turn("What is a whale?")
    session.turn("And a shark?")
    lines = capsys.readouterr().err.splitlines()
    counts = [tuple(int(word) for word in line.split() if word.isdecimal()) for line in lines]
    assert counts[0][0] == counts[0][1] and counts[1][0] < counts[1][1] / 2
    assert [message["role"] for message in session.chat] == ["system", "user", "assistant", "user", "assistant"]


def test_the_oldest_turns_are_dropped_with_a_word(opened, capsys):
    session = make(opened, [SYSTEM])
    for number in range(8):
        session.turn(f"Question number {number}: what is a whale?")
        assert len(session.engine.held.ids) < 128
    said = capsys.readouterr().err
    assert "the context is full: the oldest turn was dropped" in said
    assert session.chat[0] == SYSTEM and session.chat[1]["role"] == "user"
    assert "number 0" not in str(session.chat) and "number 7" in session.chat[-2]["content"]


def test_a_turn_that_fits_no_context_is_refused_and_forgotten(opened):
    session = make(opened, [SYSTEM])
    session.turn("What is a whale?")
    before = list(session.chat)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, the context 128: shorten it"):
        session.turn("word " * 200)
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.turn("  ")
    assert session.chat == before
    session.turn("And a shark?")


def test_an_interrupted_answer_is_no_part_of_the_chat(opened, monkeypatch):
    session = make(opened, [])
    session.turn("What is a whale?")
    before, step = list(session.chat), session.engine.step

    class Interrupted:
        def __call__(self, *arguments):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(step, name)

    monkeypatch.setattr(session.engine, "step", Interrupted())
    sample = session.turn("And a shark?")
    assert session.chat == before and len(sample.tokens) == 1
    monkeypatch.setattr(session.engine, "step", step)
    session.turn("And a shark?")
    assert len(session.chat) == 4


def test_texts_of_their_own_forget_each_other(opened, capsys):
    session = make(opened, None)
    session.turn("The sea was")
    session.turn("The sea was")
    assert session.chat is None and "reading 1 of " in capsys.readouterr().err.splitlines()[1]


def test_the_same_seed_draws_the_same_texts(opened, capsys):
    texts = []
    for _ in range(2):
        session = make(opened, None, max_new_tokens=12)
        session.sampling = Sampling(1.0)
        for _ in range(2):
            session.answer(encode_prompt(session.tokenizer, "The sea was", None), Sample(3))
            texts.append(capsys.readouterr().out)
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_an_answer_goes_on_from_its_prompt(tmp_path, capsys):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": train_sentencepiece()}))
    prompt, whole = tokenizer.encode("In 2024"), tokenizer.encode("In 2024 people paid")
    answer = whole[len(prompt) :]
    reasons = [None] * (len(answer) - 1) + ["length"]
    tokens = [Token(id, None, 0.0, reason) for id, reason in zip(answer, reasons, strict=True)]
    engine = SimpleNamespace(context=100, stream=lambda request: (token for token in tokens))
    session = Session(engine, tokenizer, Sampling(0.0), 0.0, 8, 1, None)
    assert session.answer(prompt, sample := Sample(3)) == " people paid" and sample.finish_reason == "length"
    session.stop = ["paid"]  # complete with the last token
    assert session.answer(prompt, sample := Sample(3)) == " people " and sample.finish_reason == "stop"
    session.stop = [" peo"]
    assert session.answer(prompt, sample := Sample(3)) == "" and len(sample.tokens) < len(answer)
    assert capsys.readouterr().out == " people paid\n people \n\n"


def test_a_stop_string_is_no_part_of_the_chat(opened, capsys):
    session = make(opened, [SYSTEM])
    session.turn("What is a whale?")
    answer = session.chat[-1]["content"]
    session = make(opened, [SYSTEM])
    session.stop = [answer[4:7]]
    sample = session.turn("What is a whale?")
    assert session.chat[-1]["content"] == answer[: answer.index(answer[4:7])]
    assert summarize(session.engine, [sample])["finish_reason"] == "stop"


def test_cost(opened):
    session = make(opened, None, max_new_tokens=6)
    samples = [session.turn("The sea was") for _ in range(2)]
    record = summarize(session.engine, samples)
    assert record["new_tokens"] == [6, 6] and record["finish_reason"] == "length"
    assert record["achieved_sparsity"] == 0 and record["mode"] in ("compiled", "plain")
    assert "tokens/s (median of 2)" in describe_cost(record) and "0.0% achieved" in describe_cost(record)
    assert record["cut_by_context"] == 0


def test_what_samples_skipped_is_counted_of_them_all(opened, monkeypatch):
    """Rates, sparsity and bytes are of the same samples: one of 9 steps at 20 %, one of 3 at 60 %."""
    session = make(opened, None)
    whole = bytes_per_token(session.engine.model, 0)
    monkeypatch.setattr("teal_fast.engine.session.bytes_per_token", lambda model, skipped: whole * (1 - skipped))
    ended = Token(5, None, 0.0, "length")
    samples = [
        Sample(3, [ended] * (steps + 1), 0.1, [0.5] * steps, {"qkv": skipped / 2, "all": skipped})
        for steps, skipped in ((9, 0.2), (3, 0.6))
    ]
    record = summarize(session.engine, [*samples, Sample(3, [ended], 0.1)])  # the last one ended at its first token
    assert record["achieved_sparsity"] == pytest.approx(0.3) and record["achieved_by_kind"] == pytest.approx(
        {"qkv": 0.15}
    )
    assert record["tokens_per_s"] == 2 and record["bytes_per_token"] == pytest.approx(0.7 * whole)
    assert record["gb_per_s"] == pytest.approx((2 * 0.8 * whole + 2 * 0.4 * whole) / 2 / 1e9)
    assert summarize(session.engine, [Sample(3, [ended], 0.1)])["achieved_sparsity"] is None


def test_every_turn_is_counted(opened, monkeypatch):
    """Also one that Ctrl-C ends; and one whose counting is interrupted counts for nothing."""
    session, engine = make(opened, None, max_new_tokens=4), opened[0]
    assert session.turn("The sea was").achieved["all"] == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "achieved_sparsity", interrupted)
    sample = session.turn("The sea was")
    assert len(sample.decode_s) == 3 and sample.achieved == {}
    assert summarize(engine, [sample])["achieved_sparsity"] is None


def test_an_answer_that_the_full_context_cuts_says_so(opened, capsys):
    """max_new_tokens alone, or a stop token at the last place, is no cut; a cut turn stays part of the chat."""
    engine, tokenizer = opened
    prompt = tokenizer.encode("The sea was")
    room = engine.context - len(prompt)
    samples = []
    for wanted in (room + 40, room, 5):
        session = make(opened, None, max_new_tokens=wanted)
        samples.append(Sample(len(prompt)))
        with session.counted(samples[-1]):
            session.answer(prompt, samples[-1])
        assert samples[-1].tokens[-1].finish_reason == "length"
    assert [sample.cut for sample in samples] == [True, False, False]
    said = f"the context of 128 tokens is full: cut after {room} of {room + 40} tokens\n"
    assert capsys.readouterr().err == said
    assert summarize(engine, samples)["cut_by_context"] == 1
    chat = make(opened, [], max_new_tokens=500)
    chat.turn("What is a whale?")
    assert "cut after" in capsys.readouterr().err and len(chat.chat) == 2


def test_ctrl_c_on_any_line_of_an_answer_ends_it_and_leaves_a_sound_engine(opened, capsys):
    session = make(opened, None, max_new_tokens=3)
    ids = encode_prompt(session.tokenizer, "What is a whale?", None)
    lines = 0

    def answer(interrupted_at: int) -> str:
        nonlocal lines
        lines, session.seed = 0, 1
        sample = Sample(len(ids))

        def trace(frame, event, argument):
            nonlocal lines
            # What is raised where a generator yields would leave it without its `finally`. In `_held` signals are heard
            # at calls alone, not on the lines between taking the lock and the block that gives it back.
            if event != "line" or frame.f_code.co_name == "_held":
                return trace
            lines += 1
            if lines == interrupted_at:
                raise KeyboardInterrupt
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            with session.counted(sample):
                return session.answer(ids, sample)
        finally:
            sys.settrace(previous)

    for _ in range(2):  # what is done once only
        expected = answer(0)
    total = lines
    assert total > 1000
    for line in range(1, total, 11):
        with pytest.raises(KeyboardInterrupt):
            answer(line)
    assert answer(0) == expected


def test_texts_that_grow_side_by_side_are_printed_one_after_another(capsys):
    page = Page(["a: ", "b: ", "c: "])
    page.add(0, "1")
    page.add(2, "x")
    assert capsys.readouterr().out == "a: 1"
    page.end(1, "2")
    page.add(0, "3")
    assert capsys.readouterr().out == "3" and page.open == [0, 2]
    page.end(0, "")
    assert capsys.readouterr().out == "\nb: 2\nc: x"
    page.end(2, "y")
    assert capsys.readouterr().out == "y\n" and page.open == []
