"""An answer's text is what it adds to its prompt's, for every kind of tokenizer, with transformers as the judge."""

import random
import tracemalloc
from functools import partial

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teal_fast.files.decoding import Pieces, PieceStream, unchanged
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import SPECIAL, TEXTS, load_real, real, train_byte_level, write


def metaspace_decoder(text):
    """A file whose decoder is Metaspace, as T5's: the first token of a text loses all of its spaces."""
    library = tokenizers.Tokenizer.from_str(text)
    library.decoder = decoders.Metaspace()
    return library.to_str()


def without_decoder(text, pre_tokenizer=None):
    library = tokenizers.Tokenizer.from_str(text)
    library.decoder = None
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    return library.to_str()


def words():
    library = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "a", "whale", "swims"])}, "<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library.to_str()


@pytest.fixture(scope="session")
def kinds(byte_level_json, sentencepiece_json, metaspace_json, sentencepiece_model, tiktoken_model):
    return {
        "byte level": {"tokenizer.json": byte_level_json},
        "strip": {"tokenizer.json": sentencepiece_json},
        "metaspace": {"tokenizer.json": metaspace_json},
        "metaspace decoder": {"tokenizer.json": metaspace_decoder(metaspace_json)},
        "byte level, no decoder": {"tokenizer.json": without_decoder(byte_level_json)},
        "metaspace, no decoder": {"tokenizer.json": without_decoder(metaspace_json)},
        "words": {"tokenizer.json": words()},
        "sentencepiece": {"tokenizer.model": sentencepiece_model},
        "tiktoken": {"tokenizer.model": tiktoken_model},
    }


KINDS = ("byte level", "strip", "metaspace", "metaspace decoder", "byte level, no decoder", "metaspace, no decoder")
KINDS += ("words", "sentencepiece", "tiktoken")


def added(decode, prompt, answer):
    """What an answer adds, by its definition."""
    before, whole = decode(prompt), decode([*prompt, *answer])
    common = next((i for i, pair in enumerate(zip(before, whole, strict=False)) if len({*pair}) > 1), None)
    return whole[min(len(before), len(whole)) if common is None else common :]


def streamed(tokenizer, prompt, answer):
    stream = tokenizer.stream(prompt)
    return "".join(map(stream.push, answer)) + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_it_adds_to_its_prompt(kinds, tmp_path, kind):
    tokenizer = Tokenizer.load(write(tmp_path, kinds[kind]))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):  # within characters too
            assert streamed(tokenizer, ids[:cut], ids[cut:]) == added(tokenizer.decode, ids[:cut], ids[cut:])
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randrange(9))]
        cut = draw.randrange(len(ids) + 1)
        assert streamed(tokenizer, ids[:cut], ids[cut:]) == added(tokenizer.decode, ids[:cut], ids[cut:])


@pytest.mark.parametrize("kind", ["strip", "metaspace", "metaspace decoder", "sentencepiece"])
def test_the_first_word_does_not_stick_to_the_prompt(kinds, tmp_path, kind):
    tokenizer = Tokenizer.load(write(tmp_path, kinds[kind]))
    prompt, whole = tokenizer.encode("In 2024"), tokenizer.encode("In 2024 people paid")
    assert whole[: len(prompt)] == prompt
    assert streamed(tokenizer, prompt, whole[len(prompt) :]) == " people paid"
    assert streamed(tokenizer, [], tokenizer.encode("people paid")) == "people paid"
    assert streamed(tokenizer, prompt[:1], tokenizer.encode("people", add_bos=False)) in ("people", " people")


@pytest.mark.parametrize("kind", ["byte level", "strip", "metaspace", "metaspace decoder"])
def test_any_ids_decode_as_in_transformers(kinds, tmp_path, kind):
    ours = Tokenizer.load(write(tmp_path, kinds[kind]))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    check_any_ids(ours.decode, partial(reference.decode, skip_special_tokens=True), len(reference))


