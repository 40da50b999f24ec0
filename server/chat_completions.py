"""POST /v1/chat/completions, OpenAI's older API, with the fields that vLLM and llama.cpp add to it."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.server.asked import Chat, End, Live, Reasoning, Settings, Text, ToolArguments, ToolCall, Usage
from teal_fast.server.body import read_body, unless_gone
from teal_fast.server.errors import ApiError, openai_shape
from teal_fast.server.fields import Fields
from teal_fast.server.logprobs import chat_logprobs
from teal_fast.server.service import Answer, Service, close_all, new_id
from teal_fast.server.settings import MOST_ANSWERS, MOST_TOP, read_settings
from teal_fast.server.sse import EventStream, frame
from teal_fast.server.turns import call, function, needed, objects, read_template

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MOST_MESSAGES, MOST_TOOLS = 10_000, 1000


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    model = service.check_model(fields.text("model"))
    chat, settings = read_chat(fields), read_chat_settings(fields, service)
    service.check_count(settings.n)
    options = fields.object("stream_options") or Fields({})
    stream, usage, live = fields.flag("stream"), options.flag("include_usage"), options.flag("sparsity")
    begun = Begin(new_id("chatcmpl"), "chat.completion", model)
    answers = await service.begin_chat(chat, settings, begun.id)
    if stream:
        return EventStream(chunks(begun, answers, service, usage, live), answers)
    return JSONResponse(await unless_gone(request, whole(begun, answers, service)))


class Begin:
    """What all parts of one response carry."""

    def __init__(self, id: str, kind: str, model: str):
        self.id, self.kind, self.model, self.created = id, kind, model, int(time.time())

    def object(self, choices: list[dict], kind: str = "", **more: Any) -> dict[str, Any]:
        named = {"id": self.id, "object": self.kind + kind, "created": self.created, "model": self.model}
        return named | {"choices": choices} | more


# --- what comes in


def read_chat(fields: Fields) -> Chat:
    fields.required("messages")
    if not fields.items("messages"):
        raise fields.error("messages", "at least one message")
    template = read_template(fields)
    thinking = template.get("enable_thinking")
    if thinking is not None and not isinstance(thinking, bool):
        raise ApiError(400, "chat_template_kwargs.enable_thinking: expected true or false", "chat_template_kwargs")
    if thinking is None and fields.text("reasoning_effort") == "none":
        thinking = False
    choice, name = read_tool_choice(fields)
    return Chat(
        [read_message(message) for message in objects(fields, "messages", MOST_MESSAGES)],
        [read_tool(tool) for tool in objects(fields, "tools", MOST_TOOLS)],
        choice,
        name,
        fields.flag("parallel_tool_calls", True),
        read_format(fields),
        thinking,
        fields.text("reasoning_format", "auto", ("auto", "deepseek", "none")) != "none",
        {key: value for key, value in template.items() if key != "enable_thinking"},
    )


def read_message(fields: Fields) -> dict[str, Any]:
    fields.required("role")
    role = fields.text("role", among=ROLES)
    message: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    calls = objects(fields, "tool_calls")
    if calls and role != "assistant":
        raise fields.error("tool_calls", "none, as only an assistant calls tools")
    if not calls:
        fields.required("content")
    message["content"] = read_content(fields)
    for name in ("reasoning_content", "name", "tool_call_id"):
        if fields.given(name):
            message[name] = fields.text(name)
    if calls:
        message["tool_calls"] = [read_call(one) for one in calls]
    return message


def read_content(fields: Fields) -> str:
    """A message's text: as it is, or joined from its parts."""
    value = fields.body.get("content")
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in objects(fields, "content"):
        if part.text("type") not in ("text", "refusal"):
            raise part.error("type", "'text': this model reads nothing else")
        part.required(part.text("type"))
        texts.append(part.text(part.text("type")))
    return "".join(texts)


def read_call(fields: Fields) -> dict[str, Any]:
    fields.required("function")
    called = fields.object("function")
    name, arguments = needed(called, "name"), called.body.get("arguments")
    if not isinstance(arguments, str | dict | None):
        raise called.error("arguments", "JSON as text, or an object")
    return call(fields.text("id", ""), name, arguments or {})


def read_tool(fields: Fields) -> dict[str, Any]:
    fields.text("type", among=("function",))
    fields.required("function")
    return function(fields.object("function"), "parameters")


def read_tool_choice(fields: Fields) -> tuple[str, str | None]:
    if not isinstance(fields.body.get("tool_choice"), dict):
        return fields.text("tool_choice", "auto", ("auto", "none", "required")), None
    function = fields.object("tool_choice").object("function")
    if function is None or not function.text("name"):
        raise fields.error("tool_choice", "'auto', 'none', 'required' or a function's name")
    return "named", function.text("name")


