"""Writes a quantized copy of a checkpoint: smaller weights, so that fewer bytes are read a token, sparse or not.

    python quantize.py --checkpoint demo --mode int8
    python generate.py --checkpoint checkpoints/demo-int8 --sparsity 0.5

int8 has a scale for every output channel, int4 one for every `--group` outputs of an input channel besides. In int4 the
attention's weights are int8, and the output layer is in both; embeddings and norms stay as they are.

Without `--calibrated` weights are rounded to nearest; with it, so that what layers give on a corpus changes least
(GPTQ: arXiv:2210.17323), for inputs as they are and with half of their channels dropped, and each layer makes up for
the layers before it (GPTAQ: arXiv:2504.02692). One block at a time is held in memory. `--tune` then moves scales for
what the whole model gives, dense and with half of the channels dropped (tuning.py); it holds both models in memory. The
calibration of thresholds is carried over.
"""

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from calibrate import DEFAULT_CORPUS, cut_sequences
from checkpoint import (
    METADATA,
    ROOT,
    WEIGHTS,
    find_checkpoint,
    fingerprint,
    new_file,
    new_folder,
    open_safetensors,
    read_config,
    write_safetensors,
)
from cli import positive_int, run
from corpus import read_corpus
from model import ModelArgs, Transformer
from rounding import make_up
from sparse_model import (
    CALIBRATION,
    Calibration,
    SparseLinear,
    format_of,
    load_calibration,
    load_model,
    pick_device,
    sparse_layers,
    sparsify,
    stored_as,
)
from tokenizer import Tokenizer
from tuning import STEP, tune_scales
from weights import QUANTIZED, Form, Int8Output, Weight

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
DROPPED = 0.5  # the sparsity of the inputs that count besides the dense ones
CONTEXT = 1024  # tokens a sequence
Function = Callable[[Tensor], Tensor]


