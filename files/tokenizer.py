"""Text to token ids and back, with the tokenizer that lies in a checkpoint folder.

Three libraries stand behind one class: `tokenizers` for tokenizer.json (tokenizer_json.py), `sentencepiece` and
`tiktoken` for the two formats that are both called tokenizer.model (tokenizer_model.py). They only encode; decoding.py
decodes. Special tokens written in a prompt become their ids, as in transformers; in a chat only those that its template
writes do (chat_ids.py). Training and truncation are left out. A tokenizer may be used by several threads at once.
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from teal_fast.files.chat_ids import ChatEncoder, chat_of
from teal_fast.files.decoding import Pieces, PieceStream
from teal_fast.files.fill_in import find_fill_in
from teal_fast.files.stop import stop_ids
from teal_fast.files.store import one_line, read_text, short
from teal_fast.files.tokenizer_json import load_json
from teal_fast.files.tokenizer_model import load_model
from teal_fast.files.vocabulary import (
    NAMED_TOKENS,
    Vocabulary,
    added_tokens,
    content,
    read_optional,
    read_settings,
    special_names,
    unreadable,
)


class Tokenizer:
    """Encodes prompts and chats as the checkpoint's own files say, and decodes to text without special tokens.

    eos_ids: all ids that end an answer. eos_id: the one that the files call EOS, None where they call none so. pieces:
    the bytes that an id adds to a text, absent for the ids that add none; a first one may lose its leading space.
    prefix: the ids that `encode` begins a text with: BOS where the files ask for it, often none.
    """

    def __init__(self, vocabulary: Vocabulary, settings: dict[str, Any], ends: dict[str, Any], template: str | None):
        defaults = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        names = {key: content(settings.get(key, defaults.get(key))) for key in NAMED_TOKENS}
        names = {key: name for key, name in names.items() if name is not None}
        named = {key: vocabulary.ids.get(name) for key, name in names.items()}
        self.bos_id, self.eos_id = named.get("bos_token"), named.get("eos_token")
        if "bos_token" in named and self.bos_id is None:
            raise ValueError(
                f"bos_token {short(names['bos_token'])} is not in the vocabulary: correct tokenizer_config.json"
            )
        self.eos_ids = stop_ids(vocabulary, ends | {"the vocabulary's EOS": vocabulary.eos}, template)
        self.vocab_size: int = max(vocabulary.ids.values()) + 1
        self.chat_template = template
        self._fill_in = find_fill_in(vocabulary.ids, settings)
        self._added = {token.content: i for i, token in vocabulary.added.items()}
        self._encode, self._first = vocabulary.encode, vocabulary.first
        self.pieces = Pieces({i: piece for i, piece in vocabulary.pieces.items() if i not in named.values()})
        self._unshown = {i: name.encode() for name, i in vocabulary.ids.items() if i not in self.pieces}
        self._chat = None if template is None else ChatEncoder(self._ids, vocabulary.added, template, names)
        prefix = vocabulary.prefix
        self.prefix: list[int] = prefix if prefix is not None else self._bos(settings.get("add_bos_token"))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint folder: tokenizer.json where there is one, else tokenizer.model."""
        folder = Path(folder)
        settings = read_settings(folder)
        declared, special = added_tokens(folder, settings), special_names(settings)
        if (path := folder / "tokenizer.json").is_file():
            vocabulary = load_json(path, declared, special)
        elif (path := folder / "tokenizer.model").is_file():
            vocabulary = load_model(path, declared, special, every_part=settings.get("legacy") is True)
        else:
            raise FileNotFoundError(
                f"{folder}: found neither tokenizer.json nor tokenizer.model, expected one of them: name a checkpoint "
                "folder, or convert or download the checkpoint again"
            )
        try:
            return cls(vocabulary, settings, _ends(folder), _chat_template(folder, settings))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def encode(self, text: str, add_bos: bool = True, control: bool = True, start: bool = True) -> list[int]:
        """Ids of a prompt, after BOS where the checkpoint asks for it and `add_bos` allows it; never with EOS.

        control: whether control tokens written in it become their ids, or are text. start: whether nothing comes before
        it but BOS: SentencePiece puts a space before a text's beginning.
        """
        return (self.prefix if add_bos else []) + self._ids(text, control, start)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a chat up to where the assistant answers; BOS stands where the template writes it, and only there.

        Control tokens are those that the template writes: in messages, tools and variables they are text. variables:
        what else the template may use, documents and enable_thinking for example.
        """
        return self._chat_encoder().encode(chat_of(messages, tools, variables, add_generation_prompt))

    def encode_fill_in(self, prefix: str, suffix: str) -> list[int]:
        """Ids after which the model writes what stands between two texts, in which control tokens are text."""
        if self._fill_in is None:
            raise ValueError("this checkpoint has no tokens to fill a gap with: drop --fim or use a model of code")
        before, between, after = self._fill_in
        first, last = self._ids(prefix, control=False), self._ids(suffix, control=False, start=False)
        return [*self.prefix, before, *first, between, *last, after]

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that encode_chat gives the ids of."""
        return self._chat_encoder().render(chat_of(messages, tools, variables, add_generation_prompt))

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. control: control tokens by name, else without them."""
        pieces = ChainMap(self.pieces, self._unshown) if control else self.pieces
        stream = PieceStream(pieces, self._first)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, prompt: Iterable[int] = (), visible: Mapping[int, str] | None = None) -> PieceStream:
        """Start a text that arrives token by token, as what goes on after the prompt's ids.

        visible: special tokens that are shown nevertheless, as the text that they stand for, by id.
        """
        shown = {token: text.encode() for token, text in (visible or {}).items()}
        return PieceStream(ChainMap(shown, self.pieces) if shown else self.pieces, self._first, prompt)

    def piece(self, token: int) -> bytes:
        """The bytes of an id by itself: what it adds to a text, or the name of a control token; none where it has none.

        Bytes of one token need be no valid UTF-8.
        """
        return self.pieces.get(token) or self._unshown.get(token, b"")

    def added_id(self, text: str) -> int | None:
        """The id of the control or added token that the text is, None where it is none."""
        return self._added.get(text)

    def _bos(self, wanted: Any) -> list[int]:
        if wanted and self.bos_id is None:
            raise ValueError("add_bos_token is true but there is no bos_token: correct tokenizer_config.json")
        return [] if self.bos_id is None or wanted is False else [self.bos_id]

    def _ids(self, text: str, control: bool = True, start: bool = True) -> list[int]:
        try:
            text.encode()  # tiktoken would take a lone surrogate, as from an argument that is not UTF-8
            return self._encode(text, control, start)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"text cannot be tokenized ({one_line(error)}): pass valid Unicode text") from error

    def _chat_encoder(self) -> ChatEncoder:
        if self._chat is None:
            raise ValueError("this checkpoint has no chat template: drop --chat or use an instruct model")
        return self._chat


def _ends(folder: Path) -> dict[str, Any]:
    """What the folder's files say of the tokens that end a text, by where it stands."""
    keys = {"generation_config.json": "eos_token_id", "config.json": "eos_token_id"}
    keys |= {"tokenizer_config.json": "eos_token", "special_tokens_map.json": "eos_token"}
    found = {f"{file}'s {key}": read_optional(folder / file).get(key) for file, key in keys.items()}
    text = read_optional(folder / "config.json").get("text_config")  # of models with a vision tower
    return found | ({"text_config's eos_token_id": text.get("eos_token_id")} if isinstance(text, dict) else {})


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return read_text(path)
        except ValueError as error:
            raise unreadable(path, "template", error) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template is a {type(template).__name__}, expected text: correct tokenizer_config.json")
    return template
