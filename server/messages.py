"""Anthropic's /v1/messages and its count_tokens. Claude Code speaks only this.

Blocks of content become messages of a chat, events of the answer become blocks. Images and documents are refused;
server tools, such as web search, are skipped, since only Anthropic's own service runs them.
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.server.asked import Chat, End, Event, Reasoning, Settings, Text, ToolArguments, ToolCall, Usage
from teal_fast.server.body import read_body, unless_gone
from teal_fast.server.errors import ApiError, anthropic_shape
from teal_fast.server.fields import Fields
from teal_fast.server.service import Answer, Service
from teal_fast.server.settings import read_settings, read_stop
from teal_fast.server.sse import EventStream, frame, with_pauses
from teal_fast.server.turns import Turns, block_text, blocks, function, needed, objects, read_template

CHOICES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING, PAUSE = {"type": "ping"}, 15.0  # seconds
BILLING = "x-anthropic-billing-header"  # Claude Code's block with a hash of each request, which no cached prefix stands


def parse(fields: Fields, service: Service) -> tuple[Chat, Settings, bool]:
    fields.required("max_tokens")
    fields.number("temperature", None, 0, 1)
    settings = read_settings(fields, service, fields.whole("max_tokens", None, 1), read_stop(fields, "stop_sequences"))
    return read_chat(fields), settings, fields.flag("stream")


def read_chat(fields: Fields) -> Chat:
    """The conversation, which is all that count_tokens reads."""
    turns = Turns()
    if system := read_system(fields, "system"):
        turns.system(system)
    begun = read_messages(turns, fields)
    if not any(message["role"] != "system" for message in turns.messages):
        raise fields.error("messages", "at least one message of a user's")
    tools = [
        function(tool, "input_schema") for tool in objects(fields, "tools") if tool.text("type", "custom") == "custom"
    ]
    choice, tool_name, parallel = read_choice(fields)
    schema, thinking = read_schema(fields), read_thinking(fields)
    if begun and (schema is not None or choice in ("required", "named") or thinking):
        raise fields.error(
            "messages", "a user's message at the end: thinking, tool_choice and a format begin an answer", 422
        )
    return Chat(
        messages=turns.messages,
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        parallel_tool_calls=parallel,
        schema=schema,
        thinking=False if begun else thinking,
        template=read_template(fields),
        begun=begun,
    )


def read_messages(turns: Turns, fields: Fields) -> str:
    """Adds the messages to the turns, but for an assistant's at the end: the answer begins with its text."""
    fields.required("messages")
    begun, messages = "", objects(fields, "messages")
    for number, message in enumerate(messages):
        role = message.text("role", among=("user", "assistant", "system"))
        message.required("role")
        message.required("content")
        if role == "system":
            turns.system(read_system(message, "content"))
        elif role == "user":
            read_user(turns, message)
        elif number == len(messages) - 1:
            begun = "".join(block_text(block, ("text",)) for block in blocks(message, "content"))
        else:
            read_assistant(turns, message)
    return begun


def read_system(fields: Fields, name: str) -> str:
    texts = (block_text(block, ("text",)) for block in blocks(fields, name))
    return "\n".join(text for text in texts if not text.startswith(BILLING))


def read_user(turns: Turns, message: Fields) -> None:
    texts = []
    for block in blocks(message, "content"):
        if block.text("type") == "tool_result":
            text = "\n".join(block_text(part, ("text",)) for part in blocks(block, "content"))
            wrong = block.flag("is_error") and not text.lower().startswith("error")
            turns.result(needed(block, "tool_use_id"), f"Error: {text}" if wrong else text)
        else:
            texts.append(block_text(block, ("text", "tool_result")))
    if texts:
        turns.user("\n".join(texts))


def read_assistant(turns: Turns, message: Fields) -> None:
    texts, thoughts, calls = [], [], []
    for block in blocks(message, "content"):
        match needed(block, "type"):
            case "tool_use":
                arguments = block.object("input")
                calls.append((needed(block, "id"), needed(block, "name"), arguments.body if arguments else {}))
            case "thinking":
                thoughts.append(block.text("thinking", ""))
            case "redacted_thinking":
                pass
            case _:
                texts.append(block_text(block, ("text", "thinking", "tool_use")))
    turns.assistant("".join(texts), "".join(thoughts))
    for call in calls:
        turns.call(*call)


