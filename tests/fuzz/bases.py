"""The sound models that cases start from: tiny, random, one of every kind that the door takes, and what judges them.

Their names begin with the kind: hf (Hugging Face folders), gguf (files) and own (our checkpoint folders).
"""

import base64
import json
import shutil
from pathlib import Path

import gguf
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

from teal_fast.calibration.make import Settings, make_calibration
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.tests.fuzz.mutate_gguf import rewrite
from teal_fast.tests.gguf_models import MERGES, SIZES, make_model, write_gguf
from teal_fast.tests.models import LLAMA3_ROPE
from teal_fast.weights.formats import Format

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'the in' }}{% endif %}"
)
TEXT = "the inn, thin: 12 them\n\n"  # of which the corpus is made
EVEN = {"intermediate_size": 128}  # int4 wants whole groups of outputs
NAMES = ("hf-llama", "hf-qwen2", "hf-mistral", "hf-tiktoken", "hf-qwen3")
NAMES += ("gguf-llama", "gguf-sentencepiece", "gguf-qwen2", "gguf-rope", "own-dense", "own-int8", "own-int4")


def make_bases(place: Path) -> None:
    """Fills the folder `place` with a folder for each of NAMES, and corpus.txt."""
    (place / "corpus.txt").write_text(TEXT * 60, encoding="utf-8")
    for name in NAMES:
        (place / name).mkdir()
    _write_ggufs(place)
    for name, tokenizer in (("gguf-llama", "bytes"), ("gguf-sentencepiece", "pieces")):
        convert_gguf(place / name / "model.gguf", place / tokenizer, torch.float32)
    _write_huggingface(place)
    _write_own(place)
    for tokenizer in ("bytes", "pieces"):
        shutil.rmtree(place / tokenizer)


def _write_ggufs(place: Path) -> None:
    write_gguf(place / "gguf-llama" / "model.gguf", make_model(), Type.Q8_0)
    write_gguf(place / "gguf-qwen2" / "model.gguf", make_model("qwen2"), Type.Q4_0)
    write_gguf(place / "gguf-rope" / "model.gguf", make_model("linear_rope"), Type.F16)
    path = place / "gguf-sentencepiece" / "model.gguf"
    write_gguf(path, make_model(), Type.F32)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256, gguf.TokenType.NORMAL]
    numbers = {"bos": 1, "eos": 2, "unknown": 0}
    changes: dict = {f"tokenizer.ggml.{name}_token_id": (Kind.UINT32, i) for name, i in numbers.items()}
    changes |= {"tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None}
    changes |= {"tokenizer.ggml.model": (Kind.STRING, "llama"), "tokenizer.chat_template": (Kind.STRING, CHATML)}
    changes |= {"tokenizer.ggml.tokens": (Kind.ARRAY, tokens), "tokenizer.ggml.token_type": (Kind.ARRAY, types)}
    rewrite(path, changes | {"tokenizer.ggml.scores": (Kind.ARRAY, [-float(i) for i in range(len(tokens))])})


def _write_huggingface(place: Path) -> None:
    ends = {"bos_token_id": None, "eos_token_id": 2}
    configs = {
        "hf-llama": transformers.LlamaConfig(**SIZES | EVEN, **ends, tie_word_embeddings=True),
        "hf-qwen2": transformers.Qwen2Config(**SIZES, **ends, tie_word_embeddings=False),
        "hf-mistral": transformers.MistralConfig(**SIZES, bos_token_id=1, eos_token_id=2, sliding_window=4),
        "hf-tiktoken": transformers.LlamaConfig(
            **SIZES | {"vocab_size": 256 + len(MERGES) + 256}, **ends, rope_parameters=LLAMA3_ROPE
        ),
        "hf-qwen3": transformers.Qwen3Config(**SIZES, **ends, head_dim=32),
    }
    for name, config in configs.items():
        folder = place / name
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size="100KB" if name == "hf-qwen2" else "1GB")
        _write_tokenizer(folder, place / ("pieces" if name == "hf-mistral" else "bytes"))
    folder = place / "hf-tiktoken"
    state = {key: tensor.bfloat16() for key, tensor in model_state(folder).items()}
    torch.save(state, folder / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    tokens = [bytes([byte]) for byte in range(256)] + [merge.replace(" ", "").encode() for merge in MERGES]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text("{}")


def model_state(folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face folder's parameters, read by transformers."""
    return dict(transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict())


def _write_tokenizer(folder: Path, source: Path) -> None:
    """The converted tokenizer's files, with a chat template in either of its places and a generation_config.json."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if folder.name == "hf-mistral":  # as folders of 2023 have them
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        )
        (folder / "added_tokens.json").write_text(json.dumps({"</s>": 2}))
    if folder.name == "hf-qwen2":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))


def _write_own(place: Path) -> None:
    dense = place / "own-dense"
    for name in ("own-dense", "own-int8", "own-int4"):
        (place / name).rmdir()
    convert_huggingface(place / "hf-llama", dense, torch.bfloat16)
    settings = Settings("fisher", (place / "corpus.txt",), 512, 256, 64)
    make_calibration(dense, dense / CALIBRATION, torch.device("cpu"), None, settings)
    for format in (Format("int8"), Format("int4", 64)):
        (place / f"own-{format.name}").mkdir()
        make_quantized(dense, place / f"own-{format.name}", format)
