"""Replicas of the server behind one port, by Ray Serve: an engine each, and a request goes where none is running.

    pip install "ray[serve]==2.60.0"
    serve run teal_fast.integrations.ray_serve:replicas checkpoint=demo sparsity=0.5 replicas=2

With device=cuda each replica has a GPU, on whichever node Ray finds one; the checkpoint lies in the same place on all.
A replica keeps the prefixes of conversations that it answered, so a conversation may meet one that computes its prompt
again. An answer can't be changed while it runs (PATCH), and /metrics, of one of them, waits while all answer.
"""

from argparse import ArgumentTypeError

from starlette.applications import Starlette

from teal_fast.cli import sparsity as fraction
from teal_fast.engine.load import load
from teal_fast.files.checkpoint import find_checkpoint
from teal_fast.server.app import make_app
from teal_fast.server.service import Limits, Service
from teal_fast.server.worker import Loaded, Worker

TESTED = "ray[serve]==2.60.0"  # the release that tests/integrations/test_ray_serve.py was run with
try:
    from ray import serve
except ImportError as missing:
    raise ImportError(f"Ray Serve is not installed ({missing}): pip install {TESTED}") from missing

DEFAULTS = {"checkpoint": "demo", "sparsity": "0", "replicas": "1", "device": "cpu", "context": "8192"}


@serve.ingress()
class Replica:
    """One engine with the whole HTTP API. Ray starts it anew when its engine has failed."""

    def __init__(self, checkpoint: str, sparsity: float, device: str, context: int):
        engine, tokenizer = load(checkpoint, device, context=context)
        if sparsity and engine.calibration is None:
            raise ValueError(f"sparsity {sparsity} needs a calibration: run `calibrate.py --checkpoint {checkpoint}`")
        self.failed: list[BaseException | None] = []
        loaded = Loaded(engine, tokenizer, checkpoint)
        self.service = Service(Worker(lambda: loaded, 64, self.failed.append), Limits(sparsity=sparsity))

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self.service)

    def check_health(self) -> None:
        """Called by Ray every few seconds; what it raises ends the replica."""
        if self.failed:
            raise self.failed[0] or RuntimeError("the engine's thread has ended")


def replicas(arguments: dict[str, str]) -> serve.Application:
    """The application that `serve run` and Ray's config files start, by what stands in DEFAULTS.

    Raises ValueError for arguments that are not known or not sound.
    """
    if unknown := arguments.keys() - DEFAULTS.keys():
        raise ValueError(f"{min(unknown)} is not known, expected {', '.join(DEFAULTS)}")
    given = DEFAULTS | arguments
    numbers = {}
    for name in ("replicas", "context"):
        if not given[name].isdecimal() or not int(given[name]):
            raise ValueError(f"{name}={given[name]}: expected a whole number of at least 1")
        numbers[name] = int(given[name])
    find_checkpoint(given["checkpoint"])  # said once here; of a replica that fails Ray starts another
    try:
        sparsity = fraction(given["sparsity"])
    except ArgumentTypeError as error:
        raise ValueError(f"sparsity={given['sparsity']}: {error}") from error
    gpus = 0 if given["device"] == "cpu" else 1
    deployment = serve.deployment(
        Replica,
        num_replicas=numbers["replicas"],
        max_ongoing_requests=1,  # an engine answers one at a time: what waits may still go to any replica
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    return deployment.bind(given["checkpoint"], sparsity, given["device"], numbers["context"])