def check_any_ids(ours, reference, size, count=300):
    """Where the bytes are UTF-8: what stands for others is ours, one U+FFFD a character begun."""
    draw, compared = random.Random(0), 0
    for _ in range(count):
        ids = [draw.randrange(size) for _ in range(draw.randrange(1, 8))]
        expected = reference(ids)
        if "\ufffd" not in expected:
            assert ours(ids) == expected, ids
            compared += 1
    assert compared > count / 20


def test_a_token_costs_the_same_after_any_prompt():
    class Counting(dict):
        asked = 0

        def get(self, *arguments):
            self.asked += 1
            return super().get(*arguments)

    pieces = Counting({1: b"a "})
    stream = PieceStream(pieces, unchanged, [1] * 1000)
    before = pieces.asked
    for count in range(1, 1000):
        assert stream.push(1) == "a " and pieces.asked == before + count


def test_a_character_that_the_prompt_began_belongs_to_the_answer(tmp_path, byte_level_json):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.json": byte_level_json}))
    ids, a = tokenizer.encode("🙂"), tokenizer.encode("a")
    assert tokenizer.decode(ids[:1]) == "\ufffd" and streamed(tokenizer, ids[:1], ids[1:]) == "🙂"
    assert streamed(tokenizer, ids[:1], a) == "a" and streamed(tokenizer, ids[:1], []) == ""


# --- added tokens that are not special


def falcon_like():
    """Falcon3's vocabulary names newline and tab as added tokens, in the byte-level alphabet."""
    library = train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL)
    texts = ["Ċ", "ĉ", "<tool call>", "   ", "日本", "é"]
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    return library.to_str()


def gemma_like(text):
    """Gemma's vocabulary has indents as added tokens, with ▁ for each space."""
    library = tokenizers.Tokenizer.from_str(text)
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = ["▁▁", "▁▁▁▁", "\n\n", "</b>", "<0x41>"]
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    return library.to_str()


