"""Messages as chat templates want them: calls with their arguments as objects, results with ids that templates accept.

For a template that knows no tools, or writes calls in a form that is not known here, the tools are described in a
system message, calls become text of the assistant and results text of the user, in Hermes' form.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from teal_fast.server.formats import Format

Message = dict[str, Any]

INTRODUCTION = """You can call tools. These are their descriptions, one in each line:
<tools>
{tools}
</tools>
To call a tool, write its name and arguments as one JSON object between two tags:
<tool_call>
{{"name": "the tool's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>
Then stop: you are given what the tool returns. If no tool helps, answer in plain text."""


def messages_for(format: Format, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages in a form that the templates of a format render."""
    normal = [_normal(message, format) for message in messages]
    if format.single:
        normal = list(_one_by_one(normal))
    return _introduced(list(_as_text(normal)), tools) if format.own else normal


def _normal(message: Message, format: Format) -> Message:
    message = {"content": ""} | {key: value for key, value in message.items() if value is not None}
    if "tool_call_id" in message:
        message["tool_call_id"] = _id(message["tool_call_id"], format)
    calls = message.pop("tool_calls", None)  # Llama's template asks whether it is there
    return message | {"tool_calls": [_normal_call(call, format) for call in calls]} if calls else message


def _normal_call(call: Message, format: Format) -> Message:
    """A call with its arguments as an object; clients send them back as they got them: JSON text."""
    name, arguments = call["function"]["name"], call["function"].get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {"id": _id(call.get("id") or "", format), "type": "function", "function": function}


def _id(id: str, format: Format) -> str:
    """The same id where the templates accept it, else one made of it, so that calls and results still fit."""
    if format.id_length != 9 or re.fullmatch("[a-zA-Z0-9]{9}", id):
        return id
    return hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Messages with one call each, followed by its result."""
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.get("tool_calls", ())) < 2:
            yield message
            continue
        results = []
        while rest and rest[0].get("role") == "tool":
            results.append(rest.pop(0))
        for i, call in enumerate(message["tool_calls"]):
            yield message | {"content": message["content"] if i == 0 else "", "tool_calls": [call]}
            yield from (result for result in results if result.get("tool_call_id") == call["id"])


def _as_text(messages: Iterable[Message]) -> Iterator[Message]:
    """Calls and results as text; results that follow each other are one message."""
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        yield kept | {"content": "\n".join(filter(None, parts))}
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _introduced(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    if not tools:
        return messages
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = INTRODUCTION.format(tools="\n".join(lines))
    if messages and messages[0].get("role") == "system":
        first = messages[0]
        return [first | {"content": f"{first['content']}\n\n{text}".strip()}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
