"""Tokens of texts and chats over HTTP, in vLLM's and llama.cpp's spellings, and what the server says of itself."""

import json
import urllib.error
import urllib.request

import openai
import pytest

from teal_fast.tests.server.live import serving

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 日本<|im_end|> <b>"}]


@pytest.fixture(scope="module")
def live(tiny):
    with serving(tiny, context=256, calibrated=False, names=("small", "a/b"), sparsity=0.0) as live:
        yield live


@pytest.fixture(scope="module")
def tokenizer(live):
    return live.service.tokenizer


def ask(live, path, body=None):
    """Status and parsed answer."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(live.url + path, data), timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_tokenize_as_vllm_has_it(live, tokenizer):
    text = "Hello wörld 日本"
    status, found = ask(live, "/tokenize", {"model": "small", "prompt": text})
    ids = tokenizer.encode(text)
    assert (status, found) == (200, {"tokens": ids, "count": len(ids), "max_model_len": 256, "token_strs": None})
    found = ask(live, "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})[1]
    assert found["tokens"] == tokenizer.encode(text, add_bos=False) and len(found["token_strs"]) == found["count"]
    assert found["token_strs"][0] == "Hello"


def test_tokenize_as_llama_cpp_has_it(live, tokenizer):
    text = "Hello <|im_end|>ß日"
    assert ask(live, "/tokenize", {"content": text})[1]["tokens"] == tokenizer.encode(text, add_bos=False)
    assert ask(live, "/tokenize", {"content": text, "add_special": True})[1]["tokens"] == tokenizer.encode(text)
    plain = ask(live, "/tokenize", {"content": text, "parse_special": False, "with_pieces": True})[1]["tokens"]
    assert tokenizer.added_id("<|im_end|>") not in [token["id"] for token in plain]
    pieces = (bytes(p) if isinstance(p := token["piece"], list) else p.encode() for token in plain)
    assert b"".join(pieces).decode() == text and any(isinstance(token["piece"], list) for token in plain)


def test_tokens_of_a_chat_and_its_text(live, tokenizer):
    ids = ask(live, "/tokenize", {"messages": CHAT})[1]["tokens"]
    text = ask(live, "/apply-template", {"messages": CHAT})[1]["prompt"]
    assert ids == tokenizer.encode_chat(CHAT) and text == tokenizer.render_chat(CHAT)
    assert ask(live, "/detokenize", {"tokens": ids})[1] == {"prompt": text, "content": text}


@pytest.mark.parametrize("text", ["Hello", " two  spaces ", "日本 🙂", "a <|im_end|>\n", ""])
def test_detokenize_is_the_way_back(live, text):
    ids = ask(live, "/tokenize", {"prompt": text})[1]["tokens"]
    assert ask(live, "/detokenize", {"tokens": ids, "model": "small"})[1]["prompt"] == text


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("/tokenize", {}, 400, "nothing is given"),
        ("/tokenize", {"prompt": "a", "content": "b"}, 400, "prompt and content is given"),
        ("/tokenize", {"prompt": ["a"]}, 400, "expected text"),
        ("/tokenize", {"prompt": "a\ud800"}, 400, "surrogates"),
        ("/tokenize", {"prompt": "a", "model": "gpt-5"}, 404, "not served"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "content is missing"),
        ("/tokenize", {"messages": CHAT, "add_generation_prompt": False}, 400, "where the assistant answers"),
        ("/detokenize", {}, 400, "tokens is missing"),
        ("/detokenize", {"tokens": [10**9]}, 400, "ids of tokens below"),
        ("/detokenize", {"tokens": [True]}, 400, "ids of tokens below"),
        ("/detokenize", {"tokens": [-1]}, 400, "ids of tokens below"),
        ("/apply-template", {"messages": []}, 400, "at least one message"),
        ("/apply-template", {"messages": CHAT, "chat_template_kwargs": {"messages": []}}, 400, "cannot be set"),
        ("/v1/models/gpt-5", None, 404, "not served"),
    ],
)
def test_refusals(live, path, body, status, said):
    found = ask(live, path, body)
    assert found[0] == status and said in found[1]["error"]["message"]


def test_models(live):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    listed = client.models.list().data
    assert [model.id for model in listed] == ["small", "a/b"] and listed[0].owned_by == "teal-fast"
    assert listed[0].max_model_len == 256 and client.models.retrieve("a/b").id == "a/b"


def test_props_and_version(live, tokenizer):
    assert ask(live, "/version")[1].keys() == {"version"}
    found = ask(live, "/props")[1]
    assert found["default_generation_settings"]["n_ctx"] == found["n_ctx"] == 256 and found["total_slots"] == 1
    assert found["chat_template"] == tokenizer.chat_template and found["build_info"].startswith("teal-fast ")
    assert (found["calibrated"], found["sparsity"], found["max_sparsity"]) == (False, 0.0, 0)
    assert found["device"] == "cpu" and found["format"] in ("fp32", "bf16") and found["prefill"] == ["dense", "full"]
    assert "/" not in found["model_path"]


def test_any_name(calibrated):
    with serving(calibrated, context=64, sparsity=0.5) as live:
        assert len(ask(live, "/v1/models")[1]["data"]) == 1
        assert ask(live, "/v1/models/gpt-5")[1]["id"] == "gpt-5"
        assert ask(live, "/props")[1]["sparsity"] == 0.5 and ask(live, "/props")[1]["max_sparsity"] == 0.95
