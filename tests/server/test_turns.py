import pytest

from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.turns import Turns, block_text, blocks, function

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


def turns(*pieces) -> list[dict]:
    built = Turns()
    for name, *arguments in pieces:
        getattr(built, name)(*arguments)
    return built.messages


def called(id: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_system_messages_at_the_start_are_one():
    assert turns(("system", "a"), ("system", "b"), ("user", "hi")) == [{"role": "system", "content": "a\n\nb"}, HI]


def test_a_later_system_message_joins_the_turn_before_it():
    assert turns(("user", "hi"), ("system", "s"), ("assistant", "hello")) == [HI | {"content": "hi\n\ns"}, HELLO]
    assert turns(("user", "hi"), ("assistant", "hello"), ("system", "s"), ("user", "u")) == [
        HI,
        HELLO,
        {"role": "user", "content": "s\n\nu"},
    ]
    result = {"role": "tool", "tool_call_id": "1", "content": "r\n\ns"}
    call = {"role": "assistant", "content": "", "tool_calls": [called("1")]}
    assert turns(("user", "hi"), ("call", "1", "f", {"a": 1}), ("result", "1", "r"), ("system", "s")) == [
        HI,
        call,
        result,
    ]


def test_thoughts_text_and_calls_of_one_answer_are_one_message():
    pieces = [("user", "hi"), ("assistant", "", "hm"), ("assistant", "hello"), ("call", "1", "f", {"a": 1})]
    message = HELLO | {"reasoning_content": "hm", "tool_calls": [called("1"), called("2")]}
    assert turns(*pieces, ("call", "2", "f", {"a": 1})) == [HI, message]


@pytest.mark.parametrize("note", ["system", "user"])
def test_results_follow_their_call_at_once(note):
    pieces = [("user", "hi"), ("call", "1", "f", {}), ("call", "2", "f", {}), ("result", "1", "r")]
    messages = turns(*pieces[:3], (note, "note"), *pieces[3:], ("result", "2", "q"), ("user", "u"))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert messages[-1]["content"] == "note\n\nu"


def test_more_messages_begin_with_the_same_ones():
    """What the prefix cache lives on: a longer conversation renders to a longer text, not to another one."""
    pieces = [
        ("system", "s"),
        ("user", "hi"),
        ("system", "now"),
        ("call", "1", "f", {}),
        ("result", "1", "r"),
        ("system", "later"),
        ("assistant", "hello"),
    ]
    shorter = turns(*pieces)
    assert turns(*pieces, ("system", "last"), ("user", "u"))[: len(shorter)] == shorter


def test_content_is_text_or_blocks_of_known_types():
    body = {"a": "text", "b": [{"type": "text", "text": "x"}, {"type": "image", "source": {}}], "c": 3, "d": ["x"]}
    fields = Fields(body, "messages[0]")
    assert [block_text(block, ["text"]) for block in blocks(fields, "a")] == ["text"]
    with pytest.raises(ApiError, match=r"messages\[0\].b\[1\].type is 'image', expected 'text'.*only text") as raised:
        [block_text(block, ["text"]) for block in blocks(fields, "b")]
    assert raised.value.param == "messages[0].b[1].type"
    with pytest.raises(ApiError, match=r"messages\[0\].c is 3, expected text or a list of blocks"):
        blocks(fields, "c")
    with pytest.raises(ApiError, match=r"messages\[0\].d\[0\] is 'x', expected a JSON object"):
        blocks(fields, "d")
    assert blocks(fields, "missing") == []


def test_tools_are_written_as_chat_completions_have_them():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = Fields({"name": "f", "description": "d", "schema": schema, "strict": True, "x": 1}, "tools[0]")
    described = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    assert function(tool, "schema") == {"type": "function", "function": described}
    assert function(Fields({"name": "f"}), "schema")["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {}},
    }
    with pytest.raises(ApiError, match=r"tools\[0\].name is missing"):
        function(Fields({}, "tools[0]"), "schema")
