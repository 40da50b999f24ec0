"""The vocabulary of a tokenizer.json, as the library `tokenizers` reads it."""

from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from teal_fast.files.decoding import json_decoder
from teal_fast.files.store import parse_json, read_text, short
from teal_fast.files.vocabulary import Vocabulary, is_control, unreadable


def load_json(path: Path, declared: dict[int, AddedToken], special: Iterable[str]) -> Vocabulary:
    """declared: the added tokens of the files beside it, by id; special: the names of special tokens there."""
    try:
        text = read_text(path)
        described = parse_json(text, "it")  # bounded, before the library reads it
        library = Tokenizer.from_str(text)
        to_bytes, first = json_decoder(described.get("decoder"), described.get("pre_tokenizer"))
        library.no_truncation()  # a file may ask for either; a prompt is neither cut nor filled up
        library.no_padding()
        if not library.get_vocab_size():
            raise ValueError("its vocabulary is empty")
        _add(library, declared, special)
        probe = library.encode("a")  # shows what the post-processor puts before a text
    except Exception as error:  # tokenizers raises nothing narrower
        raise unreadable(path, "tokenizer.json", error) from error
    ids, added = library.get_vocab(), library.get_added_tokens_decoder()
    hidden = {token for token, name in added.items() if name.special}
    prefix = probe.ids[: (*probe.special_tokens_mask, 0).index(0)]

    @cache
    def variant(control: bool, start: bool) -> Tokenizer:
        return library if control and start else _variant(library, control, start)

    def encode(text: str, control: bool = True, start: bool = True) -> list[int]:
        # Unlike `encode`, it lets other threads run meanwhile: a text of a megabyte takes a second.
        return variant(control, start).encode_batch_fast([text], add_special_tokens=False)[0].ids

    return Vocabulary(
        encode,
        ids,
        {token: to_bytes(name) for name, token in ids.items() if token not in hidden},
        added,
        first,
        bos=library.id_to_token(prefix[0]) if prefix else None,
        prefix=prefix,
    )


def _add(library: Tokenizer, declared: dict[int, AddedToken], special: Iterable[str]) -> None:
    """Adds the tokens that the files beside tokenizer.json have and it lacks, as transformers 5.23 does."""
    known = library.get_added_tokens_decoder()
    new = {token: added for token, added in sorted(declared.items()) if known.get(token) != added}
    library.add_tokens([*new.values()])
    for token, added in new.items():
        if (found := library.token_to_id(added.content)) != token:
            raise ValueError(f"its next id is {found} where the files beside it give {token} to {short(added.content)}")
    known = {added.content for added in library.get_added_tokens_decoder().values()}
    named = [name for name in special if name not in known and library.token_to_id(name) is not None]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])


def _variant(library: Tokenizer, control: bool, start: bool) -> Tokenizer:
    """The same vocabulary, but without control tokens in texts, or for texts that go on after one."""
    variant = Tokenizer(library.model)  # shared with the library's, so that this costs no memory to speak of
    if library.normalizer:
        variant.normalizer = library.normalizer
    if library.pre_tokenizer:
        parts, state = deepcopy(library.pre_tokenizer), library.pre_tokenizer.__getstate__()  # as JSON
        if not start:  # only Metaspace asks where a text stands
            state = state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"')
        parts.__setstate__(state)
        variant.pre_tokenizer = parts
    added = dict(sorted(library.get_added_tokens_decoder().items()))
    for token in added.values():  # copies
        token.special = is_control(token)
    variant.add_tokens([*added.values()])
    if variant.get_added_tokens_decoder().keys() != added.keys():
        raise ValueError("its added tokens do not follow its vocabulary")
    variant.encode_special_tokens = not control
    return variant
