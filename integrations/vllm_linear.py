"""What vLLM asks of the quantization `teal`: which of a model's layers are sparse, how they load and compute.

The weights are dense; "quantization" is what vLLM calls a config that owns the linear layers. It is found by the
folder's `quantization_config` (files/exported.py). Only integrations/vllm.py imports this, after it has looked at
vLLM's version.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.worker_base import WorkerBase

from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS
from teal_fast.files.exported import INDEX, METHOD, Exported, TealConfig, open_exported
from teal_fast.files.store import open_safetensors
from teal_fast.integrations.threshold_linear import count_channels, threshold_linear

PLUGIN = "teal"  # the name of our entry points, which VLLM_PLUGINS lists
TURN = "teal_sparsity"  # the workers' method that reads and turns the dial


class TealQuantization(QuantizationConfig):
    """The `quantization_config` of an exported folder. `settings` None: a folder without one, which is refused."""

    def __init__(self, settings: TealConfig | None = None):
        super().__init__()
        self.settings, self.source = settings, ("", None)
        self.rename: Callable[[list[str]], list[str]] = list  # from Hugging Face's names of modules to vLLM's

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the oldest that Triton's bf16 is made for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it all

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TealQuantization":
        return cls(TealConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.rename = hf_to_vllm_mapper.apply_list

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM's first call after `from_config`, before any worker starts: unsound folders are refused here."""
        if getattr(self, "online_quantization_config", None) is not None:
            raise ValueError(
                "the quantization teal has dense weights and goes with no other: drop --quantization-config"
            )
        self.source = (model_name, revision)
        if self.settings is None:
            refuse_unexported(model_name)
        read_folder(*self.source)

    @functools.cached_property
    def thresholds(self) -> dict[str, Tensor]:
        """At the settings' sparsity, fp32 [K] by vLLM's name of an unfused module."""
        found = read_folder(*self.source).thresholds(self.settings.sparsity)
        return dict(zip(self.rename(list(found)), found.values(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Workers read the thresholds themselves: a model of 70B has megabytes of them."""
        return {name: value for name, value in self.__dict__.items() if name != "thresholds"}

    def turn(self, sparsity: float) -> None:
        """Sets the nominal sparsity; layers copy their thresholds then."""
        self.settings = replace(self.settings, sparsity=sparsity)
        self.__dict__.pop("thresholds", None)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """Of a linear layer; None for embeddings, the output layer, attention and experts, which stay as they are."""
        if not isinstance(layer, LinearBase):
            return None
        head, _, last = prefix.rpartition(".")
        names = [f"{head}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        found = [name for name in names if name in self.thresholds]
        if not found:
            return UnquantizedLinearMethod()
        first = self.thresholds[found[0]]
        if found != names or not all(torch.equal(first, self.thresholds[name]) for name in names):
            raise ValueError(f"vLLM fuses {', '.join(names)}, which the folder does not give the same thresholds")
        return TealLinearMethod(self, found[0])


@functools.cache
def read_folder(model: str, revision: str | None) -> Exported:
    """The exported folder of a path or a name on the Hub. Raises ValueError or FileNotFoundError in one line."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[CONFIG, INDEX, "teal_*"]))
    exported = open_exported(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}, without which vLLM would take the thresholds for weights")
    return exported


def refuse_unexported(model: str) -> None:
    """Raises ValueError on a checkpoint of ours: its config.json has no quantization_config."""
    weights = Path(model) / WEIGHTS
    if weights.is_file():
        with open_safetensors(weights) as file:
            about = file.metadata() or {}
        if about.get("format") == METADATA["format"]:
            kind = f"{about['weights']}, which vLLM does not read" if "weights" in about else "teal-fast's own layout"
            todo = "serve what `python -m teal_fast.scripts.export_hf` makes of the dense checkpoint"
            raise ValueError(f"{model} is a checkpoint in {kind}: {todo}")


@register_weight_loader_v2_supported_method
class TealLinearMethod(UnquantizedLinearMethod):
    """A dense linear layer whose steps of few tokens are sparse. name: vLLM's of its first unfused module."""

    supports_pre_processed_weights = False

    def __init__(self, config: TealQuantization, name: str):
        super().__init__()
        self.config, self.name = config, name

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        super().create_weights(layer, *sizes, params_dtype, **extra)
        if len(self.config.thresholds[self.name]) != input_size:
            found = f"{len(self.config.thresholds[self.name])} thresholds, the layer {input_size} inputs"
            raise ValueError(f"{self.name} has {found}: was config.json changed after the export?")
        # A layer whose inputs are split among ranks has its own part of the thresholds on each.
        begin = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        self.channels = slice(begin, begin + input_size_per_partition)
        layer.register_buffer("teal_threshold", layer.weight.new_empty(input_size_per_partition, dtype=torch.float32))
        counts = layer.weight.new_zeros(3, dtype=torch.int64) if PLUGIN in (envs.VLLM_PLUGINS or ()) else None
        layer.register_buffer("teal_counts", counts, persistent=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        # Inputs become runs of memory, one layer at a time, and no second copy stays. vLLM's own packing of weights for
        # CPUs is left out, which would be such a copy.
        layer.weight.data = layer.weight.data.t().contiguous().t()
        self.set_threshold(layer)

    def set_threshold(self, layer: nn.Module) -> None:
        """In place: captured graphs have the address."""
        layer.teal_threshold.copy_(self.config.thresholds[self.name][self.channels])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.teal_counts is not None:
            count_channels(x, layer.teal_threshold, self.config.settings.most, layer.teal_counts)
        return threshold_linear(x, layer.weight, bias, layer.teal_threshold, self.config.settings.most)


def sparse_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(getattr(layer, "quant_method", None), TealLinearMethod)]


def teal_sparsity(worker: WorkerBase, sparsity: float | None = None) -> dict[str, Any]:
    """A worker's method, which `collective_rpc` calls by its name: sets the nominal sparsity if one is given.

    Returns it and what was counted since it was set: tokens computed sparsely and densely, summed over layers, and of
    the sparse ones the weights that they would have read and skipped.
    """
    layers = sparse_layers(worker.get_model())
    if sparsity is not None:
        for config in {id(layer.quant_method.config): layer.quant_method.config for layer in layers}.values():
            config.turn(sparsity)
        for layer in layers:
            layer.quant_method.set_threshold(layer)
            if layer.teal_counts is not None:
                layer.teal_counts.zero_()
    found = {"layers": len(layers), "sparse": 0, "dense": 0, "weights": 0, "skipped": 0}
    found["sparsity"] = layers[0].quant_method.config.settings.sparsity if layers else 0.0
    for layer in layers:
        if layer.teal_counts is not None:
            sparse, dropped, dense = layer.teal_counts.tolist()
            found["sparse"] += sparse
            found["dense"] += dense
            found["weights"] += sparse * layer.weight.numel()
            found["skipped"] += dropped * layer.weight.shape[0]
    return found


def check_loaded(load_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """vLLM's `load_model` with a look at the model: one that is called teal and has no sparse layer is refused."""

    @functools.wraps(load_model)
    def checked(loader: BaseModelLoader, vllm_config: Any, model_config: Any, *rest: Any, **named: Any) -> nn.Module:
        model = load_model(loader, vllm_config, model_config, *rest, **named)
        if model_config.quantization == METHOD and not sparse_layers(model):
            raise RuntimeError(
                f"no layer of {model_config.model} took the quantization {METHOD}: another plugin took its name, "
                f"or vLLM's {type(model).__name__} calls its layers differently from config.json's model"
            )
        return model

    checked.checks_teal = True
    return checked


def register() -> None:
    """Idempotent. Raises RuntimeError when the name is another plugin's, which vLLM would overwrite silently."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(TealQuantization)
    if (winner := get_quantization_config(METHOD)) is not TealQuantization:
        raise RuntimeError(
            f"the quantization name {METHOD} is taken by {winner.__module__}.{winner.__qualname__}: "
            "leave that plugin out with VLLM_PLUGINS"
        )
    setattr(WorkerBase, TURN, teal_sparsity)
    if not hasattr(BaseModelLoader.load_model, "checks_teal"):
        BaseModelLoader.load_model = check_loaded(BaseModelLoader.load_model)
