from typing import Literal

import anthropic
import pydantic
import pytest
from anthropic.types import Message
from hypothesis import given, settings

from teal_fast.server import messages
from teal_fast.server.asked import End, Live, Reasoning, Text, ToolArguments, ToolCall, Usage
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.messages import parse, read_chat
from teal_fast.tests.server.canned import Canned
from teal_fast.tests.server.live import serving
from teal_fast.tests.server.strange import like

USAGE = Usage(12, 7, 5, 2, 0.25)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"name": "get", "description": "d", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "get", "description": "d", "parameters": SCHEMA}}
SERVICE = Canned()
HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
ASK = {"model": "m", "max_tokens": 5, "messages": [HI]}


def asked(**body):
    return parse(Fields(ASK | body), SERVICE)


def chat(*given, **body):
    return read_chat(Fields({"messages": list(given) or [HI]} | body))


def text(said: str, **more) -> dict:
    return {"type": "text", "text": said, **more}


# --- what comes in


def test_system_and_content_are_text_or_blocks():
    cached = {"cache_control": {"type": "ephemeral"}}
    billing = text("x-anthropic-billing-header: cch=1234;")
    system = {"role": "system", "content": "be kind\nand short"}
    read = chat(
        {"role": "user", "content": [text("hi", **cached)]}, system=[billing, text("be kind"), text("and short")]
    )
    assert read.messages == [system, HI]
    assert chat(system="be kind\nand short").messages == [system, HI]
    assert chat({"role": "user", "content": [text("a"), text("b")]}).messages == [{"role": "user", "content": "a\nb"}]


def test_system_messages_between_turns_join_the_turn_before():
    read = chat(HI, {"role": "system", "content": [text("skills")]}, HELLO, HI, {"role": "system", "content": "now"})
    assert [message["content"] for message in read.messages] == ["hi\n\nskills", "hello", "hi\n\nnow"]


