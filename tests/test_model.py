"""The dense transformer against transformers: tiny random checkpoints of each architecture, all their logits.

The weights are drawn so large that logits reach several units and every switch of a config moves them visibly.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.families.rotary import make_rope
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.model import Transformer
from teal_fast.tests.models import LLAMA3_ROPE, write_tokenizer

TOKENS, TOLERANCE = 64, 1e-4  # fp32 sums in another order
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_one_kv_head": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "llama3_rope_tied": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "llama_biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_linear_rope": (transformers.LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "mistral_window": (transformers.MistralConfig, {"sliding_window": 9}),
    "mistral_full": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2_window": (transformers.Qwen2Config, QWEN_WINDOW),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3_window_bias": (transformers.Qwen3Config, {"head_dim": 16, "attention_bias": True, **QWEN_WINDOW}),
}


@dataclass
class Pair:
    model: Transformer
    tokens: Tensor  # [1, TOKENS]
    expected: Tensor  # logits of transformers [1, TOKENS, vocab]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    kind, fields = CASES[request.param]
    return make_pair(kind(**SIZES | fields), tmp_path_factory.mktemp(request.param))


def make_pair(config, folder) -> Pair:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    convert_huggingface(folder / "hf", folder / "ours", None)
    tokens = torch.randint(config.vocab_size, (1, TOKENS))
    with torch.inference_mode():
        return Pair(load_model(folder / "ours"), tokens, theirs(tokens).logits)


def run_in_steps(pair, steps):
    """Logits over a cache that is filled by calls of `steps` tokens each; the first call is a prompt."""
    cache = pair.model.new_cache(1, TOKENS)
    logits, start = [], 0
    for step in steps:
        positions = torch.arange(start, start + step) if start else None
        logits.append(pair.model(pair.tokens[:, start : start + step], positions, cache))
        start += step
    assert start == TOKENS
    return torch.cat(logits, dim=1)


@torch.inference_mode()
def test_prompt_matches_transformers(pair):
    assert pair.expected.std() > 1
    torch.testing.assert_close(pair.model(pair.tokens), pair.expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [[5] + [1] * 59, [3, 20, 1, 1, 30, 9], [40, 24]], ids=["decode", "chunks", "late"])
@torch.inference_mode()
def test_cache_matches_transformers(pair, steps):
    torch.testing.assert_close(run_in_steps(pair, steps), pair.expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_cache_may_be_longer_than_the_text(pair):
    cache = pair.model.new_cache(1, TOKENS + 40)
    pair.model(pair.tokens[:, :50], None, cache)
    found = pair.model(pair.tokens[:, 50:], torch.arange(50, TOKENS), cache)
    torch.testing.assert_close(found, pair.expected[:, 50:], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_batch_rows_do_not_mix(pair):
    both = torch.cat((pair.tokens, pair.tokens.flip(1)))
    torch.testing.assert_close(pair.model(both)[:1], pair.expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_rope_scaling_and_windows_show_in_the_logits(pair):
    """The comparison above can fail: with the plain rope, or without the window, a model is visibly another."""
    args = pair.model.args
    settings = {"rope_type": "default", "rope_theta": 10000.0, "share": 1.0}
    plain = dataclasses.replace(args, ropes=(make_rope(settings, args.head_dim),))
    full = dataclasses.replace(args, sliding_windows=(None,) * args.n_layers)
    altered = [other for other in (plain, full) if other != args]
    for other in altered:
        pair.model.args = other
        pair.model.reset_rope()
        difference = (pair.model(pair.tokens) - pair.expected).abs().max()
        pair.model.args = args
        pair.model.reset_rope()
        assert difference > 0.1
    assert len(altered) == (plain != args) + any(args.sliding_windows)


@torch.inference_mode()
def test_layer_types_choose_the_windowed_layers(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    fields = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    pair = make_pair(transformers.Qwen2Config(**SIZES | fields), tmp_path)
    assert pair.model.args.sliding_windows == (7, None, 7)
    torch.testing.assert_close(pair.model(pair.tokens), pair.expected, rtol=0, atol=TOLERANCE)


# --- reading config.json

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def test_absent_and_null_fields_mean_what_transformers_takes_them_for():
    expected = model_args(LLAMA)
    names = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "attention_bias")
    assert model_args(LLAMA | dict.fromkeys((*names, "hidden_act", "quantization_config"))) == expected
    theirs = transformers.LlamaConfig(**LLAMA)
    assert (expected.n_kv_heads, expected.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert expected.ropes == (make_rope(theirs.rope_parameters | {"share": 1.0}, theirs.head_dim),)
    assert expected.tie_embeddings == theirs.tie_word_embeddings


def test_mistral_without_the_field_has_the_window_of_transformers():
    config = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
    window = transformers.MistralConfig(**config).sliding_window
    assert model_args(config).sliding_windows == (window, window)
    assert model_args(config | {"sliding_window": None}).sliding_windows == (None, None)


def test_qwen3_without_the_field_has_the_head_dim_of_transformers():
    config = LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}
    assert model_args(config).head_dim == transformers.Qwen3Config(**config).head_dim


def test_rope_of_former_spelling_is_the_same():
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name not in ("rope_type", "rope_theta")}
    former = {"rope_theta": 10000.0, "rope_scaling": scaling | {"type": "llama3"}}
    found = model_args(LLAMA | former)
    assert found == model_args(LLAMA | {"rope_parameters": LLAMA3_ROPE}) != model_args(LLAMA)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3n_text"}, "model_type 'gemma3n_text' is not supported, the nearest that are: gemma3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"model_type": "mistral"}, "num_key_value_heads is missing"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": None}, "rope_theta is None"),  # transformers takes it, and fails later
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": {"type": "axial", "factor": 4.0}}, "rope_type 'axial' is not supported"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": [4.0]}}, "factor is [4.0]"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": {"type": "factors", "factors": [1.0] * 5}}, "5 rope factors"),
        ({"rope_scaling": {"type": "factors"}}, "factors is None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "expected one flat object"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": "4096"}, "sliding_window is '4096'"),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": 1}, "use_sliding_window is 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError) as error:
        model_args(LLAMA | fields)
    assert str(error.value).startswith("config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["chunked"] * 2},
        {"layer_types": ["full_attention"]},
        {"layer_types": 2},
        {"layer_types": [[], 1]},
    ],
)
def test_unknown_layer_types_are_refused(fields):
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True}
    with pytest.raises(ValueError, match="layer_types"):
        model_args(qwen | fields)


def test_context_beyond_the_model_is_refused():
    with torch.device("meta"):
        model = Transformer(model_args(LLAMA))
    with pytest.raises(ValueError, match="513 tokens exceeds this model's 512"):
        model.new_cache(1, 513)
