"""Code that fills a gap: which tokens stand around its two sides, and that nothing in these is a control token."""

import pytest
import tokenizers
from tokenizers import AddedToken

from teal_fast.files.fill_in import FAMILIES
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import train_sentencepiece, write

PREFIX, SUFFIX = "def f(x):\n    ", "\n    return x"


def with_added(text, names, special=True):
    library = tokenizers.Tokenizer.from_str(text)
    library.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return library.to_str(), [library.token_to_id(name) for name in names]


@pytest.mark.parametrize("names", FAMILIES, ids=lambda names: names[0])
def test_tokens_of_each_family_stand_around_the_two_sides(tmp_path, byte_level_json, names):
    text, (before, between, after) = with_added(byte_level_json, names)
    ours, plain = Tokenizer.load(write(tmp_path, {"tokenizer.json": text})), tokenizers.Tokenizer.from_str(text)
    sides = [plain.encode(side).ids for side in (PREFIX, SUFFIX)]
    assert ours.encode_fill_in(PREFIX, SUFFIX) == [before, *sides[0], between, *sides[1], after]
    assert ours.encode_fill_in("", "") == [before, between, after]


@pytest.mark.parametrize("special", [True, False])  # Qwen2.5's own files do not call theirs special
def test_control_tokens_in_the_sides_are_text(tmp_path, byte_level_json, special):
    text, ids = with_added(byte_level_json, FAMILIES[0], special)
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.json": text}))
    found = ours.encode_fill_in("a <|fim_suffix|>", "<|im_end|> b")
    assert [i for i in found if i in ids] == ids and ours.added_id("<|im_end|>") not in found
    assert ours.decode([i for i in found if i not in ids]) == "a <|fim_suffix|><|im_end|> b"


def test_what_the_files_name_counts_before_well_known_names(tmp_path, byte_level_json):
    text, ids = with_added(byte_level_json, [*FAMILIES[0], "<a>", "<b>", "<c>"])
    settings = {"prefix_token": "<a>", "suffix_token": {"content": "<b>"}, "middle_token": "<c>"}
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.json": text, "tokenizer_config.json": settings}))
    assert ours.encode_fill_in("", "") == ids[3:]
    settings["middle_token"] = "<absent>"
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.json": text, "tokenizer_config.json": settings}))
    assert ours.encode_fill_in("", "") == ids[:3]


@pytest.mark.parametrize("names", [(), FAMILIES[0][:2]])
def test_a_vocabulary_without_such_tokens_is_refused(tmp_path, byte_level_json, names):
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.json": with_added(byte_level_json, names)[0]}))
    with pytest.raises(ValueError, match="no tokens to fill a gap with: drop --fim"):
        ours.encode_fill_in(PREFIX, SUFFIX)


def test_bos_goes_first_and_the_suffix_gets_no_space(tmp_path):
    """As CodeLlama's reference has it: the prefix is a text's beginning, the suffix goes on in one."""
    model = train_sentencepiece(control_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>"])
    ours = Tokenizer.load(write(tmp_path, {"tokenizer.model": model}))
    found = ours.encode_fill_in("ab", "cd")
    one, *rest = found
    between = rest.index(ours.added_id("▁<SUF>"))
    assert (one, rest[0], rest[-1]) == (ours.bos_id, ours.added_id("▁<PRE>"), ours.added_id("▁<MID>"))
    assert rest[1:between] == ours.encode("ab", add_bos=False)
    assert b"".join(map(ours.piece, rest[between + 1 : -1])) == b"cd"
