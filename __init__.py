"""teal-fast: fast single-stream decoding of open LLMs by training-free activation sparsity.

from teal_fast import Request, load

engine, tokenizer = load("demo")
for token in engine.stream(Request(tokenizer.encode("Once upon a time"), sparsity=0.5, max_new_tokens=40)):
    print(token)
"""

from teal_fast.engine.engine import Engine
from teal_fast.engine.load import load
from teal_fast.engine.request import Request, Token

__all__ = ["Engine", "Request", "Token", "load"]
