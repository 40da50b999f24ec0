"""Serves a model over HTTP: OpenAI's and Anthropic's APIs, a chat page, and sparsity chosen per request.

python serve.py --checkpoint demo --sparsity 0.5
"""

from teal_fast.cli import run


def main() -> None:
    raise ValueError("to come")


if __name__ == "__main__":
    run(main)
