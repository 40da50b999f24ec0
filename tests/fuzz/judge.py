"""What may come of a mutated source: a refusal in one line, the unmutated one's result, or transformers' own."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from teal_fast.tests.fuzz.doors import CLOSE, PROMPT, differing

LOADED = (  # transformers loads them on first use, which every child would do again
    transformers.LlamaForCausalLM,
    transformers.MistralForCausalLM,
    transformers.Qwen2ForCausalLM,
    transformers.Qwen3ForCausalLM,
    transformers.AutoTokenizer,
    transformers.LlamaTokenizer,
)
FLOATS = {"rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
IN_BF16 = ("hf-tiktoken", "judged")  # what we compute so, and transformers in fp32
TOKENIZERS = ("tokenizer", "special_tokens", "chat_template")  # files' names begin so


def same(found: dict[str, Any], sound: dict[str, Any], only: tuple[str, ...] = ("",)) -> bool:
    """Whether two answers are one, but for what rounding does to the log-probabilities; of `only` what begins so."""
    found, sound = ({k: value for k, value in answer.items() if k.startswith(only)} for answer in (found, sound))
    if found.keys() != sound.keys():
        return False
    equal = all(found[name] == sound[name] for name in sound if not name.startswith("tokens"))
    tokens = [name for name in sound if name.startswith("tokens")]
    return equal and not any(differing(found[name], sound[name], 1e-6) for name in tokens)


def _write_floats(path: Path) -> None:
    """Writes whole numbers as floats where transformers insists on them, which JSON does not tell apart."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for fields in (config, config.get("rope_scaling"), config.get("rope_parameters")):
        for name in FLOATS.intersection(fields or ()):
            if type(fields[name]) is int and fields[name] < 2**1000:
                fields[name] = float(fields[name])
    path.write_text(json.dumps(config), encoding="utf-8")


def differs_from_transformers(source: Path, file: str, found: dict[str, Any]) -> str:
    """Where the answer parts from transformers' on the same folder; raises what transformers raises.

    file: the mutated one, which tells whether to look at the tokenizer or at the model, and how transformers reads it.
    """
    if file.startswith(TOKENIZERS):
        ids = list(transformers.AutoTokenizer.from_pretrained(source)(PROMPT).input_ids)
        return "" if ids == found["ids"] else f"ids {found['ids'][:12]}, transformers' {ids[:12]}"
    is_gguf = file.endswith(".gguf")
    if not is_gguf:
        _write_floats(source / "config.json")
    options = {"gguf_file": file} if is_gguf else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
    ids, ours = found["ids"], found["tokens at 0.0"]
    with torch.no_grad():
        rows = model(torch.tensor([ids + [id for id, _ in ours]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    theirs = [(id, float(row[id])) for (id, _), row in zip(ours, rows, strict=True)]
    return differing(ours, theirs, CLOSE if source.name in IN_BF16 else 0.002)