@pytest.mark.parametrize("kind", ["falcon", "gemma"])
def test_added_tokens_go_through_the_decoder(tmp_path, sentencepiece_json, kind):
    write(tmp_path, {"tokenizer.json": falcon_like() if kind == "falcon" else gemma_like(sentencepiece_json)})
    ours = Tokenizer.load(tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    names = reference.get_added_vocab()
    for name, token in names.items():
        expected = reference.decode([token, token], skip_special_tokens=True)
        assert ours.decode([token, token]) == expected, name
    shown = {"Ċ": "\n", "ĉ": "\t", "   ": "   "} if kind == "falcon" else {"▁▁": "  ", "\n\n": "\n\n", "<0x41>": "A"}
    assert {name: ours.decode([names[name]]) for name in shown} == shown


@pytest.mark.parametrize("name", ["falcon", "gemma", "mistral"])
def test_real_vocabularies_decode_as_their_library(name):
    ours, reference = load_real(name), tokenizers.Tokenizer.from_file(str(real(name) / "tokenizer.json"))
    check_any_ids(ours.decode, reference.decode, reference.get_vocab_size(), 200)
    for text in TEXTS[1:8]:
        ids = ours.encode(text)
        for cut in range(len(ids)):
            if "\ufffd" not in reference.decode(ids[:cut]):
                assert streamed(ours, ids[:cut], ids[cut:]) == added(reference.decode, ids[:cut], ids[cut:])


# --- no decoder in the file


def test_without_decoder_the_pre_tokenizer_tells(tmp_path, kinds):
    for kind in ("byte level, no decoder", "metaspace, no decoder"):
        (folder := tmp_path / kind).mkdir()
        tokenizer = Tokenizer.load(write(folder, kinds[kind]))
        for text in TEXTS[1:7]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_decoder_a_sequence_of_pre_tokenizers_tells(tmp_path, byte_level_json):
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = without_decoder(byte_level_json, pre_tokenizers.Sequence([digits, level]))
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.json": text}))
    assert tokenizer.decode(tokenizer.encode("In 2024\n\tpeople")) == "In 2024\n\tpeople"


def test_whole_words_are_joined_by_spaces(tmp_path, kinds):
    tokenizer = Tokenizer.load(write(tmp_path, kinds["words"]))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("a whale swims")
    assert tokenizer.decode(ids) == reference.decode(ids) == "a whale swims"
    assert streamed(tokenizer, ids[:1], ids[1:]) == " whale swims"


# --- decoders that look like the known ones

REPLACE, STRIP = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
FALLBACK, FUSE = decoders.ByteFallback(), decoders.Fuse()
KNOWN = [
    [REPLACE],
    [REPLACE, FUSE],
    [REPLACE, FALLBACK, FUSE],
    [REPLACE, FUSE, STRIP],
    [decoders.Metaspace(prepend_scheme="never")],
    [decoders.Metaspace()],
]
OTHERS = {
    "another content": [decoders.Replace("▁", "_"), FALLBACK, FUSE],
    "another pattern": [decoders.Replace("_", " "), FALLBACK, FUSE],
    "two replacements": [decoders.Replace("a", "b"), REPLACE, FALLBACK, FUSE],
    "two spaces": [REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 2, 0)],
    "both sides": [REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 1)],
    "another strip": [REPLACE, FALLBACK, FUSE, decoders.Strip("a", 1, 0)],
    "each part stripped": [REPLACE, STRIP],
    "stripped before fused": [REPLACE, FALLBACK, STRIP, FUSE],
    "fused before bytes": [REPLACE, FUSE, FALLBACK],
    "fuse": [FUSE],
    "bytes": [FALLBACK],
    "nothing": [],
    "replaced and metaspace": [REPLACE, decoders.Metaspace()],
    "stripped metaspace": [decoders.Metaspace(), FUSE, STRIP],
    "metaspace before bytes": [decoders.Metaspace(), FALLBACK, FUSE],  # a space that is written as <0x20> stays
    "another metaspace": [decoders.Metaspace("_")],
}


def with_steps(text, steps):
    library = tokenizers.Tokenizer.from_str(text)
    library.decoder = decoders.Sequence(steps)
    return library


@pytest.mark.parametrize("steps", KNOWN, ids=lambda steps: "+".join(type(step).__name__ for step in steps))
def test_known_steps_decode_as_their_library(tmp_path, sentencepiece_json, steps):
    library = with_steps(sentencepiece_json, steps)
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.json": library.to_str()}))
    check_any_ids(ours.decode, library.decode, library.get_vocab_size())


@pytest.mark.parametrize("kind", OTHERS)
def test_steps_that_would_decode_otherwise_are_refused(tmp_path, sentencepiece_json, kind):
    library = with_steps(sentencepiece_json, OTHERS[kind])
    write(tmp_path, {"tokenizer.json": library.to_str()})
    with pytest.raises(ValueError, match=r"its decoder is .*, known are ByteLevel and sentencepiece's") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_pieces_are_a_dictionary_in_little_memory():
    draw = random.Random(0)
    expected = {draw.randrange(10**9): draw.randbytes(draw.randrange(9)) for _ in range(2000)}
    found = Pieces(expected)
    assert found == expected and len(found) == len(expected) and list(found) == sorted(expected)
    assert all(found[id] == piece for id, piece in expected.items())
    assert not any(id in found for id in (-1, min(expected) - 1, max(expected) + 1, 10**20))
    assert found.get(max(expected) + 1) is None and dict(Pieces({})) == {}


def test_pieces_of_a_large_vocabulary_take_some_bytes_each():
    tracemalloc.start()
    found = Pieces({id: b"piece%d" % id for id in range(50_000)})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 50_000 and held < 50_000 * 32, held  # a dictionary takes 150
