"""Chat templates: a checkpoint's Jinja2 program, run in a sandbox, that turns messages into one text."""

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja2 lets an unsafe attribute print as nothing; a template that tries is not to be trusted.
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is not allowed")


def render_chat(template: str, messages: list[dict[str, str]], names: dict[str, str]) -> str:
    """The text that asks the model for its next answer to `messages` (each a role and a content).

    `names` holds bos_token, eos_token and the like. Raises ValueError when the template fails or reaches too far.
    """

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja2's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
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
