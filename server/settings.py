"""The fields of a body that say how an answer is made, of all dialects: sampling, limits, and what is our own."""

from collections.abc import Callable
from typing import Any

from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.lossless import MOST_DRAFTS
from teal_fast.server.asked import Settings
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.service import Service

MAX_SPARSITY = 0.95
MOST_STOPS, MOST_ANSWERS, MOST_TOP, MOST_BIAS = 16, 16, 20, 1024


def read_settings(
    fields: Fields,
    service: Service,
    max_new_tokens: int | None = None,
    stop: tuple[str, ...] | None = None,
    top_logprobs: int | None = None,
    n: int = 1,
) -> Settings:
    """Settings of a body. What dialects name or bound each in their own way is given; stop None: the field `stop`."""
    lossless = fields.flag("lossless")
    if lossless and fields.number("sparsity", 0.0, 0, MAX_SPARSITY):
        said = "sparsity is of text that may change, lossless text is the dense model's: ask for draft_sparsity"
        raise ApiError(400, said, "sparsity")
    return Settings(
        read_sampling(fields, service.vocab_size),
        0.0 if lossless else fields.number("sparsity", service.limits.sparsity, 0, MAX_SPARSITY),
        max_new_tokens,
        read_stop(fields, "stop") if stop is None else stop,
        fields.whole("seed", None, -(2**63), 2**63 - 1),
        top_logprobs,
        fields.text("prefill", "dense", ("dense", "full")),
        fields.flag("cache", fields.flag("cache_prompt", True)),
        fields.flag("ignore_eos"),
        n,
        lossless,
        fields.text("draft", "auto"),
        read_unless_auto(fields, "draft_sparsity", fields.number, 0, MAX_SPARSITY),
        read_unless_auto(fields, "draft_tokens", fields.whole, 1, MOST_DRAFTS),
    )


def read_unless_auto(fields: Fields, name: str, read: Callable[..., Any], low: float, high: float) -> Any:
    """A number from low to high; None for "auto", which is the default."""
    return None if fields.body.get(name) == "auto" else read(name, None, low, high)


def read_sampling(fields: Fields, vocab_size: int) -> Sampling:
    """Temperature 1 and no filters unless the body says otherwise, as OpenAI's API has it."""
    top_k = fields.whole("top_k", 0, -1)
    repetition = fields.number("repetition_penalty", fields.number("repeat_penalty", 1.0, 0.01, 100), 0.01, 100)
    return Sampling(
        fields.number("temperature", 1.0, 0, 100),
        None if top_k <= 0 else min(top_k, vocab_size),
        fields.number("top_p", None, 0, 1),
        fields.number("min_p", None, 0, 1),
        repetition,
        fields.number("presence_penalty", 0.0, -2, 2),
        fields.number("frequency_penalty", 0.0, -2, 2),
        read_bias(fields, vocab_size),
    )


def read_stop(fields: Fields, name: str) -> tuple[str, ...]:
    """Stop strings: one text or a list of them."""
    value = fields.body.get(name)
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > MOST_STOPS:
        raise fields.error(name, f"a text or a list of at most {MOST_STOPS} texts")
    if not all(texts):
        raise fields.error(name, "texts that are not empty")
    return tuple(texts)


def read_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """logit_bias: an object from token ids to numbers from -100 to 100."""
    given: dict[str, Any] = getattr(fields.object("logit_bias"), "body", {})
    if len(given) > MOST_BIAS:
        raise fields.error("logit_bias", f"at most {MOST_BIAS} tokens")
    pairs = []
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise fields.error("logit_bias", f"ids of tokens below {vocab_size} as keys")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise fields.error("logit_bias", "numbers from -100 to 100 as values")
        pairs.append((int(key), float(value)))
    return tuple(dict(pairs).items())
