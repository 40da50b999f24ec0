"""OpenAI's /v1/responses without memory: each request brings its whole conversation. Codex speaks only this.

Items of `input` become messages of a chat, events of the answer become items of `output`. Items and tools of kinds that
only OpenAI's own service can run are skipped, since Codex 0.14x sends them with every request. Its namespaces, which
hold the tools of MCP servers, are flattened to `namespace__name`, and calls are split again: Codex finds a tool by the
two.
"""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.server.asked import Chat, Settings
from teal_fast.server.body import read_body, unless_gone
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.logprobs import chat_logprobs
from teal_fast.server.response_items import Output
from teal_fast.server.service import Answer, Service
from teal_fast.server.settings import MOST_TOP, read_settings
from teal_fast.server.sse import EventStream, frame, with_pauses
from teal_fast.server.turns import Turns, block_text, blocks, function, needed, objects, read_template

TEXT = ("text", "input_text", "output_text")
MEMORY = {  # fields that need what an earlier request left behind
    "previous_response_id": "send the whole conversation in input",
    "conversation": "send the whole conversation in input",
    "prompt": "send its text in instructions and input",
}
PAUSE = 15.0  # seconds
LOGPROBS = "message.output_text.logprobs"


class Asked(NamedTuple):
    """names: namespace and name of each flattened tool. summary: whether thoughts are shown as a summary's text."""

    chat: Chat
    settings: Settings
    stream: bool
    echo: dict[str, Any]
    names: dict[str, tuple[str, str]]
    summary: bool


def parse(fields: Fields, service: Service) -> Asked:
    chat, names = read_chat(fields)
    top_logprobs = fields.whole("top_logprobs", 0, 0, MOST_TOP) if LOGPROBS in fields.items("include") else None
    settings = read_settings(fields, service, fields.whole("max_output_tokens", None, 1), top_logprobs=top_logprobs)
    _, summary = read_reasoning(fields)
    return Asked(chat, settings, fields.flag("stream"), echo(fields, settings), names, summary)


def read_chat(fields: Fields) -> tuple[Chat, dict[str, tuple[str, str]]]:
    """The conversation, and namespace and name of each flattened tool."""
    for name, instead in MEMORY.items():
        if fields.given(name):
            raise ApiError(400, f"{name} is not supported, since this server stores nothing: {instead}", name)
    if fields.flag("background"):
        raise fields.error("background", "false: this server stores nothing")
    tools, names = read_tools(fields)
    choice, tool_name, tools = read_choice(fields, tools)
    chat = Chat(
        messages=read_input(fields, {parts: flat for flat, parts in names.items()}),
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        schema=read_format(fields),
        thinking=read_reasoning(fields)[0],
        template=read_template(fields),
    )
    return chat, names


