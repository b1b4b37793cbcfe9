"""What a network is made of: the parts that the loop of `RecurrentCodec` joins, and what it expects of each."""

from typing import Any, NamedTuple

from torch import nn


class Parts(NamedTuple):
    """The parts of a `RecurrentCodec`, which the method `parts` of its config makes.

    The loop runs on y: images, or latents. Encoder, binarizer and decoder take their state after the step before, None
    at first, and give the new one. A state is any structure of tensors.

    Attributes:
        transforms: `analyse(x)` makes y of images [B, 3, H, W]; `synthesise(y_hat, state of the decoder, window)` makes
            images of a window of blocks; `halos` tells how many blocks beyond a block the two see on each side.
        encoder: `(residual of y, state, limit)` to features and state.
        binarizer: `(features, residual, state, limit)` to `Coded`; `values(bits, state)` to the same, given the bits.
        decoder: `(values of Coded, state, y_hat)` to what the step adds to y_hat, and state.
        gain: y_hat to factors of the residual; None for no factors.
        sums: whether what the decoder gives is added to y_hat, instead of replacing it.
    """

    transforms: Any
    encoder: Any
    binarizer: Any
    decoder: Any
    gain: nn.Module | None = None
    sums: bool = True
