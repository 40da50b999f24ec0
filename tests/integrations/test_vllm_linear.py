"""The plugin in vLLM's real engine on the CPU (make test-vllm): each engine is a process that several tests read."""

import importlib.util
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from teal_fast.calibration.make import Settings, make_calibration
from teal_fast.files.calibration import CALIBRATION, load_calibration
from teal_fast.files.checkpoint import CONFIG
from teal_fast.files.exported import TealConfig
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.store import new_folder
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.scripts.export_hf import export
from teal_fast.tests.integrations.vllm_folders import PROMPTS, TOKENS, Reference, ask_vllm, check_agree
from teal_fast.weights.formats import Format

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: it has an environment of its own (make test-vllm)", allow_module_level=True)

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from teal_fast.integrations import vllm_linear

EAGER = {"dtype": "float32", "enforce_eager": True}
EVERY = 2**31  # more tokens than any step has
RANDOM = 1e-5  # how far rounding moves inputs of the random model, whose weights are large


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)  # as vLLM's processes have it


def exported(folder: Path, out: Path, sparsity: float = 0.5, **settings) -> Path:
    calibration = load_calibration(folder)
    export(folder, out, TealConfig(sparsity, calibration.model["weights"], **settings), calibration)
    return out


def request(prompts, sparsity=None, together=False) -> dict:
    return {"prompts": prompts, "sparsity": sparsity, "together": together, "tokens": TOKENS}


@pytest.fixture(scope="module")
def prompts(demo) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def demo_hf(demo, tmp_path_factory) -> Path:
    return exported(demo, tmp_path_factory.mktemp("demo_hf") / "demo")


@pytest.fixture(scope="module")
def own_dense(demo_hf, prompts, tmp_path_factory) -> list[dict]:
    """vLLM's own answers: the same folder without a quantization_config."""
    folder = tmp_path_factory.mktemp("dense") / "demo"
    shutil.copytree(demo_hf, folder, ignore=shutil.ignore_patterns("teal_*"))
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    (done,) = ask_vllm({"model": str(folder), "options": EAGER, "requests": [request(prompts)]})
    return done["answers"]


@pytest.fixture(scope="module")
def turned(demo_hf, prompts) -> list[dict]:
    """One engine with the plugin: at sparsity 0, at 50 %, and two prompts at once at 50 %."""
    requests = [request(prompts, 0.0), request(prompts, 0.5), request(prompts[:2], 0.5, together=True)]
    return ask_vllm({"model": str(demo_hf), "options": EAGER, "requests": requests})


def test_at_sparsity_0_it_is_vllms_own_dense_model(own_dense, turned):
    for ours, theirs in zip(turned[0]["answers"], own_dense, strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)  # fp32, sums in another order


def test_at_half_it_is_the_reference_of_transformers(demo_hf, prompts, turned):
    model = Reference(demo_hf, max_m=1)
    check_agree(turned[1]["answers"], [model.answer(prompt) for prompt in prompts], least=80)


def test_every_linear_layer_takes_the_method_in_every_step(prompts, turned):
    layers = 30 * 4  # qkv, o, gate and up, down
    for run, skipped in ((turned[0], 0.0), (turned[1], 0.5)):
        (rank,) = run["ranks"]
        assert rank["layers"] == layers
        assert rank["sparse"] == len(prompts) * (TOKENS - 1) * layers  # the first token comes of the prompt
        assert rank["dense"] == sum(map(len, prompts)) * layers
        assert abs(rank["skipped"] / rank["weights"] - skipped) < 0.06


def test_two_requests_in_a_step_are_dense(own_dense, turned):
    """More than max_m tokens: but for the last step, when one request may have ended before the other."""
    (rank,) = turned[2]["ranks"]
    assert rank["sparse"] <= 4 * rank["layers"] and rank["dense"] >= 2 * (TOKENS - 4) * rank["layers"]
    for ours, theirs in zip(turned[2]["answers"], own_dense[:2], strict=True):
        assert ours["ids"][:-4] == theirs["ids"][:-4]


@pytest.fixture(scope="module")
def heads8(demo, tmp_path_factory) -> Path:
    """A random model whose heads divide among two ranks, as a checkpoint of ours: 4 layers, 8 heads, 2 of keys."""
    torch.manual_seed(0)
    source, folder = tmp_path_factory.mktemp("heads8"), tmp_path_factory.mktemp("heads8") / "heads8"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 49152}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, source / name)
    convert_huggingface(source, folder, None)
    settings = Settings(tokens=2000, pass_tokens=1000, context=128)
    make_calibration(folder, folder / CALIBRATION, torch.device("cpu"), None, settings)
    return folder


