"""Answers that are drawn at random among the allowed tokens fit what they are held to."""

import json
import random

import pytest
import torch

from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.errors import ApiError
from teal_fast.server.formats import json_grammar
from teal_fast.server.grammar import Grammars, json_rule

pytest.importorskip("llguidance")
MORE = 100  # ids that the model has beyond its tokenizer's


@pytest.fixture(scope="module")
def tokenizer(demo) -> Tokenizer:
    return Tokenizer.load(demo)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + MORE)


def begin(grammars, schema, strict=True):
    return grammars.begin(json_grammar(json_rule(schema, strict, "schema"), ""), "schema")()


def draw(constraint, tokenizer, rng, most=150):
    """Text of random allowed tokens, of which those that end a string, an object or the answer are the likeliest."""
    ids, ends = [], torch.tensor(sorted(tokenizer.eos_ids))
    closing = torch.tensor([id for id, piece in tokenizer.pieces.items() if piece in (b'"', b"}", b"]", b'"}', b'",')])
    short = torch.tensor([id for id, piece in tokenizer.pieces.items() if len(piece) == 1])
    while len(ids) < most:
        mask = constraint.mask()
        assert len(mask) == tokenizer.vocab_size + MORE and not mask[tokenizer.vocab_size :].any()
        if mask[ends].any() and (mask.count_nonzero() == len(ends) or rng.random() < 0.3):
            constraint.accept(int(ends[0]))
            return tokenizer.decode(ids)
        mask[ends] = False
        few = rng.choice([closing, closing, short, ends])
        chosen = few[mask[few]]
        ids.append(rng.choice((chosen if len(chosen) else mask.nonzero().flatten()).tolist()))
        constraint.accept(ids[-1])
    return None  # it goes on: a long string, say


def accepts(grammars, tokenizer, schema, text, strict=True):
    constraint = begin(grammars, schema, strict)
    for id in tokenizer.encode(text, add_bos=False):
        if not constraint.mask()[id]:
            return False
        constraint.accept(id)
    return bool(constraint.mask()[list(tokenizer.eos_ids)].all())


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 3, "exclusiveMaximum": 120},
        "height": {"type": "number", "minimum": -1.5, "maximum": 2.5},
        "role": {"enum": ["admin", "üser", None, 3]},
        "kind": {"const": {"a": [1]}},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": ["boolean", "null"]}, "left": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": {"type": "integer", "multipleOf": 5},
        }
    },
}
SCHEMAS = {
    "person": PERSON,
    "tree": TREE,
    "any object": {"type": "object"},
    "any": {},
    "anyOf": {"anyOf": [{"type": "string", "format": "date"}, {"type": "array", "prefixItems": [{"type": "integer"}]}]},
    "oneOf": {"oneOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 99}, {"multipleOf": 7}]},
    "formats": {
        "type": "object",
        "properties": {f: {"type": "string", "format": f} for f in ("date-time", "uuid", "ipv4", "email")},
        "required": ["uuid", "ipv4"],
    },
    "map": {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_fit_their_schema(grammars, tokenizer, name):
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    rng, whole = random.Random(name), 0
    for _ in range(12):
        text = draw(begin(grammars, SCHEMAS[name]), tokenizer, rng)
        if text is not None:
            judge.validate(json.loads(text))
            whole += 1
    assert whole > 2


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        ({"type": "object"}, ['{"a": 1}', "{}", '{\n  "a": [true, null]\n}'], ["[]", "3", "text", '{"a": 1} and']),
        ({"type": "string"}, ['"é🙂\\n\\u0001"', ' "a"'], ['"a', '"\\x"', "a"]),
        ({"type": "string", "maxLength": 2}, ['"🙂🙂"', '"\\n\\n"'], ['"abc"', '"🙂🙂🙂"']),
        (PERSON, ['{"name":"Al","age":3,"kind":{"a":[1]}}'], ['{"name":"Al","age":2,"kind":{"a":[1]}}', "{}"]),
        ({"type": "integer"}, ["-12", "0"], ["1.5", "01", "+1"]),
    ],
    ids=["object", "string", "length", "person", "integer"],
)
def test_what_fits_is_allowed_and_nothing_else(grammars, tokenizer, schema, good, bad):
    assert [text for text in good if not accepts(grammars, tokenizer, schema, text)] == []
    assert [text for text in bad if accepts(grammars, tokenizer, schema, text)] == []


def test_control_tokens_in_a_schema_are_text(grammars, tokenizer):
    for seed in range(5):
        text = "<|im_end|>" * seed + "<|im_start|>x"
        found = draw(begin(grammars, {"const": text}), tokenizer, random.Random(seed))
        assert json.loads(found) == text


def test_a_schema_that_no_text_fits_ends_in_one_line(grammars, tokenizer):
    with pytest.raises(ApiError, match="nothing fits them"):
        draw(begin(grammars, {"$ref": "#"}), tokenizer, random.Random(0))


def test_spaces_are_bounded(grammars, tokenizer):
    assert accepts(grammars, tokenizer, {}, '{"a":\n' + " " * 20 + "1}")
    assert not accepts(grammars, tokenizer, {}, '{"a":\n' + " " * 21 + "1}")


@pytest.mark.parametrize(
    "schema, reason",
    [
        ({"type": "strng"}, "Invalid type"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "shoe size"}, "Unknown format"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "https://example.com/schema"}, "not present"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"enum": ["\ud800"]}, "hex escape"),
        ({"enum": [f"{i}" * 9 for i in range(60000)]}, "too large"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(1100)}}, "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_schema_that_cannot_be_enforced_is_refused_in_one_line(grammars, schema, reason):
    with pytest.raises(ApiError) as refused:
        begin(grammars, schema)
    error = refused.value
    assert error.status == 400 and error.param == "schema"
    assert reason in error.message and "\n" not in error.message and len(error.message) < 300
    assert "%json" not in error.message.replace('parse "%json"', "") and "x-guidance" not in error.message


