"""gpt-fast as a peer, in the copy of it that torchao ships in its wheels up to 0.15 (`torchao._models.llama`).

The model and its weight-only quantization are torchao's. The loop is that of its generate.py, but that the likeliest
token is taken: a static cache, one function that gives the next token, compiled by mode "reduce-overhead" (a CUDA
graph) under torchao's own settings of the compiler, and a prompt that is computed as it stands. The host waits for the
last token alone. int8 has a scale for every output, int4 a scale and a zero for every 128 inputs or 64, in tinygemm's
layout; both are of all linear layers, the output layer among them.
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from teal_fast.benchmarks.rows import Row, Task
from teal_fast.families.args import ModelArgs
from teal_fast.families.config import model_args
from teal_fast.families.tensors import channel_order, in_order
from teal_fast.files.checkpoint import WEIGHTS, read_config
from teal_fast.files.gguf import convert_gguf
from teal_fast.sparse_model import SPARSE_WEIGHT


def rows(task: Task, format: str) -> Iterator[Row]:
    """Rows that are to be measured one after another: the next one's cache takes the place of the last one's."""
    if task.device.type != "cuda":
        raise ValueError("--peers gpt-fast decodes on CUDA: use it with --device cuda")
    import torchao

    torchao.quantization.utils.recommended_inductor_config_setter()
    args, model = load(task, torch.bfloat16)
    quantize(model, format)
    about = {
        "peer": f"gpt-fast {format}",
        "peer_version": f"(torchao {torchao.__version__})",
        "format": format,
        "mode": "compiled",
        "sparsity": 0.0,
    }
    for prompt in task.prompts:
        torch._dynamo.reset()  # a cache of another length would be compiled for all lengths
        decoder = Decoder(model, args, prompt, task.new_tokens)
        started = time.perf_counter()
        decoder.decode(), decoder.decode()  # compiles, then captures
        yield Row(about | {"prompt_tokens": len(prompt), "compile_s": time.perf_counter() - started}, decoder.decode)


def load(task: Task, dtype: torch.dtype) -> tuple[ModelArgs, nn.Module]:
    """The sizes and torchao's model of a task's GGUF file, its weights dequantized, or of random weights."""
    if isinstance(task.weights, dict):
        args = model_args(task.weights)
        return args, make_model(args, task.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        convert_gguf(task.weights, dense, dtype)
        args, stored = model_args(read_config(dense)), load_file(dense / WEIGHTS)
    if args.vocab_size != task.vocab_size:
        raise ValueError(f"{task.weights} has {args.vocab_size} tokens, the checkpoint {task.vocab_size}")
    tensors = {name: tensor.t() if SPARSE_WEIGHT.fullmatch(name) else tensor for name, tensor in stored.items()}
    return args, make_model(args, task.device, dtype, tensors)


def make_model(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """torchao's model with the tensors of our dense one, linear weights [N, K], or with random ones.

    Raises ValueError for what its model does not compute.
    """
    from torchao._models.llama import model as theirs

    has = {
        args.beyond_llama(): args.beyond_llama(),
        "biases": args.qkv_bias or args.o_bias or args.mlp_bias,
        "a window": any(args.sliding_windows),
        "heads of another width": args.n_heads * args.head_dim != args.dim,
        "rotary embedding that changes with the length": args.longest_plain,
    }
    if found := ", ".join(what for what, there in has.items() if there):
        raise ValueError(f"--peers gpt-fast decodes plain Llamas, this model has {found}: leave that peer out")
    sizes = theirs.ModelArgs(
        block_size=args.max_position,
        vocab_size=args.vocab_size,
        n_layer=args.n_layers,
        n_head=args.n_heads,
        dim=args.dim,
        intermediate_size=args.ffn_dim,
        n_local_heads=args.n_kv_heads,
        norm_eps=args.norm_eps,
    )
    with torch.device("meta" if tensors else device):
        torch.set_default_dtype(dtype)
        model = theirs.Transformer(sizes)
        torch.set_default_dtype(torch.float32)
    if tensors:
        model.load_state_dict(their_tensors(args, tensors), assign=True)
    return model.to(device, dtype).requires_grad_(False).eval()


def their_tensors(args: ModelArgs, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our dense model's tensors as torchao's: gate and up apart, rows of q and k as it turns them, neighbours."""
    order, found = channel_order(args, interleaved=True), {}
    for name, tensor in tensors.items():
        if ".w13." in name:
            found |= zip((name.replace("w13", "w1"), name.replace("w13", "w3")), tensor.chunk(2), strict=True)
        elif ".wqkv." in name and order is not None:
            found[name] = in_order(tensor, args.n_heads + args.n_kv_heads, order.argsort())
        else:
            found[name] = tensor
    return {"output.weight": found["tok_embeddings.weight"]} | found


def quantize(model: nn.Module, format: str) -> None:
    """Rounds the linear layers in place to "int8" or "int4"; "bf16" leaves them."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    group = 128 if model.config.dim % 128 == 0 else 64
    configs = {"int8": Int8WeightOnlyConfig(), "int4": Int4WeightOnlyConfig(group_size=group, version=1)}
    if format in configs:
        with warnings.catch_warnings(action="ignore"):  # that torchao will drop these versions, which its copy uses
            quantize_(model, configs[format])


def next_token(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    """The likeliest token [1, 1] after tokens [1, T] at positions [T]."""
    return model(tokens, positions)[:, -1].argmax(-1, keepdim=True)


class Decoder:
    """A model with an empty cache for a prompt and the tokens after it, which decodes as often as asked."""

    def __init__(self, model: nn.Module, args: ModelArgs, prompt: list[int], new_tokens: int):
        device, length = model.norm.weight.device, len(prompt) + new_tokens
        self.model, self.prompt, self.new_tokens = model, torch.tensor([prompt], device=device), new_tokens
        model.reset_caches()
        with torch.device(device):
            model.setup_caches(1, length)
            angles = torch.outer(torch.arange(length), torch.tensor(args.ropes[0].frequencies))
            # Its own angles know Llama 3.1's scaling of them and no other.
            model.freqs_cis = torch.stack((angles.cos(), angles.sin()), dim=-1).to(model.norm.weight.dtype)
        self.step = torch.compile(next_token, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self.tokens: list[Tensor] = []  # of the last time

    @torch.no_grad()
    def decode(self) -> float:
        """Computes the prompt, then decodes; tokens a second of the latter."""
        position = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        self.tokens = [next_token(self.model, self.prompt, position)]
        position = position[-1:] + 1
        self.tokens[0].item()  # waits
        started = time.perf_counter()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for _ in range(self.new_tokens - 1):
                self.tokens.append(self.step(self.model, self.tokens[-1], position).clone())
                position += 1
        self.tokens[-1].item()
        return (self.new_tokens - 1) / (time.perf_counter() - started)
