"""A model's passes block by block, so that gradients take the memory of one block and not that of all.

On the way forward each block's input is kept and nothing else. For the gradients each block is computed once more, from
the last to the first, and autograd records that block alone. Logits exist for some tokens and, where the output layer
has to be widened to fp32, its weight for some of the vocabulary at a time.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.model import Block, Transformer
from teal_fast.sparse_model import Phase
from teal_fast.weights.output import output_pieces

LOGITS_AT_ONCE = 2**25  # 128 MB, of which there are two or three
ROWS_AT_ONCE = 16  # of them that a softmax copies

# Work in forward passes of a block, by the loss whose gradients are taken: forward, dense forward, anew, backward; and
# products of tokens with the output layer.
BLOCK_WORK = {None: 1, "text": 3, "divergence": 4}
OUTPUT_WORK = {None: 0, "text": 2, "divergence": 3}

Done = Callable[[float], None]  # is told of work that was done, in layers x tokens


def work(model: Transformer, tokens: int, loss: str | None) -> float:
    """Layers x tokens that gradients of `loss`, or a pass without any, take; see `observe` of probe.py."""
    output = OUTPUT_WORK[loss] * output_layers(model)  # the last token has no successor to predict
    return tokens * BLOCK_WORK[loss] * len(model.layers) + (tokens - 1) * output


def output_layers(model: Transformer) -> float:
    """How many blocks the output layer's work is worth. It is computed in fp32, as blocks may be."""
    args = model.args
    attention = args.dim * args.head_dim * 2 * (args.n_heads + args.n_kv_heads)
    return args.vocab_size * args.dim / (attention + 3 * args.dim * args.ffn_dim)


def arguments(model: Transformer, length: int, phase: Phase | None = None) -> list[tuple[Block, tuple]]:
    """The blocks, each with its arguments after x for a sequence of this length from its start."""
    device, windows = model.norm.weight.device, model.args.sliding_windows
    positions = torch.arange(length, device=device)
    calls = model.calls(positions, model.norm.weight.dtype, phase=phase)
    masks = {window: model.mask(positions, None, window) for window in set(windows)}
    return [(block, (calls[i], masks[windows[i]], i)) for i, block in enumerate(model.layers)]


def hidden_states(model: Transformer, tokens: Tensor, done: Done) -> Iterator[Tensor]:
    """Hidden states [1, T, dim] of tokens [1, T] before each block and after the last."""
    x = model.embed(tokens)
    yield x
    for block, given in arguments(model, tokens.shape[1]):
        x = block(x, *given)
        done(tokens.shape[1])
        yield x


def backpropagate(model: Transformer, states: list[Tensor], gradient: Tensor, done: Done) -> None:
    """Backpropagates a gradient by the final normed hidden states, [1, T, dim], through norm and blocks.

    states: of `hidden_states`; they are used up. Whoever watches inputs sees each block's once more.
    """
    gradient = _gradient(model.norm, states.pop(), gradient)
    for block, given in reversed(arguments(model, gradient.shape[1])):
        gradient = _gradient(lambda x, block=block, given=given: block(x, *given), states.pop(), gradient)
        done(2 * gradient.shape[1])


@torch.enable_grad()
def _gradient(compute: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    compute(x).backward(gradient)
    return x.grad


@torch.no_grad()
def loss_gradient(
    hidden: Tensor,
    output: torch.nn.Module,
    tokens: Tensor,
    dense: Tensor | None,
    cap: float,
    done: Done = lambda work: None,
) -> Tensor:
    """The gradient of a loss, summed over tokens, by the final hidden states [T, dim]: in their dtype.

    The loss is the KL divergence from the dense model's predictions if `dense` is given, else the cross-entropy of the
    tokens. hidden, dense: final hidden states [T, dim]; output: the output layer, for both; tokens: [T]; cap: what its
    logits are kept within, or 0. done: is told how many of the tokens are.
    """
    found = torch.zeros_like(hidden)  # the last token has no successor to predict
    last, vocab = len(tokens) - 1, sum(len(piece) for piece in output_pieces(output))
    step = max(LOGITS_AT_ONCE // vocab, 1)
    for start in range(0, last, step):
        rows = slice(start, min(start + step, last))
        by_logits, slope = probabilities(hidden[rows], output, vocab, cap)
        if dense is None:
            by_logits.scatter_add_(1, tokens[1:][rows, None], by_logits.new_full((len(by_logits), 1), -1))
        else:
            by_logits -= probabilities(dense[rows], output, vocab, cap)[0]
        if slope is not None:
            by_logits *= slope
        begin, total = 0, 0
        for piece in output_pieces(output):
            total = total + by_logits[:, begin : (begin := begin + len(piece))] @ piece
        found[rows] = total.to(found.dtype)
        done(rows.stop - rows.start)
    return found


def probabilities(hidden: Tensor, output: torch.nn.Module, vocab: int, cap: float) -> tuple[Tensor, Tensor | None]:
    """The predictions fp32 [T, vocab] from final hidden states [T, dim], and the slope of the cap, if there is one."""
    found, begin = hidden.new_empty(len(hidden), vocab, dtype=torch.float32), 0
    for piece in output_pieces(output):
        found[:, begin : (begin := begin + len(piece))] = F.linear(hidden.float(), piece)
    slope = None
    if cap:
        slope = 1 - found.div_(cap).tanh_().square()
        found *= cap
    for rows in found.split(ROWS_AT_ONCE):
        rows.copy_(rows.softmax(-1))
    return found, slope