def read_choice(fields: Fields) -> tuple[str, str | None, bool]:
    """tool_choice, the tool that it names, and whether several calls may come in one answer."""
    if not (chosen := fields.object("tool_choice")):
        return "auto", None, True
    choice = CHOICES[chosen.text("type", "auto", CHOICES)]
    tool_name = needed(chosen, "name") if choice == "named" else None
    return choice, tool_name, not chosen.flag("disable_parallel_tool_use")


def read_schema(fields: Fields) -> dict[str, Any] | None:
    """The schema of output_config.format, or of output_format, as its beta had it."""
    config = fields.object("output_config")
    wanted = (config and config.object("format")) or fields.object("output_format")
    if not wanted:
        return None
    wanted.text("type", among=("json_schema",))
    wanted.required("schema")
    return wanted.object("schema").body


def read_thinking(fields: Fields) -> bool | None:
    """What the template is told. Left out, it does what its model does, as Anthropic's models do; adaptive is on."""
    wanted = fields.object("thinking")
    return needed(wanted, "type") != "disabled" if wanted else None


class Content:
    """Takes an answer's events, gives the stream's, and holds the message as far as it has come."""

    def __init__(self, id: str, model: str, prompt_tokens: int):
        self.message = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }
        self.blocks: list[dict[str, Any]] = self.message["content"]
        self.is_open, self.arguments = False, ""

    def begin(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self.message | {"content": []}}
        yield PING

    def push(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Text(text):
                yield from self._text({"type": "text", "text": ""}, "text_delta", text)
            case Reasoning(text):
                yield from self._text({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", text)
            case ToolCall(_, id, name):
                yield from self._add({"type": "tool_use", "id": id, "name": name, "input": {}})
            case ToolArguments(_, text):
                self.arguments += text
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case End(finish_reason, stop, usage):
                yield from self._close()
                reason = STOP_REASONS[finish_reason] if stop is None else "stop_sequence"
                ended = {"stop_reason": reason, "stop_sequence": stop}
                self.message |= {**ended, "usage": usage_of(usage)}
                yield {"type": "message_delta", "delta": ended, "usage": self.message["usage"]}
                yield {"type": "message_stop"}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _add(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self.blocks.append(block)
        self.is_open, self.arguments = True, ""
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _text(self, block: dict[str, Any], delta: str, text: str) -> Iterator[dict[str, Any]]:
        kind = block["type"]
        if not (self.is_open and self.blocks[-1]["type"] == kind):
            yield from self._add(block)
        self.blocks[-1][kind] += text
        yield self._delta({"type": delta, kind: text})

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self.is_open:
            return
        self.is_open, block = False, self.blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = read_input(self.arguments)
        elif block["type"] == "thinking":  # some clients drop a thought that has no signature; here it says nothing
            block["signature"] = self.message["id"]
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}


def read_input(arguments: str) -> dict[str, Any]:
    """The input of a call; none where max_tokens cut it."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Anthropic counts as input only what did not come from the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "achieved_sparsity": round(usage.achieved_sparsity, 6),
    }


async def endpoint(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    model = service.check_model(fields.text("model"))
    chat, settings, stream = parse(fields, service)
    (answer,) = await service.begin_chat(chat, settings, f"msg_{uuid.uuid4().hex}")
    content = Content(answer.id, model, answer.prompt_tokens)
    if stream:
        return EventStream(frames(content, answer), [answer])
    return JSONResponse(await unless_gone(request, whole(content, answer)))


async def frames(content: Content, answer: Answer) -> AsyncIterator[bytes]:
    """The stream's events, with pings while the prompt is read."""
    for data in content.begin():
        yield frame(data, data["type"])
    try:
        async with aclosing(aiter(answer)) as events, aclosing(with_pauses(events, PAUSE)) as paced:
            async for event in paced:
                for data in content.push(event) if event else [PING]:
                    yield frame(data, data["type"])
    except ApiError as error:
        yield frame(anthropic_shape(error), "error")


async def whole(content: Content, answer: Answer) -> dict[str, Any]:
    """The answer as one JSON object."""
    async with aclosing(aiter(answer)) as events:
        async for event in events:
            for _ in content.push(event):
                pass
    return content.message


async def count_tokens(request: Request) -> Response:
    """How many tokens a message's prompt has, by the rendering that answers it."""
    service: Service = request.app.state.service
    fields = await read_body(request)
    service.check_model(fields.text("model"))
    made = await service.plan(read_chat(fields))
    return JSONResponse({"input_tokens": len(made.ids)})