class Calibrated:
    """Quantizes linear layers, asked for in order, by what reaches them through the blocks quantized before.

    Each half of a block, attention and MLP, has a layer that reads hidden states and one whose outputs are added to
    them. Before a layer is rounded its weight makes up for what its inputs lack by then (GPTAQ, arXiv:2504.02692): a
    reading layer shall give what it gave the original model, an adding one bring back the original's hidden states.
    """

    def __init__(self, folder: Path, form: Form, sequences: list[list[int]], device: torch.device):
        self.form, self.device = form, device
        self.calibration = load_calibration(folder, device=device)
        self.model = load_model(folder)  # memory-mapped: a block is read when its turn comes
        self.hidden = [self.model.tok_embeddings(torch.tensor([ids])).to(device, torch.float32) for ids in sequences]
        self.wanted = self.hidden  # the original model's
        self.block = 0
        self.packed: dict[str, Weight] = {}

    def __call__(self, name: str, weight: Tensor) -> Weight:
        """What becomes of the layer `name`, whose weight [K, N] the model has."""
        while name not in self.packed:
            self.packed = self.quantize_block()
        return self.packed[name]

    @torch.no_grad()
    def quantize_block(self) -> dict[str, Weight]:
        """The next block's weights by layer name."""
        prefix, layer = f"layers.{self.block}.", self.model.layers[self.block].to(self.device, torch.float32)
        for name, parameter in layer.named_parameters():
            check_finite(stored_as(prefix + name), parameter)
        window = self.model.args.sliding_windows[self.block]

        def attend(x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1])
            inputs = (*self.model.rotary(positions, x.dtype), None, self.model.mask(positions, None, window))
            return layer.attention(x, *(part if part is None else part.to(self.device) for part in inputs))

        self.quantize_half(prefix + "attention.", layer.attention, layer.attention_norm, attend, ("wqkv", "wo"))
        mlp = layer.feed_forward
        self.quantize_half(prefix + "feed_forward.", mlp, layer.ffn_norm, mlp, ("w13", "w2"))
        self.model.layers[self.block] = torch.nn.Identity()  # its memory goes
        self.block += 1
        return {prefix + name: linear.weight for name, linear in sparse_layers(layer).items()}

    def quantize_half(self, prefix: str, half: Module, norm: Module, run: Function, names: tuple[str, str]) -> None:
        """Quantizes half a block, whose layers are called so; `run` gives what it adds to x, given norm(x)."""
        reading, adding = (getattr(half, name) for name in names)
        wanted = [x + run(norm(x)) for x in self.wanted]
        inputs = [norm(x) for x in self.hidden]
        lacks = (reading.weight.matmul(norm(aim) - x) for aim, x in zip(self.wanted, inputs, strict=True))
        self.quantize_layer(prefix + names[0], reading, zip(inputs, lacks, strict=True))

        setattr(half, names[1], torch.nn.Identity())  # what would reach the layer comes out
        inputs = [run(x) for x in inputs]
        setattr(half, names[1], adding)
        lacks = (aim - x - adding(y) for aim, x, y in zip(wanted, self.hidden, inputs, strict=True))
        self.quantize_layer(prefix + names[1], adding, zip(inputs, lacks, strict=True))
        self.hidden = [x + adding(y) for x, y in zip(self.hidden, inputs, strict=True)]
        self.wanted = wanted

    def quantize_layer(self, name: str, linear: SparseLinear, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Quantizes a layer, given inputs [1, T, K] with what its outputs lack for them [1, T, N]."""
        hessian = missing = 0
        threshold = self.calibration.threshold(name, DROPPED).to(self.device)
        for (x,), (lack,) in pairs:
            kept = x.masked_fill(x.abs() <= threshold, 0)
            kept[0] = 0  # the first token, an attention sink, is always dense
            hessian = hessian + x.t() @ x + kept.t() @ kept
            missing = missing + x.t() @ lack
        try:
            weight = make_up(linear.weight.dequantize(), hessian, missing)
            linear.weight = self.form.within(name).pack(weight, hessian)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"{name}: too few or too large inputs to round by: more --tokens?") from error


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or inf, which no scale can hold: is the checkpoint sound?")


def quantize(folder: Path, out: Path, form: Form, pack: Callable[[str, Tensor], Weight]) -> None:
    """Fills the folder `out` with a checkpoint, without calibration; `pack` quantizes the layer called so.

    Weights are [K, N]. Raises ValueError on NaN and inf.
    """
    with torch.device("meta"):
        model = sparsify(Transformer(ModelArgs.from_config(read_config(folder))), form)
    with open_safetensors(folder / WEIGHTS) as file:
        names = set(file.keys())
        parts: dict[str, Tensor] = {}  # of the weight being written

        def load(name: str) -> Tensor:
            tensor = file.get_tensor(EMBEDDINGS if name == OUTPUT and name not in names else name)
            check_finite(name, tensor)
            return tensor

        def read(name: str) -> Tensor:
            if name in quantized and name not in parts:
                module = name.rsplit(".", 1)[0]
                weight = load(f"{module}.weight")
                made_of = Int8Output.pack(weight) if f"{module}.weight" == OUTPUT else pack(module, weight)
                parts.clear()
                for part, tensor in made_of.named_parameters():
                    parts[f"{module}.{'weight' if part == 'rows' else part}"] = tensor.data.cpu()
            return parts[name] if name in quantized else load(name)

        layout, quantized = {}, set()
        for name, parameter in model.named_parameters():
            stored = stored_as(name)
            if name.endswith((".rows", ".scale")) or name == OUTPUT:
                quantized.add(stored)
            layout[stored] = (parameter.dtype if stored in quantized else file.get_tensor(name).dtype, parameter.shape)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, CALIBRATION) and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        write_safetensors(out / WEIGHTS, layout, read, METADATA | form.metadata())


def carry_calibration(folder: Path, out: Path) -> None:
    """Copies the calibration, if there is one, of one checkpoint to another, as that one's."""
    if (folder / CALIBRATION).exists():
        calibration = Calibration.load(folder / CALIBRATION)
        replace(calibration, model=fingerprint(out)).save(out / CALIBRATION)


def tune(folder: Path, out: Path, form: Form, sequences: list[list[int]], device: torch.device) -> None:
    """Tunes the scales of the checkpoint `out` in that form, made from the one in `folder`, to be like that one."""
    calibration = load_calibration(folder, device=device)
    try:
        models = (load_model(place, device, torch.float32) for place in (out, folder))
        factors = tune_scales(*models, calibration, sequences)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--tune holds both models in fp32, too much for {device}: try --device cpu") from error
    with open_safetensors(out / WEIGHTS) as file, new_file(out / WEIGHTS) as temporary:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict); memory-mapped
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}

        def read(name: str) -> Tensor:
            tensor, layer = stored[name], name.removesuffix(".scale")
            return tensor * factors[layer].cpu() if name.endswith(".scale") and layer in factors else tensor

        write_safetensors(temporary, layout, read, METADATA | form.metadata())