def read_format(fields: Fields) -> dict[str, Any] | None:
    """The schema that response_format asks for, {} for any object, None for free text."""
    if (wanted := fields.object("response_format")) is None:
        return None
    wanted.required("type")
    kind = wanted.text("type", among=("text", "json_object", "json_schema"))
    if kind != "json_schema":
        return {} if kind == "json_object" else None
    described = wanted.object("json_schema")
    schema = described and described.object("schema")
    if schema is None:
        raise ApiError(400, "response_format.json_schema.schema is missing", "response_format")
    return schema.body or {"type": ["object", "array", "string", "number", "boolean", "null"]}


def read_chat_settings(fields: Fields, service: Service) -> Settings:
    most = fields.whole("max_completion_tokens", fields.whole("max_tokens", None, 1), 1)
    top = fields.whole("top_logprobs", None, 0, MOST_TOP)
    if top is not None and not fields.flag("logprobs"):
        raise ApiError(422, "top_logprobs is given without logprobs: set logprobs to true", "top_logprobs")
    top = (top or 0) if fields.flag("logprobs") else None
    return read_settings(fields, service, most, top_logprobs=top, n=fields.whole("n", 1, 1, MOST_ANSWERS))


# --- what goes out


def usage_object(found: list[Usage]) -> dict[str, Any]:
    """One prompt's usage over all its answers."""
    prompt, completion = found[0].prompt_tokens, sum(usage.completion_tokens for usage in found)
    steps = sum(max(0, usage.completion_tokens - 1) for usage in found)
    skipped = sum(max(0, usage.completion_tokens - 1) * usage.achieved_sparsity for usage in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": found[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in found)},
        "achieved_sparsity": round(skipped / steps, 6) if steps else 0.0,
    }


async def whole(begun: Begin, answers: list[Answer], service: Service) -> dict[str, Any]:
    try:
        found = [await collect(answer, service, index) for index, answer in enumerate(answers)]
    finally:
        close_all(answers)
    return begun.object([choice for choice, _ in found], usage=usage_object([usage for _, usage in found]))


async def collect(answer: Answer, service: Service, index: int) -> tuple[dict[str, Any], Usage]:
    """One answer as a choice, and what it cost."""
    text, reasoning, calls, tokens = [], [], [], []
    async with aclosing(aiter(answer)) as events:
        async for event in events:
            if isinstance(event, Text):
                text.append(event.text)
                tokens += event.tokens
            elif isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, ToolCall):
                calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
            elif isinstance(event, ToolArguments):
                calls[event.index]["function"]["arguments"] += event.text
            elif isinstance(event, End):
                end = event
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text) if text or not calls else None}
    message |= {"reasoning_content": "".join(reasoning)} if reasoning else {}
    message |= {"tool_calls": calls} if calls else {}
    choice = {"index": index, "message": message, "finish_reason": end.finish_reason, "logprobs": None}
    if answer.settings.top_logprobs is not None:
        choice["logprobs"] = {"content": chat_logprobs(tokens, service.tokenizer)}
    return choice, end.usage


async def chunks(
    begun: Begin, answers: list[Answer], service: Service, with_usage: bool, live: bool
) -> AsyncIterator[bytes]:
    """The frames of a streamed response, answer after answer."""
    found = []
    try:
        for index, answer in enumerate(answers):
            async with aclosing(deltas(answer, service, index, live)) as parts:
                async for choice, more, usage in parts:
                    found += [usage] if usage else []
                    yield frame(begun.object([choice] if choice else [], ".chunk", **more))
        if with_usage:
            yield frame(begun.object([], ".chunk", usage=usage_object(found)))
    except ApiError as error:
        yield frame(openai_shape(error))
    yield b"data: [DONE]\n\n"


async def deltas(answer: Answer, service: Service, index: int, live: bool) -> AsyncIterator[tuple]:
    """Choices of chunks, with the chunk's other fields and, at the end, what the answer cost."""

    def choice(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    tokens = 0
    yield choice({"role": "assistant", "content": ""}), {}, None
    async with aclosing(aiter(answer)) as events:
        async for event in events:
            if isinstance(event, Text):
                found = {"content": chat_logprobs(event.tokens, service.tokenizer)} if event.tokens else None
                yield choice({"content": event.text}, logprobs=found), {}, None
            elif isinstance(event, Reasoning):
                yield choice({"reasoning_content": event.text}), {}, None
            elif isinstance(event, ToolCall):
                call = {"index": event.index, "id": event.id, "type": "function"}
                call["function"] = {"name": event.name, "arguments": ""}
                yield choice({"tool_calls": [call]}), {}, None
            elif isinstance(event, ToolArguments):
                call = {"index": event.index, "function": {"arguments": event.text}}
                yield choice({"tool_calls": [call]}), {}, None
            elif isinstance(event, Live):
                tokens += 1
                if live:
                    now = {"nominal": event.sparsity, "achieved": event.achieved, "tokens": tokens}
                    yield None, {"sparsity": now}, None
            elif isinstance(event, End):
                yield choice({}, event.finish_reason), {}, event.usage
