"""Text of an answer whose tokens arrive one by one: streamed detokenizing and stop strings, one for all clients."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from teal_fast.engine.request import Token
from teal_fast.files.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into pieces of text that are certain; joined they are the text up to the first stop string.

    prompt: the ids that the tokens follow, which decide whether a leading space belongs to the text. visible: special
    tokens that are shown as text, by id.
    What may be the beginning of a stop string is held back until it is certain that it is none. `stopped_at` is the
    stop string that was met, None as long as none was: what comes after it is dropped, and the stream of tokens can be
    closed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Iterable[int],
        stop: Sequence[str] = (),
        visible: Mapping[int, str] | None = None,
    ):
        if not all(stop):
            raise ValueError("a stop string is empty: give some text")
        self.pieces, self.stop = tokenizer.stream(prompt, visible), tuple(stop)
        self.held, self.stopped_at = "", None

    @property
    def stopped(self) -> bool:
        return self.stopped_at is not None

    def push(self, token: Token) -> str:
        """The text that became certain with this token; a stop token has none."""
        return "" if token.finish_reason == "stop" else self._release(self.pieces.push(token.id))

    def flush(self) -> str:
        """What is held back at the end of the tokens."""
        return self._release(self.pieces.flush(), ended=True)

    def _release(self, text: str, ended: bool = False) -> str:
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        begun = len(text) - (0 if ended else max((overlap(text, stop) for stop in self.stop), default=0))
        found = ((place, stop) for stop in self.stop if (place := text.find(stop)) >= 0)
        end, stop = min(found, default=(None, None))
        if end is not None and end <= begun:  # else another one has begun before it, which may yet be the first
            self.stopped_at = stop
            return text[:end]
        self.held = text[begun:]
        return text[:begun]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    tokens: Iterable[Token], tokenizer: Tokenizer, prompt: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yields the text of the tokens that follow the prompt, up to the first stop string; then it takes no more."""
    text = TextStream(tokenizer, prompt, stop)
    for token in tokens:
        yield text.push(token)
        if text.stopped:
            return
    yield text.flush()


def split_stops(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[frozenset[int], tuple[str, ...]]:
    """What a user wants an answer to end at: ids of control and added tokens, and all other texts as stop strings."""
    ids = {text: tokenizer.added_id(text) for text in texts}
    return frozenset(id for id in ids.values() if id is not None), tuple(text for text in ids if ids[text] is None)
