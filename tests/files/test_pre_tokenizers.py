"""The words that each named pre-tokenizer makes: spelled out here, and against llama.cpp where it is installed."""

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from teal_fast.files import pre_tokenizers as named
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.pre_tokenizers import SPLITTINGS, TEKKEN, VOCABULARIES, digest, find_name
from teal_fast.files.tokenizer import Tokenizer as Ours
from teal_fast.tests.files.test_gguf_tokenizer import fields_of, write_gguf

TEXTS = [
    "Hello world", " Hello  world ", "it's we'LL they'Re I'D don't 'tis '' 'S", "1", "12", "123", "1234",
    "1234567 3.14 1,000,000 007", "x1y22z333 v1.2.3", "tabs\tand\t\tmore\n\n\n  end  \n", "\r\n\r\n \r\n a\rb",
    "   \n   \t  x", "def f(x):\n    return x**2  # done\n", "a/b\\c //path/to\n/x/\n\n",
    "!?!... --- ***bold*** (((x)))\n\n", "$5 €5 £5 ¥ 50% #1 @me a+b=c <tag> ^~|`", "naïve café École façade Straße",
    "Привет МИР, как дела?", "Ελληνικά ΟΔΟΣ", "日本語のテキスト、中文。한국어 텍스트", "ไทย ภาษาไทย",
    "हिन्दी में लिखा ১২৩ ४५६", "العربية، ١٢٣ نص",
    "עברית שלום",
    "🙂👩‍👩‍👧🇨🇭 ✨ e🙂x", "Ⅳ ² ½ ①②③ ٣", "a\u00a0b\u2003c\u3000d\u200bx", "CamelCaseString HTTPServer iPhone A1B2",
    "\ufeffzero_width __init__ snake_case λ→∞", "#!/usr/bin/env <|x|> [1, 2]", "ΑΒΓ абв ABC 中1文2 é1",
]  # fmt: skip
DECOMPOSED = "e\u0301 A\u030a"
WORDS = {  # of "Don't'LL 12345 iPhone x!/\n\n  y"
    "gpt-2": ["Don", "'t", "'", "LL", "Ġ12345", "ĠiPhone", "Ġx", "!/", "ĊĊĠ", "Ġy"],
    "smollm": ["Don", "'t", "'", "LL", "Ġ", *"12345", "ĠiPhone", "Ġx", "!/", "ĊĊĠ", "Ġy"],
    "llama-bpe": ["Don", "'t", "'LL", "Ġ", "123", "45", "ĠiPhone", "Ġx", "!/ĊĊ", "Ġ", "Ġy"],
    "qwen2": ["Don", "'t", "'LL", "Ġ", *"12345", "ĠiPhone", "Ġx", "!/ĊĊ", "Ġ", "Ġy"],
    "tekken": ["Don", "'t", "'LL", "Ġ", *"12345", "Ġi", "Phone", "Ġx", "!/ĊĊ", "Ġ", "Ġy"],
    "gpt-4o": ["Don't", "'LL", "Ġ", "123", "45", "Ġi", "Phone", "Ġx", "!/ĊĊ", "Ġ", "Ġy"],
    "hunyuan-dense": ["Don", "'t", "'LL", "Ġ", "123", "45", "ĠiPhone", "Ġx", "!/ĊĊ", "Ġ", "Ġy"],
    "seed-coder": ["Don", "'t", "'LL", "Ġ", *"12345", "ĠiPhone", "Ġx", "!/", "ĊĊ", "Ġ", "Ġy"],
    "deepseek-coder": ["Don", "'", "t", "'", "LL", "Ġ", *"12345", "ĠiPhone", "Ġx", "!/", "Ċ", "Ċ", "Ġ", "Ġy"],
    "viking": ["Don't'LL", "Ġ", *"12345", "ĠiPhone", "Ġx", "!", "/", "ĊĊĠ", "Ġy"],
}


def split(name, text):
    return [word for word, _ in SPLITTINGS[name].pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    assert split(name, "Don't'LL 12345 iPhone x!/\n\n  y") == WORDS[name]


def test_names_of_one_kind_share_it():
    assert SPLITTINGS["llama-v3"] == SPLITTINGS["llama-bpe"] == SPLITTINGS["falcon3"]
    assert SPLITTINGS["deepseek-r1-qwen"] == SPLITTINGS["qwen2"] != SPLITTINGS["megrez"]
    assert split("qwen35", DECOMPOSED) == ["eÌģ", "ĠAÌĬ"] and split("qwen2", DECOMPOSED) == ["e", "Ìģ", "ĠA", "ÌĬ"]
    assert split("tekken", "ÉCOLE École") == ["ÃīCOLE", "ĠÃīcole"]  # llama.cpp 0.3.36 cuts the first: É|COLE


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens that reach across words, so that ids tell where a text was cut before."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(
        [part for text in TEXTS for part in (text, *text.split(" "), text[1:], text[:-1])], trainer
    )
    n = library.get_vocab_size()
    return fields_of(library, [("<s>", TokenType.CONTROL)]) | {"bos_token_id": n, "eos_token_id": n}


@pytest.mark.parametrize("name", {splitting: name for name, splitting in reversed(SPLITTINGS.items())}.values())
def test_ids_are_those_of_llama_cpp(vocabulary, name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tmp_path / "vocabulary.gguf"
    write_tokenizer(write_gguf(path, "gpt2", pre=name, **vocabulary), tmp_path)
    ours, theirs = Ours.load(tmp_path), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        if name not in ("tekken", "gpt-4o") or all(unicodedata.category(c)[0] != "M" for c in text):  # see TEKKEN
            assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=True, special=True), text


def test_tekken_is_mistrals_own():
    package = pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    path = Path(package.__file__).parent / "data" / "tekken_240911.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["config"]["pattern"] == TEKKEN
    first, end, expected = VOCABULARIES["tekken"]
    alphabet = {ord(char): char for char in map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)])}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - alphabet.keys()))}
    words = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][: end - first]]
    assert digest(["".join(map(alphabet.get, word)) for word in words]) == expected


# --- what is recognised


def test_a_well_known_vocabulary_is_recognised(monkeypatch):
    base = [f"token{i}" for i in range(100)]
    monkeypatch.setitem(named.VOCABULARIES, "llama-bpe", (10, 90, digest(base[10:90])))
    changed = ["special", *base[1:90], "<|im_start|>", "[PAD91]"]  # a fine-tune's other ends
    for given in (None, "", "default"):
        assert find_name(given, base) == find_name(given, changed) == "llama-bpe"
    assert find_name("qwen2", base) == "qwen2"
    for tokens in (base[:89], base[1:], [*base[:50], "x", *base[51:]]):
        with pytest.raises(ValueError, match=r"does not say how .* not a well-known one: .*--pre NAME, one of gpt-2"):
            find_name("default", tokens)
    with pytest.raises(ValueError, match=r"is 'gigapet', which is not known here: .*--pre NAME"):
        find_name("gigapet", base)


def test_hashes_are_of_vocabularies_with_a_known_split():
    assert VOCABULARIES.keys() <= SPLITTINGS.keys()
    assert len({value for _, _, value in VOCABULARIES.values()}) == len(VOCABULARIES)
