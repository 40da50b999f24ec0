"""The tokenizer on real libraries and on files trained here, against transformers, sentencepiece and tiktoken."""

import random
import threading
import time

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, processors
from transformers import PreTrainedTokenizerFast

from teal_fast.files.pre_tokenizers import LLAMA3
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.files.tokenizer_model import LLAMA3_SPECIAL
from teal_fast.tests.files.made_tokenizers import SPECIAL, TEXTS, load_real, train_sentencepiece, write

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
    library = tiktoken.Encoding("", pat_str=LLAMA3, mergeable_ranks=tiktoken_ranks, special_tokens={})
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


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    gaps, done = [], threading.Event()

    def watch():
        last = time.monotonic()
        while not done.wait(0.001):
            gaps.append(time.monotonic() - last)
            last += gaps[-1]

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    tokenizer.encode("The quick brown fox jumps. " * 20_000)
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    assert max(gaps) < seconds / 2


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
        ("<|begin|> $A", {"add_bos_token": False, "bos_token": "<|begin|>"}, [0]),
        ("<|begin|> $A", {"add_bos_token": None, "bos_token": "<|begin|>"}, [0]),
        ("$A", {"add_bos_token": True, "bos_token": "<|im_start|>"}, []),
        ("$A", {"add_bos_token": True}, []),
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
    if "<|end|>" not in single:  # add_bos_token counts for nothing beside a tokenizer.json
        assert tokenizer.encode(text) == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(text)


def test_sentencepiece_bos_can_be_turned_off(tmp_path, sentencepiece_model):
    files = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": {"add_bos_token": False}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    assert tokenizer.bos_id == 1 and 1 not in tokenizer.encode("hi")


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
    config = {"chat_template": template, "added_tokens_decoder": added, "legacy": True}
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
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template"),
        ("config.json", "nonsense", "config.json"),
        ("generation_config.json", b"\x00", "generation_config.json"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    ],
)
def test_broken_file(tmp_path, byte_level_json, name, content, said):
    write(tmp_path, {"tokenizer.json": byte_level_json, name: content})
    with pytest.raises(ValueError, match=said) as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_bos_that_is_wanted_and_missing(tmp_path):
    files = {"tokenizer.model": train_sentencepiece(bos_id=-1), "tokenizer_config.json": {"add_bos_token": True}}
    with pytest.raises(ValueError, match="no bos_token"):
        Tokenizer.load(write(tmp_path, files))


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


@pytest.mark.parametrize(
    "name, begins",
    [("llama", True), ("mistral", True), ("deepseek", False), ("qwen", False), ("falcon", False), ("yi", False)],
)
def test_real_folders_put_bos_as_transformers(name, begins):
    """The rows of docs/tokens.md; what transformers 5.23 does was read off by hand, since it takes ten seconds each."""
    tokenizer = load_real(name)
    assert (tokenizer.encode("a whale")[:1] == [tokenizer.bos_id]) is begins
    assert tokenizer.encode("a whale")[begins:] == tokenizer.encode("a whale", add_bos=False)
