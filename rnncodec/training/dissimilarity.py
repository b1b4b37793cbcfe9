"""The L1 error with blocks weighted by how little their structure is alike, of Johnston et al. 2018."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

SIDE = 8  # of a block, in pixels
MOMENTUM = 0.01  # of the moving average


def dissimilarity(x: Tensor, x_hat: Tensor) -> Tensor:
    """(1 - SSIM) / 2 of blocks of 8x8 pixels: 0 where they are equal, at most 1.

    SSIM as in Wang et al. 2004, with blocks as windows, of each channel.

    Args:
        x: originals [B, 3, H, W] in [-1, 1], with sides that are multiples of 8.
        x_hat: reconstructions, likewise.

    Returns:
        float32 [B, 3, H / 8, W / 8].
    """
    a, b = (x.float() + 1) / 2, (x_hat.float() + 1) / 2  # in [0, 1], for which the two constants are

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, SIDE)

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a.square()) - mean_a.square() + mean(b.square()) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    return (1 - light * (2 * covariance + 0.03**2) / (variances + 0.03**2)) / 2


class DissimilarityWeights(nn.Module):
    """The mean L1 error of blocks, each weighted by its dissimilarity over the moving average of all.

    The weights are constants to the gradient.
    """

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.tensor(torch.nan))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The weighted error of x_hat [B, 3, H, W] as a reconstruction of x; in training it moves the average."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = dissimilarity(x, x_hat)
            if self.training:
                mean = found.mean()
                if torch.distributed.is_initialized():  # or each process would weight errors differently
                    torch.distributed.all_reduce(mean)
                    mean /= torch.distributed.get_world_size()
                mean = torch.where(mean.isfinite(), mean, self.average)  # a step with such values is skipped
                before = torch.where(self.average.isnan(), mean, self.average)  # it starts with the first batch
                self.average.copy_(before.lerp(mean, MOMENTUM))
            weights = found / self.average.clamp(min=1e-6)
        return (weights * avg_pool2d((x - x_hat).abs(), SIDE)).mean()
