"""teal-fast: fast single-stream decoding of open LLMs by training-free activation sparsity.

    from teal_fast import Request, load

    engine, tokenizer = load("demo")
    for token in engine.stream(Request(tokenizer.encode("Once upon a time"), sparsity=0.5, max_new_tokens=40)):
        print(token)

Names are imported when they are first used: importing a room of the package does not import the engine and Triton.
"""

import importlib

_HOME = {
    "Engine": "teal_fast.engine.engine",
    "Request": "teal_fast.engine.request",
    "Token": "teal_fast.engine.request",
    "load": "teal_fast.engine.load",
}
__all__ = ["Engine", "Request", "Token", "load"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
