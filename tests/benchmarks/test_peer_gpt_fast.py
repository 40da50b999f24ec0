"""gpt-fast in torchao's copy: it computes what our dense model computes, and is decoded as it decodes itself."""

import sys

import pytest
import torch

from teal_fast.benchmarks.peer_gpt_fast import Decoder, load, make_model, quantize
from teal_fast.benchmarks.peers import check_installed, parse_peers, peer_rows
from teal_fast.benchmarks.rows import Task
from teal_fast.families.config import model_args
from teal_fast.model import Transformer
from teal_fast.tests.gguf_models import VOCABULARY, write_gguf
from teal_fast.tests.gguf_models import make_model as make_theirs
from teal_fast.tests.models import LLAMA3_ROPE, TINY

CPU, PROMPT = torch.device("cpu"), [3, 1, 4, 1, 5]
needs_torchao = pytest.mark.usefixtures("torchao")


@pytest.fixture(scope="module")
def torchao():
    pytest.importorskip("torchao._models.llama.model", reason="torchao is not installed, or too new a one")


def both(**more):
    """Our dense model of random weights in fp32, and torchao's of the same with an empty cache."""
    torch.manual_seed(0)
    ours = Transformer(model_args(TINY | more))
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs = make_model(ours.args, CPU, torch.float32, dict(ours.requires_grad_(False).named_parameters()))
    return ours, theirs, Decoder(theirs, ours.args, PROMPT, 12)


@needs_torchao
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}},
        {"rms_norm_eps": 1e-2, "rope_theta": 500000.0},
    ],
)
def test_its_logits_are_our_dense_models(more):
    ours, theirs, _ = both(**more)
    tokens = torch.randint(TINY["vocab_size"], (1, 17))
    logits = theirs(tokens, torch.arange(17))
    torch.testing.assert_close(logits, ours(tokens), atol=1e-4, rtol=1e-4)


@needs_torchao
def test_a_files_weights_are_its_weights(tmp_path):
    file, expected = tmp_path / "small.gguf", make_theirs()
    write_gguf(file, expected)
    args, model = load(Task(file, len(VOCABULARY), [PROMPT], 8, CPU, "fp32"), torch.float32)
    Decoder(model, args, PROMPT, 8)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, torch.arange(5)), expected(tokens).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"has {len(VOCABULARY)} tokens, the checkpoint 9"):
        load(Task(file, 9, [PROMPT], 8, CPU, "fp32"), torch.float32)


@needs_torchao
def test_it_decodes_the_likeliest_tokens_each_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    ours, _, decoder = both()
    expected = list(PROMPT)
    for _ in range(12):
        expected.append(int(ours(torch.tensor([expected]))[0, -1].argmax()))
    for _ in range(2):
        assert decoder.decode() > 0
        assert torch.cat(decoder.tokens).flatten().tolist() == expected[len(PROMPT) :]


@needs_torchao
def test_int8_is_rounded_and_little():
    ours, theirs, _ = both()
    tokens = torch.tensor([PROMPT])
    quantize(theirs, "int8")
    error = (theirs(tokens, torch.arange(5)) - ours(tokens)).norm() / ours(tokens).norm()
    assert 1e-3 < error < 3e-2


@needs_torchao
@pytest.mark.parametrize(
    "more, found",
    [
        ({"model_type": "qwen2"}, "biases"),
        ({"model_type": "mistral", "sliding_window": 6}, "a window"),
        ({"head_dim": 64}, "heads of another width"),
        ({"model_type": "qwen3", "head_dim": 32}, "norms of q and k"),
    ],
)
def test_a_model_that_it_does_not_compute_is_refused(more, found):
    with pytest.raises(ValueError, match=f"plain Llamas, this model has {found}: leave that peer out"):
        make_model(model_args(TINY | more), CPU, torch.float32)


def test_it_is_named_with_its_formats_and_wants_cuda():
    assert parse_peers(["gpt-fast"]) == [("gpt-fast", "bf16")]
    with pytest.raises(ValueError, match="--device cuda"):
        list(peer_rows([("gpt-fast", "int4")], Task(TINY, 500, [PROMPT], 8, CPU, "bf16")))


def test_without_torchao_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao._models.llama.model", None)
    with pytest.raises(ValueError, match=r"pip install torchao==0\.15\.0"):
        check_installed([("gpt-fast", "bf16")])
