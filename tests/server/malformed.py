"""Requests that are wrong in one place or several, made from an API's description: what fuzz.py sends."""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

Schema = dict[str, Any]
MOST_NEW, MOST_ANSWERS = 3, 2  # of cases that are answered
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
TYPES = ("text/plain", "application/xml", "multipart/form-data", "application/json; charset=utf-16", "", "\xff")
LONG = {  # names of fields that make an answer long
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), MOST_NEW),
    "n": MOST_ANSWERS,
}


@dataclass(frozen=True)
class Case:
    """One request. length: what Content-Length says beyond the body's own; None sends it in chunks."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    length: int | None = 0


def values(schema: Schema, named: dict[str, Schema]) -> st.SearchStrategy:
    """JSON values that the schema allows; named: the description's components."""
    if "$ref" in schema:
        return st.deferred(lambda: values(named[schema["$ref"].rsplit("/", 1)[1]], named))
    if "anyOf" in schema:
        return st.one_of([values(option, named) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return st.one_of([of_kind(kind, schema, named) for kind in kinds]) if kinds else ANYTHING


def of_kind(kind: str, schema: Schema, named: dict[str, Schema]) -> st.SearchStrategy:
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "integer":
        return st.integers(low, high)
    if kind == "number":
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=20)
    if kind == "array":
        least, most = schema.get("minItems", 0), min(schema.get("maxItems", 3), 3)
        return st.lists(values(schema.get("items", {}), named), min_size=least, max_size=most)
    if kind == "object" and "propertyNames" in schema:
        keys = st.from_regex(schema["propertyNames"]["pattern"], fullmatch=True)
        return st.dictionaries(keys, values(schema["additionalProperties"], named), max_size=3)
    if kind == "object":
        parts = {name: values(part, named) for name, part in schema.get("properties", {}).items()}
        needed = {name: parts.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=parts)
    return st.booleans() if kind == "boolean" else st.none()


SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
ODD = ANYTHING | st.sampled_from(
    [
        *("", "\x00", "\ud800", "a\udfff", "<|im_end|>", "{{ 1 / 0 }}", "x" * 300_000, "日" * 1000, "1e5", "NaN"),
        *(-1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e308, -1e-320, float("nan"), float("inf")),
        *([], {}, [[]], [{}], {"type": "object", "$ref": "#"}, {"pattern": "(a+)+$"}, [None] * 1000, [0] * 5000),
    ]
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to each value within a JSON value."""
    found = [path] if path else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += places(part, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, bodies: st.SearchStrategy) -> Any:
    """A body with some of its values replaced, dropped or nested."""
    body = tame(deepcopy(draw(bodies)))
    for _ in range(draw(st.integers(0, 3))):
        ways = places(body)
        if not ways:
            break
        *path, last = draw(st.sampled_from(ways))
        within = body
        for key in path:
            within = within[key]
        change = draw(st.sampled_from(("replace", "replace", "drop", "nest", "add")))
        if change == "drop":
            del within[last]
        elif change == "nest":
            for _ in range(draw(st.sampled_from((1, 3, 150)))):
                within[last] = [within[last]] if draw(st.booleans()) else {"a": within[last]}
        elif change == "add" and isinstance(within, dict):
            within[draw(st.text(max_size=9))] = deepcopy(draw(ODD))
        else:
            within[last] = deepcopy(draw(ODD))  # which later changes may change
    return tame(body)


def tame(body: dict[str, Any]) -> dict[str, Any]:
    """The body with bounds on how long an answer is, where it would be one."""
    for name, most in LONG.items():
        if isinstance(body.get(name), int | float) and body[name] > most:
            body[name] = most if body[name] < 2**63 else body[name]
    if isinstance(body.get("prompt"), list) and len(body["prompt"]) > 3 and isinstance(body["prompt"][0], str | list):
        body["prompt"] = body["prompt"][:3]
    return body


def cases(described: dict[str, Any]) -> st.SearchStrategy:
    """Requests to all endpoints of a description."""
    found = []
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            if method != "parameters":
                content = operation.get("requestBody", {}).get("content")
                schema = content and content["application/json"]["schema"]
                bodies = values(schema, described["components"]["schemas"]) if schema else None
                found.append(requests(method.upper(), path, bodies))
    return st.one_of(found)


@st.composite
def requests(draw: st.DrawFn, method: str, path: str, bodies: st.SearchStrategy | None) -> Case:
    if "{" in path:
        name = draw(st.text(max_size=20) | st.sampled_from(["..", "%", "a/b", "a" * 5000, "\x00", "req-1"]))
        path = path[: path.index("{")] + quote(name, safe=draw(st.sampled_from(["", "/."])))
    body = b"" if bodies is None else draw(raw_bodies(bodies))
    case = Case(method, path, body)
    return draw(misframed(case)) if not draw(st.integers(0, 9)) else case


@st.composite
def raw_bodies(draw: st.DrawFn, bodies: st.SearchStrategy) -> bytes:
    data = json.dumps(draw(changed(bodies)) if draw(st.integers(0, 19)) else draw(ODD)).encode()
    kind = draw(st.integers(0, 39))
    if kind == 0:
        return data[: draw(st.integers(0, len(data)))]
    if kind == 1:
        at = draw(st.integers(0, len(data)))
        return (
            data[:at] + draw(st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf"])) + data[at:]
        )
    if kind == 2 and (texts := [found.end() for found in re.finditer(b'": "', data)]):
        at = draw(st.sampled_from(texts))
        return data[:at] + draw(st.sampled_from([rb"\ud800", rb"\udfff", rb"\u0000", rb"\ud83d\ude00"])) + data[at:]
    if kind == 3:
        return draw(st.binary(max_size=50) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b" " * 1_000_000]))
    return data


@st.composite
def misframed(draw: st.DrawFn, case: Case) -> Case:
    method = draw(st.sampled_from((case.method, case.method, *METHODS)))
    headers = draw(st.sampled_from([(("Content-Type", kind),) for kind in TYPES] + [()]))
    length = draw(st.sampled_from((0, None, 1, 10**6, -1, -5)))
    return Case(method, case.path, case.body, headers, length)
