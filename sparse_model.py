"""Activation sparsity on top of model.py: SparseLinear, the calibration that sets its thresholds, and load_model.

A channel of a linear layer's input is dropped when |x| does not exceed its threshold, and the weight row it would
multiply is not read. Sparsity is the fraction dropped; 0 is exactly the dense model. Source: TEAL, arXiv:2408.14690.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from checkpoint import (
    DTYPES,
    SPARSE_WEIGHT,
    WEIGHTS,
    fingerprint,
    new_file,
    open_safetensors,
    read_config,
    run_command,
)
from model import ModelArgs, Transformer
from weights import DenseWeight, Form, Int8Output, Weight

CALIBRATION = "calibration.safetensors"
CALIBRATION_VERSION = "2"
FACTOR = ".factor"  # what a layer's factors are called in the file, after its name
KINDS = {"wqkv": "qkv", "wo": "o", "w13": "gate+up", "w2": "down"}
KEEP_ALL = -1.0  # a threshold below every |x|


class SparseLinear(nn.Module):
    """A linear layer that drops input channels with |x| <= threshold: decoded tokens by default, prompts not.

    `threshold` [K] fp32 changes in place, so that a compiled or captured step serves every sparsity. `dense_tokens`
    (see `leading_dense`) overrides how many leading tokens of a call are computed densely.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        threshold = torch.full((weight.in_features,), KEEP_ALL, device=weight.rows.device)
        self.register_buffer("threshold", threshold, persistent=False)
        self.dense_tokens: int | None = None

    def count_dense(self, tokens: int) -> int:
        """How many leading tokens of a call of `tokens` a sequence are dense: all of several, none of one."""
        if self.dense_tokens is None:
            return 0 if tokens == 1 else tokens
        return min(self.dense_tokens, tokens)

    def dropped(self, x: Tensor) -> Tensor:
        """Which entries of x [..., K] are treated as zero, bool. NaN is not: it travels on as in a dense layer."""
        return x.abs() <= self.threshold

    def forward(self, x: Tensor) -> Tensor:  # [B, T, K] -> [B, T, N]
        batch, tokens, _ = x.shape
        dense = self.count_dense(tokens)
        if dense < tokens and batch * tokens == 1:
            return self.weight.sparse_matvec(x.flatten(), self.threshold, self.bias).view(1, 1, -1)
        if dense < tokens:
            decoded = x[:, dense:]
            x = torch.cat((x[:, :dense], decoded.masked_fill(self.dropped(decoded), 0)), dim=1)
        return self.weight.matmul(x, self.bias)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The model's sparse layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsify(model: Transformer, form: Form | None = None) -> Transformer:
    """Replaces the linear layers of the blocks by SparseLinear, at sparsity 0.

    Their weights are shared, not copied; with a form they and the output layer are quantized ones, yet to be filled.
    """
    for name, linear in list(model.named_modules()):
        if SPARSE_WEIGHT.fullmatch(f"{name}.weight") and isinstance(linear, nn.Linear):
            K, N = reversed(linear.weight.shape)
            weight = form.within(name).empty(K, N) if form else DenseWeight(linear.weight.t())
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, SparseLinear(weight, linear.bias))
    if form:
        model.output = Int8Output.empty(*model.output.weight.shape)
    return model


