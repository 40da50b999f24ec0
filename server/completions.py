"""POST /v1/completions: texts continued, or scored, as evaluation harnesses ask for with echo and logprobs."""

import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.engine.scoring import Scored
from teal_fast.server.asked import Begun, End, Text, Usage
from teal_fast.server.body import in_thread, read_body, unless_gone
from teal_fast.server.chat_completions import Begin, usage_object
from teal_fast.server.errors import ApiError, openai_shape
from teal_fast.server.fields import Fields
from teal_fast.server.logprobs import completion_logprobs
from teal_fast.server.service import Answer, Service, close_all, new_id
from teal_fast.server.settings import MOST_ANSWERS, MOST_TOP, read_settings
from teal_fast.server.sse import EventStream, frame

NEW_TOKENS = 16  # where none are named, as OpenAI's API has it
MOST_PROMPTS = 64


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    model = service.check_model(fields.text("model"))
    for name, harmless in (("suffix", ""), ("best_of", 1)):
        if fields.given(name) and fields.body[name] != harmless:
            raise fields.error(name, "none: this server has no such mode")
    prompts = await read_prompts(fields, service)
    most = fields.whole("max_tokens", NEW_TOKENS, 0)
    echo, top = fields.flag("echo"), fields.whole("logprobs", None, 0, MOST_TOP)
    if not most and not echo:
        raise fields.error("max_tokens", "at least 1, or echo", 422)
    n = fields.whole("n", 1, 1, MOST_ANSWERS)
    service.check_count(n * len(prompts))
    settings = read_settings(fields, service, most or 1, top_logprobs=top, n=n)
    options = fields.object("stream_options") or Fields({})
    stream, usage = fields.flag("stream"), options.flag("include_usage")
    begun = Begin(new_id("cmpl"), "text_completion", model)
    score = top if echo and top is not None else None
    texts = [await in_thread(service.tokenizer.decode, prompt) if echo else "" for prompt in prompts]
    echoed = [text for text in texts for _ in range(n)]
    ids = [prompt for prompt in prompts for _ in range(n)]
    answers = service.begin_texts(prompts, settings, begun.id, score, most > 0)
    if stream:
        return EventStream(chunks(begun, answers, ids, echoed, service, usage), answers)
    return JSONResponse(await unless_gone(request, whole(begun, answers, ids, echoed, service)))


async def read_prompts(fields: Fields, service: Service) -> list[list[int]]:
    """Token ids of each prompt: a text, a list of them, ids, or a list of lists of ids."""
    fields.required("prompt")
    given, vocab_size = fields.body["prompt"], service.vocab_size
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MOST_PROMPTS:
        raise fields.error("prompt", f"a text, token ids, or a list of at most {MOST_PROMPTS} of either")
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            service.check_length(len(prompt))
            try:
                prompt = await in_thread(service.tokenizer.encode, prompt)
            except ValueError as error:
                raise ApiError(400, str(error), "prompt") from None
        elif not isinstance(prompt, list) or any(type(id) is not int or not 0 <= id < vocab_size for id in prompt):
            raise fields.error("prompt", f"texts, or lists of token ids below {vocab_size}")
        if not prompt:
            raise ApiError(400, "a prompt is empty: give at least one token", "prompt")
        found.append(prompt)
    return found


async def whole(
    begun: Begin, answers: list[Answer], ids: list[list[int]], echoed: list[str], service: Service
) -> dict[str, Any]:
    choices, found = [], []
    try:
        for index, (answer, prompt, start) in enumerate(zip(answers, ids, echoed, strict=True)):
            text, tokens = [start], []
            async with aclosing(aiter(answer)) as events:
                async for event in events:
                    if isinstance(event, Begun):
                        tokens += prompt_tokens(answer, prompt, event.scored)
                    elif isinstance(event, Text):
                        text.append(event.text)
                        tokens += event.tokens
                    elif isinstance(event, End):
                        end = event
            logprobs = None
            if answer.settings.top_logprobs is not None:
                logprobs = completion_logprobs(tokens, service.tokenizer, 0)
            reason = end.finish_reason
            choices.append({"index": index, "text": "".join(text), "logprobs": logprobs, "finish_reason": reason})
            found.append(end.usage)
    finally:
        close_all(answers)
    return begun.object(choices, usage=usage_of(found, answers))


def prompt_tokens(answer: Answer, ids: list[int], scored: list[Scored]) -> list[Scored]:
    """An echoed prompt's tokens where they are scored: nothing says how likely the first is."""
    return [] if answer.job.work.score is None else [Scored(ids[0], math.nan, ()), *scored]


def usage_of(found: list[Usage], answers: list[Answer]) -> dict[str, Any]:
    """Over several prompts, of which each counts once for each of its answers' first."""
    n = answers[0].settings.n
    parts = [usage_object(found[i : i + n]) for i in range(0, len(found), n)]
    usage = usage_object(found)
    usage["prompt_tokens"] = sum(part["prompt_tokens"] for part in parts)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    cached = sum(part["prompt_tokens_details"]["cached_tokens"] for part in parts)
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}


async def chunks(
    begun: Begin, answers: list[Answer], ids: list[list[int]], echoed: list[str], service: Service, with_usage: bool
) -> AsyncIterator[bytes]:
    found = []
    try:
        for index, (answer, prompt, start) in enumerate(zip(answers, ids, echoed, strict=True)):
            offset = len(start)

            def choice(text: str, tokens: Any = (), reason: str | None = None, index=index, at: int = 0) -> bytes:
                logprobs = completion_logprobs(tokens, service.tokenizer, at) if tokens else None
                parts = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
                return frame(begun.object([parts]))

            async with aclosing(aiter(answer)) as events:
                async for event in events:
                    if isinstance(event, Begun) and (start or event.scored):
                        yield choice(start, prompt_tokens(answer, prompt, event.scored))
                    elif isinstance(event, Text):
                        yield choice(event.text, event.tokens, at=offset)
                        offset += len(event.text)
                    elif isinstance(event, End):
                        found.append(event.usage)
                        yield choice("", reason=event.finish_reason)
        if with_usage:
            yield frame(begun.object([], usage=usage_of(found, answers)))
    except ApiError as error:
        yield frame(openai_shape(error))
    yield b"data: [DONE]\n\n"
