"""Chat templates: a checkpoint's Jinja2 program, run in a sandbox, that turns messages into one text.

The program is foreign. Jinja2 keeps it from the machine's files, but not from its time and memory: here a template ends
that computes for longer than SECONDS, and one whose text or part of it is longer than MOST, is refused.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from functools import lru_cache, wraps
from types import CodeType
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from teal_fast.files.store import one_line
from teal_fast.files.vocabulary import NAMED_TOKENS

SECONDS = 5  # a template takes milliseconds
RESERVED = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", *NAMED_TOKENS}
MOST = 2**24  # characters or items of a repeated text or list, bits of a number


class _Code(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%", "+"))
    code_generator_class = _Code
    deadline = 0.0  # of the thread's own time, which goes on only while it computes; past until rendering begins

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {name: self.bounded(function) for name, function in self.filters.items()}

    def call(self, context: Context, function: Callable, *arguments: Any, **named: Any) -> Any:
        # range() and macros are called: loops within loops, and macros that call themselves, come by here.
        self._check_time()
        if isinstance(getattr(function, "__self__", None), str):  # a width, say: "x".ljust(10**10)
            _check_numbers(arguments)
        return _checked(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size_of_result(operator, left, right) > MOST:
            raise SecurityError(f"{operator} gives more than {MOST} characters, items or bits")
        return _checked(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:
        # The text of the template, of a macro or of a block comes by here, and what `~` joins.
        joined, size = [], 0
        for part in parts:
            self._check_time()
            joined.append(part)
            if (size := size + len(part)) > MOST:
                raise SecurityError(f"its text is longer than {MOST} characters")
        return "".join(joined)

    def _check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it takes over {SECONDS} s")

    def bounded(self, function: Callable) -> Callable:
        @wraps(function)  # with its marks: some want the environment as first argument
        def bounded(*arguments: Any, **named: Any) -> Any:
            self._check_time()
            _check_numbers((*arguments[1:], *named.values()))
            return _checked(function(*arguments, **named))

        return bounded

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja2 lets an unsafe attribute print as nothing; a template that tries is not to be trusted.
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is not allowed")


def _checked(result: Any) -> Any:
    if isinstance(result, Sized) and len(result) > MOST:
        raise SecurityError(f"a part of it has more than {MOST} characters or items")
    return result


def _check_numbers(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, int) and argument > MOST for argument in arguments):
        raise SecurityError(f"a number given to a method or filter is more than {MOST}")


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    if operator == "+" or (operator == "%" and not isinstance(left, str)):
        return sum(len(side) for side in (left, right) if isinstance(side, Sized))
    if operator == "%":  # widths, and those that stand in the values, with `*`
        fields = " ".join(re.findall(r"%(?:\(.*?\))?([-+ #0-9.*]*)", left))
        values = (right if isinstance(right, tuple) else (right,)) if "*" in fields else ()
        widths = [int(width[:20]) for width in re.findall("[0-9]+", fields)]
        return len(left) + sum((*widths, *(abs(value) for value in values if isinstance(value, int))))
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    repeated, times = (right, left) if isinstance(left, int) else (left, right)
    return len(repeated) * times if isinstance(times, int) and hasattr(repeated, "__len__") else 0


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; a block of its own here, as in transformers."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unmarked"), [], [], body).set_lineno(line)

    def _unmarked(self, caller: Callable[[], str]) -> str:
        return caller()


def render_chat(
    template: str,
    messages: Sequence[dict[str, Any]],
    names: Mapping[str, str],
    tools: Sequence[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    marks: Mapping[str, str] | None = None,
) -> str:
    """The text that asks the model for its next answer to `messages` (each a role and a content).

    names: bos_token, eos_token and the like. variables: what else the template may use, documents and enable_thinking
    for example. marks: what is written instead of a text where the template itself writes it, and not a message.
    Raises ValueError when the template fails or reaches too far.
    """
    marks, variables = marks or {}, variables or {}
    if taken := sorted(RESERVED & variables.keys()):
        raise ValueError(f"{taken[0]!r} cannot be set as a variable of the chat template: leave it out")
    own = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
    own |= {name: marks.get(text, text) for name, text in names.items()}
    sandbox = _sandbox()
    try:
        code = _compiled(template, tuple(marks.items()))
        program = sandbox.template_class.from_code(sandbox, code, sandbox.make_globals(None))
        sandbox.deadline = time.thread_time() + SECONDS
        return program.render({"documents": None, **variables, **own})
    except Exception as error:  # a template is a foreign program: it can raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"the chat template failed ({reason}): check the messages, correct the checkpoint's chat template, or drop "
            "--chat"
        ) from error


def _sandbox() -> _Sandbox:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja2's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = sandbox.bounded(tojson)
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return sandbox


@lru_cache(maxsize=8)
def _compiled(template: str, marks: tuple[tuple[str, str], ...]) -> CodeType:
    """A template's code, which takes up to half a second to make. It holds no state: each call has its own sandbox."""
    sandbox, marked = _sandbox(), dict(marks)
    tree = sandbox.parse(template)
    if marked:
        # The longest first, as where a text is split at its added tokens.
        pattern = re.compile("|".join(map(re.escape, sorted(marked, key=len, reverse=True))))
        for node in tree.find_all((nodes.TemplateData, nodes.Const)):
            field = "data" if isinstance(node, nodes.TemplateData) else "value"
            if isinstance(text := getattr(node, field), str):
                setattr(node, field, pattern.sub(lambda match: marked[match[0]], text))
    return sandbox.compile(tree)
