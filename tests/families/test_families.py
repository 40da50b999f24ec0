"""Every family against transformers, and docs/families.md against what is seen here.

Texts are longer than the original contexts of those that scale, so that scaling shows.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.cuda_step import can_fuse
from teal_fast.engine.staged_step import stage_shape
from teal_fast.engine.steps import PlainStep
from teal_fast.families.args import Rope
from teal_fast.families.config import model_args
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.paths import ROOT
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparse_layers, sparsify
from teal_fast.tests.family_gguf import write_family_gguf
from teal_fast.tests.family_models import FAMILIES, make_family, write_family
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output

TOKENS, HALF = 80, 40
# llama.cpp's architecture llama has no window, and it scales Gemma's queries by their own size.
LOST_IN_GGUF = {"mistral": {"sliding_window": None}, "gemma 2": {"query_pre_attn_scalar": 16}}
LOST_IN_GGUF["gemma 3"] = LOST_IN_GGUF["gemma 2"]
TOLERANCE = 1e-4  # fp32 sums in another order, of logits of a unit
TOLERANCE_QUANTIZED = {"int8": 1e-3, "int4": 0.05}  # inputs rounded to 16 bits, rows' factors to 8: test_cpu_step.py


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(family):
    return make_family(family)


@pytest.fixture(scope="module")
def folder(family, theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family.replace(" ", "_"))
    convert_huggingface(write_family(theirs, folder / "hf"), folder / "ours", None)
    return folder / "ours"


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def text():
    return torch.randint(128, (1, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(theirs, text):
    with torch.inference_mode():
        return theirs(text).logits[0]


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    """The rows of the table in docs/families.md, by family and column."""
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    lines = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0].lower(): dict(zip(header, row, strict=True)) for row in rows}


def error(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def within(documented: dict, family: str, column: str, found: float) -> bool:
    """Whether an error is at most what the table says, and that at most the tolerance."""
    bound = float(re.fullmatch(r"(\S+)", documented[family][column])[1])
    return found <= bound <= TOLERANCE


@torch.no_grad()
def follow(make_step, model: Transformer, text: Tensor) -> Tensor:
    """Logits [HALF, vocab] of a text's second half, token by token after its first half at once."""
    cache = model.new_cache(1, TOKENS)
    model.stretch(cache, TOKENS)
    model(text[:, :HALF], None, cache)
    step = make_step(model, cache)
    return torch.stack([step(text[:, i : i + 1], torch.tensor([i])).clone() for i in range(HALF, TOKENS)])


@torch.no_grad()
def test_logits_are_those_of_transformers(family, model, text, expected, documented):
    assert expected.std() > 1
    assert within(documented, family, "dense", error(model(text)[0], expected))
    assert within(documented, family, "dense", error(follow(PlainStep, model, text), expected[HALF:]))


def test_cpp_step_computes_them_too(family, model, text, expected, documented):
    assert within(documented, family, "CPU step", error(follow(CpuStep, model, text), expected[HALF:]))


@torch.no_grad()
def test_several_tokens_have_the_bits_of_one_by_one(model, text):
    alone = follow(CpuStep, model, text)
    cache = model.new_cache(1, TOKENS)
    model.stretch(cache, TOKENS)
    model(text[:, :HALF], None, cache)
    step = CpuStep(model, cache)
    together = [step.dense(text[0, i : i + 8].tolist(), i, 8) for i in range(HALF, TOKENS, 8)]
    assert torch.equal(torch.cat(together), alone)


def test_sparse_steps_agree_and_differ_from_dense_ones(model, text, expected):
    set_sparsity(model, calibrate_on_random_tokens(model, tokens=256), 0.4)
    sparse = follow(PlainStep, model, text)
    # An input that lies within rounding of its threshold may be skipped by one and not by the other.
    assert error(follow(CpuStep, model, text), sparse) < 0.02
    assert error(sparse, expected[HALF:]) > 0.1


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_weights(family, model, text, format, documented):
    assert documented[family]["int8, int4"] == "yes"
    model.output = Int8Output.pack(model.output.weight)
    for layer in sparse_layers(model).values():
        layer.weight = Format(format, 64 if format == "int4" else 0).pack(layer.weight.dequantize())
    plain = follow(PlainStep, model, text)
    assert error(follow(CpuStep, model, text), plain) < TOLERANCE_QUANTIZED[format] * plain.norm(dim=-1).max()


def test_gguf(family, theirs, text, tmp_path, documented):
    written = make_family(family, **LOST_IN_GGUF.get(family, {}))
    write_family_gguf(tmp_path / "model.gguf", written)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "ours", torch.float32)
    with torch.inference_mode():
        assert within(documented, family, "GGUF", error(load_model(tmp_path / "ours")(text), written(text).logits))


def test_cuda_step_is_that_of_the_table(family, documented):
    """Heads are of a size that the fused kernels take; what these don't compute, the stages refuse as well."""
    args = model_args(make_family(family).config.to_dict())
    ropes = tuple(Rope((0.5,) * 16, (max(rope.sizes),) * 16) for rope in args.ropes)
    shape = {"head_dim": 32, "n_heads": 2, "n_kv_heads": 2, "o_bias": False, "mlp_bias": False}
    model = sparsify(Transformer(replace(args, ropes=ropes, **shape)))
    assert documented[family]["CUDA"] == ("fused" if can_fuse(model) else "plain")
    if not can_fuse(model) and model.args.qk_norm != "head":
        with pytest.raises(ValueError, match="no kernels for"):
            stage_shape(model)
