"""What an engine's cache holds: the last conversation's tokens, and how they were made; earlier ones lie in a store.

A prefix counts only as far as its keys and values were made at no higher sparsity than a request's: at sparsity 0 all
of it was made densely.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence

from teal_fast.engine.prefixes import PrefixStore
from teal_fast.engine.request import STEPPED, Request
from teal_fast.files.memory import explain_memory
from teal_fast.model import KVCache


class Held:
    """ids: the tokens whose keys and values the cache holds, from position 0 on.

    made: for each the highest sparsity at which it or an earlier one was made. private: whether none of it is to be
    used again. store: where a conversation goes before it is overwritten, if there is one.
    """

    def __init__(self, cache: KVCache, store: PrefixStore | None):
        self.cache, self.store = cache, store
        self.ids: list[int] = []
        self.made: list[float] = []
        self.private = False

    def clear(self) -> None:
        self.ids, self.made, self.private = [], [], False

    def add(self, token: int, sparsity: float) -> None:
        """Notes that the cache holds the keys and values of one more token, made at this sparsity on those before."""
        self.made.append(max(sparsity, self.made[-1]) if self.made else sparsity)
        self.ids.append(token)

    @property
    def dense(self) -> int:
        """How many of the first positions were made densely."""
        return bisect_right(self.made, STEPPED)

    def known(self, prompt: Sequence[int], sparsity: float) -> int:
        """How many of the prompt's first tokens a request at that sparsity need not compute."""
        ids, made = ([], []) if self.private else (self.ids, self.made)
        most = min(len(prompt) - 1, len(ids), bisect_right(made, sparsity))
        return next((i for i in range(most) if prompt[i] != ids[i]), most)

    def keep(self) -> None:
        """Gives what the cache holds to the store before it is overwritten, if it may be used again."""
        if self.store is None or self.private or not self.ids:
            return
        try:
            self.store.put(self.ids, self.made, self.cache)
        except (RuntimeError, MemoryError) as error:
            if (said := explain_memory(error)) is None:
                raise
            print(f"the prefix cache is emptied, for lack of memory ({said}): lower its budget", file=sys.stderr)
            self.store.clear()

    def reuse(self, request: Request) -> int:
        """Makes the cache hold what is known of the request's prompt, and nothing else; how many tokens that is."""
        prompt, sparsity = request.prompt, request.reuses
        usable = request.cache and not request.sparse_prompt  # a sparse prompt is to be sparse as a whole
        start = self.known(prompt, sparsity) if usable else 0
        if len(self.ids) > start:
            self.keep()
        self.ids, self.made = self.ids[:start], self.made[:start]
        stored = self.store.known(prompt, sparsity) if usable and self.store is not None else 0
        if stored > start:
            found = self.store.fetch(prompt, sparsity, start, stored, self.cache)
            for token, made in zip(prompt[start:stored], found, strict=True):
                self.add(token, made)
        self.private = not request.cache
        return len(self.ids)
