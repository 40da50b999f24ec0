"""Turns of a conversation as chat templates take them: one system message at the start, then roles that alternate.

Agents send more than that. Claude Code 2.1 and Codex 0.14x put system and developer messages between turns, several of
a role in a row, and a note between a call and its result. Templates of 2026 refuse a system message that is not the
first (Qwen3.8), or roles that do not alternate (Mistral, Gemma). Moved to the start, what comes later would change the
prompt's beginning, and with it all that the prefix cache holds; so it joins the turn before it, as in vLLM's
inline_system.py. The same messages and one more therefore begin with the same text.
"""

from collections.abc import Sequence
from typing import Any

from teal_fast.server.fields import Fields

JOINTS = {"content": "\n\n", "reasoning_content": ""}  # between the texts of messages that become one


class Turns:
    """Messages in the shape of chat completions, built from pieces in the order in which a dialect has them."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []  # their texts are lists, joined once: a million may become one

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [
            {name: JOINTS[name].join(part) if name in JOINTS else part for name, part in message.items()}
            for message in self._messages
        ]

    def _last(self, *roles: str) -> dict[str, Any] | None:
        return self._messages[-1] if self._messages and self._messages[-1]["role"] in roles else None

    def _add(self, message: dict[str, Any], text: str, name: str = "content") -> None:
        if text:
            message.setdefault(name, []).append(text)

    def _new(self, role: str) -> dict[str, Any]:
        self._messages.append({"role": role, "content": []})
        return self._messages[-1]

    def system(self, text: str) -> None:
        if not self._messages:
            self._add(self._new("system"), text)
        elif message := self._last("system", "user", "tool"):
            self._add(message, text)
        else:
            self.user(text)

    def user(self, text: str) -> None:
        self._add(self._last("user") or self._new("user"), text)

    def assistant(self, text: str = "", reasoning: str = "") -> dict[str, Any]:
        message = self._last("assistant") or self._new("assistant")
        self._add(message, text)
        self._add(message, reasoning, "reasoning_content")
        return message

    def call(self, id: str, name: str, arguments: Any) -> None:
        """A call of the assistant's; arguments: an object, or text where a model wrote what is none."""
        self.assistant().setdefault("tool_calls", []).append(call(id, name, arguments))

    def result(self, id: str, text: str) -> None:
        """What a call gave. It follows calls and other results at once: a note that came between goes after it."""
        before = self._messages[-2] if len(self._messages) > 1 and self._last("user") else {}
        between = "tool_calls" in before or "tool_call_id" in before
        message = {"role": "tool", "tool_call_id": id, "content": [text] if text else []}
        self._messages.insert(len(self._messages) - between, message)


def objects(fields: Fields, name: str, most: int | None = None) -> list[Fields]:
    """A list of objects, each with its place for errors."""
    items = fields.items(name, most=most)
    return [Fields(item, f"{fields.place}{name}[{number}]") for number, item in enumerate(items)]


def blocks(fields: Fields, name: str) -> list[Fields]:
    """What a message holds: a list of blocks, or text, which counts as one block of type text."""
    content = fields.body.get(name)
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content}, f"{fields.place}{name}")]
    if content is not None and not isinstance(content, list):
        raise fields.error(name, "text or a list of blocks")
    return objects(fields, name)


def block_text(block: Fields, kinds: Sequence[str]) -> str:
    """The text of a block that is of one of these types. Models here read text and nothing else."""
    if needed(block, "type") not in kinds:
        raise block.error("type", f"{' or '.join(repr(word) for word in kinds)}: models here read only text")
    return block.text("text", "")


def needed(fields: Fields, name: str) -> str:
    fields.required(name)
    return fields.text(name)


def call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A tool's call as chat completions write it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(fields: Fields, parameters: str) -> dict[str, Any]:
    """A tool as chat completions write it; parameters: the field of its JSON schema."""
    described = {"name": needed(fields, "name")}
    if fields.given("description"):
        described["description"] = fields.text("description")
    schema = fields.object(parameters)
    described["parameters"] = schema.body if schema else {"type": "object", "properties": {}}
    if fields.given("strict"):
        described["strict"] = fields.flag("strict")
    return {"type": "function", "function": described}


def read_template(fields: Fields) -> dict[str, Any]:
    """More variables of the chat template, in the field in which vLLM and llama.cpp take them."""
    return variables.body if (variables := fields.object("chat_template_kwargs")) else {}
