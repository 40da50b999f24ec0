"""Exported folders in transformers: against hooks over the dense model, and against our own engine."""

import copy
import importlib
import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from teal_fast.engine.steps import PlainStep
from teal_fast.files.calibration import CALIBRATION, load_calibration, set_sparsity
from teal_fast.files.checkpoint import WEIGHTS, fingerprint, read_config
from teal_fast.files.exported import INDEX, METHOD, TealConfig, open_exported
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.integrations import transformers as adapter
from teal_fast.scripts.export_hf import export
from teal_fast.sparse_model import Phase, SparseLinear, watch_inputs
from teal_fast.tests.exported import make_up_calibration, teal_config
from teal_fast.tests.family_models import make_family, write_family
from teal_fast.tests.models import write_tokenizer

OURS = {  # of a layer's modules
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.wqkv"),
    "self_attn.o_proj": "attention.wo",
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "feed_forward.w13"),
    "mlp.down_proj": "feed_forward.w2",
}
PROMPTS = ("The capital of France is", "Call me Ishmael. Some years ago", "def fibonacci(n):\n")
NEW_TOKENS = 24
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def theirs():
    return make_family("llama")


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The checkpoint of a tiny Llama, and a made-up calibration."""
    folder = tmp_path_factory.mktemp("llama")
    convert_huggingface(write_family(theirs, folder / "hf"), folder / "ours", None)
    return folder / "ours", make_up_calibration(read_config(folder / "ours"), fingerprint(folder / "ours")["weights"])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "exported"


@pytest.fixture
def make(ours, folder):
    """Exports the tiny Llama with options of the block, and loads it."""

    def make(**options):
        export(ours[0], folder, teal_config(ours[1], **options), ours[1])
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    return make


def by_hooks(model: nn.Module, calibration, sparsity: float) -> nn.Module:
    """A copy of the dense model whose linear layers get what exceeds the thresholds, in every call."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+_proj)", name):
            threshold = calibration.threshold(f"layers.{found[1]}.{OURS[found[2]]}", sparsity)
            module.register_forward_pre_hook(
                lambda _, x, threshold=threshold: torch.where(x[0].abs() > threshold, x[0], 0)
            )
    return model


@torch.inference_mode()
def logits(model: nn.Module, *pieces: torch.Tensor) -> torch.Tensor:
    """Those of a text computed in pieces [B, T], of its last one; a tuple of two models computes one piece each."""
    models = model if isinstance(model, tuple) else (model,) * len(pieces)
    cache = None
    for each, piece in zip(models, pieces, strict=True):
        done = each(piece, past_key_values=cache, use_cache=True)
        cache = done.past_key_values
    return done.logits


def test_few_tokens_are_sparse_and_more_are_dense(make, theirs, ours):
    model, masked = make(max_m=2), by_hooks(theirs, ours[1], 0.5)
    assert torch.equal(logits(model, IDS), logits(theirs, IDS))
    assert torch.equal(logits(model, IDS[:, :5], IDS[:, 5:]), logits((theirs, masked), IDS[:, :5], IDS[:, 5:]))
    assert torch.equal(logits(model, IDS[:, :2], IDS[:, 2:4]), logits(theirs, IDS[:, :2], IDS[:, 2:4]))  # 2 x 2 tokens
    assert not torch.equal(logits(masked, IDS), logits(theirs, IDS))


def test_in_mode_mask_all_are_sparse(make, theirs, ours):
    assert torch.equal(logits(make(mode="mask"), IDS), logits(by_hooks(theirs, ours[1], 0.5), IDS))


def test_the_dial(make, theirs, ours):
    model = make(mode="mask")
    adapter.set_sparsity(model, 0.3)
    assert torch.equal(logits(model, IDS), logits(by_hooks(theirs, ours[1], 0.3), IDS))
    adapter.set_sparsity(model, 0)
    assert torch.equal(logits(model, IDS), logits(theirs, IDS))
    for wrong in (1.5, -0.1, float("nan"), "0.4"):
        with pytest.raises(ValueError, match=r"sparsity is .*, expected a number from 0 to 1"):
            adapter.set_sparsity(model, wrong)
    with pytest.raises(ValueError, match="LlamaForCausalLM was not loaded from an exported folder"):
        adapter.set_sparsity(theirs, 0.4)


def test_what_is_skipped_is_counted(make):
    model = make()
    with adapter.count_skipped(model) as counted:
        logits(model, IDS)
        assert (counted.all, counted.sparsity) == (0, 0)
        logits(model, IDS[:1, :1])
    layers = [module for module in model.modules() if isinstance(module, adapter.TealLinear)]
    assert len(layers) == len(OURS) * 4
    assert counted.all == sum(layer.weight.numel() for layer in layers) and 0 < counted.skipped < counted.all
    adapter.set_sparsity(model, 0)
    with adapter.count_skipped(model) as dense:
        logits(model, IDS[:1, :1])
    assert (dense.skipped, dense.all) == (0, counted.all)


