"""The text of an answer, split as it arrives into what the model thinks, says and calls.

What may be the beginning of a marker is held back until it is certain. White space around thoughts and calls belongs to
their form and is dropped. What begins as a call and then turns out to be none is text, all of it: of what the model
says nothing is lost.
"""

import secrets
import string
from collections.abc import Container, Iterable, Iterator

from teal_fast.engine.text import overlap
from teal_fast.server.asked import Event, Reasoning, Text, ToolArguments, ToolCall
from teal_fast.server.calls import Call, NamedCall
from teal_fast.server.formats import Format, Thoughts


class Splitter:
    """format: how calls are written, None where none are expected. names: of the tools.

    begun: whether the prompt has begun the thoughts. split: whether thoughts are events of their own, or text with
    their markers. trim: whether white space before the text is dropped, as where it is JSON. The states are methods:
    each takes from `held` what is certain and says whether the next may go on.
    """

    def __init__(
        self,
        format: Format | None = None,
        names: Container[str] = (),
        thoughts: Thoughts = Thoughts(),  # noqa: B008, it is immutable
        begun: bool = False,
        split: bool = True,
        trim: bool = False,
    ):
        self.trim = trim
        self.format, self.names, self.thoughts, self.split = format, names, thoughts, split
        self.held, self.ended, self.events = "", False, []
        self.state = self._in_thoughts if begun else self._start
        self.new = split  # whether nothing was said since thoughts began or ended: white space is dropped
        self.silent, self.after_call = True, False  # whether there was no text yet, and none since a call
        self.call = self.announced = None
        self.raw = ""  # what will be text should the call be none
        self.index, self.listed = -1, False  # of the last call; whether it stands in a list

    @property
    def called(self) -> bool:
        """Whether the answer calls a tool: its last call is whole, and not cut by a stop string."""
        return self.announced is not None and self.announced.done

    def push(self, text: str) -> list[Event]:
        """The events that became certain with this piece of text."""
        self.held += text
        while self.held and self.state():
            pass
        return self._taken()

    def flush(self) -> list[Event]:
        """What is held back at the end of the text."""
        self.ended = True
        while self.state():
            pass
        return self._taken()

    def _taken(self) -> list[Event]:
        taken, self.events = self.events, []
        return list(_joined(taken))

    def _take(self, size: int) -> str:
        taken, self.held = self.held[:size], self.held[size:]
        return taken

    def _say(self, text: str) -> None:
        text = text.lstrip() if self.new else text
        if text:
            self.events.append(Text(text))
            self.new = self.silent = self.after_call = False

    def _start(self) -> bool:
        begin, text = self.thoughts.begin, self.held.lstrip()
        if text.startswith(begin):
            taken = self._take(len(self.held) - len(text) + len(begin))
            if not self.split:
                self.events.append(Text(taken))
            self.state = self._in_thoughts
        elif self.ended or not begin.startswith(text):
            self.state, self.new = self._in_text, self.trim
        else:
            return False
        return True

    def _in_thoughts(self) -> bool:
        end = self.thoughts.end
        place, size = self._certain(end)
        if not self.split:
            self._say(self._take(size + (len(end) if place >= 0 else 0)))
        else:
            text = self._take(size if self.ended and place < 0 else len(self.held[:size].rstrip()))
            if text := text.lstrip() if self.new else text:
                self.events.append(Reasoning(text))
                self.new = False
            if place >= 0:
                self._take(self.held.index(end) + len(end))
        if place >= 0:
            self.state, self.new = self._in_text, self.split
        return place >= 0

    def _in_text(self) -> bool:
        if self.format is None:
            self._say(self._take(len(self.held)))
            return False
        if self.format.bare and self.silent:
            text = self.held.lstrip()
            if text.startswith("{"):
                return self._begin(Call(self.names), self._take(len(self.held) - len(text)))
            if not text and not self.ended:
                return False
        place, size = self._certain(self.format.begin)
        text = self.held[:size]
        if place >= 0 or not self.ended or (self.after_call and text.isspace()):
            text = text.rstrip()
        self._say(self._take(len(text)))
        if place >= 0:
            self.raw = self._take(self.held.index(self.format.begin) + len(self.format.begin))
            self.state = self._in_calls
        return place >= 0

    def _certain(self, marker: str) -> tuple[int, int]:
        """Where the marker is in what is held, -1 for nowhere, and how much is before it or its beginning."""
        place = self.held.find(marker)
        return place, place if place >= 0 else len(self.held) - (0 if self.ended else overlap(self.held, marker))

    def _in_calls(self) -> bool:
        """After the marker: an object, a list of them, or a name."""
        text = self.held.lstrip()
        if not text:
            return self.ended and self._give_up()
        self.raw += self._take(len(self.held) - len(text))
        mistral = self.format.listed or self.format.named
        if mistral and text[0] == "[":
            self.listed = True
            return self._begin(Call(), self.raw + self._take(1))
        return self._begin(NamedCall() if mistral and text[0] != "{" else Call(), self.raw)

    def _begin(self, call: Call | NamedCall, raw: str) -> bool:
        self.call, self.raw, self.state = call, raw, self._in_call
        return True

    def _in_call(self) -> bool:
        taken, call = 0, self.call
        while taken < len(self.held) and not call.done and call.push(self.held[taken]):
            taken += 1
        self.raw += self._take(taken)
        if call.name is not None:
            self._announce(call)
        if call.done:
            self.state = self._after_call
            return True
        return bool(self.held or self.ended) and self._give_up()

    def _announce(self, call: Call | NamedCall) -> None:
        if call is not self.announced:
            self.index, self.announced = self.index + 1, call
            self.events.append(ToolCall(self.index, call.id or new_id(self.format.id_length), call.name))
            self.new, self.after_call = False, True
        self.raw = ""
        if arguments := call.take():
            self.events.append(ToolArguments(self.index, arguments))

    def _give_up(self) -> bool:
        """What was read is no call, or goes on as none."""
        self._say(self.raw)
        self.raw, self.listed, self.state = "", False, self._in_text
        return True

    def _after_call(self) -> bool:
        text, end = self.held.lstrip(), self.format.end
        if not text or (end and end.startswith(text) and end != text):
            if self.ended:
                self._take(len(self.held))
            return False
        white, following = len(self.held) - len(text), text.lstrip("; \t\r\n")
        if self.format.bare and not following and not self.ended:
            return False
        self.state = self._in_text
        if self.listed and text[0] == ",":
            return self._begin(Call(), self._take(white + 1))
        if self.listed and text[0] == "]":
            self._take(white + 1)
            self.listed = False
        elif end and text.startswith(end):
            self._take(white + len(end))
        elif self.format.bare and following.startswith("{"):
            return self._begin(Call(self.names), self._take(len(self.held) - len(following)))
        return True


def new_id(length: int) -> str:
    """An id of a call: OpenAI's form, or one of the nine letters and digits that Mistral's templates accept."""
    if length == 9:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))
    return f"call_{secrets.token_hex(length // 2)}"


def _joined(events: Iterable[Event]) -> Iterator[Event]:
    """Neighbours of one kind as one."""
    last = None
    for event in events:
        if isinstance(event, (Text, Reasoning)) and type(event) is type(last):
            last = type(event)(last.text + event.text)
        elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments) and event.index == last.index:
            last = ToolArguments(event.index, last.text + event.text)
        else:
            if last is not None:
                yield last
            last = event
    if last is not None:
        yield last