ANSWER = [
    {"type": "thinking", "thinking": "hm", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    text("wait"),
    {"type": "tool_use", "id": "1", "name": "get", "input": {"a": 1}},
    {"type": "tool_use", "id": "2", "name": "get", "input": {}},
]
RESULTS = [
    {"type": "tool_result", "tool_use_id": "1", "content": [text("2"), text("3")]},
    {"type": "tool_result", "tool_use_id": "2", "content": "not there", "is_error": True},
    text("go on"),
]
TURNS = [HI, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": RESULTS}]


def test_calls_results_and_thoughts():
    calls = [
        {"id": id, "type": "function", "function": {"name": "get", "arguments": arguments}}
        for id, arguments in (("1", {"a": 1}), ("2", {}))
    ]
    assert chat(*TURNS).messages == [
        HI,
        {"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "2\n3"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: not there"},
        {"role": "user", "content": "go on"},
    ]


def test_an_assistants_message_at_the_end_is_the_answers_beginning():
    read = chat(HI, HELLO)
    assert (read.messages, read.begun, read.thinking) == ([HI], "hello", False)
    assert chat(HI, {"role": "assistant", "content": [text("a"), text("b")]}).begun == "ab"


def test_tools_and_their_choice():
    server = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    read = chat(tools=[TOOL | {"type": "custom"}, server, TOOL | {"name": "set", "strict": True}])
    assert read.tools[0] == FUNCTION and [tool["function"]["name"] for tool in read.tools] == ["get", "set"]
    assert read.tools[1]["function"]["strict"] is True
    for kind, choice in {"auto": "auto", "any": "required", "none": "none"}.items():
        assert chat(tools=[TOOL], tool_choice={"type": kind}).tool_choice == choice
    read = chat(tools=[TOOL], tool_choice={"type": "tool", "name": "get", "disable_parallel_tool_use": True})
    assert (read.tool_choice, read.tool_name, read.parallel_tool_calls) == ("named", "get", False)


def test_thinking_and_format():
    assert chat().thinking is None and chat().schema is None
    for kind, on in {"enabled": True, "adaptive": True, "disabled": False}.items():
        assert chat(thinking={"type": kind, "budget_tokens": 1024}).thinking is on
    wanted = {"type": "json_schema", "schema": SCHEMA}
    assert chat(output_config={"format": wanted, "effort": "low"}).schema == SCHEMA
    assert chat(output_format=wanted).schema == SCHEMA
    assert chat(output_config={"effort": "low"}).schema is None


def test_settings():
    _, made, stream = asked(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["x"], sparsity=0.25, stream=True)
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (made.max_new_tokens, made.stop, made.sparsity, stream) == (5, ("x",), 0.25, True)
    assert asked(metadata={"user_id": "x"}, context_management={}, service_tier="auto")[2] is False


@settings(max_examples=200, deadline=None)
@given(
    body=like(
        ASK
        | {"messages": [*TURNS, HELLO], "system": [text("be kind")], "tools": [TOOL], "tool_choice": {"type": "any"}}
        | {"thinking": {"type": "disabled"}, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    )
)
def test_no_body_is_too_strange(body):
    try:
        parse(Fields(body), SERVICE)
    except ApiError as error:
        assert error.status in (400, 422) and "\n" not in error.message


@pytest.mark.parametrize(
    "body, said",
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
        ({"messages": None}, "messages is missing"),
        ({"messages": []}, "at least one message of a user's"),
        ({"messages": [HELLO]}, "at least one message of a user's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role is 'robot', expected 'user' or"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is missing"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\].type is 'image'.*only text"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, r"'document'.*only text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id is missing"),
        ({"messages": [HI, {"role": "assistant", "content": [{"type": "tool_use"}]}, HI]}, "id is missing"),
        ({"messages": [HI, {"role": "assistant", "content": [{"type": "tool_use"}]}]}, "expected 'text'"),
        (
            {"messages": [HI, HELLO], "thinking": {"type": "enabled"}},
            "messages is .*expected a user's message at the end",
        ),
        (
            {"messages": [HI, HELLO], "output_format": {"type": "json_schema", "schema": {}}},
            "a user's message at the end",
        ),
        ({"temperature": 1.5}, "temperature is 1.5, expected a number from 0 to 1"),
        ({"stop_sequences": [""]}, "stop_sequences is .*not empty"),
        ({"tools": [{"input_schema": {}}]}, r"tools\[0\].name is missing"),
        ({"tool_choice": "auto"}, "tool_choice is 'auto', expected an object"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type is 'required', expected 'auto' or 'any'"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"output_config": {"format": {"type": "grammar"}}}, "output_config.format.type is 'grammar'"),
        ({"thinking": {}}, "thinking.type is missing"),
        ({"system": 3}, "system is 3, expected text or a list of blocks"),
    ],
)
def test_what_is_refused(body, said):
    with pytest.raises(ApiError, match=said) as raised:
        asked(**body)
    excluded = "at the end" in raised.value.message  # each field may be so, but not all of them
    assert raised.value.status == (422 if excluded else 400) and "\n" not in raised.value.message


# --- what goes out


@pytest.fixture(scope="module")
def canned():
    service = Canned()
    with service.serving() as url:
        service.client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        yield service


def streamed(canned, *said, **body) -> tuple[list[dict], Message]:
    """The stream's events, each checked against the SDK's own types, and the message that the SDK makes of them."""
    canned.said = said
    with canned.client.messages.create(**ASK, stream=True, **body) as stream:
        built = list(stream)
    for event in built:
        type(event).model_validate(event.to_dict())  # a client builds its objects without a check
    with canned.client.messages.stream(**ASK, **body) as stream:
        return [event.to_dict() for event in built], stream.get_final_message()


CALLED = [ToolCall(0, "call_1", "get"), ToolArguments(0, '{"a"'), ToolArguments(0, ": 1}")]
WHOLE = [Reasoning("hm"), Reasoning(" so"), Text("Hel"), Live(0.5, 0.4), Text("lo"), *CALLED]


def test_events_come_in_the_order_that_clients_want(canned):
    events, message = streamed(canned, *WHOLE, End("tool_calls", None, USAGE), tools=[TOOL])
    found = [(event["type"], event.get("index"), event.get("delta", {}).get("type")) for event in events]
    assert found == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert events[0]["message"]["usage"]["input_tokens"] == 12
    thought, said, call = message.content
    assert (thought.thinking, said.text, call.name, call.id) == ("hm so", "Hello", "get", "call_1")
    assert (call.input, message.stop_reason, message.usage.output_tokens) == ({"a": 1}, "tool_use", 7)
    assert thought.signature


def test_a_whole_answer_is_what_the_stream_adds_up_to(canned):
    events, added = streamed(canned, *WHOLE, End("tool_calls", None, USAGE), tools=[TOOL])
    plain = canned.client.messages.create(**ASK, tools=[TOOL])
    Message.model_validate(plain.to_dict())
    assert plain.model_dump(include={"role", "model", "stop_reason", "stop_sequence", "type"}) == added.model_dump(
        include={"role", "model", "stop_reason", "stop_sequence", "type"}
    )
    for one, other in zip(plain.content, added.content, strict=True):
        assert one.model_dump(exclude={"signature"}) == other.model_dump(exclude={"signature", "parsed_output"})
    usage = {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 2},
        "achieved_sparsity": 0.25,
    }
    assert plain.usage.to_dict() == events[-2]["usage"] == usage


@pytest.mark.parametrize(
    "reason, stop, said",
    [("stop", None, "end_turn"), ("stop", "###", "stop_sequence"), ("length", None, "max_tokens")],
)
def test_why_an_answer_stopped(canned, reason, stop, said):
    _, message = streamed(canned, Text("Hello"), End(reason, stop, USAGE))
    assert (message.stop_reason, message.stop_sequence) == (said, stop)


def test_a_call_that_was_cut_has_no_input(canned):
    canned.said = [*CALLED[:2], End("length", None, USAGE)]
    message = canned.client.messages.create(**ASK, tools=[TOOL])
    assert (message.content[0].input, message.stop_reason) == ({}, "max_tokens")


def test_an_answer_of_nothing(canned):
    events, message = streamed(canned, End("stop", None, USAGE))
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]
    assert message.content == []


def test_an_answer_that_fails_raises_at_the_client(canned):
    with pytest.raises(anthropic.APIStatusError, match="too slow") as raised:
        streamed(canned, Text("Hel"), ApiError(503, "too slow"))
    assert raised.value.body == {"type": "error", "error": {"type": "overloaded_error", "message": "too slow"}}


def test_pings_while_the_prompt_is_read(canned, monkeypatch):
    monkeypatch.setattr(messages, "PAUSE", 0.05)
    monkeypatch.setattr(canned, "reading", 0.2)
    canned.said = [Text("Hello"), End("stop", None, USAGE)]
    with canned.client.messages.with_streaming_response.create(**ASK, stream=True) as response:
        lines = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert 2 < lines.count("event: ping") < 6  # one comes with the start
    assert lines[-1] == "event: message_stop"


def test_a_client_that_goes_while_the_prompt_is_read_closes_the_answer(canned, monkeypatch):
    monkeypatch.setattr(canned, "reading", 60.0)
    with canned.client.messages.create(**ASK, stream=True) as stream:
        assert next(stream).type == "message_start"
        assert not canned.answer.closed.is_set()
    assert canned.answer.closed.wait(10)


# --- the real model behind it


@pytest.fixture(scope="module")
def live(demo):
    with serving(demo, api_key="secret") as server:
        yield anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)


