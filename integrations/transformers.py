"""Runs exported folders in transformers: import this module, and `from_pretrained(FOLDER)` applies the thresholds.

    import teal_fast.integrations.transformers
    model = transformers.AutoModelForCausalLM.from_pretrained("checkpoints/hf/demo-teal")

The folder is scripts/export_hf.py's. Channels with |x| <= threshold count as zero in a dense product: this is the
numerical reference for other adapters and saves no time. `set_sparsity` turns the dial, `count_skipped` reads it.
Written for transformers 5.16 to 5.24, which find no plugin by themselves: the import registers the method.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from teal_fast.files.checkpoint import CONFIG, WEIGHTS
from teal_fast.files.exported import INDEX, METHOD, Exported, TealConfig, open_exported, write_index
from teal_fast.files.store import open_safetensors
from teal_fast.sparse_model import KEEP_ALL


class TealLinear(nn.Linear):
    """A linear layer over another's weights, that zeroes channels with |x| <= threshold in calls that are sparse.

    threshold: fp32 [K], changed in place; it stays fp32 whatever the model is cast to.
    """

    def __init__(self, linear: nn.Linear, config: TealConfig):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.config = linear.weight, linear.bias, config
        threshold = torch.full((linear.in_features,), KEEP_ALL, dtype=torch.float32, device=linear.weight.device)
        self.register_buffer("threshold", threshold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. NaN is kept, as in a dense layer."""
        if self.config.sparse(x.shape[:-1].numel()):
            x = x.masked_fill(self.skipped(x), 0)
        return super().forward(x)

    def skipped(self, x: Tensor) -> Tensor:
        """Which entries of x [..., K] count as zero in a sparse call, bool."""
        return x.abs() <= self.threshold

    def _apply(self, fn: Any, recurse: bool = True) -> "TealLinear":
        exact = self.threshold
        super()._apply(fn, recurse)
        self.threshold = exact.to(self.threshold.device)
        return self


class TealQuantizationConfig(QuantizationConfigMixin):
    """config.json's block in transformers' words; see `TealConfig`."""

    quant_method = METHOD

    def __init__(self, **block: Any):
        self.teal = TealConfig.from_dict(block)

    def to_dict(self) -> dict[str, Any]:
        return self.teal.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class TealQuantizer(HfQuantizer):
    """Puts `TealLinear` in the place of the linear layers that the folder has thresholds of."""

    quantization_config: TealQuantizationConfig
    exported: Exported

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.exported = open_exported(find_folder(model, self.quantization_config.teal))
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, K in self.exported.inputs.items():
            if name not in linear or linear[name].in_features != K:
                found = f"{linear[name].in_features} inputs" if name in linear else "no linear layer"
                raise ValueError(f"{type(model).__name__} has {found} at {name}, the exported folder {K} thresholds")
            model.set_submodule(name, TealLinear(linear[name], self.exported.config))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.tp_size not in (None, 1):
            raise ValueError(
                f"tensor parallelism (tp_size {model.tp_size}) is not served here: use one device, or vLLM"
            )
        set_thresholds(model, self.exported)
        model.save_pretrained = MethodType(save_pretrained, model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def find_folder(model: PreTrainedModel, config: TealConfig) -> Path:
    """The folder that the model is loaded from, which of a model on the Hub has the files fetched so far."""
    place, commit = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    files = [cached_file(place, name, _commit_hash=commit) for name in (CONFIG, config.thresholds, config.calibration)]
    return Path(files[0]).parent


def set_thresholds(model: PreTrainedModel, exported: Exported) -> None:
    for name, threshold in exported.thresholds().items():
        layer = model.get_submodule(name)
        if layer.threshold.is_meta:
            raise ValueError("thresholds are offloaded: load without offload_buffers")
        layer.threshold.copy_(threshold)


def save_pretrained(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """A loaded model's own: writes thresholds, calibration, and an index also of one weight file (for vLLM) too."""
    if options.get("push_to_hub"):
        raise ValueError("save_pretrained(push_to_hub=True) would leave files out: use model.push_to_hub")
    folder, writes = Path(save_directory), options.get("is_main_process", True)
    if writes:
        (folder / INDEX).unlink(missing_ok=True)  # of what was there before
    type(model).save_pretrained(model, save_directory, **options)
    if writes:
        model.hf_quantizer.exported.write(folder)
    if writes and not (folder / INDEX).exists():  # transformers writes one of several files
        with open_safetensors(folder / WEIGHTS) as file:
            sizes = {name: file.get_tensor(name).nbytes for name in sorted(file.keys())}
        write_index(folder, dict.fromkeys(sizes, WEIGHTS), sum(sizes.values()))


def set_sparsity(model: PreTrainedModel, sparsity: float) -> None:
    """Sets the thresholds of a loaded model in place; 0 is exactly dense. Raises ValueError on what can't be."""
    if not isinstance(quantizer := getattr(model, "hf_quantizer", None), TealQuantizer):
        raise ValueError(f"{type(model).__name__} was not loaded from an exported folder: it has no thresholds")
    quantizer.exported = quantizer.exported.at(sparsity)
    quantizer.quantization_config.teal = quantizer.exported.config
    set_thresholds(model, quantizer.exported)


@dataclass
class Skipped:
    """What sparse calls skipped of their layers' weights, in weights."""

    skipped: int = 0
    all: int = 0

    @property
    def sparsity(self) -> float:
        """Achieved; 0 where no call was sparse."""
        return self.skipped / self.all if self.all else 0.0


@contextmanager
def count_skipped(model: PreTrainedModel) -> Iterator[Skipped]:
    """Counts in the block what the model's sparse calls skip. It slows them: counts are read back at each."""
    count, hooks = Skipped(), []

    def hook(layer: TealLinear, given: tuple[Tensor]) -> None:
        if layer.config.sparse(given[0].shape[:-1].numel()):
            count.skipped += int(layer.skipped(given[0]).sum()) * layer.out_features
            count.all += given[0].numel() * layer.out_features

    for layer in model.modules():
        if isinstance(layer, TealLinear):
            hooks.append(layer.register_forward_pre_hook(hook))
    try:
        yield count
    finally:
        for handle in hooks:
            handle.remove()


def register() -> None:
    """Makes transformers know the method. Raises RuntimeError where another program has taken its name."""
    for mapping, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, TealQuantizationConfig),
        (AUTO_QUANTIZER_MAPPING, TealQuantizer),
    ):
        known = mapping.get(METHOD, ours)
        if (known.__module__, known.__name__) != (ours.__module__, ours.__name__):
            raise RuntimeError(f"transformers knows {METHOD!r} already, as {known.__module__}.{known.__name__}")
        mapping[METHOD] = ours


register()
