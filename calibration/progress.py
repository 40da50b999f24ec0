"""How far a calibration is, and how long it will take: one bar over all its passes, and an estimate in words.

Work is counted in layers x tokens, so that the bar moves every second or so, where a pass over the text takes minutes.
"""

import sys
import time

from tqdm import tqdm

SAID_AFTER = 4.0  # seconds: by then some layers of a 1.5B model have run on 2 cores


class Progress:
    """A bar over `total` layers x tokens, for use in a `with` block. After SAID_AFTER seconds a line says how long."""

    def __init__(self, total: float, title: str):
        self.started, self.said = time.perf_counter(), False
        bar = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self.bar = tqdm(total=total, desc=title, bar_format=bar, smoothing=0)  # work of one kind comes in long runs

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def turn_to(self, title: str) -> None:
        """Writes `title` before the bar."""
        self.bar.set_description(title)

    def skip(self, work: float) -> None:
        """Work that need not be done."""
        self.bar.total = max(self.bar.total - work, self.bar.n)
        self.bar.refresh()

    def add(self, work: float) -> None:
        """Work that was done."""
        self.bar.update(min(work, self.bar.total - self.bar.n))  # sums of fractions may be a little more
        seconds = time.perf_counter() - self.started
        if not self.said and seconds >= SAID_AFTER:
            self.said = True
            left = seconds * (self.bar.total - self.bar.n) / self.bar.n
            self.bar.write(f"about {in_words(left)} to go on this machine", file=sys.stderr)


def in_words(seconds: float) -> str:
    """A time that is rounded as an estimate deserves it."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} seconds"
