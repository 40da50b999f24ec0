"""What an answer's text is split into, however its pieces are cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teal_fast.server.asked import Reasoning, Text, ToolArguments, ToolCall
from teal_fast.server.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, Thoughts
from teal_fast.server.splitter import Splitter, new_id

FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "named": MISTRAL_NAMED}


def split(pieces, format=HERMES, **options):
    """(reasoning, text, [(name, arguments)]), all pieces joined, and the order in which they began."""
    splitter = Splitter(format, ("f", "g"), **options)
    events = [event for piece in pieces for event in splitter.push(piece)] + splitter.flush()
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    text = "".join(event.text for event in events if isinstance(event, Text))
    calls = {event.index: [event.name, ""] for event in events if isinstance(event, ToolCall)}
    for event in events:
        if isinstance(event, ToolArguments):
            calls[event.index][1] += event.text
    assert calls or not splitter.called
    assert all(event.text for event in events if not isinstance(event, ToolCall))
    return reasoning, text, [tuple(call) for call in calls.values()]


def write(format, calls):
    """Calls as a model of the format writes them."""
    if format.named:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    objects = [f'{{"name": {json.dumps(name)}, "{format.key}": {arguments}}}' for name, arguments in calls]
    if format.listed:
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    if format.bare:
        return format.begin + "; ".join(objects)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.builds(
    json.dumps,
    st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
    ensure_ascii=st.booleans(),
    indent=st.none() | st.just(2),
)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), min_size=1, max_size=3)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 400), max_size=30), spoken=st.sampled_from(["", "I look.", "a < b"]))
def test_calls_come_back_however_the_text_is_cut(format, calls, cuts, spoken):
    text = (f"{spoken}\n\n" if spoken else "") + write(format, calls)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert split(pieces, format) == ("", spoken, calls)


PARTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
PARTS += ['{"name": "f", "arguments": ', '{"name": "f"', '{"a": [1, "x\\n"]}', '{"parameters": {}, "name": "g"}']
PARTS += ["[", "]", "{", "}", ",", '"', "\\", " ", "\n", "f", "; ", "hello", "null", "<", "[TOOL", "é🙂"]


@pytest.mark.parametrize("format", [*FORMATS.values(), None], ids=[*FORMATS, "none"])
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), begun=st.booleans(), apart=st.booleans(), data=st.data())
def test_any_text_is_split_the_same_however_it_is_cut(format, parts, begun, apart, data):
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    places = sorted({0, len(text), *cuts})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = split([text], format, begun=begun, split=apart)
    assert split(list(text), format, begun=begun, split=apart) == whole
    assert split(pieces, format, begun=begun, split=apart) == whole
    if not whole[2]:  # then all of it is there, but for white space and the markers of thoughts
        closed = text.replace("</think>", "", 1)
        possible = (text, closed, text.replace("<think>", "", 1), closed.replace("<think>", "", 1))
        assert "".join((whole[0] + whole[1]).split()) in ["".join(said.split()) for said in possible]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>\nhm\n</think>\n\nHello", ("hm", "Hello")),
        ("\n<think>hm", ("hm", "")),
        ("Hello <think>no</think>", ("", "Hello <think>no</think>")),
        ("<thin", ("", "<thin")),
        ("<think></think>Hello", ("", "Hello")),
        ("<think>a <tool_call> b</think>c", ("a <tool_call> b", "c")),
    ],
)
def test_thoughts_stand_at_the_start(text, expected):
    assert split([text]) == (*expected, [])


def test_thoughts_that_the_prompt_has_begun():
    assert split(["\nhm\n</", "think>\n\nHi "], begun=True) == ("hm", "Hi ", [])
    assert split(["hm"], begun=True) == ("hm", "", [])


def test_thoughts_with_other_markers():
    assert split(["[THINK]hm[/THINK]Hi"], thoughts=Thoughts("[THINK]", "[/THINK]")) == ("hm", "Hi", [])


def test_white_space_before_json_is_dropped():
    assert split(["\n", " {}\n"], None, trim=True) == ("", "{}\n", [])
    assert split(["\n", " {}\n"], None) == ("", "\n {}\n", [])


def test_thoughts_that_stay_in_the_text():
    text = "<think>\nhm <tool_call>\n</think>\n\nHi"
    assert split([text], split=False) == ("", text, [])
    assert split([text.removeprefix("<think>")], split=False, begun=True) == ("", text.removeprefix("<think>"), [])


@pytest.mark.parametrize(
    "call, expected",
    [
        ('{"arguments": {"a": 1}, "name": "f"}', ("f", '{"a": 1}')),
        ('{"type": "function", "name": "f", "parameters": {"a": [1, {}]}}', ("f", '{"a": [1, {}]}')),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ("f", '{"a": 1}')),
        ('{"name": "unknown", "arguments": {}}', ("unknown", "{}")),
        ('{"name": "f", "arguments": {"a": "}</tool_call>{"}}', ("f", '{"a": "}</tool_call>{"}')),
    ],
)
def test_other_ways_to_write_a_call(call, expected):
    assert split([f"<tool_call>{call}</tool_call>"]) == ("", "", [expected])


@pytest.mark.parametrize(
    "call",
    [
        '{"name": 3, "arguments": {}}',
        '{"name": "f" "arguments": {}}',
        '{"arguments": {}}',
        "get(x)",
        "[]",
        '{"name": "f',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no JSON"}',
        '{"name": "", "arguments": {}}',
        "",
    ],
)
def test_a_broken_call_is_text(call):
    text = f"Look: <tool_call>\n{call}\n</tool_call>."
    assert split([text]) == ("", text, [])


def test_a_call_that_breaks_after_it_has_begun_goes_on_as_text():
    _, text, calls = split(['<tool_call>{"name": "f", "arguments": {"a": 1,, }}</tool_call>'])
    assert (text, calls) == (", }}</tool_call>", [("f", '{"a": 1,')])


def test_arguments_are_streamed_as_they_come():
    splitter = Splitter(HERMES)
    assert splitter.push('<tool_call>\n{"name": "f", "arg') == []
    name, arguments = splitter.push('uments": {"text": "ab')
    assert isinstance(name, ToolCall) and (name.index, name.name) == (0, "f")
    assert arguments == ToolArguments(0, '{"text": "ab')
    assert splitter.push("cd") == [ToolArguments(0, "cd")]
    assert splitter.push('"}}\n</tool_call>') == [ToolArguments(0, '"}')]
    assert splitter.flush() == []


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_call_that_is_cut_is_none_to_be_made(format):
    whole = write(format, [("f", '{"city": "Rome"}')])
    for text, called in ((whole, True), (whole[: whole.index("Rome")], False), ("I look.", False)):
        splitter = Splitter(format, ("f",))
        splitter.push(text)
        splitter.flush()
        assert splitter.called == called, text


def test_text_is_streamed_but_for_what_may_begin_a_call():
    splitter = Splitter(HERMES)
    assert splitter.push("Hello, <") == [Text("Hello,")]
    assert splitter.push("b>") == [Text(" <b>")]


def test_text_between_and_after_calls():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert split([f"a\n{call}\n\nb\n{call}\n"]) == ("", "a\n\nb", [("f", "{}")] * 2)


def test_llama_calls_only_known_tools_without_a_marker():
    assert split(['{"name": "f", "parameters": {}}'], LLAMA) == ("", "", [("f", "{}")])
    assert split(['{"name": "Bob", "parameters": {}}'], LLAMA) == ("", '{"name": "Bob", "parameters": {}}', [])
    assert split(['Sure: {"name": "f", "parameters": {}}'], LLAMA) == ("", 'Sure: {"name": "f", "parameters": {}}', [])


def test_llama_calls_cut_at_their_separator():
    call = '{"name": "f", "parameters": {}}'
    assert split([f"{call};", f" {call}"], LLAMA) == ("", "", [("f", "{}")] * 2)
    assert split([f"{call};", " done"], LLAMA) == ("", "; done", [("f", "{}")])


def test_mistrals_own_id_is_kept():
    splitter = Splitter(MISTRAL_NAMED)
    call, _ = splitter.push("[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}")
    assert call == ToolCall(0, "abcDEF123", "f")


def test_ids():
    assert new_id(24).startswith("call_") and len(new_id(24)) == 29
    assert len(new_id(9)) == 9 and new_id(9).isalnum()
    assert new_id(24) != new_id(24)
