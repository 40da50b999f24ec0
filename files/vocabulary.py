"""What a tokenizer's file says by itself, and the tokens that the files beside it add or name."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken

from teal_fast.files.decoding import First, unchanged
from teal_fast.files.store import one_line, read_json

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word")


class Encode(Protocol):
    """control: whether control tokens that are written in the text become their ids, or are text as any other.

    start: whether the text begins here, or goes on after a control token, where some vocabularies put no space first.
    """

    def __call__(self, text: str, control: bool = True, start: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """How text becomes ids and ids become text.

    encode: a text's ids, nothing added. pieces: what an id adds to the text, nothing where it is absent. added: the
    tokens that are found in a text before it is split, control tokens among them. prefix: the ids that go before a
    prompt, None for BOS.
    """

    encode: Encode
    ids: dict[str, int]
    pieces: dict[int, bytes]
    added: dict[int, AddedToken] = field(default_factory=dict)
    first: First = unchanged
    bos: str | None = None
    eos: str | None = None
    prefix: list[int] | None = None


def is_control(token: AddedToken) -> bool:
    """Whether an added token steers the model and is no text.

    It is called special, or has the form of a control token: DeepSeek's and Qwen's files do not call all of theirs
    special, and llama.cpp's converter goes by the same form. Other added tokens, as `<think>` and `<tool_call>`, are
    parsed wherever they stand, as they are by llama.cpp without parse_special (both as in llama-cpp-python 0.3.36).
    """
    return token.special or re.fullmatch(r"<\|.*\|>|<\uff5c.*\uff5c>", token.content, re.DOTALL) is not None


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json as one.

    The map is the older place: it counts where tokenizer_config.json has no added_tokens_decoder, and for what that
    does not name (transformers 5.23).
    """
    config, named = read_optional(folder / "tokenizer_config.json"), read_optional(folder / "special_tokens_map.json")
    return named | config if "added_tokens_decoder" in config else config | named


def added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json adds to the tokenizer's file by id, or else added_tokens.json."""
    name, kind, declared = "tokenizer_config.json", "added_tokens_decoder", settings.get("added_tokens_decoder")
    texts, special = read_optional(folder / "added_tokens.json") if declared is None else {}, special_names(settings)
    try:
        if declared is None:
            name, kind = "added_tokens.json", "list of added tokens"
            declared = {token: {"content": text, "special": text in special} for text, token in texts.items()}
        return {_id(token): _added(entry) for token, entry in declared.items() if entry["content"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(folder / name, kind, error) from error


def special_names(settings: dict[str, Any]) -> set[str]:
    """The texts of the tokens that the settings name: BOS, EOS and the like, and those without a part to play."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = [*extra.values()] if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    names = (content(value) for value in (*(settings.get(key) for key in NAMED_TOKENS), *extra))
    return {name for name in names if name}


def content(value: Any) -> str | None:
    """The text of a token that a JSON file gives as text, as an object with its flags, or as the first of a list."""
    value = value[0] if isinstance(value, list) and value else value
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, todo="convert or download the checkpoint again") if path.is_file() else {}


def unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable {kind} ({one_line(error)}): convert or download the checkpoint again")


def _added(entry: dict[str, Any]) -> AddedToken:
    special, flags = bool(entry.get("special")), {flag: bool(entry.get(flag)) for flag in FLAGS}
    return AddedToken(entry["content"], special=special, normalized=bool(entry.get("normalized", not special)), **flags)


def _id(token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, int | str) or not re.fullmatch("[0-9]{1,9}", str(token)):
        raise TypeError(f"{str(token)[:40]!r} is no id")
    return int(token)
