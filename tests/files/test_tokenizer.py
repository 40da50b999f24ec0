"""The tokenizer on real libraries and on files trained here, against transformers, sentencepiece and tiktoken."""

import argparse
import base64
import inspect
import io
import json
import random

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from teal_fast.files.tokenizer import Tokenizer
from teal_fast.files.tokenizer_model import LLAMA3_SPECIAL, LLAMA3_SPLIT

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
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi 🙂 <b>"quoted"</b>\n 123'},
    {"role": "assistant", "content": "  Hello!  "},
    {"role": "user", "content": "日本?"},
]
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


@pytest.fixture(scope="module")
def byte_level_json():
    return train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL).to_str()


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_sentencepiece()


def pieces_and_merges(model):
    """A sentencepiece BPE model's vocabulary, and its merges in the order of their scores, which is that of the ids."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    pairs = [(piece[:i], piece[i:]) for piece in ids for i in range(1, len(piece))]
    return ids, sorted((pair for pair in pairs if {*pair} <= ids.keys()), key=lambda pair: ids["".join(pair)])


@pytest.fixture(scope="module")
def sentencepiece_json(sentencepiece_model):
    """The sentencepiece model as a tokenizer.json, in the form that Llama 2's has."""
    ids, merges = pieces_and_merges(sentencepiece_model)
    library = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str()


@pytest.fixture(scope="module")
def metaspace_json(sentencepiece_model):
    """The same in the form that transformers writes today: no space is put before a text that starts with one."""
    ids, merges = pieces_and_merges(sentencepiece_model)
    return LlamaTokenizer(vocab=ids, merges=merges).backend_tokenizer.to_str()


@pytest.fixture(scope="module")
def tiktoken_ranks():
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = train_byte_level(pre_tokenizers.Sequence([split, byte_level]))
    shown = {c: library.token_to_id(c) for c in pre_tokenizers.ByteLevel.alphabet()}
    assert sorted(shown.values()) == list(range(256))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary}


@pytest.fixture(scope="module")
def tiktoken_model(tiktoken_ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tiktoken_ranks.items())


BACKENDS = {
    "byte_level_json": "tokenizer.json",
    "sentencepiece_json": "tokenizer.json",
    "sentencepiece_model": "tokenizer.model",
    "tiktoken_model": "tokenizer.model",
}


@pytest.fixture(params=BACKENDS)
def tokenizer(request, tmp_path):
    return Tokenizer.load(write(tmp_path, {BACKENDS[request.param]: request.getfixturevalue(request.param)}))


# --- text to ids and back


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_decode(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) == text and stream.flush() == ""
    for i in range(len(ids)):
        so_far, whole = "".join(parts[: i + 1]), tokenizer.decode(ids[: i + 1])
        assert whole.startswith(so_far) and set(whole[len(so_far) :]) <= {"\ufffd"}


def test_stream_is_decode_for_any_ids(tokenizer):
    draw = random.Random(0)
    for length in (1, 2, 3, 10, 2000):
        ids = [draw.randrange(tokenizer.vocab_size + 5) for _ in range(length)]  # a padded head can give larger ids
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_back_an_unfinished_character(tokenizer):
    ids = tokenizer.encode("🙂", add_bos=False)
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1]) == "🙂" and stream.flush() == ""
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(stream.flush()) == {"\ufffd"}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", ["byte_level_json", "sentencepiece_json", "metaspace_json"])
def test_json_matches_transformers(request, tmp_path, backend, text):
    write(tmp_path, {"tokenizer.json": request.getfixturevalue(backend)})
    tokenizer = Tokenizer.load(tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_means_the_same_in_either_file(tmp_path, sentencepiece_json, sentencepiece_model, text):
    for name, content in {"tokenizer.json": sentencepiece_json, "tokenizer.model": sentencepiece_model}.items():
        (tmp_path / name[-5:]).mkdir()
        write(tmp_path / name[-5:], {name: content})
    one, other = (Tokenizer.load(tmp_path / name) for name in (".json", "model"))
    assert one.encode(text, add_bos=False) == other.encode(text, add_bos=False)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_matches_library(tmp_path, sentencepiece_model, text):
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": sentencepiece_model}))
    assert tokenizer.encode(text) == [sp.bos_id(), *sp.encode(text)]
    assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))
    assert tokenizer.vocab_size == sp.vocab_size()


def test_sentencepiece_leading_space_is_the_models_own(tmp_path):
    model = train_sentencepiece(add_dummy_prefix=False)
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": model}))
    for text in ("word", " word", "  word"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, " " * 60_000 + "x" * 30_000 + " y"], ids=lambda text: text[:8])
