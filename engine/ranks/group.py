"""The processes of one model, as torchrun starts them: each computes its part, and they tell one another their results.

What they exchange is gathered from all by all, and sums are taken by each of them in the order of ranks: the same bits
everywhere, however they are connected. gloo connects CPUs, NCCL GPUs. Rank and number of all are global, over nodes;
the local rank chooses the GPU.
"""

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from teal_fast.engine.device import pick_device
from teal_fast.engine.ranks.launch import TIMEOUT, launched, store
from teal_fast.weights.shards import Shard


class Ranks:
    """This process among those that share a model. shard: its part. device: what it computes on."""

    def __init__(self, shard: Shard, device: torch.device, group: dist.ProcessGroup):
        self.shard, self.device, self.group = shard, device, group

    def __deepcopy__(self, memo: dict) -> "Ranks":
        """Engines over one model share them."""
        return self

    @classmethod
    def join(cls, device: str | None = None) -> "Ranks | None":
        """This process among the ranks that have met (launch.py); None where it is the only one.

        device: cpu or cuda, by default CUDA where there is one. Raises ValueError on others, and where one is missing.
        """
        if launched() == 1:
            return None
        rank, where = int(os.environ["RANK"]), pick_device(device)
        if where.type == "cuda":
            if where.index is not None:
                raise ValueError(f"--device {device}: each rank takes the GPU of its own number, give --device cuda")
            where = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
        backend = "nccl" if where.type == "cuda" else "gloo"
        bound = {"device_id": where} if where.type == "cuda" else {}
        dist.init_process_group(backend, store=store(), rank=rank, world_size=launched(), timeout=TIMEOUT, **bound)
        return cls(Shard(rank, launched()), where, dist.group.WORLD)

    def all(self, x: Tensor) -> Tensor:
        """[ranks, …]: every rank's tensor x […], all of one shape and type."""
        found = x.new_empty(self.shard.ranks, *x.shape)
        dist.all_gather(list(found.unbind(0)), x.contiguous(), self.group)
        return found

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of every rank's tensor, in fp32."""
        return self.all(partial).float().sum(0)

    def gather(self, x: Tensor, size: int) -> Tensor:
        """[…, size]: every rank's share of it, x […, n], beside each other, as `Shard.of` deals them out."""
        found = self.all(F.pad(x, (0, -(-size // self.shard.ranks) - x.shape[-1])))
        return found.movedim(0, -2).flatten(-2)[..., :size]

    def share(self, size: int) -> int:
        """How many of `size` things a rank has at most."""
        return len(Shard(0, self.shard.ranks).of(size))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of every rank's values; all have the same keys."""
        found = self.all(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)).mean(0)
        return dict(zip(values, found.tolist(), strict=True))

    def agree(self, seed: int | None) -> int:
        """A seed that all ranks have: this one, or where there is none rank 0's own."""
        if seed is None:
            return int(self.all(torch.tensor([torch.Generator().seed() >> 1], device=self.device))[0])
        return seed
