"""Models with the shapes of published ones and random weights: speed does not depend on what the weights say."""

import torch

from calibrate import cut_sequences, measure
from model import ModelArgs, Transformer
from sparse_model import Calibration, sparsify

# config.json of the published models, as far as shapes go.
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
COMMON = {"model_type": "llama", "num_attention_heads": 32, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}


def random_model(
    config: dict, device: torch.device | str, dtype: torch.dtype, seed: int = 0, std: float = 0.02
) -> Transformer:
    """A model of this config.json with normally distributed weights, sparse at sparsity 0."""
    with torch.device("meta"):
        model = Transformer(ModelArgs.from_config(config))
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight = torch.empty(parameter.shape[::-1], dtype=dtype, device=device)  # [K, N], seen as [N, K]
        weight = weight.fill_(1) if "norm" in name else weight.normal_(0, std, generator=generator)
        setattr(parent, leaf, torch.nn.Parameter(weight.t() if weight.ndim == 2 else weight, requires_grad=False))
        if leaf == "weight" and parent in (model.output, model.tok_embeddings):  # these two lie as PyTorch has them
            parent.weight = torch.nn.Parameter(parent.weight.contiguous(), requires_grad=False)
    if model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return sparsify(model.to(device)).eval()


def calibrate_on_random_tokens(model: Transformer, tokens: int = 2048, seed: int = 0) -> Calibration:
    """Quantiles of |x| over random tokens: thresholds that give a random model the sparsity asked for."""
    ids = torch.randint(model.args.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Calibration(measure(model, cut_sequences([ids], 512, tokens, seed)), {}, {"corpus": "random tokens"})
