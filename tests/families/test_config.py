"""Rotary settings in every spelling, against transformers' own reading of the same config.json; quantized models."""

import itertools
import json
import math

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from teal_fast.families.config import model_args

SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WITHIN = {  # the contents of a block, its kind and theta aside
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": LLAMA3,
    "llama3 of the model's own length": {name: LLAMA3[name] for name in LLAMA3 if name[0] != "o"},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn by other settings": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn of a stated size": {"factor": 4.0, "attention_factor": 0.9},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 128,
    },
    "longrope of a stated factor": {
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 128,
        "factor": 32.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
THETAS = {"no theta": {}, "theta": {"rope_theta": 5e5}}


def blocks() -> dict[str, dict]:
    """Blocks by what they are: every kind, under both names and both at once, with and without theta."""
    made = {"theta alone": {"rope_theta": 2e4}, "null theta": {"rope_theta": None}, "null kind": {"rope_type": None}}
    for (kind, within), (title, theta) in itertools.product(WITHIN.items(), THETAS.items()):
        name = kind.split()[0]
        made[f"{kind}, {title}"] = {"rope_type": name} | within | theta
        made[f"{kind}, {title}, as type"] = {"type": name} | within | theta
    return made | {"both names": {"rope_type": "linear", "type": "llama3", "factor": 2.0}, "empty": {}, "null": None}


BLOCKS = blocks()
LENGTHS = (100, 300, 1500)  # before all original contexts, beyond most, beyond all


def spelled(scaling: str | None, parameters: str | None, top: dict) -> dict:
    """A config with these blocks; None for a spelling that is absent."""
    given = {"rope_scaling": scaling, "rope_parameters": parameters}
    return SIZES | top | {name: BLOCKS[block] for name, block in given.items() if block is not None}


def theirs(config: dict) -> list[torch.Tensor] | None:
    """transformers' cos and sin at some positions of texts of LENGTHS; None where it fails."""
    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
        # Anew for each: what dynamic scaling gives depends on what was computed before.
        both = [LlamaRotaryEmbedding(read)(torch.zeros(1), torch.tensor([places(length)])) for length in LENGTHS]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return [torch.cat(pair, dim=-1)[0] for pair in both]


def places(length: int) -> list[int]:
    return [0, 1, 77, length - 1]


def ours(config: dict) -> list[torch.Tensor] | str:
    """Ours, or the line of refusal."""
    try:
        (rope,) = model_args(config).ropes
    except ValueError as error:
        return str(error)
    found = []
    for length in LENGTHS:
        angles = torch.tensor(places(length))[:, None].float() * rope.at(length)
        cos, sin = (part * torch.tensor(rope.sizes) for part in (angles.cos(), angles.sin()))
        found.append(torch.cat((cos, cos, sin, sin), dim=-1))
    return found


def same_or_refused(config: dict) -> bool:
    """Whether we turn as transformers does; False for a refusal, which has to be one line about the rope."""
    found, expected = ours(config), theirs(config)
    if isinstance(found, str):
        assert found.startswith("config.json: ") and "\n" not in found and len(found) < 500
        assert any(word in found for word in ("rope_", "factor"))
        return False
    assert expected is not None, "transformers does not compute this"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # of angles up to 1500
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("theta", [{}, {"rope_theta": 1e6}, {"rope_theta": None}], ids=["none", "theta", "null"])
@pytest.mark.parametrize("scaling", [None, *BLOCKS])
def test_every_spelling_is_as_transformers_or_refused(scaling, theta):
    kinds = () if scaling is None else ("default, theta", "linear, theta", "yarn, no theta", "theta alone", "empty")
    others = list(BLOCKS) if scaling is None else kinds
    taken = [same_or_refused(spelled(scaling, parameters, theta)) for parameters in (None, *others)]
    if not (scaling or "").startswith("null") and theta.get("rope_theta", 1):
        assert taken[0] and sum(taken) > 1  # so what is refused is not all of it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "seed_oss"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("block", ["default, theta", "linear, theta, as type", "llama3, no theta"])
def test_every_family_reads_it_alike(architecture, spelling, block):
    assert same_or_refused(SIZES | {"model_type": architecture, "rope_theta": 1e6, spelling: BLOCKS[block]})


def test_a_theta_that_scaling_would_lose_is_refused():
    """transformers takes theta 10,000 here: the fault that a user reported of it."""
    config = SIZES | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    line = ours(config)
    assert "rope_scaling says" in line and "rope_parameters" in line and "1000000.0" in line
    config["rope_scaling"] = config["rope_scaling"] | {"rope_theta": 1e6}
    assert same_or_refused(config)
    config["rope_scaling"] = {"type": "axial", "factor": 4.0}
    assert "rope_type 'axial' is not supported" in ours(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outside", [32, 4096])
def test_the_original_length_may_stand_outside_of_the_block(outside):
    config = spelled("llama3, theta", None, {"original_max_position_embeddings": outside})
    assert same_or_refused(config)
    assert not torch.equal(ours(config)[0], ours(spelled("llama3, theta", None, {}))[0])


@pytest.mark.parametrize("wrong", [{"low_freq_factor": 4.0}, {"low_freq_factor": 5.0}, {"high_freq_factor": 1.0}])
def test_llama3_needs_two_frequencies_in_order(wrong):
    assert "is not below high_freq_factor" in ours(SIZES | {"rope_scaling": {"type": "llama3"} | LLAMA3 | wrong})


@pytest.mark.parametrize(
    "value", [[], [{}], "linear", 4, True, {"rope_type": {"a": 1}}, {"rope_type": math.nan}], ids=str
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_blocks_that_are_none_are_refused(spelling, value):
    assert "rope_" in ours(SIZES | {spelling: value})


def test_an_unknown_model_is_told_the_nearest():
    line = ours(SIZES | {"model_type": "qwen3_moe"})
    assert line == "config.json: model_type 'qwen3_moe' is not supported, the nearest that are: qwen3, qwen2"
    assert "expected one of llama, mistral" in ours(SIZES | {"model_type": "rwkv"})
    assert "expected one of" in ours(SIZES | {"model_type": ["llama"]})


# --- quantized models

METHODS = {
    "GPTQ (4 bits)": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
    "AWQ (4 bits)": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
    },
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "bitsandbytes (4 bits)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes (8 bits)": {"load_in_8bit": True, "llm_int8_threshold": 6.0},  # written before quant_method was
    "modelopt": {"producer": {"name": "modelopt"}, "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"},
    "MLX (4 bits)": {"group_size": 64, "bits": 4},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "an unnamed method": {},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_quantized_model_is_refused_by_its_method(key, method):
    line = ours(SIZES | {key: METHODS[method]})
    assert f"config.json: {key} says that {method} quantized the weights: convert the unquantized model" in line
    assert len(line) < 190


@pytest.mark.parametrize(
    "value", ["gptq", 4, ["x" * 1000], {"quant_method": ["x" * 1000]}, {"quant_method": "x\n" * 99}]
)
def test_whatever_stands_there_the_line_is_short(value):
    line = ours(SIZES | {"quantization_config": value})
    assert "quantized the weights" in line and "\n" not in line and len(line) < 190
