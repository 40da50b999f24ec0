"""Models with a vision tower: the text alone is served, from folders as transformers writes them and older ones."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.tests.family_models import GEMMA, LLAMA4, SIZES, write_family

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
CASES = {
    "mistral3": ({"model_type": "mistral", "head_dim": 16, "sliding_window": None}, {"model_type": "pixtral"}),
    "ministral3": ({"model_type": "ministral3", "head_dim": 16, "rope_parameters": LLAMA4}, {"model_type": "pixtral"}),
    "gemma3": (GEMMA | {"model_type": "gemma3_text"}, {"model_type": "siglip_vision_model"}),
}


@pytest.fixture(scope="module", params=CASES)
def theirs(request):
    text, vision = CASES[request.param]
    kind = transformers.Gemma3Config if request.param == "gemma3" else transformers.Mistral3Config
    config = kind(
        text_config=SIZES | text, vision_config=VISION | vision, tie_word_embeddings=request.param == "gemma3"
    )
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return write_family(theirs, tmp_path_factory.mktemp("hf") / "hf")


@torch.inference_mode()
def same(theirs, folder) -> bool:
    tokens = torch.randint(200, (1, 60), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(load_model(folder)(tokens), expected, rtol=0, atol=1e-4)
    return expected.std() > 0.1


def test_text_is_that_of_transformers(theirs, folder, tmp_path, capsys):
    convert_huggingface(folder, tmp_path / "out", None)
    assert same(theirs, tmp_path / "out")
    assert "its vision tower is left out, text alone is served" in capsys.readouterr().err


def test_a_mistral_that_splits_as_llama_3_is_named(theirs, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "hf")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|[^\p{N}]"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for source in (folder, tmp_path / "hf"):
        convert_huggingface(source, tmp_path / source.parent.name, None)
        warned = "splits text as Llama 3's does" in capsys.readouterr().err
        assert warned == (source != folder and theirs.config.model_type == "mistral3")


def test_names_and_settings_of_other_versions(theirs, folder, tmp_path):
    """Weights named as older uploads have them or as newer ones do, and `dtype`, `rope_scaling` by their old names."""
    tensors = load_file(folder / "model.safetensors")
    old = any(name.startswith("language_model.model.") for name in tensors)
    swaps = [("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")]

    def other(name: str) -> str:
        for one, two in swaps:
            before, after = (one, two) if old else (two, one)
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name

    (tmp_path / "hf").mkdir()
    save_file({other(name): tensor for name, tensor in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    if "full_attention" not in text["rope_parameters"]:
        text["rope_scaling"] = text.pop("rope_parameters")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    convert_huggingface(tmp_path / "hf", tmp_path / "out", None)
    assert same(theirs, tmp_path / "out")
