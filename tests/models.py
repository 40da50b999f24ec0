"""Small models for tests."""

from pathlib import Path

import tokenizers
import torch
import transformers

TINY = {  # a config.json
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 300,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}

LLAMA3_ROPE = {  # of a config.json
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json whose tokens are the single bytes, for folders of models that are given token ids alone."""
    alphabet = {character: i for i, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))


def write_llama(
    folder: Path,
    demo: Path,
    hidden_size: int,
    intermediate_size: int,
    layers: int = 2,
    positions: int = 512,
    vocab_size: int = 49152,
) -> Path:
    """A tiny random Llama in fp32, written by transformers, with the demo's tokenizer: a Hugging Face folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    return folder