def test_tiktoken_matches_library(tmp_path, tiktoken_ranks, tiktoken_model, text):
    library = tiktoken.Encoding("", pat_str=LLAMA3_SPLIT, mergeable_ranks=tiktoken_ranks, special_tokens={})
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": tiktoken_model}))
    ids = tokenizer.encode(text)
    bos = len(tiktoken_ranks)
    assert ids[0] == bos and library.decode(ids[1:]) == text == tokenizer.decode(ids)
    if len(text) < 25_000:
        assert ids[1:] == library.encode(text)


def test_tiktoken_survives_what_overflows_its_regex(tmp_path, tiktoken_model):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": tiktoken_model}))
    text = " " * 1_000_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiktoken_special_tokens_follow_the_ranks(tmp_path, tiktoken_ranks, tiktoken_model):
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": tiktoken_model}))
    base = len(tiktoken_ranks)
    assert len(set(LLAMA3_SPECIAL)) == 256 and tokenizer.vocab_size == base + 256
    assert tokenizer.encode("<|start_header_id|><|end_header_id|><|eot_id|>", False) == [base + 6, base + 7, base + 9]
    assert tokenizer.eos_ids == {base + 1, base + 8, base + 9}
    assert tokenizer.decode([base, *tokenizer.encode("hi", False), base + 9]) == "hi"


def test_a_prompt_is_not_cut_or_padded(tmp_path, byte_level_json):
    library = tokenizers.Tokenizer.from_str(byte_level_json)
    plain = library.encode(TEXTS[1]).ids
    library.enable_truncation(4)
    library.enable_padding(length=100)
    assert Tokenizer.load(write(tmp_path, {"tokenizer.json": library.to_str()})).encode(TEXTS[1]) == plain


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="valid Unicode"):
        tokenizer.encode("a\udcffb")


# --- BOS, EOS, special tokens


def with_template(text, single):
    library = tokenizers.Tokenizer.from_str(text)
    tokens = [(name, library.token_to_id(name)) for name in SPECIAL]
    library.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return library.to_str()


@pytest.mark.parametrize(
    "single, config, expected",
    [
        ("$A", {}, []),
        ("<|begin|> $A", {}, [0]),
        ("<|begin|> $A <|end|>", {}, [0]),  # EOS never
        ("$A <|end|>", {}, []),
        ("<|begin|> $A", {"add_bos_token": False, "bos_token": "<|begin|>"}, []),
        ("<|begin|> $A", {"add_bos_token": None, "bos_token": "<|begin|>"}, [0]),
        ("$A", {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}, [2]),
        ("$A", {"bos_token": "<|begin|>"}, []),
    ],
)
def test_bos_as_the_checkpoint_says(tmp_path, byte_level_json, single, config, expected):
    text = "Some text"
    files = {"tokenizer.json": with_template(byte_level_json, single), "tokenizer_config.json": config}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    plain = tokenizers.Tokenizer.from_str(byte_level_json).encode(text).ids
    assert tokenizer.encode(text) == expected + plain
    assert tokenizer.encode(text, add_bos=False) == plain
    assert expected in ([], [tokenizer.bos_id])


def test_sentencepiece_bos_can_be_turned_off(tmp_path, sentencepiece_model):
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": {"add_bos_token": False}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    assert tokenizer.bos_id == 1 and 1 not in tokenizer.encode("hi")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 1}}, {1}),
        ({"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": [3, 5]}}, {1, 3, 5}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {3}),
        (
            {"config.json": {"eos_token_id": 1}, "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}},
            {1, 3},
        ),
        ({"special_tokens_map.json": {"eos_token": "<|end|>"}}, {1}),
    ],
)
def test_eos_ids(tmp_path, byte_level_json, files, expected):
    assert Tokenizer.load(write(tmp_path, {"tokenizer.json": byte_level_json, **files})).eos_ids == expected


def test_sentencepiece_eos_is_the_models_own(tmp_path, sentencepiece_model):
    assert Tokenizer.load(write(tmp_path, {"tokenizer.model": sentencepiece_model})).eos_ids == {2}


