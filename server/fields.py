"""Fields of a JSON body, each with its type and bounds checked; null counts as left out, unknown fields as nothing."""

import math
from collections.abc import Iterable
from typing import Any

from teal_fast.files.store import short
from teal_fast.server.errors import ApiError


class Fields:
    """A JSON object's fields. Each reader gives the default where the field is absent or null, and raises ApiError 400.

    place: what goes before a field's name in an error, for objects within a body.
    """

    def __init__(self, body: Any, place: str = ""):
        if not isinstance(body, dict):
            raise ApiError(400, f"{place or 'the body'} is {short(body)}, expected a JSON object", place or None)
        self.body, self.place = body, f"{place}." if place else ""

    def given(self, name: str) -> bool:
        return self.body.get(name) is not None

    def number(self, name: str, default: Any = None, low: float = -math.inf, high: float = math.inf) -> Any:
        """A finite number from low to high."""
        value = self._typed(name, (int, float), "a number")
        if value is None:
            return default
        if not (low <= value <= high and abs(value) <= 1.7e308):
            raise self.error(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: Any = None, low: int = -(2**63), high: int = 2**63 - 1) -> Any:
        """A whole number from low to high; 3.0 is one."""
        value = self._typed(name, (int, float), "a whole number")
        if value is None:
            return default
        if not (abs(value) < 2**64 and value == int(value) and low <= value <= high):
            bounds = f"from {low} to {high}" if high < 2**63 - 1 else f"of at least {low}" if low > -(2**63) else ""
            raise self.error(name, f"a whole number {bounds}".strip())
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._typed(name, (bool,), "true or false")
        return default if value is None else value

    def text(self, name: str, default: str | None = None, among: Iterable[str] = ()) -> Any:
        """Text; among: the values that it may have, any where there are none."""
        value = self._typed(name, (str,), "text")
        if value is not None and among and value not in among:
            raise self.error(name, " or ".join(f"{word!r}" for word in among))
        return default if value is None else value

    def items(self, name: str, default: Any = (), most: int | None = None) -> Any:
        value = self._typed(name, (list,), "a list")
        if value is not None and most is not None and len(value) > most:
            raise ApiError(
                400, f"{self.place}{name} has {len(value)} items, expected at most {most}", self.place + name
            )
        return default if value is None else value

    def object(self, name: str) -> "Fields | None":
        value = self._typed(name, (dict,), "an object")
        return None if value is None else Fields(value, self.place + name)

    def required(self, name: str) -> None:
        if not self.given(name):
            raise ApiError(400, f"{self.place}{name} is missing", self.place + name)

    def error(self, name: str, expected: str, status: int = 400) -> ApiError:
        got = self.body.get(name)
        return ApiError(status, f"{self.place}{name} is {short(got)}, expected {expected}", self.place + name)

    def _typed(self, name: str, types: tuple[type, ...], expected: str) -> Any:
        value = self.body.get(name)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise self.error(name, expected)
        return value
