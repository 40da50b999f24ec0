"""Tokenizers of every kind, made once for all tests of this folder."""

import base64

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer

from teal_fast.files.pre_tokenizers import LLAMA3
from teal_fast.tests.files.made_tokenizers import SPECIAL, pieces_and_merges, train_byte_level, train_sentencepiece


@pytest.fixture(scope="session")
def byte_level_json():
    return train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL).to_str()


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece()


@pytest.fixture(scope="session")
def sentencepiece_json(sentencepiece_model):
    """The sentencepiece model as a tokenizer.json, in the form that Llama 2's has."""
    ids, merges = pieces_and_merges(sentencepiece_model)
    library = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str()


@pytest.fixture(scope="session")
def metaspace_json(sentencepiece_model):
    """The same in the form that transformers writes today: no space is put before a text that starts with one."""
    ids, merges = pieces_and_merges(sentencepiece_model)
    return LlamaTokenizer(vocab=ids, merges=merges).backend_tokenizer.to_str()


@pytest.fixture(scope="session")
def tiktoken_ranks():
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = train_byte_level(pre_tokenizers.Sequence([split, byte_level]))
    shown = {c: library.token_to_id(c) for c in pre_tokenizers.ByteLevel.alphabet()}
    assert sorted(shown.values()) == list(range(256))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary}


@pytest.fixture(scope="session")
def tiktoken_model(tiktoken_ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tiktoken_ranks.items())
