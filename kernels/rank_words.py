"""Where the GPUs of one host, a rank each, write into each other's memory (csrc/stages_ranks.cuh): PyTorch's symmetric
memory, which maps a tensor of every rank into all. It needs GPUs that reach each other, by NVLink or PCIe.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory


class RankWords:
    """This rank's words [2, ranks, width] int64 on the current device, zero at first, and the addresses of all ranks'.

    width: the most values that a rank sends at once. Raises ValueError where GPUs can't reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, width: int):
        self.rank, self.ranks = group.rank(), group.size()
        device = torch.device("cuda", torch.cuda.current_device())
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks)) != self.ranks:
            raise ValueError("no kernels for ranks on several hosts")
        try:
            self.words = symmetric_memory.empty(2 * self.ranks * width, dtype=torch.int64, device=device)
            self.memory = symmetric_memory.rendezvous(self.words, group)
        except RuntimeError as error:
            raise ValueError(
                f"no kernels for GPUs that don't reach each other's memory ({str(error).splitlines()[0]})"
            ) from error
        self.words.zero_()
        self.calls = torch.zeros(1, dtype=torch.int32, device=device)
        self.lost = torch.zeros(1, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # none writes before all are zero

    @property
    def addresses(self) -> list[int]:
        return list(self.memory.buffer_ptrs)