def read_input(fields: Fields, flat: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """The messages of `instructions` and `input`. flat: how the chat calls a tool of a namespace."""
    turns = Turns()
    if instructions := fields.text("instructions"):
        turns.system(instructions)
    fields.required("input")
    if isinstance(text := fields.body["input"], str):
        turns.user(text)
        return turns.messages
    for item in objects(fields, "input"):
        read_item(turns, item, flat)
    if not (messages := turns.messages):
        raise fields.error("input", "at least one message")
    return messages


def read_item(turns: Turns, item: Fields, flat: dict[tuple[str, str], str]) -> None:
    match item.text("type", "message"):
        case "message":
            role = item.text("role", "user", ("user", "assistant", "system", "developer"))
            texts = [block_text(part, TEXT) for part in blocks(item, "content")]
            text = ("" if role == "assistant" else "\n").join(texts)
            {"user": turns.user, "assistant": turns.assistant}.get(role, turns.system)(text)
        case "reasoning":
            parts = objects(item, "content") or objects(item, "summary")
            turns.assistant(
                reasoning="\n\n".join(block_text(part, ("reasoning_text", "summary_text")) for part in parts)
            )
        case "function_call":
            name = needed(item, "name")
            name = flat.get((item.text("namespace", ""), name), name)
            turns.call(needed(item, "call_id"), name, needed(item, "arguments"))
        case "function_call_output":
            texts = [block_text(part, TEXT) for part in blocks(item, "output")]
            turns.result(needed(item, "call_id"), "\n".join(texts))
        case "item_reference":
            raise item.error("type", "the item itself, since this server stores none")


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    tools, names = [], {}
    for tool in objects(fields, "tools"):
        kind = needed(tool, "type")
        if kind == "function":
            tools.append(function(tool, "parameters"))
        elif kind == "namespace":
            space = needed(tool, "name")
            for inner in objects(tool, "tools"):
                if inner.text("type") == "function":
                    described = function(inner, "parameters")
                    name = described["function"]["name"]
                    described["function"]["name"] = f"{space}__{name}"
                    names[f"{space}__{name}"] = (space, name)
                    tools.append(described)
    return tools, names


def read_choice(fields: Fields, tools: list[dict[str, Any]]) -> tuple[str, str | None, list[dict[str, Any]]]:
    """tool_choice, the tool that it names, and the tools that it leaves."""
    choice, tool_name = "auto", None
    if not isinstance(fields.body.get("tool_choice"), dict):
        choice = fields.text("tool_choice", "auto", ("auto", "none", "required"))
    else:
        chosen = fields.object("tool_choice")
        kind = chosen.text("type", among=("function", "allowed_tools"))
        if kind == "allowed_tools":
            choice = chosen.text("mode", "auto", ("auto", "required"))
            allowed = {needed(tool, "name") for tool in objects(chosen, "tools") if tool.text("type") == "function"}
            tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        else:
            choice, tool_name = "named", needed(chosen, "name")
    return choice, tool_name, tools


def read_reasoning(fields: Fields) -> tuple[bool | None, bool]:
    """Whether the model should think, None where that is left to its template, and whether a summary is wanted.

    Templates know no degrees: every effort but none is thinking.
    """
    if not (reasoning := fields.object("reasoning")):
        return None, False
    effort = reasoning.text("effort")
    return None if effort is None else effort != "none", reasoning.text("summary", "none") != "none"


def read_format(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema of `text.format`."""
    wanted = (text := fields.object("text")) and text.object("format")
    kind = wanted.text("type", "text", ("text", "json_object", "json_schema")) if wanted else "text"
    if kind != "json_schema":
        return {} if kind == "json_object" else None
    wanted.required("schema")
    return wanted.object("schema").body


def echo(fields: Fields, settings: Settings) -> dict[str, Any]:
    """The fields of a request that its answer repeats."""
    body, sampling = fields.body, settings.sampling
    fields.text("truncation", among=("auto", "disabled"))
    return {
        "instructions": body.get("instructions"),
        "max_output_tokens": settings.max_new_tokens,
        "metadata": metadata.body if (metadata := fields.object("metadata")) else {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "temperature": sampling.temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": list(fields.items("tools")),
        "top_logprobs": settings.top_logprobs or 0,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "truncation": "disabled",  # a prompt that is too long is refused
        "user": fields.text("user"),
        "background": False,
        "previous_response_id": None,
        "store": False,
    }


async def endpoint(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    model = service.check_model(fields.text("model"))
    asked = parse(fields, service)
    (answer,) = await service.begin_chat(asked.chat, asked.settings, f"resp_{uuid.uuid4().hex}")
    response = {"id": answer.id, "object": "response", "created_at": int(time.time()), "model": model, **asked.echo}
    output = Output(response, asked.names, asked.summary, partial(chat_logprobs, tokenizer=service.tokenizer))
    if asked.stream:
        return EventStream(frames(output, answer), [answer])
    return JSONResponse(await unless_gone(request, whole(output, answer)))


async def frames(output: Output, answer: Answer) -> AsyncIterator[bytes]:
    """The stream's events. While the prompt is read, one is repeated, since Codex waits no 300 s for the next."""
    for data in output.begin():
        yield frame(data, data["type"])
    try:
        async with aclosing(aiter(answer)) as events, aclosing(with_pauses(events, PAUSE)) as paced:
            async for event in paced:
                for data in output.push(event) if event else output.waiting():
                    yield frame(data, data["type"])
    except ApiError as error:
        data = output.failed(error)
        yield frame(data, data["type"])


async def whole(output: Output, answer: Answer) -> dict[str, Any]:
    """The answer as one JSON object."""
    async with aclosing(aiter(answer)) as events:
        async for event in events:
            for _ in output.push(event):
                pass
    return output.response


async def count_tokens(request: Request) -> Response:
    """POST /v1/responses/input_tokens: how many tokens a prompt has, by the rendering that answers it."""
    service: Service = request.app.state.service
    fields = await read_body(request)
    service.check_model(fields.text("model"))
    made = await service.plan(read_chat(fields)[0])
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(made.ids)})