def dtype_name(model: Transformer) -> str:
    """What the model computes in: bf16, fp16 or fp32."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.norm.weight.dtype)


def format_of(model: Transformer) -> str:
    """The form of the weights: bf16, fp16, fp32, int8 or int4."""
    form = model.layers[0].feed_forward.w13.weight.form
    return dtype_name(model) if form == "dense" else form


@contextmanager
def watch_inputs(model: nn.Module, observe: Callable[[str, SparseLinear, Tensor], Tensor | None]) -> Iterator[None]:
    """In the block, `observe(name, layer, x)` is called before a sparse layer computes from x [B, T, K].

    When it returns a tensor, the layer computes from that instead.
    """
    with ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hook = layer.register_forward_pre_hook(lambda layer, inputs, name=name: observe(name, layer, inputs[0]))
            hooks.enter_context(hook)
        yield


@contextmanager
def leading_dense(model: nn.Module, tokens: int) -> Iterator[None]:
    """In the block, the first `tokens` tokens of each call are computed densely and all later ones sparsely."""
    layers = sparse_layers(model).values()
    before = [layer.dense_tokens for layer in layers]
    for layer in layers:
        layer.dense_tokens = tokens
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.dense_tokens = value


@dataclass(frozen=True)
class Calibration:
    """Thresholds of every sparse layer for any sparsity of the model, by bytes of its sparse layers' rows.

    curves: by module name, fp32 [points], ascending, the layer's threshold at model sparsities evenly spaced from 0 to
    1. model: `checkpoint.fingerprint` of the model it belongs to. origin: what it was measured on (corpus, tokens,
    seed) and how (method). factors: by module name, fp32 [K], what a layer's threshold is times for each channel;
    layers without one have the same for all.
    """

    curves: dict[str, Tensor]
    model: dict[str, str]
    origin: dict[str, str]
    factors: dict[str, Tensor] = field(default_factory=dict)

    def threshold(self, name: str, sparsity: float) -> Tensor:
        """Of layer `name` at a model sparsity: fp32 [K], or a scalar where channels share it; linear between points."""
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity {sparsity}: expected a fraction from 0 to 1")
        if sparsity == 0:
            return torch.tensor(KEEP_ALL)
        points = self.curves[name]
        position = sparsity * (len(points) - 1)
        below = min(int(position), len(points) - 2)
        threshold = torch.lerp(points[below], points[below + 1], position - below)
        return threshold * self.factors[name] if name in self.factors else threshold

    def save(self, path: Path) -> None:
        """Writes the file whole or leaves what was there."""
        about = {"version": CALIBRATION_VERSION, "model": self.model, "origin": self.origin}
        tensors = self.curves | {name + FACTOR: factor for name, factor in self.factors.items()}
        with new_file(path) as temporary:
            # One entry of metadata: of several, safetensors shuffles the order, and equal files should be equal bytes.
            temporary.write_bytes(save(tensors, {"calibration": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises FileNotFoundError, or ValueError when the file is not a sound calibration of this version."""
        with open_safetensors(path) as file:
            about = json.loads((file.metadata() or {}).get("calibration", "{}"))
            if about.get("version") != CALIBRATION_VERSION:
                raise ValueError(f"{path} is no calibration of version {CALIBRATION_VERSION}: run calibrate.py again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, values in tensors.items():
            row = values.dtype == torch.float32 and values.ndim == 1 and len(values) > 1 and values.isfinite().all()
            if not (row and ((values >= 0) if name.endswith(FACTOR) else values.diff() >= 0).all()):
                expected = "fp32 of at least 0" if name.endswith(FACTOR) else "ascending fp32"
                raise ValueError(f"{path}: values of {name} are not {expected}: run calibrate.py again")
        factors = {name.removesuffix(FACTOR): tensors.pop(name) for name in list(tensors) if name.endswith(FACTOR)}
        return cls(tensors, about["model"], about["origin"], factors)

    def check(self, folder: Path) -> None:
        """Raises ValueError naming what differs when this is not the calibration of the checkpoint in `folder`."""
        expected = fingerprint(folder)
        if differing := [name for name in expected if self.model.get(name) != expected[name]]:
            found = ", ".join(f"{name} {self.model.get(name)} (checkpoint: {expected[name]})" for name in differing)
            raise ValueError(f"the calibration is another model's: it has {found}; run calibrate.py on {folder}")
        with open_safetensors(folder / WEIGHTS) as file:
            layers = {name.removesuffix(".weight") for name in file.keys() if SPARSE_WEIGHT.fullmatch(name)}  # noqa: SIM118
        if differing := sorted(layers ^ self.curves.keys()):
            side = "lacks" if differing[0] in layers else "has, unlike the model,"
            raise ValueError(f"the calibration {side} layer {differing[0]}: run calibrate.py on {folder}")


def set_sparsity(model: Transformer, calibration: Calibration, sparsity: float) -> None:
    """Sets every layer's thresholds in place so that a share `sparsity` of the sparse layers' bytes is not read."""
    for name, layer in sparse_layers(model).items():
        layer.threshold.copy_(calibration.threshold(name, sparsity))


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one. Raises ValueError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not known here, expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and not 0 <= (device.index or 0) < count:
        raise ValueError(f"--device {name}: this PyTorch sees {count} CUDA devices, use another or --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and Triton's launches go by the current device
    return device


def load_calibration(folder: Path, path: Path | None = None, device: torch.device | str = "cpu") -> Calibration:
    """The calibration at `path`, or the folder's own, made first when there is none. Raises when it does not fit."""
    if path is None:
        path = folder / CALIBRATION
        if not path.exists():
            run_command("calibrate", "--checkpoint", str(folder), "--device", str(device))
    calibration = Calibration.load(path)
    calibration.check(folder)
    return calibration


def stored_as(name: str) -> str:
    """The name in model.safetensors of a parameter of the sparse model."""
    return name.replace(".weight.rows", ".weight").replace(".weight.scale", ".scale")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model of a checkpoint folder, its block linears sparse at sparsity 0; dtype None keeps the stored one.

    Quantized weights stay so; `dtype` is of what is computed, and of all else. On the CPU tensors stay memory-mapped
    unless it changes them.
    """
    args = ModelArgs.from_config(read_config(folder))
    tensors = {}
    with open_safetensors(folder / WEIGHTS) as file:
        metadata, stored = file.metadata() or {}, set(file.keys())
        if metadata.get("format") != "teal-fast":
            raise ValueError(f"{folder} is not converted yet: run `python -m scripts.convert_hf_checkpoint {folder}`")
        with torch.device("meta"):
            model = sparsify(Transformer(args), Form.read(metadata))
        for name, parameter in model.named_parameters():
            stored_name = stored_as(name)
            if stored_name not in stored:
                raise ValueError(f"{folder / WEIGHTS} lacks {stored_name}, which its config.json calls for: remake it")
            tensor = file.get_tensor(stored_name).to(device=device)
            quantized = not tensor.is_floating_point() or name.endswith(".scale")
            tensors[name] = tensor if quantized else tensor.to(dtype=dtype)
            if tensor.shape != parameter.shape:
                found, expected = list(tensor.shape), list(parameter.shape)
                raise ValueError(f"{folder / WEIGHTS}: {stored_name} is {found}, config.json calls for {expected}")
        if extra := sorted(stored - set(map(stored_as, tensors))):
            raise ValueError(f"{folder / WEIGHTS} holds {extra[0]}, unknown to its config.json: make it again")
    model.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(model.output, nn.Linear) and args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    for layer in sparse_layers(model).values():
        layer.threshold = torch.full(layer.threshold.shape, KEEP_ALL, device=device)
    return model.to(device).requires_grad_(False).eval()


@dataclass
class Tally:
    """Entries seen and kept by each sparse layer, counted on the device: int64 scalars by module name."""

    seen: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def by_kind(self, model: Transformer) -> dict[str, float]:
        """Achieved sparsity by tensor kind and "all", weighted by the bytes of a channel's row; of what was counted."""
        layers = sparse_layers(model)
        read: dict[str, float] = {}
        held: dict[str, float] = {}
        for name, seen in self.seen.items():
            for kind in (KINDS[name.rsplit(".", 1)[1]], "all"):
                held[kind] = held.get(kind, 0) + seen * layers[name].weight.rows[0].nbytes
                read[kind] = read.get(kind, 0) + self.kept[name].item() * layers[name].weight.rows[0].nbytes
        return {kind: 1 - read[kind] / held[kind] for kind in held if held[kind]}


@contextmanager
def tally_kept(model: Transformer) -> Iterator[Tally]:
    """Counts, in the block, what every sparse layer keeps of the tokens that it does not compute densely."""
    tally = Tally()

    def count(name: str, layer: SparseLinear, x: Tensor) -> None:
        decoded = x[:, layer.count_dense(x.shape[1]) :]
        tally.seen[name] = tally.seen.get(name, 0) + decoded.numel()
        tally.kept[name] = tally.kept.get(name, 0) + layer.dropped(decoded).logical_not().sum()

    with watch_inputs(model, count):
        yield tally


def bytes_per_token(model: Transformer, sparsity: float, context: int = 0) -> int:
    """Bytes that one decoded token reads when a share `sparsity` of the sparse layers' rows is skipped.

    Weights, and the keys and values of `context` earlier tokens.
    """
    args, itemsize = model.args, model.norm.weight.element_size()
    cached = 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize * context
    sparse = sum(layer.weight.rows.nbytes for layer in sparse_layers(model).values())
    total = sum(parameter.nbytes for parameter in model.parameters())  # a tied output layer counts once …
    if model.output.weight is not model.tok_embeddings.weight:
        total -= model.tok_embeddings.weight.nbytes  # … and of an embedding table of its own one row is read
    return total - round(sparse * sparsity) + cached
