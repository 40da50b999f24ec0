"""From a chat to what is decoded: the prompt's ids, what the answer is held to, and how its text is split.

A forced answer (a schema, tool_choice required or named) is held to it from its first token on, or from the end of its
thoughts. With tool_choice auto the answer is free until a call begins, and then held to the tools' parameters. Tools
that must not be called are shown to the template all the same, as vLLM does, so that the prompt's beginning stays what
it was; calls are then text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from teal_fast.engine.request import Constraint
from teal_fast.files.store import short
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.asked import Chat
from teal_fast.server.errors import ApiError
from teal_fast.server.formats import (
    Format,
    Thoughts,
    forced_calls,
    format_of,
    free_calls,
    json_grammar,
    thinking,
    thoughts_of,
    visible_markers,
)
from teal_fast.server.grammar import Grammars, json_rule
from teal_fast.server.splitter import Splitter
from teal_fast.server.transcript import messages_for

ANY_OBJECT = {"type": "object"}
MOST_NAME = 256  # characters; OpenAI's API takes 64
TAIL = 32  # ids at a prompt's end in which thoughts begin or end


@dataclass(frozen=True)
class Plan:
    """How a chat is answered.

    ids: the prompt. constraint, splitter: begin those of one answer, None for text as it comes. visible: special tokens
    that the splitter must see in the text, for TextStream.
    """

    ids: list[int]
    constraint: Callable[[], Constraint] | None = None
    splitter: Callable[[], Splitter] | None = None
    visible: Mapping[int, str] = field(default_factory=dict)


def plan(chat: Chat, tokenizer: Tokenizer, grammars: Grammars) -> Plan:
    """Raises ApiError: 400 for what can't be rendered or enforced, 422 for a schema where a tool must be called."""
    _check(chat)
    template = tokenizer.chat_template or ""
    format, thoughts, visible = format_of(template), thoughts_of(template), visible_markers(tokenizer)
    ids = _render(chat, tokenizer, format)
    stream = tokenizer.stream(visible=visible)
    tail = ("".join(map(stream.push, ids[-TAIL:])) + stream.flush()).rstrip()
    begun, over = tail.endswith(thoughts.begin), tail.endswith(thoughts.end)
    names = frozenset(tool["function"]["name"] for tool in chat.tools)
    expected = format if names and chat.tool_choice != "none" else None
    grammar = _Grammar(thoughts, begun, over, thinks=begun or thoughts.begin in template)
    return Plan(
        ids,
        grammar.constraint(chat, expected, grammars),
        lambda: Splitter(expected, names, thoughts, begun, chat.split_thinking, trim=chat.schema is not None),
        visible,
    )


def _check(chat: Chat) -> None:
    names = [tool["function"]["name"] for tool in chat.tools]
    if wrong := [name for name in names if not 0 < len(name) <= MOST_NAME]:
        raise ApiError(400, f"a tool's name is {short(wrong[0])}, expected 1 to {MOST_NAME} characters", "tools")
    if chat.tool_choice not in ("required", "named"):
        return
    if not names:
        raise ApiError(422, f"tool_choice is {chat.tool_choice}, and there are no tools: give some", "tool_choice")
    if chat.tool_choice == "named" and chat.tool_name not in names:
        raise ApiError(422, f"tool_choice names {short(chat.tool_name)}, expected one of the tools", "tool_choice")
    if chat.schema is not None:
        raise ApiError(
            422,
            "response_format asks for JSON and tool_choice for a call: drop one, or choose tools by auto",
            "response_format",
        )


def _render(chat: Chat, tokenizer: Tokenizer, format: Format) -> list[int]:
    variables = dict(chat.template)
    if chat.thinking is not None:  # what Qwen 3 and DeepSeek V3.1 call it
        variables |= {"enable_thinking": chat.thinking, "thinking": chat.thinking}
    tools = [_shown(tool["function"]) for tool in chat.tools]
    messages = messages_for(format, chat.messages, tools)
    try:
        return tokenizer.encode_chat(messages, tools=None if format.own else tools or None, variables=variables)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None


def _shown(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates describe it to the model: Hermes' and functionary's want all three fields."""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    described = {"description": function.get("description") or "", "parameters": parameters}
    return {"type": "function", "function": {"name": function["name"]} | described}


@dataclass(frozen=True)
class _Grammar:
    """What an answer is held to; thinks: whether the model thinks before an answer that is forced."""

    thoughts: Thoughts
    begun: bool
    over: bool
    thinks: bool

    def constraint(self, chat: Chat, format: Format | None, grammars: Grammars) -> Callable[[], Constraint] | None:
        may = "" if self.over else "think" if self.begun else "think?"
        must, end = may if self.thinks else "", thinking(self.thoughts, self.begun)
        answer = ""
        if chat.schema is not None:
            answer = json_rule(chat.schema or ANY_OBJECT, True, "response_format")
            grammars.check(answer, "response_format")
        if format is None:
            return grammars.begin(json_grammar(answer, must) + end, "response_format") if answer else None
        forced = chat.tool_choice in ("required", "named")
        single = (
            not chat.parallel_tool_calls or chat.tool_choice == "named"
        )  # a named one is called once, as OpenAI does
        rules = _rules(chat, grammars, forced)
        if forced or answer:
            return grammars.begin(forced_calls(format, rules, must, single, answer) + end, "tools")
        try:
            return grammars.begin(free_calls(format, rules, may, single) + end, "tools")
        except ApiError:
            if any(_is_strict(tool) for tool in chat.tools):
                raise
            return None  # of all the tools together too large: calls are parsed as they come


def _rules(chat: Chat, grammars: Grammars, forced: bool) -> dict[str, str]:
    """The rule of each callable tool's arguments; any object where neither the tool nor the choice is strict."""
    rules = {}
    for i, tool in enumerate(chat.tools):
        name, param = tool["function"]["name"], f"tools[{i}].function.parameters"
        if chat.tool_choice == "named" and name != chat.tool_name:
            continue
        schema = (tool["function"].get("parameters") or {}) | ANY_OBJECT
        try:
            rules[name] = json_rule(schema, _is_strict(tool), param)
            grammars.check(rules[name], param)
        except ApiError:
            if forced or _is_strict(tool):
                raise
            rules[name] = json_rule(ANY_OBJECT, True, param)
    return rules


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool["function"].get("strict") is True
