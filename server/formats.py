"""How models write tool calls and thoughts: the formats of our families, told from a chat template, and as grammars.

Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Llama 3: `{"name": …, "parameters": {…}}` at
the start of an answer or after `<|python_tag|>`. Mistral: `[TOOL_CALLS]` and a list of Hermes' objects, later
`[TOOL_CALLS]name[ARGS]{…}`. Templates of other formats, and those that know no tools, are given Hermes' format in words
of our own (transcript.py). Left out: XML within calls, as Qwen3-Coder and GLM write it, and Llama's built-in tools.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from teal_fast.files.tokenizer import Tokenizer

# Between the parts of JSON, as llama.cpp's grammars have it: without a bound small models write spaces for ever.
SPACE = r"[ ]|\n{1,2}[ \t]{0,20}"


class Thoughts(NamedTuple):
    """What stands before and after what a model thinks, at the start of an answer."""

    begin: str = "<think>"
    end: str = "</think>"


@dataclass(frozen=True)
class Format:
    """begin, end: what stands before and after a call. key: what the arguments are called.

    listed: the calls after one `begin` are a JSON list. named: the name stands before the arguments, outside of the
    JSON. bare: a call may begin an answer without `begin`. single: the template takes one call in a message. own: the
    tools are described in our words. id_length: of a call's id.
    """

    begin: str
    key: str = "arguments"
    end: str = ""
    listed: bool = False
    named: bool = False
    bare: bool = False
    single: bool = False
    own: bool = False
    id_length: int = 24

    @property
    def markers(self) -> tuple[str, ...]:
        """What a tokenizer may have as special tokens."""
        return tuple(filter(None, (self.begin, self.end, *((ARGUMENTS, CALL_ID) if self.named else ()))))


ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
HERMES = Format("<tool_call>", end="</tool_call>")
OWN = Format("<tool_call>", end="</tool_call>", own=True)
LLAMA = Format("<|python_tag|>", key="parameters", bare=True, single=True)
MISTRAL = Format("[TOOL_CALLS]", listed=True, id_length=9)  # its templates refuse ids of another length
MISTRAL_NAMED = Format("[TOOL_CALLS]", named=True, id_length=9)


def format_of(template: str) -> Format:
    """The format that a chat template speaks."""
    if not re.search(r"\btools\b", template):
        return OWN
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if ARGUMENTS in template else MISTRAL
    if "<tool_call>" in template and not re.search(r"<function=|<arg_key>", template):
        return HERMES
    return LLAMA if re.search(r"\bipython\b", template) and "parameters" in template else OWN


def thoughts_of(template: str) -> Thoughts:
    return Thoughts("[THINK]", "[/THINK]") if "[THINK]" in template else Thoughts()


def visible_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """Markers that are special tokens, by id: text is decoded without those, and here they must be seen."""
    template = tokenizer.chat_template or ""
    markers = (*thoughts_of(template), *format_of(template).markers)
    ids = {tokenizer.added_id(marker): marker for marker in markers}
    return {id: marker for id, marker in ids.items() if id is not None and id not in tokenizer.pieces}


def json_grammar(rule: str, think: str) -> str:
    """An answer that is JSON of a rule of grammar.json_rule; think: what goes before it, see thinking()."""
    return f"start: {think} SPACE answer\nanswer: {rule}\n{_COMMON}"


def thinking(thoughts: Thoughts, begun: bool) -> str:
    """The rule `think`: a block of thoughts, or the rest of one that the prompt begins; MUSING: one that begins."""
    begin = "" if begun else f"/\\s*/ {_text(thoughts.begin)}"
    return f"think[lazy]: THINK\nTHINK: {begin} ANY {_text(thoughts.end)}\nMUSING: /\\s*/ {_text(thoughts.begin)} ANY\n"


def forced_calls(format: Format, tools: Mapping[str, str], think: str, single: bool, answer: str = "") -> str:
    """An answer that is nothing but calls, or else JSON of the rule `answer`; tools: rules of arguments, by name."""
    one = f"SPACE {_text(format.begin)} {_after_begin(format, single or format.single)}"
    calls = "one" if single or format.single or format.listed else "one+"
    if answer:
        calls = f"({calls} | SPACE answer)\nanswer: {answer}"  # a bare call would hide answers that begin like one
    elif format.bare:
        calls = f"({calls} | call)"
    return f"start: {think} {calls}\none: {one}\n{_calls(format, tools)}{_COMMON}"


def free_calls(format: Format, tools: Mapping[str, str], think: str, single: bool) -> str:
    """An answer of any text, in which what begins a call goes on as one.

    Within thoughts nothing is a call. Free text therefore doesn't begin as thoughts do: `first`, where they may come.
    """
    once, bare = single or format.single or format.listed, "call SPACE | " if format.bare else ""
    rest = _after_begin(format, single or format.single)
    after = f"{bare}free {rest} SPACE | TEXT?" if once else f"(free {rest})* TEXT?"
    first = f"{bare}free_first {rest} {'SPACE' if once else 'after'} | TEXT_FIRST?"
    start = {"": "after", "think": "think after", "think?": "think after | first"}[think]
    unlike = " & ~BEGUN" if format.bare else ""
    return (
        f"start: {start}\nafter: {after}\nfirst: {first}\nfree[lazy]: FREE\nfree_first[lazy]: FREE_FIRST\n"
        f"FREE: (ANY {_text(format.begin)}){unlike}\nFREE_FIRST: FREE & ~MUSING\n"
        f"TEXT: /(?s:.+)/{unlike}\nTEXT_FIRST: TEXT & ~MUSING\n{_calls(format, tools)}{_COMMON}"
    )


_COMMON = f"SPACE: /({SPACE})?/\nANY: /(?s:.*)/\n"


def _after_begin(format: Format, once: bool) -> str:
    if format.listed:
        more = "" if once else '(SPACE "," call)*'
        return f'SPACE "[" call {more} SPACE "]"'
    return f"call SPACE {_text(format.end)}" if format.end else "call"


def _calls(format: Format, tools: Mapping[str, str]) -> str:
    """The rule `call`, and the terminal BEGUN of texts that begin as a call does."""
    id = '(SPACE "," SPACE "\\"id\\"" SPACE ":" SPACE /"[a-zA-Z0-9]{9}"/)?' if format.listed else ""
    lines = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, (name, rule) in enumerate(tools.items()):
        if format.named:
            lines.append(f"NAME_{i}: SPACE {_text(name)}")
            head, tail = f"NAME_{i} ({_text(CALL_ID)} /[a-zA-Z0-9]{{9}}/)? {_text(ARGUMENTS)}", ""
        else:
            lines.append(
                f'NAME_{i}: SPACE "{{" SPACE "\\"name\\"" SPACE ":" SPACE {_text(json.dumps(name, ensure_ascii=False))}'
            )
            head = f'NAME_{i} SPACE "," SPACE {_text(json.dumps(format.key))} SPACE ":"'
            tail = f'{id} SPACE "}}"'
        lines.append(f"HEAD_{i}: {head}\ncall_{i}: HEAD_{i} SPACE arguments_{i} {tail}\narguments_{i}: {rule}")
    lines.append(f"BEGUN: ({' | '.join(f'NAME_{i}' for i in range(len(tools)))}) ANY")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return json.dumps(text)
