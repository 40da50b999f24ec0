"""The layers of a rank's model whose results are other ranks' as well; all other layers are those of any model."""

from torch import Tensor, nn

from teal_fast.engine.ranks.group import Ranks
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase, SparseLinear, sparse_layers
from teal_fast.weights.shards import SUMMED


class SummedLinear(SparseLinear):
    """A layer of which each rank has some inputs: summed over ranks in fp32, the bias added once."""

    def __init__(self, layer: SparseLinear, ranks: Ranks):
        super().__init__(layer.weight, layer.bias)
        self.threshold, self.ranks = layer.threshold, ranks

    def forward(self, x: Tensor, phase: Phase | None = None) -> Tensor:
        y = self.ranks.sum(self.product(x, phase))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class GatheredOutput(nn.Module):
    """The output layer, of which each rank computes the logits of some tokens: all of them know all."""

    def __init__(self, part: nn.Module, ranks: Ranks, vocab_size: int):
        super().__init__()
        self.part, self.ranks, self.vocab_size = part, ranks, vocab_size

    @property
    def weight(self) -> Tensor | nn.Module:
        return self.part.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.gather(self.part(x), self.vocab_size)


def connect(model: Transformer, ranks: Ranks) -> Transformer:
    """Replaces, in the model of a rank's shard, the layers that are summed and the output layer."""
    for name, layer in sparse_layers(model).items():
        if name.endswith(SUMMED):
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, SummedLinear(layer, ranks))
    model.output = GatheredOutput(model.output, ranks, model.args.vocab_size)
    return model


def agreed_seed(model: Transformer, seed: int | None) -> int | None:
    """The seed of an answer: ranks that draw the same tokens from the same logits must have the same."""
    ranks = ranks_of(model)
    return seed if ranks is None else ranks.agree(seed)


def ranks_of(model: Transformer) -> Ranks | None:
    """The ranks that share a model; None of one that a process has for itself."""
    return getattr(model.output, "ranks", None)


def own_output(model: Transformer) -> nn.Module:
    """The output layer, of a model that ranks share this rank's part of it."""
    return model.output.part if isinstance(model.output, GatheredOutput) else model.output


def adds_bias(layer: SparseLinear) -> bool:
    """Whether this process adds the layer's bias: of a sum over ranks the first one does."""
    return not (isinstance(layer, SummedLinear) and layer.ranks.shard.rank)
