"""Training of the codec network: unrolled iterations, loss, and validation on whole images."""

import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from rnncodec.allocation import block_errors
from rnncodec.data import PatchDataModule
from rnncodec.metrics.curves import NAN, Point
from rnncodec.metrics.distortion import DISTORTIONS, REPORTED_ITERATIONS
from rnncodec.network import (
    AnyConfig,
    LatentConfig,
    RecurrentCodec,
    Step,
    network_config,
    pad_to_blocks,
    to_uint8,
    widened,
)
from rnncodec.training.base import Training, global_seed
from rnncodec.training.dissimilarity import DissimilarityWeights
from rnncodec.training.optim import MuonAdamW, parameter_groups
from rnncodec.training.records import VALIDATED, Validated
from rnncodec.weights import load_weights

START_BLOCKS = 2**16  # 16x16 blocks of training images from which a latent network is initialized


class CodecTraining(Training):
    """Trains a `RecurrentCodec` on patches to minimize the distortion of all iterations.

    Toderici et al. 2017, sec. 3.3.

    Args:
        network: config of the network; None for that of Toderici et al. 2017.
        weights: weights to start from, instead of random ones: name of shipped weights, or path of a .safetensors file.
            Their network may have fewer channels (see `rnncodec.network.widened`), another binarizer, and other priming
            and diffusion.
        iterations: steps of the unrolled loop, each weighted equally; of a latent network, at most as many as it has.
        pictures: number of iterations that are reconstructed in a training step, one drawn from each of as many equal
            ranges; 0 for all. A latent network needs few, because reconstruction costs more than an iteration.
        missing: fraction of the training steps of a latent network in which locations receive only a random number of
            their groups of bits: in half of the images each its own, in the others all the same, as in a file that was
            cut.
        distortion: `l1`, the mean L1 error of all iterations (Toderici et al. 2017); `ssim_l1`, the same with blocks
            weighted by how little their structure is alike (Johnston et al. 2018); or `rmse`, the geometric mean of
            root mean square errors, in which a decibel counts the same in each iteration.
        growth: number of iterations to unroll, by the training step from which it applies, such as {0: 2, 1000: 4,
            5000: [4, 8, 16]}; of a list, each step draws one. Numbers are limited to `iterations`, which are unrolled
            from the start if the mapping is empty.
        optimizer: `adam` (as in the papers), or `muon`, which is Muon for the kernels of recurrent cells and AdamW for
            all other parameters.
        learning_rate: of Adam or AdamW.
        muon_learning_rate: of Muon.
        start_learning_rate: with `muon`, learning rate of the parts of a latent network that are initialized from
            images: linear transforms and tables.
        weight_decay: decoupled weight decay of every optimizer.
        warmup_steps: steps in which all learning rates rise linearly.
        decay_steps: steps in which all learning rates fall linearly to zero, up to `trainer.max_steps`; a number below
            1 is a fraction of `trainer.max_steps`, and 0 means no fall.
        compile: whether to compile the step with `torch.compile` (validation stays eager).
        max_bad_steps: how many steps in a row with non-finite gradients are skipped before training stops.
    """

    monitor = "val/psnr", "max"

    def __init__(
        self,
        network: AnyConfig | None = None,
        weights: str | None = None,
        iterations: int = 16,
        pictures: int = 0,
        missing: float = 0.0,
        distortion: Literal["l1", "ssim_l1", "rmse"] = "l1",
        growth: dict[int, int | list[int]] | None = None,
        optimizer: Literal["adam", "muon"] = "adam",
        learning_rate: float = 5e-4,
        muon_learning_rate: float = 0.02,
        start_learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        decay_steps: float = 0,
        compile: bool = False,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, decay_steps, max_bad_steps)
        # A checkpoint holds plain values: a mapping for the network, and possibly text for the steps of growth.
        self.network = RecurrentCodec(network_config(network) if isinstance(network, dict) else network)
        if weights is not None:
            start = load_weights(weights)
            try:
                self.network = widened(start.recurrent, self.network.config)
            except ValueError as error:
                raise ValueError(f"{weights}: {error}") from error
            self.started_from = start.fingerprint.hex()
        self.save_hyperparameters()
        self.plain_hyperparameters(network=asdict(self.network.config))
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        config = self.network.config
        most = config.iterations if isinstance(config, LatentConfig) else max(iterations, *REPORTED_ITERATIONS)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {iterations}")
        self.reported = tuple(k for k in REPORTED_ITERATIONS if k <= most)  # those that validation measures
        self.iterations, self.distortion = min(iterations, most), distortion
        self.weights = DissimilarityWeights() if distortion == "ssim_l1" else None
        self.pictures, self.missing = pictures, missing
        self.starts = isinstance(config, LatentConfig) and weights is None
        self.growth = {int(step): [k] if isinstance(k, int) else list(k) for step, k in (growth or {}).items()}
        self.optimizer, self.muon_learning_rate = optimizer, muon_learning_rate
        self.start_learning_rate = start_learning_rate
        if compile:
            self.network.compile(dynamic=False)

    def current_iterations(self, step: int) -> int:
        """The number of iterations to unroll at a training step; depends on seed and step, so that all ranks agree."""
        start = max((start for start in self.growth if start <= step), default=None)
        choices = [self.iterations] if start is None else self.growth[start]
        return min(self.iterations, random.Random(f"{global_seed()} {step}").choice(choices))

    def fewest_iterations(self) -> int:
        """The smallest number of iterations that any training step unrolls."""
        return min(k for choices in [[self.iterations], *self.growth.values()] for k in choices)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "muon":
            groups = parameter_groups(self, self.learning_rate, self.muon_learning_rate)
            for parameters, rate in self.own_rates():
                chosen = set(parameters)
                groups[-1]["params"] = [parameter for parameter in groups[-1]["params"] if parameter not in chosen]
                groups.insert(0, {"params": parameters, "gates": 0, "lr": rate})
            optimizer: torch.optim.Optimizer = MuonAdamW(groups, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return self.scheduled(optimizer)

    def own_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters with their own learning rates of AdamW, for the optimizer `muon`."""
        started = self.network.started()
        return [(started, self.start_learning_rate)] if started else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.starts = False

    def start_network(self) -> None:
        """Initializes a latent network from training images on rank zero and broadcasts it.

        Does nothing in a resumed run, or if the training starts from weights.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not self.starts or not isinstance(data, PatchDataModule):
            return
        if self.trainer.is_global_zero:
            rank_zero_info("finding principal components and questions")
            self.network.start(data.sample(START_BLOCKS * self.network.config.stride**2).to(self.device))
        state = {key: value.cpu() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.trainer.strategy.broadcast(state))
        self.prepare()

    def prepare(self) -> None:
        """Called after a latent network has been initialized from images; subclasses may override it."""

    def on_fit_start(self) -> None:
        config = self.network.config
        recurrent = isinstance(config, LatentConfig) or "none" not in (config.encoder_cell, config.decoder_cell)
        if recurrent and self.trainer.world_size > 1 and self.fewest_iterations() < 2:
            raise ValueError("several processes need at least 2 iterations: in one, hidden kernels have no gradient")
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PatchDataModule) and data.patch_size % config.stride:
            raise ValueError(f"patches of {data.patch_size} pixels a side are no multiple of blocks of {config.stride}")
        self.start_network()

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        iterations = self.current_iterations(self.global_step)
        loss = self.loss(x, list(self.network.unroll(self.network.analyse(x), iterations, self.limit(x))))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/iterations", float(iterations))
        return loss

    def draws(self, iterations: int) -> list[int]:
        """The iterations, counted from 0, that are reconstructed in a training step; the same on all ranks."""
        if self.pictures == 0 or self.pictures >= iterations:
            return list(range(iterations))
        generator = random.Random(f"{global_seed()} {self.global_step} pictures")
        ends = [iterations * i // self.pictures for i in range(self.pictures + 1)]
        return [generator.randrange(start, end) for start, end in pairwise(ends)]

    def limit(self, x: Tensor) -> Tensor | None:
        """The most groups of bits of each location, or None in training steps in which no bits are missing."""
        config = self.network.config
        drawn = random.Random(f"{global_seed()} {self.global_step} missing").random()
        if not isinstance(config, LatentConfig) or drawn >= self.missing:
            return None
        batch, _, height, width = x.shape
        counts = config.iterations * config.groups
        shape = batch, height // config.stride, width // config.stride
        each = torch.randint(1, counts + 1, shape, device=x.device)
        cut = torch.rand(batch, 1, 1, device=x.device) < 0.5
        return torch.where(cut, each[:, :1, :1], each)

    def loss(self, x: Tensor, steps: list[Step]) -> Tensor:
        """The loss of the unrolled steps, here the distortion of those that `draws` selects."""
        pictures = {t + 1: self.network.picture(steps[t].state) for t in self.draws(len(steps))}
        self.log_dict(
            {f"train/l1_{k}": (x - pictures[k]).detach().abs().mean() for k in REPORTED_ITERATIONS if k in pictures}
        )
        return self.mean_distortion([self.error(x, x_hat) for x_hat in pictures.values()])

    def error(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The error of one iteration: the mean absolute, weighted absolute, or squared residual."""
        if self.distortion == "rmse":
            return (x - x_hat).square().mean()
        return (x - x_hat).abs().mean() if self.weights is None else self.weights(x, x_hat)

    def mean_distortion(self, errors: list[Tensor]) -> Tensor:
        """The distortion of all iterations, in units of x, from the `error` of each."""
        stacked = torch.stack(errors)
        return stacked.mean() if self.distortion != "rmse" else (stacked.clamp(min=1e-12).log().mean() / 2).exp()

    def validation_step(self, x: Tensor, batch_idx: int) -> Validated:
        height, width = x.shape[-2:]
        stride = self.network.config.stride
        padded = pad_to_blocks(x, stride)
        raw = self.network.config.bits * (padded.shape[-2] // stride) * (padded.shape[-1] // stride)
        original, bits, cases, losses, errors = to_uint8(x), [], [], [], []
        values, points, pictures, blocks = {}, [], [original], []
        with torch.compiler.set_stance("force_eager"):  # each image size would need another compilation
            steps = self.network.unroll(self.network.analyse(padded), max(self.reported))
            for k, step in enumerate(steps, start=1):
                bits.append(step.bits)
                cases.append(step.cases)
                picture = self.network.picture(step.state)
                losses.append((padded - picture).abs().mean())
                errors.append(self.error(padded, picture))
                if batch_idx == 0:
                    blocks.append(block_errors(padded[:1], picture[:1].float(), stride, "psnr"))
                if k in self.reported:
                    x_hat = to_uint8(picture[..., :height, :width])
                    metrics: dict[str, Any] = {
                        name: DISTORTIONS[name](original, x_hat).mean().item() for name in VALIDATED
                    }
                    values |= {f"{name}_{k}": value for name, value in metrics.items()}
                    points.append(Point("", "", k, bytes=k * raw / 8, bpp=k * raw / (height * width), **metrics))
                    pictures.append(x_hat)
        values["psnr"] = sum(values[f"psnr_{k}"] for k in self.reported) / len(self.reported)
        values["l1"] = torch.stack(losses).mean().item()
        values |= self.validated_rate(bits, cases, self.mean_distortion(errors))
        if batch_idx:
            return {"values": values, "points": points, "reconstructions": [], "maps": {}}
        maps = self.maps([each[:1] for each in bits], [each if each is None else each[:1] for each in cases], blocks)
        maps = {name: enlarged(plane, stride)[:, :height, :width] for name, plane in maps.items()}
        return {"values": values, "points": points, "reconstructions": [each[0] for each in pictures], "maps": maps}

    def maps(self, bits: list[Tensor], cases: list[Tensor | None], errors: list[Tensor]) -> dict[str, Tensor]:
        """Maps of an image's blocks, from 0 to 1, [rows, cols], by name; none without adaptive rates.

        Args:
            bits: of each iteration.
            cases: of these bits.
            errors: squared error of each block after each iteration, [rows, cols].
        """
        return {}

    def validated_rate(self, bits: list[Tensor], cases: list[Tensor | None], distortion: Tensor) -> dict[str, float]:
        """More values of an image, from its bits and their cases, in trainings that minimize the rate."""
        return {}

    def curve(self, means: Mapping[str, float]) -> list[Point]:
        bpp = self.network.config.bits / self.network.config.stride**2
        metrics: dict[int, dict[str, Any]] = {
            k: {name: means[f"{name}_{k}"] for name in VALIDATED} for k in self.reported
        }
        return [Point("mean", "", k, NAN, k * bpp, **metrics[k]) for k in self.reported]


def enlarged(plane: Tensor, stride: int) -> Tensor:
    """A gray picture of values from 0 to 1 of blocks of `stride` pixels a side, uint8 [3, H, W]."""
    gray = (plane * 255).round().to(torch.uint8)
    return gray.repeat_interleave(stride, 0).repeat_interleave(stride, 1).expand(3, -1, -1)
