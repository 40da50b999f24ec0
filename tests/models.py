"""Small models for tests."""

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
