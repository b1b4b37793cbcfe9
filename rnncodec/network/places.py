"""Picks the locations of a map that still change, so that a step computes nothing for those that have stopped."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 3  # of the neighborhood of a location
MOST = 0.7  # share of locations that go on above which it is faster to compute all of them


class Places:
    """Some locations of maps [B, C, H, W].

    Picked values are maps [1, C, 1, n], to which 1x1 convolutions apply as to any other.

    Attributes:
        here: numbers of the picked locations, long [n].
        near: numbers of these and their neighbors, long [m].
        within: where in `near` the picked ones are, long [n].
        around: where in `near` the 3x3 locations around each are, long [n, 9], and m beyond the border.
    """

    def __init__(self, going: Tensor) -> None:
        """Picks the locations of a mask, bool [B, 1, H, W]."""
        near = F.max_pool2d(going.float(), SIDE, 1, SIDE // 2) > 0
        self.here, self.near = (mask.flatten().nonzero().squeeze(1) for mask in (going, near))
        number = torch.where(near, near.flatten().cumsum(0).view_as(near) - 1, len(self.near))
        self.within = number.flatten()[self.here]
        padded = F.pad(number, [SIDE // 2] * 4, value=len(self.near))
        around = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1).reshape(-1, SIDE * SIDE)
        self.around = around[self.here]

    @classmethod
    def of(cls, going: Tensor | None, training: bool) -> "Places | None":
        """Picks the locations of a mask; None if all are to be computed, as always in training."""
        if going is None or training or not 0 < float(going.float().mean()) <= MOST:
            return None
        return cls(going)


def pick(x: Tensor, places: Tensor) -> Tensor:
    """The values of maps [B, C, H, W] at the locations of given numbers, [1, C, 1, n]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, places).T[None, :, None]


def put(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A copy of maps [B, C, H, W] with other values at the locations of given numbers."""
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(0, 2).index_copy(0, places, values[0, :, 0].T.to(x.dtype))
    return rows.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


def convolve(layer: torch.nn.Conv2d, near: Tensor, places: Places) -> Tensor:
    """A 3x3 convolution at the picked locations, [1, C, 1, n], of values [1, C, 1, m] at `near`."""
    rows = near[0, :, 0].T
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    columns = rows.index_select(0, places.around.flatten()).view(len(places.around), -1)  # [n, 9 C]
    kernel = layer.weight.permute(2, 3, 1, 0).flatten(0, 2).to(rows.dtype)
    found = columns @ kernel if layer.bias is None else torch.addmm(layer.bias.to(rows.dtype), columns, kernel)
    return found.T[None, :, None]
