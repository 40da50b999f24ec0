"""GPTQ through whole models of families whose halves of a block end in a norm, or begin without one."""

import pytest
import torch

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.quantization.gptq_quantizer import GptqQuantizer
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.family_models import make_family, write_family
from teal_fast.weights.formats import Format

INT4 = Format("int4", 64)


@pytest.mark.parametrize("family", ["olmo 2", "gemma 2"])
@torch.no_grad()
def test_predictions_change_less_than_by_rounding_to_nearest(family, tmp_path):
    convert_huggingface(write_family(make_family(family), tmp_path / "hf"), tmp_path / "ours", None)
    dense = load_model(tmp_path / "ours")
    texts = torch.randint(128, (6, 1, 120), generator=torch.Generator().manual_seed(5))
    expected = [dense(text).log_softmax(-1) for text in texts]
    calibration = calibrate_on_random_tokens(dense, tokens=256)
    quantizer = GptqQuantizer(tmp_path / "ours", INT4, calibration, texts[1:, 0].tolist(), torch.device("cpu"))
    changes = {}
    for way in ("gptq", "nearest"):
        model = load_model(tmp_path / "ours")
        for name, layer in sparse_layers(model).items():
            weight = layer.weight.dequantize()
            layer.weight = quantizer(name, weight) if way == "gptq" else INT4.pack(weight)
        divergences = [
            torch.nn.functional.kl_div(model(text).log_softmax(-1), target, log_target=True, reduction="sum").item()
            for text, target in zip(texts, expected, strict=True)
        ]
        changes[way] = divergences[0], sum(divergences[1:])  # of a text that was not rounded by, and of those that were
    assert all(gptq < 0.5 * nearest for gptq, nearest in zip(*changes.values(), strict=True)), changes
