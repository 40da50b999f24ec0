"""Bodies that nobody wrote: a good one with one or two of its values exchanged for another, or left out."""

import copy
from typing import Any

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(("type", "text", "x")), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any) -> list[tuple]:
    """The ways to all values within this one."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *way) for key, inner in pairs for way in [(), *places(inner)]]


@st.composite
def like(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 2))):
        *way, key = draw(st.sampled_from(places(body)))
        inner = body
        for step in way:
            inner = inner[step]
        if draw(st.booleans()):
            inner[key] = draw(VALUES)
        else:
            del inner[key]
    return body
