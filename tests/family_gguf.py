"""Tiny models of every family as GGUF files: names by the gguf package, weights as llama.cpp's converter has them."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from teal_fast.tests.gguf_models import MERGES, VOCABULARY, permute

ARCHITECTURES = {"gemma3_text": "gemma3", "ministral3": "mistral3", "mistral": "llama", "olmo3": "olmo2"}
ARCHITECTURES |= {"hunyuan_v1_dense": "hunyuan-dense", "granitemoehybrid": "granite"}
PERMUTED = ("llama", "mistral3", "granite", "smollm3")  # q and k: pairs that turn together stand side by side


def write_family_gguf(path: Path, model: torch.nn.Module) -> None:
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    of_layers = config.model_type == "granitemoehybrid"  # whose other layers might have none
    writer.add_head_count_kv(
        [config.num_key_value_heads] * config.num_hidden_layers if of_layers else config.num_key_value_heads
    )
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None) and config.model_type != "mistral":
        writer.add_sliding_window(config.sliding_window)
    write_rope(writer, config, head_dim)
    if name == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(VOCABULARY))
    writer.add_token_merges(MERGES)
    for full, parameter in model.named_parameters():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.detach().numpy()
        if config.model_type.startswith("gemma") and "norm" in full:
            values = values + 1
        if name in PERMUTED and any(part in full for part in (".q_proj", ".k_proj")):
            values = permute(values, config.num_attention_heads if "q_proj" in full else config.num_key_value_heads)
        parts = {full: values}
        if "shared_mlp.input_linear" in full:  # no experts: an ordinary MLP, its two inputs apart
            mlp = full.replace("shared_mlp.input_linear", "mlp.{}_proj")
            parts = {mlp.format("gate"): values[: len(values) // 2], mlp.format("up"): values[len(values) // 2 :]}
        for full, values in parts.items():
            their = names.get_name(full.replace("shared_mlp.output_linear", "mlp.down_proj"), (".weight", ".bias"))
            writer.add_tensor(their, np.ascontiguousarray(values, dtype=np.float32), raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rope(writer: gguf.GGUFWriter, config, head_dim: int) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"] * rope.get("alpha", 1.0) ** (head_dim / (head_dim - 2)))
    if "sliding_attention" in config.rope_parameters:
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", local)
    kind = rope["rope_type"]
    if kind == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / _frequencies(config)).numpy())
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if config.model_type == "ministral3":
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
            writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    elif kind == "longrope":
        original = config.original_max_position_embeddings
        by = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors((1 + np.log(by) / np.log(original)) ** 0.5)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))


def _frequencies(config) -> torch.Tensor:
    return LlamaRotaryEmbedding(config).inv_freq
