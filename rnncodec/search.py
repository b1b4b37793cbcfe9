"""Search for better bits than the encoder's: what effort beyond one pass can do, at no cost to whoever decodes.

The encoder guesses in one pass which bits the decoder needs. Here the guess is only where a descent starts, along the
gradient of what counts, the error of the picture and the length of the code (as Campos et al. 2019 and Yang et al. 2020
do for other codecs).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rnncodec.binarizer import binarize
from rnncodec.context import ContextModel, code_nats
from rnncodec.network import RecurrentCodec, State, Step

RATE = 0.1  # of Adam, on features in (-1, 1)
# What a relative change of the code length counts, where one of the squared error counts 1. On photographs the error
# falls about so much faster than the code grows: at a larger weight shorter files would do better, at a smaller one
# longer ones.
LENGTH_WEIGHT = 0.7


@torch.no_grad()
def unroll(
    network: RecurrentCodec,
    x: Tensor,
    iterations: int,
    effort: int,
    context: ContextModel | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Step]:
    """The steps that encode images as `RecurrentCodec.unroll` does, with bits that have been searched for.

    In each iteration the bits minimize

        log(squared error after it) + 0.7 log(code length of it and all earlier ones)

    Args:
        network: in evaluation mode.
        x: [B, 3, H, W] in [-1, 1], H and W multiples of the stride.
        iterations: how many steps.
        effort: steps of the descent in each iteration, each of which costs a pass of the decoder and one back.
        context: in floats (`ContextModel.relaxed`), predicts the code length; None if all bits cost the same.
        size: height and width of what counts of x, from the top left; None for all. The rest is padding.
    """
    height, width = size or x.shape[-2:]
    state = memory = None
    spent = torch.zeros(len(x), device=x.device)  # length of the code of the earlier iterations in nats
    for t in range(iterations):
        start = network(state, x=x)
        assert start.y is not None
        prior = context and context.history.look(memory, start.bits)
        y = start.y.clone().requires_grad_()
        optimizer = torch.optim.Adam([y], RATE)
        best, least = start.bits, torch.full_like(spent, torch.inf)
        for i in range(effort + 1):
            with torch.set_grad_enabled(i < effort):
                bits = binarize(y, training=False)
                error = (x - network(state, bits=bits).x_hat)[..., :height, :width].square().sum((1, 2, 3))
                cost = error.clamp(min=1e-9).log() + LENGTH_WEIGHT * (spent + _length(bits, context, t, prior)).log()
                if i < effort:
                    (y.grad,) = torch.autograd.grad(cost.sum(), y)
                    optimizer.step()
            better = cost < least
            best = torch.where(better[:, None, None, None], bits.detach(), best)
            least = torch.where(better, cost.detach(), least)
        step = network(state, bits=best)
        state = State(start.state.encoder, step.state.decoder, step.x_hat)
        yield step._replace(state=state)
        spent = spent + _length(best, context, t, prior)
        memory = context and context.history(best, memory)


def _length(bits: Tensor, context: ContextModel | None, t: int, prior: Tensor | None) -> Tensor:
    """Code length of an iteration in nats, [B], or always the same without a context model."""
    if context is None or prior is None:
        return torch.ones(len(bits), device=bits.device)
    return code_nats(context.predictor(t)(bits, prior), bits).sum((1, 2, 3))
