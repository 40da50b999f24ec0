"""The start and the end of processes that torchrun starts: rank 0 speaks, and of several that fail the first says why.

They meet at torchrun's store before anything is read. torchrun ends all of them as soon as one has failed, so that
those that have nothing to say wait for a moment.
"""

import os
import re
import sys
import time
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # of a rank that hangs; loading may keep others waiting. One that ended shows at once
A_MOMENT = 1.0  # second
ENDED = "teal-fast/ended"  # the store's key that the first rank takes that fails
LOST = re.compile(r"/gloo/|Connection (closed|reset)|NCCL")
LOST_RANK = "another rank has ended or hangs: start all of them again"
_store: dist.Store | None = None


def launched() -> int:
    """How many processes torchrun started, or one."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1  # others set WORLD_SIZE too


def meet(served: bool) -> None:
    """Waits for the other ranks, if there are any, and leaves speaking to rank 0.

    Raises ValueError where a command is not served as several processes.
    """
    global _store
    if launched() == 1:
        return
    store, rank, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set(f"teal-fast/{rank}", "here")
    store.wait([f"teal-fast/{other}" for other in range(ranks)], TIMEOUT)
    _store = store
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
        sys.excepthook = _show_mistake
    if not served:
        raise ValueError(f"torchrun started {ranks} processes, but of the commands generate alone runs as several")


def store() -> dist.Store:
    """What the ranks have met at."""
    assert _store is not None
    return _store


def leave() -> None:
    """Parts from the other ranks, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_end() -> bool:
    """Whether this process is to say why it ends: of several ranks the first that fails."""
    if _store is None:
        return True
    rank = os.environ["RANK"].encode()
    try:
        first = _store.compare_set(ENDED, "", rank) == rank
    except dist.DistError:  # the store ended with its process
        first = True
    sys.stderr = sys.__stderr__
    if not first:
        time.sleep(A_MOMENT)
    return first


def wait_for_rank_0() -> None:
    """Where all ranks end for the same reason rank 0 says it."""
    if _store is not None and os.environ["RANK"] != "0":
        time.sleep(A_MOMENT)


def explain_lost(error: BaseException) -> str | None:
    """What an error says of ranks that ended; None when it is about something else."""
    if _store is None or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
        return None
    said = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0][:100]  # without the library's source file
    return f"{LOST_RANK} (rank {os.environ['RANK']} of {launched()} was told: {said})"


def _show_mistake(*error) -> None:
    sys.stderr = sys.__stderr__
    sys.__excepthook__(*error)