def check_dense(folder: Path, form: Form) -> None:
    """Raises ValueError when the checkpoint is unsound or quantized already, or does not fit the form."""
    model = load_model(folder)  # memory-mapped
    if format_of(model) in QUANTIZED:
        raise ValueError(f"{folder} is in {format_of(model)} already: quantize the checkpoint that it was made from")
    for name, layer in sparse_layers(model).items():
        parts = 2 if name.endswith("w13") else 1  # gate and up share no group
        form.within(name).empty(layer.weight.in_features, layer.weight.out_features // parts)
    if (folder / CALIBRATION).exists():
        Calibration.load(folder / CALIBRATION).check(folder)


def read_sequences(folder: Path, corpus: list[Path], tokens: int, seed: int) -> list[list[int]]:
    """Token sequences of the corpus, of at most CONTEXT tokens each."""
    tokenizer, args = Tokenizer.load(folder), ModelArgs.from_config(read_config(folder))
    documents = [tokenizer.encode(text) for text in read_corpus(corpus)]
    if sequences := cut_sequences(documents, min(CONTEXT, args.max_position), tokens, seed):
        return sequences
    raise ValueError("the corpus has fewer than 2 tokens: give more text, or a larger --tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint, or demo")
    parser.add_argument("--mode", choices=QUANTIZED, default="int8", help="form of the weights (default: %(default)s)")
    parser.add_argument("--group", type=positive_int, help="outputs a scale in int4 (default: 64)")
    parser.add_argument("--calibrated", action="store_true", help="round for the least change of what layers give")
    parser.add_argument("--tune", action="store_true", help="then move scales for what the whole model gives")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text for these two (default: data/calibration)")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        default=65536,
        help="of the corpus, for --calibrated; --tune takes half of them (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the text (default: %(default)s)")
    parser.add_argument("--device", help="where these two compute: cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name>-<mode>)")
    options = parser.parse_args()
    if not (options.calibrated or options.tune) and options.corpus:
        parser.error("--corpus is text for --calibrated and --tune")
    if options.group and options.mode != "int4":
        parser.error("--group is for --mode int4")

    folder = find_checkpoint(options.checkpoint)
    form = Form(options.mode, (options.group or 64) if options.mode == "int4" else 0)
    check_dense(folder, form)
    out = options.out or ROOT / "checkpoints" / f"{folder.resolve().name}-{options.mode}"
    device = pick_device(options.device)
    with new_folder(out) as made:
        if options.calibrated or options.tune:  # read first: bad text is refused before the work
            sequences = read_sequences(folder, options.corpus or [DEFAULT_CORPUS], options.tokens, options.seed)
        if options.calibrated:
            quantize(folder, made, form, Calibrated(folder, form, sequences, device))
        else:
            quantize(folder, made, form, lambda name, weight: form.within(name).pack(weight))
        if options.tune:
            # Half of each sequence is a step: on 2 cores one takes 8 s for the demo model.
            tune(folder, made, form, [sequence[:STEP] for sequence in sequences], device)
        carry_calibration(folder, made)
    before, after = ((place / WEIGHTS).stat().st_size / 1e6 for place in (folder, out))
    print(f"wrote {out}: {after:.0f} MB instead of {before:.0f} MB")


if __name__ == "__main__":
    run(main)
