"""Writes a checkpoint as a Hugging Face folder that vLLM and transformers run sparsely, with our adapters.

    python -m teal_fast.scripts.export_hf --checkpoint demo --sparsity 0.5

The folder (files/exported.py) is a dense model like any other to programs that ignore its `quantization_config`.
Weights have the checkpoint's values in Hugging Face's names and order: `convert_hf_checkpoint` gives the checkpoint
back, bit for bit. Memory holds one tensor. Quantized weights are refused: other engines could not skip theirs.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from teal_fast.cli import add_prepare_argument, open_calibration, open_checkpoint, pick_device, positive_int, run
from teal_fast.cli import sparsity as fraction
from teal_fast.families.config import model_args, text_config
from teal_fast.families.table import CLASSES
from teal_fast.families.tensors import Tensors
from teal_fast.files.calibration import Calibration
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, read_config, rounded_to
from teal_fast.files.conversion import find_parts, unstack
from teal_fast.files.exported import MODES, Exported, TealConfig, open_exported, write_index
from teal_fast.files.huggingface import COPIED
from teal_fast.files.load import load_model, stored_as
from teal_fast.files.paths import checkpoints_folder
from teal_fast.files.store import check_new, new_folder, write_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import dtype_name, format_of
from teal_fast.weights.formats import DTYPES, FORMATS

SHARD = 5 * 10**9  # bytes of a weight file at most, unless one tensor has more
DEQUANTIZE = "convert its GGUF file with `python -m teal_fast.scripts.convert_gguf --dequantize` and export that"


def export(folder: Path, out: Path, teal: TealConfig, calibration: Calibration, most: int = SHARD) -> None:
    """Writes the Hugging Face folder `out` of a checkpoint folder, whole or not at all; most: bytes of a weight file.

    Raises ValueError on what other engines don't run: quantized weights, and rotary settings that only GGUF files have.
    """
    check_new(out)
    source, model = read_config(folder), load_model(folder)
    if (format := format_of(model)) not in DTYPES:
        todo = "export the checkpoint that it was made from" if format in FORMATS else DEQUANTIZE
        raise ValueError(f"{folder} has {format} weights, of which other engines can't skip any: {todo}")
    config = exported_config(source, teal, DTYPES[dtype_name(model)])
    with new_folder(out) as temporary:
        for name in COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Exported.of(source, teal, calibration).write(temporary)
        open_exported(temporary)
        metadata = {"format": "pt"} | rounded_to(folder / WEIGHTS)
        write_weights(temporary, model, Tensors(source, model.args), most, metadata)


def exported_config(source: dict[str, Any], teal: TealConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The folder's config.json: of text alone, with what other programs don't find out from the weights."""
    config, args = text_config(source), model_args(source)
    blocks = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if any("factors" in map(rope_type, (block, *block.values())) for block in blocks):
        raise ValueError(
            "config.json: rope_scaling is that of a GGUF file, which other engines don't know: convert the model's "
            "Hugging Face folder and export that"
        )
    own = {"architectures": [f"{CLASSES[args.architecture]}ForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    own |= {"tie_word_embeddings": args.tie_embeddings, "quantization_config": teal.to_dict()}
    return {name: value for name, value in config.items() if name != "torch_dtype"} | own


def rope_type(block: Any) -> str | None:
    return block.get("rope_type") if isinstance(block, dict) else None


def write_weights(folder: Path, model: Transformer, theirs: Tensors, most: int, metadata: dict[str, str]) -> None:
    """Writes the model's tensors under Hugging Face's names: an index and files of at most `most` bytes."""
    stored = {stored_as(name): parameter for name, parameter in model.named_parameters()}
    parts = {
        part: view
        for name, rows in find_parts(model.args, theirs.names)[1].items()
        for part, view in unstack(name, stored[name], rows).items()
    }
    files, size = [{}], 0
    for name, view in parts.items():
        if size + view.nbytes > most and files[-1]:
            files, size = [*files, {}], 0
        files[-1][name], size = (view.dtype, view.shape), size + view.nbytes
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [WEIGHTS]
    for file, layout in zip(names, files, strict=True):
        write_safetensors(folder / file, layout, lambda name: theirs.restore(name, parts[name]), metadata)
    where = {name: file for file, layout in zip(names, files, strict=True) for name in layout}
    write_index(folder, where, sum(view.nbytes for view in parts.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint, or demo")
    parser.add_argument("--sparsity", type=fraction, required=True, help="nominal; can be changed in use")
    parser.add_argument("--mode", choices=MODES, default="decode", help="mask: prompts are sparse too")
    parser.add_argument("--max_m", type=positive_int, default=1, help="tokens at once that are sparse (default: 1)")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/hf/<checkpoint's name>-teal)")
    add_prepare_argument(parser)
    options = parser.parse_args()
    if Path(options.checkpoint).is_file():
        raise ValueError(f"{options.checkpoint} is a file, expected a converted checkpoint's folder: {DEQUANTIZE}")
    folder = open_checkpoint(options.checkpoint, not options.no_prepare)
    out = options.out or checkpoints_folder() / "hf" / f"{folder.resolve().name}-teal"
    check_new(out)  # before a calibration is made
    calibration = open_calibration(folder, options.calibration, pick_device(None), not options.no_prepare)
    teal = TealConfig(options.sparsity, calibration.model["weights"], options.mode, options.max_m)
    export(folder, out, teal, calibration)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