@pytest.fixture(scope="module")
def ranks(heads8, prompts, tmp_path_factory) -> tuple[Path, dict, dict]:
    """Folder, one rank's answers from torch.compile's graph, and two ranks'."""
    folder = exported(heads8, tmp_path_factory.mktemp("ranks") / "heads8")
    task = {"model": str(folder), "requests": [request(prompts, 0.5)]}
    one = ask_vllm(task | {"options": {"dtype": "float32", "enforce_eager": False}})
    two = ask_vllm(task | {"options": EAGER | {"tensor_parallel_size": 2}})
    return folder, one[0], two[0]


def test_two_ranks_give_what_one_gives_and_a_compiled_graph_what_the_reference_gives(ranks, prompts):
    folder, one, two = ranks
    model = Reference(folder, max_m=1, close=RANDOM)
    expected = [model.answer(prompt) for prompt in prompts]
    for run in (one, two):
        check_agree(run["answers"], expected, least=20)


def test_each_of_two_ranks_has_its_part_of_the_thresholds(ranks, prompts):
    _, one, two = ranks
    (alone,), both = one["ranks"], two["ranks"]
    assert [rank["layers"] for rank in both] == [alone["layers"]] * 2 == [16, 16]
    assert [rank["sparse"] for rank in both] == [alone["sparse"]] * 2 == [len(prompts) * (TOKENS - 1) * 16] * 2
    assert sum(rank["weights"] for rank in both) == alone["weights"]
    assert sum(rank["skipped"] for rank in both) == pytest.approx(alone["skipped"], rel=0.005)


def test_mask_mode_masks_prompts_too(heads8, prompts, tmp_path):
    folder = exported(heads8, tmp_path / "mask", mode="mask")
    (done,) = ask_vllm({"model": str(folder), "options": EAGER, "requests": [request(prompts, 0.5, together=True)]})
    model = Reference(folder, EVERY)
    firsts = [model.answer(prompt).logprobs[0] for prompt in prompts]  # later tokens part: see Reference
    found = [answer["logprobs"][0] for answer in done["answers"]]
    assert sum(abs(ours - theirs) < 1e-3 for ours, theirs in zip(found, firsts, strict=True)) > len(prompts) // 2
    assert done["ranks"][0]["dense"] == 0


def test_what_is_not_exported_or_has_another_quantization_is_refused_in_a_sentence(heads8, tmp_path):
    with new_folder(tmp_path / "int8") as folder:
        make_quantized(heads8, folder, Format("int8"))
    good, other = exported(heads8, tmp_path / "good"), exported(heads8, tmp_path / "other", 0.3)
    shutil.copyfile(other / "teal_thresholds.safetensors", good / "teal_thresholds.safetensors")
    llama = {"architectures": ["LlamaForCausalLM"]}
    tried = {
        "int8, which vLLM does not read: serve what": {"model": str(tmp_path / "int8"), "hf_overrides": llama},
        "teal-fast's own layout: serve what": {"model": str(heads8), "hf_overrides": llama},
        "sparsity is '0.3', expected '0.5'": {"model": str(good)},
        "goes with no other": {
            "model": str(other),
            "quantization_config": {"linear": {"weight": "fp8_per_channel_static"}},
        },
    }
    said = ask_vllm({"configs": [{"quantization": "teal"} | options for options in tried.values()]})
    for expected, found in zip(tried, said, strict=True):
        assert expected in found, found


def test_registration_is_idempotent_and_a_taken_name_is_refused(monkeypatch):
    vllm_linear.register()
    vllm_linear.register()
    assert get_quantization_config("teal") is vllm_linear.TealQuantization
    assert QUANTIZATION_METHODS.count("teal") == 1

    class Other(vllm_linear.TealQuantization):
        pass

    vllm_linear.register_quantization_config("teal")(Other)  # which vLLM takes without a word
    try:
        with pytest.raises(RuntimeError, match=r"the quantization name teal is taken by .*Other"):
            vllm_linear.register()
    finally:
        vllm_linear.register_quantization_config("teal")(vllm_linear.TealQuantization)


@pytest.mark.parametrize("quantization", ["teal", None])
def test_a_model_without_a_sparse_layer_is_refused_after_loading(quantization):
    load = vllm_linear.check_loaded(lambda loader, vllm_config, model_config: nn.Linear(2, 2))
    model_config = types.SimpleNamespace(quantization=quantization, model="some-folder")
    if quantization is None:
        assert isinstance(load(None, None, model_config), nn.Linear)
    else:
        with pytest.raises(RuntimeError, match="no layer of some-folder took the quantization teal"):
            load(None, None, model_config)
