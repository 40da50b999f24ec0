"""Greedy shares: of equal bytes a block, and what costs nothing is dropped first."""

import torch

from teal_fast.calibration.blockwise import STEPS, blockwise_shares
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.files.load import load_model
from teal_fast.sparse_model import KEEP_ALL, sparse_layers

SEQUENCE = torch.randint(3, 40_000, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def test_blocks_drop_equal_bytes_and_what_costs_least_first(tiny):
    model = load_model(tiny)
    free = model.layers[1].attention.wo
    free.weight.packed = torch.nn.Parameter(torch.zeros_like(free.weight.packed), requires_grad=False)
    quantiles = measure_quantiles(model, [SEQUENCE])
    shares = blockwise_shares(model, SEQUENCE, quantiles)
    assert shares.shape == (8, STEPS + 1)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert (shares.diff(dim=1) >= -1e-9).all()
    assert (shares[:, 0] == 0).all() and torch.allclose(shares[:, -1], torch.ones(8).double())
    layers = sparse_layers(model)
    bytes_ = torch.tensor([layer.weight.packed.nbytes for layer in layers.values()]).double().view(2, 4, 1)
    dropped = (shares.view(2, 4, -1) * bytes_).sum(1) / bytes_.sum(1)
    torch.testing.assert_close(dropped, torch.linspace(0, 1, STEPS + 1).double().expand(2, -1))
    whole = int(
        (bytes_[1, :2].sum() / bytes_[1].sum() * STEPS).item()
    )  # steps that fit into qkv and o, now without use
    assert whole > 3
    assert (shares[6:, whole - 1] == 0).all()
    assert all((layer.threshold == KEEP_ALL).all() for layer in layers.values())
