"""Where an answer ends: the ids that the checkpoint's files declare, and well-known ends that they forget.

A chat model may end a turn otherwise than a text, and files that name but one of both are common. Names are those of
llama.cpp (src/llama-vocab.cpp, 2026), without the families that are not read here. Unlike there, a token of such a name
is an end only where it is a control token: Gemma's vocabulary has `</s>` as an HTML tag.
"""

import re
from typing import Any

from teal_fast.files.store import short
from teal_fast.files.vocabulary import Vocabulary

ENDS = {
    *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]"),  # of a text
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"),  # of a turn
    *("<EOT>", "▁<EOT>", "[EOT]", "<\uff5cend▁of▁sentence\uff5c>"),  # CodeLlama's, Kimi's, DeepSeek's
}
# Of a piece of code that fills a gap. Qwen2.5's own files do not call them special: there their form has to do, as it
# does for llama.cpp's converter, which makes control tokens of them.
CODE_ENDS = {
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}


def stop_ids(vocabulary: Vocabulary, declared: dict[str, Any], template: str | None) -> frozenset[int]:
    """The ids that end an answer: the union of what is declared and what the vocabulary holds of the well-known ends.

    declared: by where it stands, an id, a token's text, an object with its content, or a list of those. What is none of
    them, or names no token, is passed over as long as another end is known, else it raises ValueError. A control token
    is one that its file calls special, or an added one that the chat template writes, as in transformers 5.23.
    """
    known = {*vocabulary.ids.values(), *vocabulary.pieces}  # tiktoken's ranks are only among the pieces
    ends, wrong = set(), None
    for place, value in declared.items():
        for entry in value if isinstance(value, list) else [value]:
            if (token := _id(entry, vocabulary.ids)) in known:
                ends.add(token)
            elif entry is not None:
                wrong = wrong or f"{place} is {short(value)}"
    for token, added in vocabulary.added.items():
        name = added.content
        control = added.special or name in (template or "")
        if (name in ENDS and control) or (name in CODE_ENDS and (control or name.startswith("<|"))):
            ends.add(token)
    if wrong and not ends:
        raise ValueError(f"{wrong}, expected an id, a token of the vocabulary or a list of them: correct it")
    return frozenset(ends)


def _id(entry: Any, ids: dict[str, int]) -> int | None:
    entry = entry.get("content", entry.get("id")) if isinstance(entry, dict) else entry
    if isinstance(entry, str):
        return int(entry) if re.fullmatch("[0-9]{1,9}", entry) else ids.get(entry)
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        return None
    return int(entry) if entry >= 0 and (isinstance(entry, int) or entry.is_integer()) else None
