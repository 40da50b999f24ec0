"""Whether our tokenizer gives the ids that llama.cpp gives on the very same GGUF file; weights are not read.

    python -m teal_fast.benchmarks.agree_tokens --gguf model.gguf --text data/evaluation page.html

Whole documents are compared, and short texts that are easily split otherwise: runs of spaces, tabs and empty lines,
HTML, code, numbers, other scripts and marks. Ends with an error that shows where the first one parts. docs/usage.md
says where ours differ on purpose; the short texts hold none of that.
"""

import argparse
import ctypes
import json
import tempfile
from itertools import zip_longest
from pathlib import Path

from teal_fast.benchmarks.peer_llama import load, native
from teal_fast.benchmarks.peers import check_installed
from teal_fast.calibration.corpus import read_corpus
from teal_fast.cli import run
from teal_fast.evaluation.perplexity import DEFAULT_TEXT
from teal_fast.files.gguf_reader import open_gguf
from teal_fast.files.gguf_tokenizer import write_tokenizer
from teal_fast.files.tokenizer import Tokenizer

SHOWN = 8  # ids from the first that differs on
TEXTS = (
    *("\n".join(" " * width + mark for mark in "a{<") for width in (1, 2, 4, 31, 32, 33, 40, 64, 100)),
    *("\t" * width + "x" + "\n" * width + "y" for width in (1, 2, 30, 31, 32, 33, 70)),
    "def f(x):\n    if x:\n\treturn  [x ** 2 for _ in range(10_000)]  # 3.14e-10\n",
    "<!DOCTYPE html>\n<html>\n  <body class='a'>\n    <h1>A &amp; B</h1><p>x<br/><b>y</b> <i>z</i>\n<table><tr><td>1",
    "<div><ul>\n<li>one</li>\n\n<li> two </li></ul><code>a < b > c</code><sup>2</sup></div></body></html>",
    "It's we'll I'VE don’t “quoted” — dash… naïve café ﬁ ½ ² €100,000.50 1234567890 v1.2.3-rc4",  # noqa: RUF001
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا بالعالم नमस्ते दुनिया สวัสดี ελληνικά עברית",  # noqa: RUF001
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪 \u200b\ufeff\u00a0x \u2028y \x07\x7f � ▁ ▁▁ a▁b Ġ",
    " leading", "trailing ", "  ", "\n", " \n \n", "a\r\nb\r\n\r\n", "<", "<<<>>>", "<0x0A> <0xFF>", "[1]", "",
)  # fmt: skip


def their_ids(vocabulary: ctypes.c_void_p, text: str) -> list[int]:
    """llama.cpp's ids of a prompt, with BOS where the file asks for it and with control tokens."""
    data = text.encode()
    ids = (ctypes.c_int32 * (len(data) + 2))()
    count = native().llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
    assert count >= 0, "no text has more tokens than bytes"
    return ids[:count]


def parting(ours: list[int], theirs: list[int]) -> int | None:
    """The index of the first id that differs; None where none does."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((i for i, (our, their) in pairs if our != their), None)


def compare(gguf: Path, texts: list[str]) -> list[dict]:
    """A record for each text of which ids differ. Raises ValueError where llama.cpp cannot load the file."""
    if not (model := load(gguf, vocab_only=True)):
        raise ValueError(f"llama.cpp cannot load {gguf}: take another file")
    vocabulary = native().llama_model_get_vocab(model)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(open_gguf(gguf), Path(folder))
        tokenizer = Tokenizer.load(Path(folder))
    parted = []
    for text in texts:
        ours, theirs = tokenizer.encode(text), their_ids(vocabulary, text)
        if (at := parting(ours, theirs)) is not None:
            before = tokenizer.decode(ours[:at], control=True)
            found = {"after": before[-40:], "ours": ours[at : at + SHOWN], "llama_cpp": theirs[at : at + SHOWN]}
            parted.append(found)
    return parted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the file")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="files or folders of text")
    options = parser.parse_args()
    check_installed([("llama.cpp", "")])
    texts = [*TEXTS, *read_corpus(options.text)]
    parted = compare(options.gguf, texts)
    print(f"{options.gguf.name}: {len(texts) - len(parted)} of {len(texts)} texts have llama.cpp's ids")
    print(json.dumps(parted))
    if parted:
        raise ValueError(f"{len(parted)} texts have other ids than llama.cpp's, the first one {parted[0]}")


if __name__ == "__main__":
    run(main)
