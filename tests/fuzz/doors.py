"""What a case does with its mutated source: through the library's door, or through one of the commands.

The door converts what is foreign, opens the checkpoint and answers a prompt, by the compiled and by the plain step.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from teal_fast import calibrate, eval, generate, quantize
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.session import encode_prompt
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.engine.text import stream_text
from teal_fast.files.calibration import CALIBRATION, load_calibration
from teal_fast.files.checkpoint import find_checkpoint
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.scripts import convert_gguf as gguf_command
from teal_fast.scripts import convert_hf_checkpoint as hf_command

PROMPT, NEW_TOKENS = "the inn 12\n them", 3
CLOSE = 0.05  # between two steps' log-probabilities in bf16, of logits of about 1


def convert(source: Path, out: Path) -> Path:
    """The checkpoint folder that the source becomes, or is."""
    if source.name.startswith("gguf"):
        convert_gguf(source / "model.gguf", out, torch.float32)
    elif source.name.startswith("hf"):
        convert_huggingface(source, out, None)
    else:
        return source
    return out


def answer(source: Path, out: Path, opened: Callable[[], None]) -> dict[str, Any]:
    """All that a user gets of a model, as JSON: ids, tokens, log-probabilities, text, and whether two steps agree.

    `opened` is called when the checkpoint is there and open: what is refused from there on refuses a prompt only.
    """
    folder = find_checkpoint(str(convert(source, out)))
    tokenizer = Tokenizer.load(folder)
    calibration = load_calibration(folder) if (folder / CALIBRATION).exists() else None
    model = load_model(folder)
    opened()
    found: dict[str, Any] = {"ids": tokenizer.encode(PROMPT), "chat": chat_ids(tokenizer)}
    said = found["chat"][:32] if isinstance(found["chat"], list) else []
    said = said or found["ids"]
    engines = [Engine(model, calibration, tokenizer.eos_ids, 64, step) for step in (fast_step, PlainStep)]
    for sparsity in (0.0, 0.5) if calibration else (0.0,):
        for engine in engines:
            engine.forget()  # a prefix that the cache holds rounds otherwise than one that is read
        request = Request(found["ids"], Sampling(temperature=0), sparsity, NEW_TOKENS, stop=(), logprobs=True)
        fast, plain = ([(t.id, t.logprob) for t in engine.stream(request)] for engine in engines)
        # A tiny model feels it when rounding puts one entry on the other side of its threshold.
        if difference := differing(fast, plain, CLOSE * (10 if sparsity else 1)):
            found["steps differ"] = f"at sparsity {sparsity}: {difference}"
        found[f"tokens at {sparsity}"] = fast
        request = Request(
            found["chat"] if isinstance(found["chat"], list) else found["ids"],
            Sampling(temperature=0),
            sparsity,
            NEW_TOKENS,
        )
        found[f"text at {sparsity}"] = "".join(stream_text(engines[0].stream(request), tokenizer, said))
    return found | {"ends": sorted(tokenizer.eos_ids)}


def chat_ids(tokenizer: Tokenizer) -> list[int] | str | None:
    """The prompt's ids in a chat. A template may refuse one, by a ValueError, and the checkpoint serve all the same."""
    if tokenizer.chat_template is None:
        return None
    try:
        return encode_prompt(tokenizer, PROMPT, [{"role": "system", "content": "a"}])
    except ValueError as error:
        return "refused: " + str(error)


def differing(ours: list[tuple[int, float]], theirs: list[tuple[int, float]], close: float = CLOSE) -> str:
    """Where two greedy answers part by more than rounding can do; nothing where they do not."""
    for (id, logprob), (other, theirs_logprob) in zip(ours, theirs, strict=True):
        if not abs(logprob - theirs_logprob) <= close:  # NaN differs from everything
            return f"token {id} at {logprob:.4f}, token {other} at {theirs_logprob:.4f}"
        if id != other:  # two that are equally likely: what follows is of two texts
            return ""
    return ""


def command(rng: random.Random, source: Path, out: Path, corpus: Path) -> tuple[Callable[[], None], list[str]]:
    """A command's `main` and its arguments, drawn for this kind of source."""
    text = ["--corpus", corpus, "--tokens", 256]
    if source.name.startswith("gguf"):
        main, arguments = gguf_command.main, [source / "model.gguf", "--out", out]
    elif source.name.startswith("hf"):
        main, arguments = hf_command.main, [source, "--out", out]
    else:
        generated = [*("--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", NEW_TOKENS), "--no_prepare"]
        scored = ["--text", corpus, "--context", 64, "--windows", 2, "--no_prepare", "--out", out]
        group = ["--group", 64]
        choices = [
            (generate.main, [*generated, "--sparsity", 0.5]),
            (generate.main, [*generated, "--chat", "--json"]),
            (generate.main, [*generated, "--eager", "--sparsity", 0.5, "--top_p", 0.5]),
            (calibrate.main, [*text, "--context", 64, "--method", "uniform", "--out", out]),
            (calibrate.main, [*text, "--context", 64, "--out", out]),
            (quantize.main, ["--mode", "int8", "--out", out]),
            (quantize.main, ["--mode", "int4", *group, "--calibrated", *text, "--no_prepare", "--out", out]),
            (quantize.main, ["--mode", "int4", *group, "--tune", *text, "--no_prepare", "--out", out]),
            (eval.main, [*scored, "--sparsity", 0, 0.5]),
        ]
        main, arguments = rng.choice(choices)
        arguments = ["--checkpoint", source, *arguments]
    return main, [str(argument) for argument in arguments]


def run_door(source: Path, out: Path, result: Path) -> None:
    """Writes the answer to `result`, which is empty when only the answer is refused."""
    result.write_text(json.dumps(answer(source, out, result.touch)))


def run_command(main: Callable[[], None], arguments: list[str]) -> None:
    sys.argv = ["command", *arguments]
    main()
