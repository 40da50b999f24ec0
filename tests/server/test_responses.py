import json
from typing import Literal

import openai
import pydantic
import pytest
from hypothesis import given, settings
from openai.types.responses import Response

from teal_fast.server import responses
from teal_fast.server.asked import End, Live, Reasoning, Text, ToolArguments, ToolCall, Usage
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.responses import parse
from teal_fast.tests.server.canned import Canned
from teal_fast.tests.server.live import serving
from teal_fast.tests.server.strange import like

USAGE = Usage(12, 7, 5, 2, 0.25)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "name": "get", "description": "d", "parameters": SCHEMA, "strict": True}
INNER = [TOOL | {"name": "find"}, {"type": "custom", "name": "x"}]
SPACE = {"type": "namespace", "name": "mcp__db", "description": "d", "tools": INNER}
FUNCTION = {"name": "get", "description": "d", "parameters": SCHEMA, "strict": True}
CALLED = [ToolCall(0, "call_1", "get"), ToolArguments(0, '{"a"'), ToolArguments(0, ": 1}")]
SERVICE, HI = Canned(), {"role": "user", "content": "hi"}
ITEMS = [
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wait"}]},
    {"type": "function_call", "call_id": "1", "name": "get", "arguments": '{"a": 1}'},
    {"type": "web_search_call", "id": "ws_1"},
    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "2"}]},
    {"type": "function_call", "call_id": "2", "name": "find", "namespace": "mcp__db", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "2", "output": "3"},
]
FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA}
MORE = {"reasoning": {"effort": "low", "summary": "auto"}, "tool_choice": {"type": "function", "name": "get"}}


def asked(**body):
    return parse(Fields({"input": "hi"} | body), SERVICE)


def messages(*items, **body) -> list[dict]:
    return list(asked(input=list(items), **body).chat.messages)


# --- what comes in


def test_input_is_text_or_messages():
    assert asked().chat.messages == [HI]
    system = {"role": "system", "content": "be kind\n\nand short"}
    text = {"type": "input_text", "text": "hi"}
    developer = {"type": "message", "role": "developer", "content": [text | {"text": "and short"}]}
    assert messages(developer, {"role": "user", "content": [text]}, instructions="be kind") == [system, HI]
    said = {
        "role": "assistant",
        "content": [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}],
    }
    assert messages(HI, said, HI) == [HI, {"role": "assistant", "content": "ab"}, HI]


def test_items_of_one_answer_are_one_message():
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    found = {"id": "2", "type": "function", "function": {"name": "mcp__db__find", "arguments": "{}"}}
    assert messages(HI, *ITEMS, tools=[SPACE]) == [
        HI,
        {"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [found]},
        {"role": "tool", "tool_call_id": "2", "content": "3"},
    ]


def test_thoughts_come_back_from_a_summary_as_well():
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": None}
    assert messages(HI, item, HI)[1]["reasoning_content"] == "hm"


def test_tools_are_functions_of_the_request_and_of_its_namespaces():
    taken = asked(tools=[TOOL, {"type": "web_search"}, {"type": "local_shell"}, SPACE])
    found = FUNCTION | {"name": "mcp__db__find"}
    assert [tool["function"] for tool in taken.chat.tools] == [FUNCTION, found]
    assert taken.names == {"mcp__db__find": ("mcp__db", "find")}


def test_tool_choice():
    other = TOOL | {"name": "set"}
    for word in ("auto", "none", "required"):
        assert asked(tools=[TOOL], tool_choice=word).chat.tool_choice == word
    chat = asked(tools=[TOOL], tool_choice={"type": "function", "name": "get"}).chat
    assert (chat.tool_choice, chat.tool_name) == ("named", "get")
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "set"}]}
    chat = asked(tools=[TOOL, other], tool_choice=allowed).chat
    assert (chat.tool_choice, [tool["function"]["name"] for tool in chat.tools]) == ("required", ["set"])
    assert asked(tools=[TOOL], parallel_tool_calls=False).chat.parallel_tool_calls is False


def test_format_and_thinking():
    assert asked().chat.schema is None
    assert asked(text={"format": {"type": "text"}, "verbosity": "low"}).chat.schema is None
    assert asked(text={"format": {"type": "json_object"}}).chat.schema == {}
    assert asked(text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}).chat.schema == SCHEMA
    assert asked(reasoning={}).chat.thinking is None
    assert asked(reasoning={"effort": "none"}).chat.thinking is False
    assert asked(reasoning={"effort": "xhigh"}).chat.thinking is True
    assert asked(reasoning={"summary": "auto"}).summary is True
    assert asked(reasoning={"summary": "none"}).summary is asked().summary is False