GREEDY = {
    "model": "m",
    "max_tokens": 8,
    "messages": [{"role": "user", "content": "Name a colour."}],
    "extra_body": {"temperature": 0},
}


def test_a_streamed_answer_is_the_plain_one(live):
    plain = live.messages.create(**GREEDY)
    with live.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert plain.content[0].text == text == final.content[0].text != ""
    assert plain.usage.output_tokens == final.usage.output_tokens == 8
    assert plain.stop_reason == final.stop_reason == "max_tokens"


def test_count_tokens_is_what_an_answer_reads(live):
    body = {"model": "m", "system": "Be kind.", "messages": [HI, HELLO, HI], "tools": [TOOL]}
    for sent in (body, body | {"messages": [HI, HELLO]}):  # the second is begun by the assistant
        usage = live.messages.create(**sent, max_tokens=1).usage
        counted = live.messages.count_tokens(**sent).input_tokens
        assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(live):
    text = live.messages.create(**GREEDY).content[0].text
    stop = text[4:7]
    cut = live.messages.create(**GREEDY, stop_sequences=["unheard of", stop])
    assert (cut.stop_reason, cut.stop_sequence, cut.content[0].text) == ("stop_sequence", stop, text.partition(stop)[0])


def test_an_answer_goes_on_after_its_beginning(live):
    text = live.messages.create(**GREEDY).content[0].text
    begun = text[: text.index(" ", 6)]
    turns = [*GREEDY["messages"], {"role": "assistant", "content": begun}]
    rest = live.messages.create(**GREEDY | {"messages": turns}).content[0].text
    assert (begun + rest).startswith(text)


def test_a_tool_that_must_be_called_is(live):
    body = {**GREEDY, "max_tokens": 64, "tools": [TOOL]}
    body["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    with live.messages.stream(**body) as stream:
        final = stream.get_final_message()
    call = next(block for block in final.content if block.type == "tool_use")
    assert (call.name, type(call.input["a"]), final.stop_reason) == ("get", int, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "blue"}
    turns = [
        *GREEDY["messages"],
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": [result]},
    ]
    assert (
        live.messages.create(
            **body | {"messages": turns, "max_tokens": 1, "tool_choice": {"type": "none"}}
        ).usage.output_tokens
        > 0
    )


def test_json_that_fits_a_schema(live):
    class Colour(pydantic.BaseModel):
        name: Literal["red", "blue"]

    parsed = live.messages.parse(**{**GREEDY, "max_tokens": 64}, output_format=Colour)
    assert parsed.parsed_output.name in ("red", "blue")


def test_errors_have_anthropics_shape(live):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is 0") as raised:
        live.messages.create(**GREEDY | {"max_tokens": 0})
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="shorten"):
        live.messages.create(**GREEDY | {"messages": [{"role": "user", "content": "word " * 4000}]})
    with pytest.raises(anthropic.AuthenticationError):
        live.with_options(api_key="wrong").messages.create(**GREEDY)
