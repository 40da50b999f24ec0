"""Added tokens around a tokenizer.model: spaces after them, spaces they claim, and files of older fine-tunes."""

import shutil

import pytest
import sentencepiece
import tiktoken
from tokenizers import AddedToken
from transformers import LlamaTokenizer

from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.pre_tokenizers import LLAMA3
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.files.tokenizer_model import _splitter
from teal_fast.tests.files.made_tokenizers import train_sentencepiece, write

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
TEXTS = [
    "people paid",
    "a <|im_start|>user\npeople<|im_end|> paid",
    "<|im_start|>people<|im_end|>people",
    "<|im_start|><|im_end|>\n\npeople  <|im_end|>  paid ",
    "<s>people</s> paid <s>",
    "paid<|x|>people <|x|>s <|x|> ",
]


def added(name, special=True, **flags):
    return {"content": name, "special": special, "normalized": False, **flags}


def of_model(folder):
    """What transformers reads from the same folder."""
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece's files by protobuf")
    return LlamaTokenizer.from_pretrained(folder)


DECODER = {
    "700": added("<|im_start|>", lstrip=True),
    "701": added("<|im_end|>", False, rstrip=True),
    "702": added("<|x|>", single_word=True),
    "703": added("<|im_start|>people", False),
}
SETTINGS = {
    "legacy": {"legacy": True, "added_tokens_decoder": {"700": added("<|im_start|>"), "701": added("<|im_end|>")}},
    "not legacy": {"legacy": False, "added_tokens_decoder": {"700": added("<|im_start|>"), "701": added("<|im_end|>")}},
    "not said": {"added_tokens_decoder": {"700": added("<|im_start|>"), "701": added("<|im_end|>", False)}},
    "claimed spaces": {"legacy": False, "added_tokens_decoder": DECODER},
    "claimed spaces, legacy": {"legacy": True, "added_tokens_decoder": {**DECODER, "2": added("</s>", rstrip=True)}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_as_transformers(tmp_path, sentencepiece_model, name):
    config = NAMED | {"add_bos_token": True} | SETTINGS[name]
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": config}))
    reference = of_model(tmp_path)
    for text in TEXTS:
        # A part that begins with a space is sentencepiece's matter: transformers 5.23 gives it no second one.
        if config.get("legacy") is not True or "> " not in text:
            assert ours.encode(text) == reference.encode(text), text
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)


@pytest.mark.parametrize("legacy, spaced", [(True, True), (False, False), (None, False)])
def test_the_space_after_an_added_token(tmp_path, sentencepiece_model, legacy, spaced):
    config = {"legacy": legacy, "added_tokens_decoder": {"700": added("<|im_start|>")}}
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": config}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    with_space = sp.encode("people")  # ▁pe…
    bare = [token for token in sp.encode("(people")[1:] if sp.id_to_piece(token) != "("]
    assert sp.decode(bare) == sp.decode(with_space) == "people" and bare != with_space
    found = tokenizer.encode("people<|im_start|>people", add_bos=False)
    assert found == [*with_space, 700, *(with_space if spaced else bare)]
    assert tokenizer.encode("<|im_start|> people", False)[1:] == (sp.encode(" people") if spaced else with_space)


def test_a_model_without_leading_space_never_gets_one(tmp_path):
    model = train_sentencepiece(add_dummy_prefix=False)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    for legacy in (True, False):
        config = {"legacy": legacy, "added_tokens_decoder": {"700": added("<|x|>")}}
        tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": model, "tokenizer_config.json": config}))
        assert tokenizer.encode("people<|x|>people", False) == [*sp.encode("people"), 700, *sp.encode("people")]


def test_spaces_that_an_added_token_claims(tmp_path, sentencepiece_model):
    config = {"legacy": False, "added_tokens_decoder": DECODER}
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": config}
    tokenizer = Tokenizer.load(write(tmp_path, files))

    def ids(text):
        return tokenizer.encode(text, add_bos=False)

    assert ids("people \n <|im_start|>") == [*ids("people"), 700]
    assert ids("<|im_end|> \n people") == ids("<|im_end|>people") and ids("<|im_end|> \n people")[0] == 701
    assert ids("people <|im_end|>")[-1] == 701 and ids("people <|im_end|>") != [*ids("people"), 701]
    assert 702 in ids("people <|x|> paid") and 702 not in ids("people<|x|>") and 702 not in ids("<|x|>people")
    assert ids("<|im_start|>people") == [703]  # the longest wins


# --- added tokens beside tiktoken's ranks, whose special tokens are the 256 behind them


def test_the_longest_of_names_that_begin_alike_wins():
    names = ["  ", "   ", "<u>", "<ul>", "<unused1>", "<unused12>", "<u", "ab", "abc.", "a"]
    split = _splitter({name: AddedToken(name, single_word=name == "ab") for name in names})
    cases = {
        "x     y<unused12><unused3>": ["x", "   ", "  ", "y", "<unused12>", "<u", "nused3>"],
        "<unused1><ul><u><u<": ["<unused1>", "<ul>", "<u>", "<u", "<"],
        "ab abc.abd xab ab": ["ab", " ", "abc.", "a", "bd x", "a", "b ", "ab"],
    }
    for text, parts in cases.items():
        assert [part for part in split(text) if part] == parts


def test_added_tokens_around_tiktoken_ranks(tmp_path, tiktoken_ranks, tiktoken_model):
    ranks = tiktoken.Encoding("", pat_str=LLAMA3, mergeable_ranks=tiktoken_ranks, special_tokens={})
    first = len(tiktoken_ranks) + 256
    flags = [{"lstrip": True}, {"special": False, "rstrip": True}, {"single_word": True}, {"special": False}]
    names = ["<|a|>", "<|b|>", "word", "<|a|>b"]
    decoder = {str(first + i): added(name, **flag) for i, (name, flag) in enumerate(zip(names, flags, strict=True))}
    files = {"tokenizer.model": tiktoken_model, "tokenizer_config.json": {"added_tokens_decoder": decoder}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    cases = {
        "people \n <|a|> paid": ["people", first, " paid"],
        "people <|b|> \n paid": ["people ", first + 1, "paid"],
        "a word, words, word": ["a ", first + 2, ", words, ", first + 2],
        "<|a|>b<|begin_of_text|>": [first + 3, first - 256],  # the longest wins
    }
    for text, parts in cases.items():
        expected = [i for part in parts for i in ([part] if isinstance(part, int) else ranks.encode(part))]
        assert tokenizer.encode(text, add_bos=False) == expected, text


@pytest.mark.parametrize("before", [24_990, 24_999, 25_000, 25_001])
def test_a_long_word_does_not_cut_the_special_token_behind_it(tmp_path, tiktoken_model, tiktoken_ranks, before):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": tiktoken_model}))
    ids = tokenizer.encode("x" * before + "<|eot_id|>", add_bos=False)
    assert ids[-1] == len(tiktoken_ranks) + 9 and tokenizer.decode(ids) == "x" * before


# --- added_tokens.json, which sentencepiece fine-tunes of 2023 have


CHATML = {"<|im_end|>": 700, "<|im_start|>": 701}
MAP = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": "<unk>"}


def fine_tune(model):
    return {
        "tokenizer.model": model,
        "tokenizer_config.json": NAMED | {"add_bos_token": True},
        "special_tokens_map.json": MAP,
        "added_tokens.json": CHATML,
    }


def test_added_tokens_json_is_read(tmp_path, sentencepiece_model):
    tokenizer = Tokenizer.load(write(tmp_path, fine_tune(sentencepiece_model)))
    ids = tokenizer.encode("<|im_start|>user\npeople<|im_end|>")
    assert ids[:2] == [1, 701] and ids[-1] == 700 and tokenizer.vocab_size == 702
    assert tokenizer.decode(ids) == "<|im_start|>user\npeople"  # special is what special_tokens_map.json names
    assert tokenizer.eos_ids == {2, 700} and tokenizer.eos_id == 700


def test_added_tokens_json_as_transformers(tmp_path, sentencepiece_model):
    ours = Tokenizer.load(write(tmp_path, fine_tune(sentencepiece_model)))
    reference = of_model(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.eos_id == reference.eos_token_id


def test_added_tokens_json_beside_a_tokenizer_json(tmp_path, sentencepiece_json):
    files = {"tokenizer.json": sentencepiece_json, "added_tokens.json": CHATML, "special_tokens_map.json": MAP}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    assert tokenizer.encode("<|im_start|>people<|im_end|>")[::3][:1] == [701]
    assert tokenizer.added_id("<|im_end|>") == 700


def test_added_tokens_decoder_counts_before_added_tokens_json(tmp_path, sentencepiece_model):
    files = fine_tune(sentencepiece_model)
    files["tokenizer_config.json"] = {"added_tokens_decoder": {"700": added("<|x|>")}}
    assert Tokenizer.load(write(tmp_path, files)).added_id("<|im_start|>") is None


@pytest.mark.parametrize(
    "content", [{"a": "b"}, {"a": True}, {"a": -1}, {"a": None}, {"a": [1]}, {"a": 1.0}, {"\ud800": 700}]
)
def test_malformed_added_tokens_json(tmp_path, sentencepiece_model, content):
    write(tmp_path, {"tokenizer.model": sentencepiece_model, "added_tokens.json": content})
    with pytest.raises(ValueError, match=r"added_tokens\.json: not a readable list of added tokens") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("token, text", [("9" * 5000, "a"), ("²", "a"), ("٣", "a"), ("-1", "a"), ("700", "\ud800")])
@pytest.mark.parametrize("kind", ["sentencepiece_model", "sentencepiece_json"])
def test_malformed_added_tokens_decoder(tmp_path, request, kind, token, text):
    name = "tokenizer.json" if kind.endswith("json") else "tokenizer.model"
    settings = {"added_tokens_decoder": {token: added(text)}}
    write(tmp_path, {name: request.getfixturevalue(kind), "tokenizer_config.json": settings})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a readable added_tokens_decoder") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 and "4300" not in str(refused.value)


def test_an_added_token_that_does_not_come_next(tmp_path, sentencepiece_json):
    write(tmp_path, {"tokenizer.json": sentencepiece_json, "added_tokens.json": {"<|x|>": 900}})
    with pytest.raises(ValueError, match=r"next id is 700 where the files beside it give 900 to '<\|x\|>'"):
        Tokenizer.load(tmp_path)


def test_conversion_copies_added_tokens_json(tiny_hf, tmp_path):
    source = shutil.copytree(tiny_hf, tmp_path / "source")
    tokens = {"<|x|>": Tokenizer.load(source).vocab_size}
    convert_huggingface(write(source, {"added_tokens.json": tokens}), tmp_path / "out", None)
    assert (tmp_path / "out" / "added_tokens.json").read_bytes() == (source / "added_tokens.json").read_bytes()
