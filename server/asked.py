"""What a client asks for and what comes back, in no dialect's words: each dialect translates to and from these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from teal_fast.engine.sampling import Sampling
from teal_fast.engine.scoring import Scored


@dataclass(frozen=True)
class Chat:
    """A conversation to be answered, as chat completions write it.

    messages: role, content (text), reasoning_content, tool_calls with their arguments as objects, tool_call_id, name.
    tools: function, with name, description, parameters and strict. tool_choice: auto, none, required or named;
    tool_name: the one that must be called where it is named. schema: what the answer's JSON must fit, {} for any
    object, None for free text. thinking: what the template is told, None for its own default. split_thinking: whether
    `<think>` goes apart from the answer's text. template: more variables of the chat template. begun: text that the
    answer continues, and that is not part of it.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    schema: dict[str, Any] | None = None
    thinking: bool | None = None
    split_thinking: bool = True
    template: dict[str, Any] = field(default_factory=dict)
    begun: str = ""


@dataclass(frozen=True)
class Settings:
    """How an answer is made. top_logprobs: None for no log-probabilities, else how many of the likeliest tokens.

    max_new_tokens: None for as many as fit the context. prefill: "dense", or "full" where all of the prompt but its
    first token is sparse. cache: whether the prompt's beginning may come from the prefix cache, and stay in it.
    ignore_eos: whether the answer goes on after tokens that end it. n: how many answers. lossless and
    what begins with draft: as a Request has them.
    """

    sampling: Sampling
    sparsity: float
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    prefill: str = "dense"
    cache: bool = True
    ignore_eos: bool = False
    n: int = 1
    lossless: bool = False
    draft: str = "auto"
    draft_sparsity: float | None = None
    draft_tokens: int | None = None


@dataclass(frozen=True)
class Usage:
    """achieved_sparsity: the share of weight bytes that decoding skipped; cached_tokens: of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    achieved_sparsity: float = 0.0


class Begun(NamedTuple):
    """The first event, once the prompt is read. scored: the prompt's tokens but the first, where that was asked for."""

    cached_tokens: int
    scored: list[Scored]


class Text(NamedTuple):
    """A piece of an answer's text; tokens: those that came since the last piece, where log-probabilities are wanted."""

    text: str
    tokens: tuple[Scored, ...] = ()


class Reasoning(NamedTuple):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCall(NamedTuple):
    """The beginning of a call; index: its number in the answer."""

    index: int
    id: str
    name: str


class ToolArguments(NamedTuple):
    """A piece of a call's arguments, which are JSON once all pieces are joined."""

    index: int
    text: str


class Live(NamedTuple):
    """After each token: the sparsity that was asked for and the one achieved, None where the step does not count."""

    sparsity: float
    achieved: float | None


class End(NamedTuple):
    """The last event. finish_reason: stop, length or tool_calls; stop: the stop string that ended it, if one did."""

    finish_reason: str
    stop: str | None
    usage: Usage


Event = Begun | Text | Reasoning | ToolCall | ToolArguments | Live | End
