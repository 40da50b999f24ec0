"""The dial of a running vLLM server: GET and POST /teal/sparsity, and the achieved sparsity in /metrics.

    VLLM_PLUGINS=teal vllm serve checkpoints/hf/model-teal
    curl -X POST localhost:8000/teal/sparsity -H 'Content-Type: application/json' -d '{"sparsity": 0.4}'

It is an endpoint plugin, which vLLM loads only when VLLM_PLUGINS names it; that also turns on the counting in the
workers. A stat logger would not do for /metrics: it is given the scheduler's figures, while these are the workers'. So
the workers are asked whenever /metrics is read. vLLM's --api-key guards paths below /v1, not these.
"""

from argparse import Namespace
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from prometheus_client import Gauge
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient

ROUTE = "/teal/sparsity"
TURN = "teal_sparsity"  # of integrations/vllm_linear.py, which is for processes with a model


class Dial:
    """Asks all ranks for their counts, and tells them a new sparsity. engine: set when the server starts."""

    engine: EngineClient

    def __init__(self) -> None:
        self.nominal = Gauge("teal:sparsity_ratio", "Nominal sparsity", multiprocess_mode="mostrecent")
        self.achieved = Gauge(
            "teal:achieved_sparsity_ratio",
            "Weights skipped by sparse tokens since the sparsity was set",
            multiprocess_mode="mostrecent",
        )

    async def read(self, sparsity: float | None = None) -> dict[str, Any]:
        """The answer of both methods. achieved_sparsity: null before the first sparse token."""
        ranks = await self.engine.collective_rpc(TURN, args=(sparsity,))
        total = {
            name: sum(rank[name] for rank in ranks) for name in ("layers", "sparse", "dense", "weights", "skipped")
        }
        if not total["layers"]:
            raise ValueError("VLLM_PLUGINS names teal, but this model is not one of scripts/export_hf.py")
        achieved = total["skipped"] / total["weights"] if total["weights"] else None
        self.nominal.set(ranks[0]["sparsity"])
        self.achieved.set(achieved or 0.0)
        return {
            "sparsity": ranks[0]["sparsity"],
            "achieved_sparsity": achieved,
            "sparse_tokens": round(total["sparse"] / total["layers"]),
            "dense_tokens": round(total["dense"] / total["layers"]),
        }


class FreshMetrics:
    """Middleware that reads the dial before /metrics is answered."""

    def __init__(self, app: ASGIApp, dial: Dial):
        self.app, self.dial = app, dial

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") == "/metrics":
            await self.dial.read()
        await self.app(scope, receive, send)


class SparsityEndpoint:
    """The plugin as vLLM's `EndpointPlugin` describes it."""

    name = "teal"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.dial = Dial()

    def attach_router(self, app: FastAPI) -> None:
        @app.get(ROUTE)
        async def read() -> dict[str, Any]:
            return await self.dial.read()

        @app.post(ROUTE)
        async def turn(sparsity: Annotated[float, Body(embed=True, ge=0, le=0.95)], request: Request) -> dict[str, Any]:
            # Keys and values that were computed at another sparsity are not for prompts that come now.
            answer = await self.dial.read(sparsity)
            await self.dial.engine.reset_prefix_cache()
            return answer

        app.add_middleware(FreshMetrics, dial=self.dial)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Starts the counts anew, after vLLM's own warm-up. Raises ValueError when the model has no sparse layers."""
        self.dial.engine = engine_client
        await self.dial.read((await self.dial.read())["sparsity"])