def test_nan_stays_and_thresholds_stay_fp32():
    layer = adapter.TealLinear(nn.Linear(3, 2), TealConfig(0.5, "0123456789abcdef"))
    layer.threshold.copy_(torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    assert layer(torch.tensor([[1 / 3, 0.0, torch.nan]])).isnan().all()
    assert torch.equal(layer(torch.full((1, 3), 1 / 3)), layer.bias[None])
    assert layer.to(torch.bfloat16).float().threshold.tolist() == torch.tensor([1 / 3] * 3).tolist()


def test_saved_and_loaded_again(make, theirs, ours, tmp_path):
    model = make(mode="mask", max_m=3)
    adapter.set_sparsity(model, 0.3)
    model.save_pretrained(tmp_path / "saved")
    config = open_exported(tmp_path / "saved").config
    assert (config.sparsity, config.mode, config.max_m) == (0.3, "mask", 3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    write_tokenizer(tmp_path / "saved")
    convert_huggingface(tmp_path / "saved", tmp_path / "back", None)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (ours[0] / WEIGHTS).read_bytes()
    assert load_calibration(tmp_path / "back", tmp_path / "back" / CALIBRATION).origin == ours[1].origin


@torch.inference_mode()
def test_what_is_saved_names_its_weights(make, tmp_path):
    """Thresholds are no weights, in one file of them and in several, also over what was saved there before."""
    model, saved = make(), tmp_path / "saved"
    for size in ("5GB", "100KB", "5GB"):
        for old in saved.glob("model*.safetensors"):
            old.unlink()
        model.save_pretrained(saved, max_shard_size=size)
        files = {path.name for path in saved.glob("model*.safetensors")}
        assert (len(files) > 1) == (size == "100KB")
        index = json.loads((saved / INDEX).read_text())["weight_map"]
        assert set(index.values()) == files and index.keys() == model.state_dict().keys()
        again = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
        assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_copy_saves_itself(make, tmp_path):
    model = make()
    other = copy.deepcopy(model)
    other.model.norm.weight.data.zero_()
    other.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not saved.model.norm.weight.any() and model.model.norm.weight.all()
    with pytest.raises(ValueError, match=r"use model\.push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def test_programs_that_do_not_know_the_method_see_a_dense_model(make, folder, theirs, monkeypatch):
    make(mode="mask")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    dense = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(logits(dense, IDS), logits(theirs, IDS))


def test_importing_again_is_no_error_but_another_of_the_name_is(monkeypatch):
    adapter.register()
    importlib.reload(adapter)
    assert AUTO_QUANTIZER_MAPPING[METHOD] is adapter.TealQuantizer
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, nn.Linear)
    with pytest.raises(RuntimeError, match=r"transformers knows 'teal' already, as torch\.nn"):
        adapter.register()


def test_a_damaged_folder_is_one_line(make, folder):
    make()
    (folder / "teal_calibration.safetensors").unlink()
    with pytest.raises(OSError, match=r"does not appear to have a file named teal_calibration\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def test_the_demo_computes_what_our_steps_compute(demo, tmp_path, set_threads):
    """Dense prompts, then 24 tokens at 50 % in fp32, greedy, of both the same: logits agree while masks do.

    Where rounding lets one channel pass on one side alone, its texts part, at any margin: then the rest says nothing.
    """
    set_threads(1)
    calibration, tokenizer = load_calibration(demo), Tokenizer.load(demo)
    export(demo, tmp_path / "out", teal_config(calibration), calibration)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(demo, dtype=torch.float32)
    set_sparsity(ours, calibration, 0.5)
    masks, compared = {}, 0
    for name, layer in open_exported(tmp_path / "out").layers.items():
        module = theirs.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, x, layer=layer: masks.update({layer: module.skipped(x[0][0, -1])})
        )

    def same(name: str, layer: SparseLinear, x: torch.Tensor, phase: Phase) -> None:
        agreed.append(torch.equal(layer.dropped(x[0, -1]), masks[name]))

    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        cache = ours.new_cache(1, ids.shape[1] + NEW_TOKENS)
        step, done = PlainStep(ours, cache), theirs(ids, use_cache=True)
        torch.testing.assert_close(ours(ids, None, cache)[0, -1], done.logits[0, -1], rtol=0, atol=1e-3)
        for i in range(NEW_TOKENS):
            token, agreed = done.logits[0, -1].argmax().view(1, 1), []
            done = theirs(token, past_key_values=done.past_key_values, use_cache=True)
            with watch_inputs(ours, same):
                found = step(token, torch.tensor([ids.shape[1] + i])).flatten()
            if not all(agreed):
                break
            torch.testing.assert_close(found, done.logits[0, -1], rtol=0, atol=1e-3)
            compared += 1
    assert compared > NEW_TOKENS
    assert 0.4 < torch.cat(list(masks.values())).float().mean() < 0.6
