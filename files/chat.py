"""Chat templates: a checkpoint's Jinja2 program, run in a sandbox, that turns messages into one text."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja2 lets an unsafe attribute print as nothing; a template that tries is not to be trusted.
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is not allowed")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; a block of its own here, as in transformers."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unmarked"), [], [], body).set_lineno(line)

    def _unmarked(self, caller: Callable[[], str]) -> str:
        return caller()


def render_chat(template: str, messages: list[dict[str, str]], names: dict[str, str]) -> str:
    """The text that asks the model for its next answer to `messages` (each a role and a content).

    `names` holds bos_token, eos_token and the like. Raises ValueError when the template fails or reaches too far.
    """

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja2's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    given = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
    try:
        return sandbox.from_string(template).render(given | names)
    except Exception as error:  # a template is a foreign program: it can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"the chat template failed ({reason}): check the messages, correct the checkpoint's chat template, or drop "
            "--chat"
        ) from error
