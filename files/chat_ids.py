"""From a chat to ids, where only the control tokens that its template writes become control tokens.

A user may write `<|im_end|>`, and a tool may return a text that holds it: there it is text, as any other. A rendered
chat does not show who wrote what, as messages, names and the keys of a tool's parameters all end up in one text. So
control tokens in the template's own texts are replaced by marks before it runs. A template that looks for a control
token in a message does not find it there.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from teal_fast.files.chat import render_chat
from teal_fast.files.vocabulary import Encode, is_control

# Marks are lone surrogates: no valid text has them, so that none can come from a message.
SURROGATES = re.compile("[\ud800-\udfff]")
FIRST_MARK, BREAK = 0xD800, "\udfff"
DEEPEST = 100  # lists and objects within one another, in messages and tools


class ChatEncoder:
    """Renders chats with one template, and encodes them. A chat is what chat_of gives.

    added: the vocabulary's added tokens. names: bos_token, eos_token and the like, which the template may write.
    """

    def __init__(self, encode: Encode, added: Mapping[int, AddedToken], template: str, names: Mapping[str, str]):
        self._encode, self._template, self._names = encode, template, names
        self._control = {token.content: (i, token) for i, token in added.items() if is_control(token)}
        self._ids = {i for i, _ in self._control.values()}
        written = [name for name in self._control if name in template or name in names.values()]
        self._marks = {name: chr(FIRST_MARK + i) for i, name in enumerate(written)}
        self._marked = {mark: name for name, mark in self._marks.items()}
        self._any_mark = _any_of(self._marked)

    def render(self, chat: Mapping[str, Any]) -> str:
        """The text of a chat."""
        return self._unmarked(self._render(chat))

    def encode(self, chat: Mapping[str, Any]) -> list[int]:
        """The ids of a chat."""
        rendered = self._render(chat)
        ids = self._encode(self._unmarked(rendered))
        expected = [self._control[self._marked[mark]][0] for mark in self._any_mark.findall(rendered)]
        if [i for i in ids if i in self._ids] == expected:
            return ids  # the common case: no control tokens but the template's own, and one text
        built = self._built(chat)
        if built:  # those in messages are told apart by a break within them
            pattern = _any_of(built)
            broken = _mapped(chat, lambda text: pattern.sub(lambda found: found[0][0] + BREAK + found[0][1:], text))
            rendered = self._render(broken)
        return self._encode_apart(_any_of([*self._marked, *built]).split(rendered))

    def _built(self, chat: Mapping[str, Any]) -> list[str]:
        """The control tokens that the template puts together, as Phi's does with `'<|' + role + '|>'`.

        They are those without a mark where all strings of the chat are words, which can be no control tokens.
        """
        try:
            rendered = self._render(_mapped(chat, lambda text: re.sub(r"[^\w\s]", "x", text)))
        except ValueError:  # the template wants a text that was changed
            return []
        return [name for name in self._control if name in rendered]

    def _encode_apart(self, parts: Sequence[str]) -> list[int]:
        """Ids of texts that take turns with control tokens, given by name or mark."""
        tokens = [self._control[self._marked.get(part, part)] for part in parts[1::2]]
        ids: list[int] = []
        for i, text in enumerate(parts[::2]):
            text = text.replace(BREAK, "")
            if i:
                token, added = tokens[i - 1]
                ids.append(token)
                text = text.lstrip() if added.rstrip else text
            if i < len(tokens) and tokens[i][1].lstrip:
                text = text.rstrip()
            ids += self._encode(text, control=False, start=not i)
        return ids

    def _render(self, chat: Mapping[str, Any]) -> str:
        return render_chat(self._template, names=self._names, marks=self._marks, **chat)

    def _unmarked(self, text: str) -> str:
        return self._any_mark.sub(lambda found: self._marked[found[0]], text)


def chat_of(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    add_generation_prompt: bool,
) -> dict[str, Any]:
    """The arguments of render_chat. Raises ValueError where a text is no valid Unicode."""

    def check(text: str) -> str:
        if SURROGATES.search(text):
            raise ValueError("text cannot be tokenized (it holds a lone surrogate): pass valid Unicode text")
        return text

    chat = {"messages": messages, "tools": tools, "variables": variables}
    return _mapped(chat, check) | {"add_generation_prompt": add_generation_prompt}


def _mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of a JSON value whose strings are changed, an object's keys too."""
    if depth > DEEPEST:
        raise ValueError(f"the chat has more than {DEEPEST} lists and objects within one another: make it flatter")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: _mapped(part, change, depth + 1)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(part, change, depth + 1) for part in value]
    return value


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts, as one group."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")
