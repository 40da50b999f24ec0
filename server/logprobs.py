"""Log-probabilities as the dialects write them."""

from collections.abc import Iterable, Sequence
from typing import Any

from teal_fast.engine.scoring import Scored
from teal_fast.files.tokenizer import Tokenizer

LEAST = -9999.0  # what OpenAI's API gives for a probability of zero, as JSON has no infinity


def chat_logprobs(tokens: Iterable[Scored], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """As chat completions and responses have them: text, bytes and the likeliest tokens of each place."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(id)
        return {"token": piece.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(piece)}

    return [entry(id, own) | {"top_logprobs": [entry(*pair) for pair in top]} for id, own, top in tokens]


def completion_logprobs(tokens: Sequence[Scored], tokenizer: Tokenizer, offset: int) -> dict[str, list]:
    """As completions have them: lists side by side; offset: where in the text the first token begins.

    A token whose log-probability is NaN has none, as the first of an echoed prompt.
    """
    names = [_name(tokenizer.piece(token.id)) for token in tokens]
    offsets = _sums(names, offset)
    known = [token.logprob == token.logprob for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [max(t.logprob, LEAST) if k else None for t, k in zip(tokens, known, strict=True)],
        "top_logprobs": [
            {_name(tokenizer.piece(id)): max(value, LEAST) for id, value in reversed(t.top)} if k else None
            for t, k in zip(tokens, known, strict=True)
        ],
        "text_offset": offsets,
    }


def _sums(names: Sequence[str], offset: int) -> list[int]:
    found = []
    for name in names:
        found.append(offset)
        offset += len(name)
    return found


def _name(piece: bytes) -> str:
    """A token's text; bytes that are no text by themselves as OpenAI writes them."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
