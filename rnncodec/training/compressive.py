"""Training of compressive autoencoders: one rate first, then the scales and priors of all others."""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rnncodec.metrics.curves import NAN, Point
from rnncodec.metrics.distortion import DISTORTIONS
from rnncodec.network import CompressiveAutoencoder, CompressiveConfig, to_uint8
from rnncodec.training.base import Training, global_seed
from rnncodec.training.optim import MuonAdamW
from rnncodec.training.records import VALIDATED, Validated


class CompressiveTraining(Training):
    """Trains a `CompressiveAutoencoder` to minimize rate and distortion (Theis et al. 2017, sec. 2 and 3.2).

        loss = bits per pixel + weight of the distortion * mean squared error, of values in [0, 1]

    All coefficients and transforms are trained for one rate, whose scales and priors the other rates follow. Then the
    transforms stay as they are, and all rates learn their own scales and priors (sec. 2.5), one rate in each step.

    Args:
        network: config of the network; None for that of the paper.
        distortion_weights: of each rate, rising.
        first: the number of the rate that is trained first, from 0.
        growth_steps: steps in which the coefficients come one after another, instead of all at once (sec. 2.4).
        scale_steps: the last steps, in which only scales and priors are trained; a number below 1 is a fraction of
            `trainer.max_steps`.
        learning_rate: of AdamW.
        prior_learning_rate: of AdamW for scales and priors, which are logarithms and have far to go.
        muon_learning_rate: of Muon, for the kernels of all convolutions but the first and the last.
        weight_decay: decoupled weight decay.
        warmup_steps: steps in which the learning rates rise linearly.
        decay_steps: steps in which they fall linearly to zero, up to `trainer.max_steps`; a number below 1 is a
            fraction of `trainer.max_steps`, and 0 means no fall.
        max_bad_steps: how many steps in a row with non-finite gradients are skipped before training stops.
    """

    monitor = "val/loss", "min"

    def __init__(
        self,
        network: CompressiveConfig | None = None,
        distortion_weights: tuple[float, ...] = (30.0, 75.0, 190.0, 480.0, 1200.0, 3000.0),
        first: int = 3,
        growth_steps: int = 0,
        scale_steps: float = 0.2,
        learning_rate: float = 2e-3,
        prior_learning_rate: float = 0.03,
        muon_learning_rate: float = 5e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        decay_steps: float = 0,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, decay_steps, max_bad_steps)
        self.network = CompressiveAutoencoder(
            CompressiveConfig(**network) if isinstance(network, dict) else network or CompressiveConfig()
        )
        rates = self.network.config.rates
        if len(distortion_weights) != rates or not 0 <= first < rates:
            raise ValueError(f"{rates} rates need as many weights of the distortion, and the first is one of them")
        if min(distortion_weights) <= 0 or any(a >= b for a, b in pairwise(distortion_weights)):
            raise ValueError(f"weights of the distortion are positive and rise, unlike {list(distortion_weights)}")
        if not scale_steps >= 0:
            raise ValueError(f"scale_steps must not be negative, as {scale_steps} is")
        self.prior_learning_rate, self.muon_learning_rate = prior_learning_rate, muon_learning_rate
        self.distortion_weights, self.first = tuple(distortion_weights), first
        self.growth_steps, self.scale_steps = growth_steps, scale_steps
        with torch.no_grad():  # where the distortion counts four times as much, steps are half as large
            for rate, weight in enumerate(self.distortion_weights):
                self.network.scale[rate] += math.log(weight / self.distortion_weights[first]) / 2
        self.save_hyperparameters()
        self.plain_hyperparameters(network=asdict(self.network.config))
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def on_fit_start(self) -> None:
        if self.trainer.max_steps < 1 and self.scale_steps and self.network.config.rates > 1:
            raise ValueError("scale_steps are the last ones of trainer.max_steps, which must be set")

    def configure_optimizers(self) -> Any:
        network = self.network
        kernels = [
            layer.weight
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d) and layer not in (network.analysis[0], network.synthesis[-2])
        ]
        priors = [network.scale, network.deviation, network.weight]
        taken = {*kernels, *priors}
        groups = [
            {"params": kernels, "gates": 1, "lr": self.muon_learning_rate},
            {"params": priors, "gates": 0, "lr": self.prior_learning_rate},
            {"params": [p for p in network.parameters() if p not in taken], "gates": 0, "lr": self.learning_rate},
        ]
        return self.scheduled(MuonAdamW(groups, weight_decay=self.weight_decay))

    def scaling(self) -> int:
        """The step from which only scales and priors are trained."""
        most = self.trainer.max_steps
        last = self.scale_steps * most if self.scale_steps < 1 else min(self.scale_steps, most)
        return round(most - last) if most > 0 else most

    def scaled(self) -> bool:
        """Whether only scales and priors are trained in this step."""
        return 0 <= self.scaling() <= self.global_step

    def rate(self) -> int:
        """The rate of this step, the same on all ranks."""
        if not self.scaled():
            return self.first
        return random.Random(f"{global_seed()} {self.global_step} rate").randrange(self.network.config.rates)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if not self.scaled() or self.global_step == self.scaling():
            self.follow_first()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaled():  # gradients are dropped rather than not computed: with several processes, DDP waits for them
            for parameter in (*self.network.analysis.parameters(), *self.network.synthesis.parameters()):
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    @torch.no_grad()
    def follow_first(self) -> None:
        """Gives all rates what the first one has learned, their scales as far from it as at the start.

        In each step, because averaged weights would otherwise keep a part of what they were at the start.
        """
        network, first = self.network, self.first
        weights = torch.tensor(self.distortion_weights, device=network.scale.device)
        apart = torch.log(weights / weights[first])[:, None] / 2
        network.scale.copy_(network.scale[first] + apart)
        network.deviation.copy_(network.deviation[first] + apart[..., None])
        network.weight.copy_(network.weight[first].expand_as(network.weight))

    def active(self) -> int | None:
        """How many coefficients there are in this step; None for all."""
        if self.global_step >= self.growth_steps:
            return None
        return 1 + self.network.config.coefficients * self.global_step // self.growth_steps

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        rate = self.rate()
        x_hat, nats = self.network(x, rate, self.active())
        bpp, error = self.bpp(nats, x), self.error(x, x_hat)
        self.log("train/bpp", bpp, prog_bar=True)
        self.log("train/rate", float(rate))
        loss = bpp + self.distortion_weights[rate] * error
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def bpp(self, nats: Tensor, x: Tensor) -> Tensor:
        """Bits per pixel of images x, from the code lengths of their integers."""
        return nats.sum() / math.log(2) / (len(x) * x.shape[-2] * x.shape[-1])

    def error(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The mean squared error of values in [0, 1]."""
        return (x - x_hat.float()).square().mean() / 4

    def validation_step(self, x: Tensor, batch_idx: int) -> Validated:
        height, width = x.shape[-2:]
        original = to_uint8(x)
        values: dict[str, float] = {}
        points, pictures, losses = [], [original], []
        for rate, weight in enumerate(self.distortion_weights):
            x_hat, nats = self.network(x, rate)
            bpp = self.bpp(nats, x).item()
            losses.append(bpp + weight * self.error(x, x_hat).item())
            decoded = to_uint8(x_hat)
            metrics: dict[str, Any] = {name: DISTORTIONS[name](original, decoded).mean().item() for name in VALIDATED}
            values |= {f"{name}_{rate + 1}": value for name, value in metrics.items()} | {f"bpp_{rate + 1}": bpp}
            points.append(Point("", "", rate + 1, bytes=bpp * height * width / 8, bpp=bpp, **metrics))
            pictures.append(decoded)
        values["loss"] = sum(losses) / len(losses)
        values |= {"psnr": values[f"psnr_{self.first + 1}"], "bpp": values[f"bpp_{self.first + 1}"]}
        shown = [picture[0] for picture in pictures] if batch_idx == 0 else []
        return {"values": values, "points": points, "reconstructions": shown, "maps": {}}

    def curve(self, means: Mapping[str, float]) -> list[Point]:
        rates = range(1, self.network.config.rates + 1)
        metrics: dict[int, dict[str, Any]] = {k: {name: means[f"{name}_{k}"] for name in VALIDATED} for k in rates}
        return [Point("mean", "", k, NAN, means[f"bpp_{k}"], **metrics[k]) for k in rates]
