"""Constraints on an answer: grammars in llguidance's form of Lark, and JSON of a schema, as masks over the vocabulary.

llguidance either enforces what a schema says or refuses it, and depends on nothing; docs/server-tools.md compares it
with xgrammar. Schemas are foreign: their size is bounded before they are compiled, and the library bounds the work of
compiling and of each mask by its own limits (LIMITS). What has been compiled is kept, since agents send the same tools
with every request.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from teal_fast.engine.request import Constraint
from teal_fast.files.store import one_line
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.errors import ApiError
from teal_fast.server.formats import SPACE, visible_markers

LIMITS = LLParserLimits(initial_lexer_fuel=500_000, max_grammar_size=50_000, verbose_errors=False)
MOST_TEXT = 2**20  # characters of a schema
MOST_WORK = 2**20  # of compiling a schema, see _work; it takes up to 2 s on one core


class Grammars:
    """What answers of one tokenizer may be held to.

    vocab_size: of the model, which may know more ids than its tokenizer. Special tokens that mark calls and thoughts
    count as the text that they stand for.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = lru_cache(maxsize=64)(self._compile)
        self._refused = lru_cache(maxsize=1024)(self._refuse)

    @cached_property
    def _library(self) -> LLTokenizer:
        """Made when it is first needed: it takes a second for a large vocabulary."""
        shown = {id: text.encode() for id, text in visible_markers(self._tokenizer).items()}
        pieces, ends = {**self._tokenizer.pieces, **shown}, sorted(self._tokenizer.eos_ids)
        if not ends:
            raise ApiError(400, "this checkpoint names no token that ends an answer: no schema or call can be enforced")
        words = [b"" if id in ends else pieces.get(id, b"") for id in range(self._vocab_size)]
        return LLTokenizer(TokenizerWrapper(_Vocabulary(words, ends, self._tokenizer, shown)), self._vocab_size, ends)

    def begin(self, grammar: str, param: str) -> Callable[[], Constraint]:
        """What begins a constraint to the grammar, for one answer each. Raises ApiError 400 with the reason."""
        matcher = self._compiled(grammar)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), param)
        return lambda: _Constraint(matcher.deep_copy())

    def check(self, rule: str, param: str) -> None:
        """Raises ApiError 400 on a rule of json_rule that can't be enforced."""
        if reason := self._refused(rule):
            raise _refusal(reason, param)

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._library, grammar, log_level=0, limits=LIMITS)

    def _refuse(self, rule: str) -> str:
        return LLMatcher(self._library, f"start: {rule}", log_level=0, limits=LIMITS).get_error()


def _refusal(reason: str, param: str) -> ApiError:
    return ApiError(400, f"{param} can't be enforced ({_said(reason)}): simplify it or leave it out", param)


def _said(error: str) -> str:
    """What the library says, without the place in a grammar that the client has not written."""
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error.replace("<non-verbose/>", ""))
    return one_line(re.sub(r"\n *\d+ \|.*", "", error, flags=re.DOTALL))


def json_rule(schema: dict[str, Any], strict: bool, param: str) -> str:
    """JSON that fits the schema, as a part of a grammar; strict: refuse keywords that can't be enforced, not skip them.

    Raises ApiError 400 on a schema that is too large.
    """
    try:
        text = json.dumps(schema | {"x-guidance": {"whitespace_pattern": SPACE, "lenient": not strict}})
    except RecursionError:
        text = ""
    if not text or len(text) > MOST_TEXT or _work(schema) > MOST_WORK:
        raise ApiError(400, f"{param} is too large or too deep to be enforced: shorten it", param)
    return f"%json {text}"


def _work(schema: Any) -> int:
    """How much work a schema is. Optional properties of one object are compared with each other, items are not."""
    work, parts = 0, [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            work += len(part) ** 2
            parts += part.values()
        elif isinstance(part, list):
            work += 20 * len(part)
            parts += part
    return work


class _Vocabulary:
    """A tokenizer as the library wants to see it, which encodes what it must write: names and constants are text.

    markers: the special tokens that are meant where they are written.
    """

    bos_token_id = None

    def __init__(self, words: list[bytes], ends: list[int], tokenizer: Tokenizer, markers: dict[int, bytes]):
        self.tokens, self.eos_token_id, self.tokenizer = words, ends[0], tokenizer
        self.special_token_ids = [id for id, word in enumerate(words) if not word]
        self._markers = {marker.decode(): id for id, marker in markers.items()}
        self._any = re.compile(f"({'|'.join(map(re.escape, self._markers)) or '(?!)'})")

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = []
        for part in self._any.split(text.decode()):
            marker = self._markers.get(part)
            ids += self.tokenizer.encode(part, add_bos=False, control=False) if marker is None else [marker]
        return ids


class _Constraint:
    """One answer's state within a grammar."""

    def __init__(self, matcher: LLMatcher):
        self.matcher = matcher

    def mask(self) -> Tensor:
        allowed = np.frombuffer(self.matcher.compute_logit_bias(), dtype=np.uint8) != 0
        self._check(bool(allowed.any()))
        return torch.from_numpy(allowed)

    def accept(self, id: int) -> None:
        self.matcher.consume_token(id)
        self._check()

    def fork(self) -> Constraint:
        return _Ahead(self.matcher.deep_copy())

    def _check(self, possible: bool = True) -> None:
        if self.matcher.is_error() or not possible:
            reason = _said(self.matcher.get_error())
            reason = "nothing fits them" if reason in ("", "NoExtensionBias") else reason
            raise ApiError(400, f"the answer can't be held to the schema or tools ({reason}): simplify them")


class _Ahead(_Constraint):
    """The state after drafts. One that leads nowhere, or behind an answer's end, is no error: it will not stand."""

    def mask(self) -> Tensor:
        allowed = super().mask()
        return allowed if allowed.any() else torch.ones_like(allowed)

    def _check(self, possible: bool = True) -> None:
        pass