# --- chat

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "tojson": "{{ messages | tojson(indent=2) }}{{ {'é': 1} | tojson }}",
    "blocks": "{%- if tools is none %}\n  {% for m in messages %}\n    {{- m.role }}\n  {% endfor %}\n{% endif %}\nend",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "undefined": "{{ nothing }}{{ pad_token }}{{ messages[0].missing }}{% if date is defined %}x{% endif %}.",
    "year": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_matches_transformers(tmp_path, byte_level_json, name):
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True, "chat_template": TEMPLATES[name]}
    files = {"tokenizer.json": with_template(byte_level_json, "<|begin|> $A"), "tokenizer_config.json": config}
    ids = Tokenizer.load(write(tmp_path, files)).encode_chat(CHAT)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **config)
    assert ids == reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids


def test_sentencepiece_chat_parses_special_tokens(tmp_path, sentencepiece_model):
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    added = {str(700 + i): {"content": name, "special": i < 2} for i, name in enumerate(["<|x|>", "<|x|>y", "<think>"])}
    template = "{{ bos_token }}<|x|>{{ messages[0].content }}<|x|>y<think>{{ eos_token }}"
    config = {"chat_template": template, "added_tokens_decoder": added}
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": config}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello there"}])
    assert ids == [1, 700, *sp.encode("Hello there"), 701, 702, 2]
    assert tokenizer.decode(ids) == "Hello there<think>"
    assert tokenizer.vocab_size == 703


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "t", "template": "x"}]}}, None),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "t", "template": "x"}, {"name": "default", "template": "c"}]
                }
            },
            "c",
        ),
    ],
)
def test_where_the_chat_template_is_found(tmp_path, byte_level_json, files, expected):
    assert Tokenizer.load(write(tmp_path, {"tokenizer.json": byte_level_json, **files})).chat_template == expected


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "drop --chat or use an instruct model"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__ }}", "SecurityError"),
        ("{{ ''['__class__'] }}", "SecurityError"),
        ("{{ (''|attr('__class__')) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes over 0.1 s"),
        ("{% macro m(n) %}{{ m(n - 1) + m(n - 1) if n }}{% endmacro %}{{ m(60) }}", "it takes over 0.1 s"),
        ("{{ 'a' * 10**11 }}", "gives more than"),
        ("{{ 10**11 * messages }}", "gives more than"),
        ("{{ 9 ** (9 ** 9) }}", "gives more than"),
    ],
)
def test_chat_that_cannot_be_rendered(tmp_path, byte_level_json, monkeypatch, template, said):
    monkeypatch.setattr("teal_fast.files.chat.SECONDS", 0.1)
    files = {"tokenizer.json": byte_level_json, "tokenizer_config.json": {"chat_template": template}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    with pytest.raises(ValueError, match=said) as refused:
        tokenizer.encode_chat(CHAT)
    assert "\n" not in str(refused.value)


# --- files that are missing or broken


def test_missing_files(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model") as refused:
            Tokenizer.load(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file(request, tmp_path, backend, share):
    content = request.getfixturevalue(backend)
    content = content if isinstance(content, bytes) else content.encode()
    end = int(len(content) * share)
    end -= (
        2 if b"\n" in content[max(end - 1, 0) : end + 1] else 0
    )  # whole lines are a smaller vocabulary, not a broken one
    write(tmp_path, {BACKENDS[backend]: content[: max(end, 0)]})
    with pytest.raises(ValueError, match=rf"{BACKENDS[backend]}.*download the checkpoint again") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
        ("tokenizer.json", {"model": {"type": "New"}}, "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", [], "expected an object"),
        ("tokenizer_config.json", {"bos_token": "<absent>"}, "<absent>"),
        ("tokenizer_config.json", {"eos_token": "<absent>"}, "<absent>"),
        ("tokenizer_config.json", {"add_bos_token": True}, "no bos_token"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template"),
        ("config.json", "nonsense", "config.json"),
        ("config.json", {"eos_token_id": "2"}, "eos_token_id"),
        ("generation_config.json", b"\x00", "generation_config.json"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    ],
)
def test_broken_file(tmp_path, byte_level_json, name, content, said):
    write(tmp_path, {"tokenizer.json": byte_level_json, name: content})
    with pytest.raises(ValueError, match=said) as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_unknown_decoder_is_refused(tmp_path, byte_level_json):
    library = tokenizers.Tokenizer.from_str(byte_level_json)
    library.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer.load(write(tmp_path, {"tokenizer.json": library.to_str()}))


def test_malformed_added_tokens(tmp_path, sentencepiece_model):
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}
    with pytest.raises(ValueError, match="added_tokens_decoder"):
        Tokenizer.load(write(tmp_path, files))


def test_any_other_tokenizer_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sentencepiece"):
        Tokenizer.load(write(tmp_path, {"tokenizer.model": b'{"config": {}, "vocab": []}'}))