def test_a_deep_schema_is_refused(grammars):
    schema = {}
    for _ in range(300):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="recursion limit"):
        begin(grammars, schema)
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="too deep"):
        begin(grammars, schema)


def test_keywords_that_cannot_be_enforced_are_skipped_where_it_is_not_strict(grammars, tokenizer):
    schema = {"type": "object", "properties": {"a": {"not": {"const": 1}, "type": "integer"}}, "required": ["a"]}
    assert accepts(grammars, tokenizer, schema, '{"a": 1}', strict=False)
    assert not accepts(grammars, tokenizer, schema, '{"a": "x"}', strict=False)


def test_a_schema_cannot_change_how_it_is_read(grammars, tokenizer):
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(ApiError, match="uniqueItems"):
        begin(grammars, schema)


def test_answers_of_one_grammar_do_not_know_each_other(grammars, tokenizer):
    start = grammars.begin(json_grammar(json_rule({"enum": ["ab", "cd"]}, True, "schema"), ""), "schema")
    first, second = start(), start()
    for id in tokenizer.encode('"ab"', add_bos=False):
        first.accept(id)
    assert first.mask()[list(tokenizer.eos_ids)].all()
    assert not second.mask()[list(tokenizer.eos_ids)].any()


def test_a_token_that_is_not_allowed_is_an_error(grammars, tokenizer):
    with pytest.raises(ApiError, match="can't be held"):
        begin(grammars, {"type": "object"}).accept(tokenizer.encode("hello", add_bos=False)[0])


def test_a_fork_goes_on_by_itself_and_raises_nothing(grammars, tokenizer):
    constraint, end = begin(grammars, {"const": 12}), min(tokenizer.eos_ids)
    first, second = tokenizer.encode("12", add_bos=False)
    ahead = constraint.fork()
    for id in (first, second, end, end, first):  # as a draft may have it, behind the end too
        assert ahead.mask().any()
        ahead.accept(id)
    constraint.accept(first)
    wrong = constraint.fork()
    wrong.accept(first)  # not what follows
    assert wrong.mask().any()
    assert constraint.mask()[second] and not constraint.mask()[first]
    constraint.accept(second)
