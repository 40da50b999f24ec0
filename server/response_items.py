"""An answer as /v1/responses has it: items of output, and the stream's events in the order in which clients want them.

An item is added, its part is added, deltas come, then each is done: so openai 3.57 puts a response together, and Codex
takes an item when it is done. Thoughts go into `content` as reasoning_text, as in vLLM and llama.cpp. Where a summary
is asked for, they go into `summary` instead, which is what Codex shows unless it is told to show raw thoughts.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from teal_fast.engine.scoring import Scored
from teal_fast.server.asked import End, Event, Reasoning, Text, ToolArguments, ToolCall, Usage
from teal_fast.server.errors import ApiError


class Kind(NamedTuple):
    """How an item with one text is written: type and id of the item, where its part stands, names of its events."""

    item: str
    id: str
    place: str
    index: str
    part: str
    part_event: str
    text_event: str


MESSAGE = Kind("message", "msg", "content", "content_index", "output_text", "content_part", "output_text")
THOUGHT = Kind("reasoning", "rs", "content", "content_index", "reasoning_text", "content_part", "reasoning_text")
SUMMARY = Kind(
    "reasoning", "rs", "summary", "summary_index", "summary_text", "reasoning_summary_part", "reasoning_summary_text"
)


class Output:
    """Takes an answer's events, gives the stream's, and holds the response as far as it has come.

    response: the fields that stand from the beginning. names: namespace and name of flattened tools. summary: whether
    thoughts go into the summary. logprobs: writes tokens down as OpenAI does.
    """

    def __init__(
        self,
        response: dict[str, Any],
        names: dict[str, tuple[str, str]],
        summary: bool,
        logprobs: Callable[[tuple[Scored, ...]], list[dict[str, Any]]],
    ):
        state = {"status": "in_progress", "error": None, "incomplete_details": None, "output": [], "usage": None}
        self.response = response | state
        self.names, self.thought, self.logprobs = names, SUMMARY if summary else THOUGHT, logprobs
        self.items: list[dict[str, Any]] = self.response["output"]
        self.kind: Kind | None = None  # of the open item, None for a call
        self.is_open, self.number = False, 0

    def begin(self) -> Iterator[dict[str, Any]]:
        yield self._frame("response.created", response=self.response | {"output": []})
        yield from self.waiting()

    def waiting(self) -> Iterator[dict[str, Any]]:
        yield self._frame("response.in_progress", response=self.response | {"output": []})

    def push(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Text(text, tokens):
                logprobs = self.logprobs(tokens) if tokens else []
                yield from self._text(MESSAGE, text, logprobs)
            case Reasoning(text):
                yield from self._text(self.thought, text)
            case ToolCall(_, call_id, name):
                yield from self._call(call_id, name)
            case ToolArguments(_, text):
                self.items[-1]["arguments"] += text
                yield self._in_item("function_call_arguments.delta", delta=text)
            case End(finish_reason, _, usage):
                yield from self._end(finish_reason == "length", usage)

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The last event of an answer that broke off. The API has a list of codes; Codex tries no bad prompt again."""
        known = {"message": error.message, "code": "invalid_prompt" if error.status < 500 else "server_error"}
        self.response |= {"status": "failed", "error": known}
        return self._frame("response.failed", response=self.response)

    def _frame(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def _in_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self._frame(f"response.{kind}", **place, **fields)

    def _item_frame(self, kind: str) -> dict[str, Any]:
        item = copy.deepcopy(self.items[-1])
        return self._frame(f"response.output_item.{kind}", output_index=len(self.items) - 1, item=item)

    def _add(self, kind: Kind | None, prefix: str, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self.kind, self.is_open = kind, True
        unique = self.response["id"].partition("_")[2]
        self.items.append({"id": f"{prefix}_{unique}_{len(self.items)}", "status": "in_progress", **item})
        yield self._item_frame("added")

    def _text(self, kind: Kind, text: str, logprobs: list[dict[str, Any]] | None = None) -> Iterator[dict[str, Any]]:
        if not (self.is_open and self.kind is kind):
            if kind is MESSAGE:
                item, part = {"role": "assistant"}, {"annotations": [], "logprobs": []}
            else:
                item, part = {"summary": []}, {}
            yield from self._add(kind, kind.id, {"type": kind.item, **item, "content": []})
            part = {"type": kind.part, "text": "", **part}
            self.items[-1][kind.place].append(part)
            yield self._in_item(f"{kind.part_event}.added", **{kind.index: 0}, part=copy.deepcopy(part))
        part = self.items[-1][kind.place][0]
        part["text"] += text
        more = {}
        if kind is MESSAGE:
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._in_item(f"{kind.text_event}.delta", **{kind.index: 0}, delta=text, **more)

    def _call(self, call_id: str, name: str) -> Iterator[dict[str, Any]]:
        namespace, name = self.names.get(name, (None, name))
        item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        yield from self._add(None, "fc", item if namespace is None else item | {"namespace": namespace})

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self.is_open:
            return
        self.is_open, item = False, self.items[-1]
        if kind := self.kind:
            part = item[kind.place][0]
            more = {"logprobs": part["logprobs"]} if kind is MESSAGE else {}
            yield self._in_item(f"{kind.text_event}.done", **{kind.index: 0}, text=part["text"], **more)
            yield self._in_item(f"{kind.part_event}.done", **{kind.index: 0}, part=part)
        else:
            yield self._in_item("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        item["status"] = status
        yield self._item_frame("done")

    def _end(self, cut: bool, usage: Usage) -> Iterator[dict[str, Any]]:
        status = "incomplete" if cut else "completed"
        yield from self._close(status)
        self.response |= {"status": status, "usage": usage_of(usage), "completed_at": None if cut else int(time.time())}
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._frame(f"response.{status}", response=self.response)


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "achieved_sparsity": round(usage.achieved_sparsity, 6),
    }
