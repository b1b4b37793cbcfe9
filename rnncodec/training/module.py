"""Training of the codec network: loss, schedules, guard against divergence, validation on whole images."""

import os
import random
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric, Metric, MetricCollection

from rnncodec.data import PatchDataModule
from rnncodec.metrics.curves import NAN, Point
from rnncodec.metrics.distortion import REPORTED_ITERATIONS, ms_ssim, psnr
from rnncodec.network import (
    LatentConfig,
    NetworkConfig,
    RecurrentCodec,
    Step,
    network_config,
    pad_to_blocks,
    to_uint8,
    widened,
)
from rnncodec.training.optim import MuonAdamW, parameter_groups
from rnncodec.training.tracking import curve_charts, log_rates, points_table
from rnncodec.weights import load_weights

START_BLOCKS = 2**16  # 16x16 blocks from which a latent network starts


def global_seed() -> int:
    """The seed that `lightning.seed_everything` has set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Training(L.LightningModule):
    """What every training here shares: schedule, seeds, and a guard against gradients that are not finite.

    Attributes:
        monitor: what decides on the best checkpoint, and whether its `min` or `max` is best.

    Args:
        learning_rate: of Adam or AdamW.
        weight_decay: decoupled, of every optimizer.
        warmup_steps: of the linear rise of all rates.
        decay_steps: of the linear fall of all rates to zero that ends with `trainer.max_steps`; a number below 1 is a
            share of them, 0 is for none.
        max_bad_steps: how many steps in a row with gradients that are not finite are skipped before training stops.
    """

    monitor: ClassVar[tuple[str, str]]

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup_steps: int, decay_steps: float, max_bad_steps: int
    ) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.max_bad_steps = max_bad_steps
        self.started_from = ""  # the fingerprint of given weights, whose name may stand for others one day
        self.bad_steps = self.bad_steps_in_a_row = 0

    def plain_hyperparameters(self, **values: Any) -> None:
        """Makes the saved hyperparameters what the constructor takes: plain values, nothing of the command line's."""
        for key in ("_instantiator", "_class_path"):
            self.hparams.pop(key, None)
        self.hparams.update(values)

    def configure_model(self) -> None:
        # Constant buffers need no broadcast, which ranks with unequal shares of images would not all take part in.
        constants = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer with its schedule, as Lightning takes it."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the learning rates: a linear rise, a plateau, a linear fall that ends at `max_steps`."""
        factor = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_steps and self.trainer.max_steps > 0:
            decay = self.decay_steps * (self.trainer.max_steps if self.decay_steps < 1 else 1)
            factor = min(factor, max(0.0, (self.trainer.max_steps - step) / decay))
        return factor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The random state is a function of the batch, so that a resumed run draws the same bits.
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(global_seed() * 2**32 + number)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]
        if torch.isfinite(norm):
            self.bad_steps_in_a_row = 0
        else:
            # Without gradients an optimizer leaves weights and moments as they are.
            for parameter in self.parameters():
                parameter.grad = None
            self.bad_steps += 1
            self.bad_steps_in_a_row += 1
            if self.bad_steps_in_a_row > self.max_bad_steps:
                raise FloatingPointError(f"gradients were not finite in {self.bad_steps_in_a_row} steps in a row")
        self.log("train/gradient_norm", norm)
        self.log("train/skipped_steps", float(self.bad_steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bad_steps"], checkpoint["seed"] = self.bad_steps, global_seed()
        checkpoint["started_from"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bad_steps = checkpoint["bad_steps"]
        self.started_from = checkpoint.get("started_from", "")  # not in those of former versions

    @property
    def tracked(self) -> bool:
        """Whether there is a W&B logger, on every rank alike."""
        return any(isinstance(logger, WandbLogger) for logger in self.loggers)

    def wandb_loggers(self) -> list[WandbLogger]:
        """The W&B loggers of this process; none on ranks above zero."""
        return [logger for logger in self.loggers if isinstance(logger, WandbLogger) and self.global_rank == 0]


class CodecTraining(Training):
    """Trains a `RecurrentCodec` on patches for the distortion of all iterations (Toderici et al. 2017, sec. 3.3).

    Args:
        network: shapes and equations of the network; None for those of Toderici et al. 2017.
        weights: to start from instead of random ones: a name of shipped weights, or path of a .safetensors file. Their
            network may have fewer channels (see `rnncodec.network.widened`) and another binarizer.
        iterations: steps of the unrolled loop, each weighted equally.
        pictures: of how many iterations a picture is made in each training step, drawn so that equal stretches of them
            have one each; 0 for all. A latent network needs few, since each costs more than an iteration.
        missing: in which share of the training steps of a latent network every location has a random number of groups
            of bits after which nothing is sent.
        distortion: `l1`, the mean of the L1 of all iterations (Toderici et al. 2017), or `rmse`, the geometric mean of
            their root mean square errors: a decibel counts the same in each iteration, however small its error.
        growth: iterations by the training step from which on they are unrolled: {0: 2, 1000: 4, 5000: [4, 8, 16]}. Of
            several, each step draws one. They never exceed `iterations`, which an empty mapping unrolls from the start.
        optimizer: `adam` (the papers'), or `muon`: Muon for the recurrent kernels beside AdamW for the rest.
        learning_rate: of Adam or AdamW.
        muon_learning_rate: of Muon.
        start_learning_rate: with `muon`, of what a latent network starts with: linear transforms and tables.
        weight_decay: decoupled, of every optimizer.
        warmup_steps: of the linear rise of both rates.
        decay_steps: of the linear fall of both rates to zero that ends with `trainer.max_steps`; a number below 1 is a
            share of them, 0 is for none.
        compile: whether to compile the step with `torch.compile` (validation stays eager).
        max_bad_steps: how many steps in a row with gradients that are not finite are skipped before training stops.
    """

    monitor = "val/psnr", "max"

    def __init__(
        self,
        network: NetworkConfig | LatentConfig | None = None,
        weights: str | None = None,
        iterations: int = 16,
        pictures: int = 0,
        missing: float = 0.0,
        distortion: Literal["l1", "rmse"] = "l1",
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
                self.network = widened(start.network, self.network.config)
            except ValueError as error:
                raise ValueError(f"{weights}: {error}") from error
            self.started_from = start.fingerprint.hex()
        self.save_hyperparameters()
        self.plain_hyperparameters(network=asdict(self.network.config))
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.iterations, self.distortion = iterations, distortion
        self.pictures, self.missing = pictures, missing
        self.starts = isinstance(self.network.config, LatentConfig) and weights is None
        self.growth = {int(step): [k] if isinstance(k, int) else list(k) for step, k in (growth or {}).items()}
        self.optimizer, self.muon_learning_rate = optimizer, muon_learning_rate
        self.start_learning_rate = start_learning_rate
        if compile:
            self.network.compile(dynamic=False)
        # MS-SSIM is not defined for small images: these do not count.
        means: dict[str, Metric | MetricCollection] = {
            f"{name}_{k}": MeanMetric(nan_strategy="ignore")
            for k in REPORTED_ITERATIONS
            for name in ("psnr", "ms_ssim")
        }
        self.val_metrics = MetricCollection(means, compute_groups=False)
        # Of the validation that runs, on this rank, and of the last one: for W&B.
        self.val_points: list[Point] = []
        self.val_curve: list[Point] = []

    def current_iterations(self, step: int) -> int:
        """Iterations to unroll at a training step: a function of seed and step, so that all ranks draw the same."""
        start = max((start for start in self.growth if start <= step), default=None)
        choices = [self.iterations] if start is None else self.growth[start]
        return min(self.iterations, random.Random(f"{global_seed()} {step}").choice(choices))

    def fewest_iterations(self) -> int:
        """Iterations that are unrolled at some time, at the least."""
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
        """Parameters with learning rates of their own, beside Muon."""
        started = self.network.started()
        return [(started, self.start_learning_rate)] if started else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.starts = False

    def start_network(self) -> None:
        """Starts a latent network from images, in one process that hands it to all, unless a checkpoint has been."""
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
        """What a training derives from the network that it starts from."""

    def on_fit_start(self) -> None:
        config = self.network.config
        recurrent = isinstance(config, LatentConfig) or "none" not in (config.encoder_cell, config.decoder_cell)
        if recurrent and self.trainer.world_size > 1 and self.fewest_iterations() < 2:
            raise ValueError("several processes need at least 2 iterations: in one, hidden kernels have no gradient")
        self.start_network()

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        iterations = self.current_iterations(self.global_step)
        loss = self.loss(x, list(self.network.unroll(self.network.analyse(x), iterations, self.limit(x))))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/iterations", float(iterations))
        return loss

    def draws(self, iterations: int) -> list[int]:
        """The iterations whose pictures count in a training step, from 0: the same on all ranks."""
        if self.pictures == 0 or self.pictures >= iterations:
            return list(range(iterations))
        chance = random.Random(f"{global_seed()} {self.global_step} pictures")
        ends = [iterations * i // self.pictures for i in range(self.pictures + 1)]
        return [chance.randrange(start, end) for start, end in pairwise(ends)]

    def limit(self, x: Tensor) -> Tensor | None:
        """How many groups of bits each location may have, in that share of the steps whose bits are not all sent."""
        config = self.network.config
        chance = random.Random(f"{global_seed()} {self.global_step} missing").random()
        if not isinstance(config, LatentConfig) or chance >= self.missing:
            return None
        batch, _, height, width = x.shape
        counts = config.iterations * config.groups
        shape = batch, height // config.stride, width // config.stride
        return torch.randint(1, counts + 1, shape, device=x.device)

    def loss(self, x: Tensor, steps: list[Step]) -> Tensor:
        """The distortion of the steps of the unrolled loop of which pictures are made."""
        residuals = {t + 1: x - self.network.picture(steps[t].state) for t in self.draws(len(steps))}
        self.log_dict(
            {f"train/l1_{k}": residuals[k].detach().abs().mean() for k in REPORTED_ITERATIONS if k in residuals}
        )
        return self.mean_distortion([self.error(residual) for residual in residuals.values()])

    def error(self, residual: Tensor) -> Tensor:
        """What the distortion counts of an iteration: the mean absolute or squared residual."""
        return residual.abs().mean() if self.distortion == "l1" else residual.square().mean()

    def mean_distortion(self, errors: list[Tensor]) -> Tensor:
        """The distortion of all iterations, in units of x, of the `error` after each."""
        stacked = torch.stack(errors)
        return stacked.mean() if self.distortion == "l1" else (stacked.clamp(min=1e-12).log().mean() / 2).exp()

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        height, width = x.shape[-2:]
        padded = pad_to_blocks(x, self.network.config.stride)
        original, pictures, bits, cases, losses, errors = to_uint8(x), [], [], [], [], []
        with torch.compiler.set_stance("force_eager"):  # every size of image would be compiled anew
            for k, step in enumerate(
                self.network.unroll(self.network.analyse(padded), max(REPORTED_ITERATIONS)), start=1
            ):
                bits.append(step.bits)
                cases.append(step.cases)
                picture = self.network.picture(step.state)
                residual = padded - picture
                losses.append(residual.abs().mean())
                errors.append(self.error(residual))
                if k in REPORTED_ITERATIONS:
                    x_hat = to_uint8(picture[..., :height, :width])
                    qualities = psnr(original, x_hat), ms_ssim(original, x_hat)
                    for name, quality in zip(("psnr", "ms_ssim"), qualities, strict=True):
                        self.val_metrics[f"{name}_{k}"].update(quality)
                    if self.tracked:
                        size = sum(plane.numel() for plane in bits) / 8 / len(x)
                        bpp = 8 * size / (height * width)
                        means = dict(zip(("psnr", "ms_ssim"), (q.mean().item() for q in qualities), strict=True))
                        self.val_points.append(Point(self.image_name(batch_idx), "", k, size, bpp, **means))
                    pictures.append(x_hat)
        self.log("val/l1", torch.stack(losses).mean(), batch_size=1, sync_dist=True)
        self.validate_rate(bits, cases, self.mean_distortion(errors))
        if batch_idx == 0:
            strip = torch.cat([original, *pictures], dim=-1)[0].permute(1, 2, 0).cpu().numpy()
            for logger in self.wandb_loggers():
                logger.log_image(
                    "val/reconstructions", [strip], caption=[f"original, then {REPORTED_ITERATIONS} iterations"]
                )

    def validate_rate(self, bits: list[Tensor], cases: list[Tensor | None], distortion: Tensor) -> None:
        """What a training that counts bits adds to the validation of an image, given its bits and their cases."""

    def on_validation_epoch_end(self) -> None:
        values = self.val_metrics.compute()
        self.val_metrics.reset()
        self.log_dict({f"val/{name}": value for name, value in values.items()})
        self.log("val/psnr", torch.stack([values[f"psnr_{k}"] for k in REPORTED_ITERATIONS]).mean(), prog_bar=True)
        bpp = self.network.config.bits / self.network.config.stride**2
        measures = {
            k: {name: values[f"{name}_{k}"].item() for name in ("psnr", "ms_ssim")} for k in REPORTED_ITERATIONS
        }
        self.val_curve = [Point("mean", "", k, NAN, k * bpp, **measures[k]) for k in REPORTED_ITERATIONS]
        points = self.gather_points()
        for logger in self.wandb_loggers():
            run = logger.experiment
            table = points_table(replace(point, codec=run.name or "") for point in points)
            run.log({"val/images": table, **curve_charts({run.name or "": self.val_curve})})

    def on_fit_end(self) -> None:
        for logger in self.wandb_loggers():
            log_rates(logger.experiment, self.val_curve)

    def image_name(self, batch_idx: int) -> str:
        """The name of a validation image of this rank, or its number if the data have no names."""
        number = batch_idx * self.trainer.world_size + self.global_rank
        data = getattr(self.trainer, "datamodule", None)
        return data.val_names[number] if isinstance(data, PatchDataModule) else str(number)

    def gather_points(self) -> list[Point]:
        """The points of the validation images of all ranks, in order of the images' names."""
        shares: list[Any] = [self.val_points]
        if self.trainer.world_size > 1 and self.tracked:
            shares *= self.trainer.world_size
            torch.distributed.all_gather_object(shares, self.val_points)
        self.val_points = []
        return sorted((point for share in shares for point in share), key=lambda point: point.image)
