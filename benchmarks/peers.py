"""Other programs to time in the same run. Each is optional: nothing of them is imported unless it is asked for."""

import importlib
from collections.abc import Iterator

from teal_fast.benchmarks import peer_gpt_fast, peer_llama, peer_transformers
from teal_fast.benchmarks.peer_llama import FILE
from teal_fast.benchmarks.rows import Row, Task

FORMATS = {  # the first is meant when none is named
    "llama.cpp": ("bf16", "q8_0", "q4_0", FILE),
    "transformers": ("",),
    "gpt-fast": ("bf16", "int8", "int4"),
}
MODULES = {
    "llama.cpp": ("llama_cpp",),
    "transformers": ("transformers", "accelerate"),
    "gpt-fast": ("torchao._models.llama.model",),
}
INSTALL = {
    "llama.cpp": "pip install --no-binary llama-cpp-python llama-cpp-python",
    "transformers": "pip install transformers accelerate",
    "gpt-fast": "pip install torchao==0.15.0",  # the last that ships it
}

Peer = tuple[str, str]  # a program, and the format in which it has the weights ("": the model's own; or FILE)


def parse_peers(words: list[str]) -> list[Peer]:
    """The peers that words name, apart by commas or spaces: programs, each followed by its formats if need be."""
    groups: list[list[str]] = []
    for word in " ".join(words).replace(",", " ").split():
        if word in FORMATS:
            groups.append([word])
        elif groups and word in FORMATS[groups[-1][0]]:
            groups[-1].append(word)
        else:
            known = [f"{program} {format}".strip() for program, formats in FORMATS.items() for format in formats]
            raise ValueError(f"--peers got {word!r}, expected some of {', '.join(known)}")
    named = [(program, format) for program, *formats in groups for format in formats or FORMATS[program][:1]]
    return list(dict.fromkeys(named))


def check_installed(peers: list[Peer]) -> None:
    """Raises ValueError saying what to install when a peer's packages are not there."""
    for program in dict.fromkeys(program for program, _ in peers):
        for module in MODULES[program]:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"--peers {program} needs {module}: {INSTALL[program]}") from error


def peer_rows(peers: list[Peer], task: Task) -> Iterator[Row]:
    """Rows that are ready to decode, one a peer and prompt."""
    for program, format in peers:
        if program == "llama.cpp":
            yield from peer_llama.rows(task, format)
        elif program == "gpt-fast":
            yield from peer_gpt_fast.rows(task, format)
        else:
            yield from peer_transformers.rows(task)
