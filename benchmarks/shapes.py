"""Models with the shapes of published ones and random weights: speed does not depend on what the weights say."""

import torch
from torch import Tensor

from teal_fast.calibration.passes import cut_sequences
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.families.config import model_args
from teal_fast.files.calibration import Calibration
from teal_fast.kernels.int4 import pack_int4
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers, sparsify
from teal_fast.weights.formats import Format

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
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
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
    config: dict,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    std: float = 0.02,
    format: Format | None = None,
) -> Transformer:
    """A model of this config.json with normally distributed weights, sparse at sparsity 0, quantized with a format."""
    with torch.device("meta"):
        model = sparsify(Transformer(model_args(config)), format)
    for parameter in () if format else model.parameters():
        parameter.data = parameter.data.to(dtype)  # fp32 of a large model would not fit
    model.to_empty(device=device)
    model.reset_rope(device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = parameter.data
        if value.dtype == torch.int8:
            value = _normal(value.shape, 127 / 4, generator).clamp_(-127, 127).to(torch.int8)
        elif value.dtype == torch.uint8:
            N, group = parent.out_features, parent.group
            values = (_normal((value.shape[0], N), 8 / 3, generator).round_() + 8).clamp_(0, 15).to(torch.uint8)
            value = pack_int4(values, torch.ones(value.shape[0], N // group, device=device, dtype=torch.bfloat16))
        elif leaf == "scale":
            value = torch.full_like(value, std * (3 / 8 if getattr(parent, "group", 0) else 4 / 127))
        elif "norm" in name:
            value = torch.ones_like(value, dtype=dtype)
        else:
            value = _normal(value.shape, std, generator).to(dtype)
        setattr(parent, leaf, torch.nn.Parameter(value, requires_grad=False))
    for layer in sparse_layers(model).values():
        layer.threshold.fill_(KEEP_ALL)
    if model.args.tie_embeddings and format is None:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def _normal(shape: torch.Size | tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Half precision, since fp32 of a large layer would take gigabytes."""
    return torch.empty(shape, device=generator.device, dtype=torch.bfloat16).normal_(0, std, generator=generator)


def calibrate_on_random_tokens(model: Transformer, tokens: int = 2048, seed: int = 0) -> Calibration:
    """Quantiles of |x| over random tokens: thresholds that give a random model the sparsity asked for."""
    ids = torch.randint(model.args.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Calibration(
        measure_quantiles(model, cut_sequences([ids], 512, tokens, seed, ())), {}, {"corpus": "random tokens"}
    )
