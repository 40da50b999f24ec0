"""Tiny random models of every family, made by transformers: configs, weights that show every switch, and folders."""

from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from teal_fast.tests.gguf_models import VOCABULARY
from teal_fast.tests.models import LLAMA3_ROPE, write_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
HALF = 6  # pairs that turn in a head of 16 channels, three quarters of them
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.05 * i for i in range(HALF)],
    "long_factor": [1.5 + i for i in range(HALF)],
    "partial_rotary_factor": 0.75,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "attention_bias": True,
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
LLAMA4 = YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24}
FAMILIES = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "granite": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "granite 4": (
        "granitemoehybrid",
        GRANITE
        | {
            "layer_types": ["full_attention"] * 4,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "position_embedding_type": "rope",
        },
    ),
    "phi 4": ("phi3", {}),
    "phi 4 mini": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("smollm3", {}),
    "olmo 2": ("olmo2", {}),
    "olmo 3": (
        "olmo3",
        {
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}),
    "gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "ministral 3": ("ministral3", {"head_dim": 16, "rope_parameters": LLAMA4}),
    "glm 4": ("glm4", {"head_dim": 16}),
    "ernie 4.5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "seed-oss": ("seed_oss", {"head_dim": 24}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": ALPHA, "attention_bias": True}),
}


def make_family(name: str, **more) -> transformers.PreTrainedModel:
    """The model of a family, its norms and biases drawn as well."""
    kind, fields = FAMILIES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | fields | more)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            low = -0.5 if kind.startswith("gemma") else 0.5
            torch.nn.init.uniform_(parameter, low, low + 1)
    return model


def write_family(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """The model as transformers saves it, with a tokenizer."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
