"""Texts without answers: tokens of a text or a chat and back, the chat's text; and what is served, by what version.

/tokenize takes vLLM's bodies (0.22: prompt, or messages) and llama.cpp's (de93b99: content), whose defaults differ:
vLLM puts BOS first and llama.cpp does not.
"""

import time
import tomllib
from importlib.metadata import version as installed_version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.files.paths import IN_A_CLONE, ROOT
from teal_fast.server.body import in_thread, read_body
from teal_fast.server.chat_completions import read_chat
from teal_fast.server.errors import ApiError
from teal_fast.server.fields import Fields
from teal_fast.server.service import Service
from teal_fast.server.settings import MAX_SPARSITY
from teal_fast.sparse_model import format_of

SOURCES = ("prompt", "messages", "content")


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    service.check_model(fields.text("model"))
    ids = await read_ids(fields, service)
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.engine.context}
    with_pieces, with_names = fields.flag("with_pieces"), fields.flag("return_token_strs")
    pieces = [service.tokenizer.piece(id) for id in ids] if with_pieces or with_names else []
    if with_pieces:
        found["tokens"] = [{"id": id, "piece": as_piece(piece)} for id, piece in zip(ids, pieces, strict=True)]
    found["token_strs"] = [piece.decode(errors="replace") for piece in pieces] if with_names else None
    return JSONResponse(found)


async def read_ids(fields: Fields, service: Service) -> list[int]:
    """The ids of the one text or chat that a body of /tokenize has."""
    given = [name for name in SOURCES if fields.given(name)]
    if len(given) != 1:
        raise ApiError(400, f"{' and '.join(given) or 'nothing'} is given, expected prompt, messages or content")
    if given[0] == "messages":
        return (await service.plan(read_open_chat(fields))).ids
    bos = fields.flag("add_special_tokens", True) if given[0] == "prompt" else fields.flag("add_special")
    control = fields.flag("parse_special", True)
    try:
        return await in_thread(service.tokenizer.encode, fields.text(given[0]), bos, control)
    except ValueError as error:
        raise ApiError(400, str(error), given[0]) from None


def read_open_chat(fields: Fields):
    """A chat as chat completions have it, which always ends where the assistant answers."""
    if not fields.flag("add_generation_prompt", True) or fields.flag("continue_final_message"):
        raise ApiError(400, "only chats that end where the assistant answers are rendered: leave out how they end")
    return read_chat(fields)


def as_piece(piece: bytes) -> str | list[int]:
    """As llama.cpp has it: bytes as numbers where they are no text by themselves."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = await read_body(request)
    service.check_model(fields.text("model"))
    fields.required("tokens")
    ids, vocab_size = fields.items("tokens"), service.vocab_size
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise fields.error("tokens", f"ids of tokens below {vocab_size}")
    text = await in_thread(service.tokenizer.decode, ids, control=True)
    return JSONResponse({"prompt": text, "content": text})


async def apply_template(request: Request) -> Response:
    """The prompt that a chat is answered to, as text, control tokens by their names."""
    service: Service = request.app.state.service
    fields = await read_body(request)
    service.check_model(fields.text("model"))
    made = await service.plan(read_open_chat(fields))
    return JSONResponse({"prompt": await in_thread(service.tokenizer.decode, made.ids, control=True)})


# --- what is served


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    names = [name for name in service.limits.names if name != "*"] or [service.loaded.name]
    return JSONResponse({"object": "list", "data": [card(service, name) for name in names]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(card(service, service.check_model(request.path_params["name"])))


def card(service: Service, name: str) -> dict[str, Any]:
    """A model as OpenAI's API describes it, with vLLM's max_model_len."""
    described = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "teal-fast"}
    return described | {"root": service.loaded.name, "max_model_len": service.engine.context}


async def version(request: Request) -> Response:
    return JSONResponse({"version": our_version()})


async def props(request: Request) -> Response:
    """What llama.cpp's clients ask a server for, and what ours do."""
    service: Service = request.app.state.service
    engine, tokenizer, name = service.engine, service.tokenizer, service.loaded.name
    names = {f"{key}_token": getattr(tokenizer, f"{key}_id") for key in ("bos", "eos")}
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": engine.context},
            "total_slots": 1,
            "model_alias": name,
            "model_path": name,  # the name alone: paths are nobody's business
            "chat_template": tokenizer.chat_template or "",
            **{key: "" if id is None else tokenizer.piece(id).decode(errors="replace") for key, id in names.items()},
            "modalities": {"vision": False, "audio": False},
            "build_info": f"teal-fast {our_version()}",
            "n_ctx": engine.context,
            "sparsity": service.limits.sparsity,
            "max_sparsity": MAX_SPARSITY if engine.calibration else 0,
            "calibrated": engine.calibration is not None,
            "prefill": ["dense", "full"],
            "format": format_of(engine.model),
            "device": engine.model.norm.weight.device.type,
        }
    )


def our_version() -> str:
    """Of the clone, where this runs in one, since what is installed may be older."""
    if IN_A_CLONE:
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return installed_version("teal-fast")