def test_settings():
    taken = asked(max_output_tokens=5, temperature=0.5, sparsity=0.25, stop="x", seed=3, prefill="full", cache=False)
    made = taken.settings
    assert (made.max_new_tokens, made.sampling.temperature, made.sparsity) == (5, 0.5, 0.25)
    assert (made.stop, made.seed, made.prefill, made.cache) == (("x",), 3, "full", False)
    assert asked(top_logprobs=3).settings.top_logprobs is None  # OpenAI's field says only how many
    assert asked(top_logprobs=3, include=["message.output_text.logprobs"]).settings.top_logprobs == 3
    assert asked(include=["message.output_text.logprobs", "reasoning.encrypted_content"]).settings.top_logprobs == 0


@settings(max_examples=200, deadline=None)
@given(body=like({"input": [HI, *ITEMS], "tools": [TOOL, SPACE], "stream": True, "text": {"format": FORMAT}} | MORE))
def test_no_body_is_too_strange(body):
    try:
        parse(Fields(body), SERVICE)
    except ApiError as error:
        assert error.status == 400 and "\n" not in error.message


@pytest.mark.parametrize(
    "body, param, said",
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": []}, "input", "at least one message"),
        ({"input": 3}, "input", "input is 3, expected a list"),
        ({"input": [3]}, "input[0]", r"input\[0\] is 3, expected a JSON object"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'robot', expected 'user' or"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content", "expected text or a list"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "only text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "stores none"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "is missing"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "is missing"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "stores nothing"),
        ({"prompt": {"id": "x"}}, "prompt", "stores nothing"),
        ({"background": True}, "background", "stores nothing"),
        ({"tools": [{}]}, "tools[0].type", "is missing"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        (
            {"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            "is missing",
        ),
        ({"tool_choice": "any"}, "tool_choice", "'auto' or 'none' or 'required'"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "'function' or 'allowed_tools'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        ({"reasoning": "high"}, "reasoning", "an object"),
        ({"truncation": "middle"}, "truncation", "'auto' or 'disabled'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "a whole number of at least 1"),
        ({"metadata": []}, "metadata", "an object"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"sparsity": 2}, "sparsity", "a number from 0"),
    ],
)
def test_what_is_refused(body, param, said):
    with pytest.raises(ApiError, match=said) as raised:
        asked(**body)
    assert (raised.value.status, raised.value.param) == (400, param)
    assert "\n" not in raised.value.message


# --- what goes out


@pytest.fixture(scope="module")
def canned():
    service = Canned()
    with service.serving() as url:
        service.client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        yield service


def streamed(canned, *said, **body) -> tuple[list, Response]:
    """The stream's events, each checked against the SDK's own types, and what the SDK makes of them all."""
    canned.said = said
    with canned.client.responses.create(model="m", input="hi", stream=True, **body) as stream:
        built = list(stream)
    raw = [event.to_dict() for event in built]
    for number, event in enumerate(built):
        type(event).model_validate(raw[number])  # a client builds its objects without a check
        assert event.sequence_number == number
    with canned.client.responses.stream(model="m", input="hi", **body) as stream:
        events = list(stream)
    assert [event.type for event in events] == [event["type"] for event in raw]
    return events, raw


WHOLE = [Reasoning("hm"), Reasoning(" so"), Text("Hel"), Live(0.5, 0.4), Text("lo"), *CALLED]


def test_events_come_in_the_order_that_clients_want(canned):
    events, raw = streamed(canned, *WHOLE, End("tool_calls", None, USAGE), tools=[TOOL])
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1].response
    thought, message, call = final.output
    assert (thought.content[0].text, final.output_text, call.arguments) == ("hm so", "Hello", '{"a": 1}')
    assert (call.name, call.call_id, call.status, call.parsed_arguments) == ("get", "call_1", "completed", {"a": 1})
    assert raw[2]["item"]["content"] == [] and message.status == "completed"
    done = [event["item"] for event in raw if event["type"] == "response.output_item.done"]
    assert done == raw[-1]["response"]["output"]


def test_a_whole_answer_is_what_the_stream_ends_with(canned):
    _, raw = streamed(canned, *WHOLE, End("tool_calls", None, USAGE), tools=[TOOL], metadata={"a": "b"})
    plain = canned.client.responses.create(model="m", input="hi", tools=[TOOL], metadata={"a": "b"}).to_dict()
    Response.model_validate(plain)
    for response in (plain, raw[-1]["response"]):
        unique = response.pop("id").partition("_")[2]
        response["output"] = json.loads(json.dumps(response["output"]).replace(unique, ""))
        response.pop("created_at"), response.pop("completed_at")
    assert plain == raw[-1]["response"]
    assert plain["usage"] == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 19,
        "achieved_sparsity": 0.25,
    }
    assert (plain["model"], plain["store"], plain["metadata"], plain["status"]) == ("m", False, {"a": "b"}, "completed")


def test_thoughts_are_a_summary_where_that_is_asked_for(canned):
    events, _ = streamed(canned, *WHOLE, End("stop", None, USAGE), reasoning={"effort": "low", "summary": "auto"})
    assert [event.type.removeprefix("response.reasoning_summary_") for event in events[3:8]] == [
        "part.added",
        "text.delta",
        "text.delta",
        "text.done",
        "part.done",
    ]
    thought = events[-1].response.output[0]
    assert (thought.summary[0].text, thought.content) == ("hm so", [])


def test_a_call_of_a_namespace_goes_back_to_it(canned):
    called = [ToolCall(0, "call_1", "mcp__db__find"), ToolArguments(0, "{}")]
    events, _ = streamed(canned, *called, End("tool_calls", None, USAGE), tools=[SPACE])
    for item in (events[2].item, events[-1].response.output[0]):
        assert (item.namespace, item.name) == ("mcp__db", "find")


def test_an_answer_that_was_cut_is_incomplete(canned):
    events, _ = streamed(canned, Text("Hel"), End("length", None, USAGE))
    final = events[-1].response
    assert (events[-1].type, final.status) == ("response.incomplete", "incomplete")
    assert (final.incomplete_details.reason, final.output[0].status) == ("max_output_tokens", "incomplete")


@pytest.mark.parametrize("status, code", [(503, "server_error"), (400, "invalid_prompt")])
def test_an_answer_that_fails_says_so_in_its_last_event(canned, status, code):
    events, _ = streamed(canned, Text("Hel"), ApiError(status, "too slow", code="timeout"))
    assert events[-1].type == "response.failed"
    assert (events[-1].response.error.code, events[-1].response.error.message) == (code, "too slow")


def test_an_answer_of_nothing(canned):
    events, _ = streamed(canned, End("stop", None, USAGE))
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.completed"]
    assert events[-1].response.output == []


def test_while_the_prompt_is_read_an_event_is_repeated(canned, monkeypatch):
    monkeypatch.setattr(responses, "PAUSE", 0.05)
    monkeypatch.setattr(canned, "reading", 0.2)
    events, _ = streamed(canned, Text("Hello"), End("stop", None, USAGE))
    assert 2 < [event.type for event in events].count("response.in_progress") < 6
    assert events[-1].response.output_text == "Hello"


def test_a_client_that_goes_while_the_prompt_is_read_closes_the_answer(canned, monkeypatch):
    monkeypatch.setattr(canned, "reading", 60.0)
    with canned.client.responses.create(model="m", input="hi", stream=True) as stream:
        assert next(stream).type == "response.created"
        assert not canned.answer.closed.is_set()
    assert canned.answer.closed.wait(10)


# --- the real model behind it


@pytest.fixture(scope="module")
def live(demo):
    with serving(demo) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


GREEDY = {"model": "m", "input": "Name a colour.", "max_output_tokens": 8, "temperature": 0}


def test_a_streamed_answer_is_the_plain_one(live):
    plain = live.responses.create(**GREEDY)
    with live.responses.stream(**GREEDY) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert plain.output_text == deltas == events[-1].response.output_text != ""
    assert plain.usage.output_tokens == events[-1].response.usage.output_tokens == 8
    assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    counted = live.responses.input_tokens.count(model="m", input=GREEDY["input"])
    assert counted.input_tokens == plain.usage.input_tokens


def test_the_next_turn_finds_its_prefix_in_the_cache(live):
    first = live.responses.create(**GREEDY)
    items = [{"role": "user", "content": GREEDY["input"]}, *first.to_dict()["output"], HI]
    second = live.responses.create(**GREEDY | {"input": items})
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens


def test_logprobs(live):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain = live.responses.create(**GREEDY, **wanted).output[0].content[0]
    assert "".join(token.token for token in plain.logprobs).startswith(plain.text)
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in plain.logprobs)
    with live.responses.stream(**GREEDY, **wanted) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert [token.token for event in deltas for token in event.logprobs] == [token.token for token in plain.logprobs]


def test_a_tool_that_must_be_called_is(live):
    body = GREEDY | {"max_output_tokens": 64, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    with live.responses.stream(**body) as stream:
        final = stream.get_final_response()
    call = next(item for item in final.output if item.type == "function_call")
    assert call.name == "get" and isinstance(json.loads(call.arguments)["a"], int)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "blue"}
    items = [{"role": "user", "content": "hi"}, *final.to_dict()["output"], result]
    assert (
        live.responses.create(**GREEDY | {"input": items, "tools": [TOOL], "max_output_tokens": 1}).usage.output_tokens
        > 0
    )


def test_json_that_fits_a_schema(live):
    class Colour(pydantic.BaseModel):
        name: Literal["red", "blue"]

    parsed = live.responses.parse(**GREEDY | {"max_output_tokens": 64}, text_format=Colour)
    assert parsed.output_parsed.name in ("red", "blue")


def test_errors_have_openais_shape(live):
    with pytest.raises(openai.BadRequestError) as raised:
        live.responses.create(**GREEDY, previous_response_id="resp_1")
    assert (raised.value.param, raised.value.type) == ("previous_response_id", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as raised:
        live.responses.create(**GREEDY | {"input": "word " * 4000})
    assert raised.value.code == "context_length_exceeded"
