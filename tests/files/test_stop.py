"""Where answers end: the union of what files declare and of well-known names, these only as control tokens."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken

from teal_fast.files.stop import CODE_ENDS, ENDS
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import load_real, write

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def with_added(text, special=(), ordinary=()):
    library = tokenizers.Tokenizer.from_str(text)
    library.add_special_tokens([*special])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in ordinary])
    return library.to_str(), library.token_to_id


@pytest.fixture
def plain_json(byte_level_json):
    """Without a well-known end: its special tokens have other names."""
    return byte_level_json.replace("<|im_end|>", "<|other|>").replace("<|end|>", "<|last|>")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 1}}, {1}),
        ({"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": [3, 5]}}, {1, 3, 5}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": "<|other|>"}}, {3}),
        (
            {"config.json": {"eos_token_id": 1}, "tokenizer_config.json": {"eos_token": {"content": "<|other|>"}}},
            {1, 3},
        ),
        ({"special_tokens_map.json": {"eos_token": "<|last|>"}}, {1}),
        (
            {"special_tokens_map.json": {"eos_token": "<|last|>"}, "tokenizer_config.json": {"eos_token": "<|other|>"}},
            {1, 3},
        ),
        ({"tokenizer_config.json": {"eos_token": ["<|last|>", {"content": "<|other|>"}]}}, {1, 3}),
        ({"config.json": {"eos_token_id": ["<|last|>", 3]}}, {1, 3}),
        ({"config.json": {"eos_token_id": {"id": 3}}}, {3}),
        ({"config.json": {"eos_token_id": "3"}}, {3}),
        ({"config.json": {"eos_token_id": 3.0}}, {3}),
    ],
)
def test_all_that_is_declared_ends_an_answer(tmp_path, plain_json, files, expected):
    assert Tokenizer.load(write(tmp_path, {"tokenizer.json": plain_json, **files})).eos_ids == expected


WRONG = [True, {"a": 1}, [[3]], -1, 1.5, "<absent>", [True], "", {"content": None}, [{}], "9" * 5000]
WRONG += [999999, "999999", [999999], {"id": 999999}, 1e300, 10**400]  # ids that no token has


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_a_wrong_end_beside_a_right_one_is_passed_over(tmp_path, plain_json, value):
    places = {"config.json": "eos_token_id", "generation_config.json": "eos_token_id"}
    places |= {"tokenizer_config.json": "eos_token", "special_tokens_map.json": "eos_token"}
    for place, key in places.items():
        right = "generation_config.json" if place == "config.json" else "config.json"
        files = {"tokenizer.json": plain_json, right: {"eos_token_id": 3}, place: {key: value}}
        (folder := tmp_path / place).mkdir()
        assert Tokenizer.load(write(folder, files)).eos_ids == {3}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_ends_alone_are_refused(tmp_path, plain_json, value):
    files = {"tokenizer.json": plain_json, "config.json": {"eos_token_id": value}}
    with pytest.raises(
        ValueError, match=r"config\.json's eos_token_id is .*, expected an id, a token.*: correct"
    ) as refused:
        Tokenizer.load(write(tmp_path, files))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("name", sorted(ENDS | CODE_ENDS))
def test_well_known_names_end_an_answer_as_control_tokens(tmp_path, plain_json, name):
    for kind, ends in {"special": True, "ordinary": name in CODE_ENDS and name.startswith("<|")}.items():
        text, token_to_id = with_added(plain_json, **{kind: [name]})
        (folder := tmp_path / kind).mkdir()
        found = Tokenizer.load(write(folder, {"tokenizer.json": text})).eos_ids
        assert found == ({token_to_id(name)} if ends else set()), kind


def test_an_end_that_the_vocabulary_has_as_plain_text_is_none(tmp_path, sentencepiece_json):
    described = json.loads(sentencepiece_json)
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] != "</s>"]
    assert "</s>" in described["model"]["vocab"]
    assert Tokenizer.load(write(tmp_path, {"tokenizer.json": described})).eos_ids == set()


def test_the_end_of_a_turn_that_no_field_names(tmp_path, plain_json):
    text, token_to_id = with_added(plain_json, special=["<|endoftext|>", "<|im_end|>"])
    config = {"eos_token": "<|endoftext|>", "chat_template": CHATML}
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.json": text, "tokenizer_config.json": config}))
    assert tokenizer.eos_ids == {token_to_id("<|endoftext|>"), token_to_id("<|im_end|>")}
    assert tokenizer.eos_id == token_to_id("<|endoftext|>")


def test_an_added_token_that_the_template_writes_is_a_control_token(tmp_path, plain_json):
    text, token_to_id = with_added(plain_json, ordinary=["<|im_end|>", "</s>"])
    files = {"tokenizer.json": text, "tokenizer_config.json": {"chat_template": CHATML}}
    assert Tokenizer.load(write(tmp_path, files)).eos_ids == {token_to_id("<|im_end|>")}


def test_an_ordinary_token_may_be_declared_an_end(tmp_path, tiktoken_model, sentencepiece_model):
    for model in (tiktoken_model, sentencepiece_model):
        files = {"tokenizer.model": model, "config.json": {"eos_token_id": 5}}
        assert 5 in Tokenizer.load(write(tmp_path, files)).eos_ids


def test_sentencepiece_ends_are_the_models_own(tmp_path, sentencepiece_model):
    assert Tokenizer.load(write(tmp_path, {"tokenizer.model": sentencepiece_model})).eos_ids == {2}


def test_demo_ends(demo):
    tokenizer = Tokenizer.load(demo)
    names = ("<|endoftext|>", "<|im_end|>", "<reponame>")
    assert tokenizer.eos_ids == {0, 2, 4} == {tokenizer.added_id(name) for name in names} and tokenizer.eos_id == 2


@pytest.mark.parametrize(
    "name, expected",
    [
        ("qwen", {"<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}),
        ("gemma", {"<eos>", "<end_of_turn>"}),  # its </s> is an HTML tag
        ("falcon", {"<|endoftext|>"}),
        ("mistral", {"</s>"}),
    ],
)
def test_real_vocabularies_end_where_they_should(name, expected):
    tokenizer = load_real(name)
    assert tokenizer.eos_ids == {tokenizer.added_id(end) for end in expected}
    if name == "gemma":
        assert tokenizer.added_id("</s>") not in {None, *tokenizer.eos_ids}
