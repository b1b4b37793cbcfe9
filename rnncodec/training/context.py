"""Training of context models, on the bits of a frozen codec or together with a codec."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import wandb
from torch import Tensor, nn

from rnncodec.allocation import ErrorSurvey
from rnncodec.entropy import ContextConfig, ContextModel, code_length, code_nats
from rnncodec.metrics.distortion import REPORTED_ITERATIONS
from rnncodec.network import AnyConfig, LatentBinarizer, LatentConfig, RecurrentCodec, Step, pad_to_blocks
from rnncodec.training.base import Training
from rnncodec.training.module import CodecTraining
from rnncodec.training.records import Validated
from rnncodec.weights import DEFAULT_NAME, load_weights


def _config(values: ContextConfig | dict[str, Any] | None, network: AnyConfig) -> ContextConfig:
    """Completes a config, or its values from a checkpoint, with the shape of the bits of a network.

    Raises:
        ValueError: the kind is grouped and the network is not latent.
    """
    latent = isinstance(network, LatentConfig)
    config = ContextConfig(**values) if isinstance(values, dict) else values
    config = config or ContextConfig(kind="grouped" if latent else "sequential")
    if latent and config.kind == "grouped":
        return replace(config, bits=network.bits, groups=network.groups, iterations=network.iterations)
    if config.kind == "grouped":
        raise ValueError("a context model of the grouped kind needs a latent network, whose bits answer questions")
    return replace(config, bits=network.bits)


def _check_unroll(module: Training, iterations: int, configs: Sequence[ContextConfig]) -> None:
    """Checks that every weight has a gradient if there are several processes, which would otherwise wait for it.

    Raises:
        ValueError: there are too few iterations.
    """
    own = [config.iterations for config in configs if config.kind != "grouped"]  # grouped: one tensor has them all
    needed = max([3, *own])  # the LSTM's hidden kernel has no gradient before the third
    if module.trainer.world_size > 1 and iterations < needed:
        raise ValueError(f"several processes need at least {needed} iterations to train these context models")


def predicted(context: ContextModel, bits: Sequence[Tensor], cases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The logits of the bits of T unrolled steps, and these bits, both [T, B, bits, H, W]."""
    planes = torch.stack(list(bits))
    known = torch.stack([case for case in cases if case is not None]) if context.config.kind == "grouped" else None
    return context(planes, known), planes


def start_context(context: ContextModel, network: RecurrentCodec) -> None:
    """Initializes a grouped context model with the log odds of the questions of a latent network."""
    if context.config.kind == "grouped" and isinstance(network.binarizer, LatentBinarizer):
        context.grouped.start_odds(network.binarizer.questions.odds())


def saved_chart(rows: list[list[Any]]) -> Any:
    """A chart of the share of bits that context models save, from rows of model, raw bits per pixel and share."""
    table = wandb.Table(["model", "raw bpp", "saved"], rows)
    return wandb.plot.line(table, "raw bpp", "saved", stroke="model", title="share of bits saved")


class ContextTraining(Training):
    """Trains context models to minimize the code length of a frozen codec's bits (Toderici et al. 2017, sec. 4).

    All models learn from the same bits and share no weights, so they can be compared, and the codec runs only once. The
    best checkpoint has the lowest mean of their rates. In mixed precision, some of the codec's bits differ from those
    in files; validation computes them as for files.

    Args:
        contexts: configs of the models, by name; `bits` is taken from the codec.
        codec: name of shipped weights, or path of a .safetensors file.
        weights: likewise, with a context model from which all models start, instead of random weights; its codec may be
            another one.
        iterations: number of iterations of the codec whose bits are learned.
        learning_rate: of AdamW.
        weight_decay: decoupled weight decay.
        warmup_steps: steps in which the learning rate rises linearly.
        decay_steps: steps in which the learning rate falls linearly to zero, up to `trainer.max_steps`; a number below
            1 is a fraction of `trainer.max_steps`, and 0 means no fall.
        max_bad_steps: how many steps in a row with non-finite gradients are skipped before training stops.
    """

    monitor = "val/bpp", "min"

    def __init__(
        self,
        contexts: dict[str, ContextConfig],
        codec: str = DEFAULT_NAME,
        weights: str | None = None,
        iterations: int = 16,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        decay_steps: float = 0,
        max_bad_steps: int = 20,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, decay_steps, max_bad_steps)
        if not contexts or iterations < 1:
            raise ValueError("training a context model needs at least one of them and one iteration")
        coded = load_weights(codec)
        network = coded.recurrent.requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._codec = (network,)  # in a tuple it is no submodule, so it is neither averaged nor saved
        configs = {name: _config(config, network.config) for name, config in contexts.items()}
        self.contexts = nn.ModuleDict({name: ContextModel(config) for name, config in configs.items()})
        for context in self._models():
            start_context(context, network)
        if weights is not None:
            start = load_weights(weights)
            if start.context is None or any(config != start.context.config for config in configs.values()):
                raise ValueError(f"{weights} has no context model of the shape of those that are to be trained")
            for context in self.contexts.values():
                context.load_state_dict(start.context.state_dict())
            self.started_from = start.context_fingerprint.hex()
        self.save_hyperparameters()
        self.plain_hyperparameters(contexts={name: asdict(config) for name, config in configs.items()})
        self.fingerprint = coded.fingerprint.hex()
        self.hparams["fingerprint"] = self.fingerprint
        self.iterations = iterations
        self.stride = network.config.stride
        self.bpp = network.config.bits / self.stride**2  # raw bits per pixel of one iteration
        self.counts = sorted(
            {k for k in REPORTED_ITERATIONS if k < iterations} | {iterations}
        )  # numbers of iterations whose rate is validated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        trained_on = checkpoint["hyper_parameters"]["fingerprint"]
        if trained_on != self.fingerprint:
            raise ValueError(f"the checkpoint was trained on the codec {trained_on}, not on {self.fingerprint}")

    def on_fit_start(self) -> None:
        _check_unroll(self, self.iterations, [context.config for context in self._models()])

    def _models(self) -> list[ContextModel]:
        return [context for context in self.contexts.values() if isinstance(context, ContextModel)]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.contexts.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return self.scheduled(optimizer)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The bits of images and their cases; bits are [B, bits, H / stride, W / stride] of -1 and +1 per iteration."""
        codec = self._codec[0].to(x.device)
        y = codec.analyse(pad_to_blocks(x, self.stride))
        steps = [(step.bits.float(), step.cases) for step in codec.unroll(y, self.iterations)]
        return [bits for bits, _ in steps], [cases for _, cases in steps]

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        codes = self.codes(x)
        models = zip(self.contexts, self._models(), strict=True)
        lengths = {name: code_length(*predicted(context, *codes)) for name, context in models}
        self.log_dict({f"train/{name}": length for name, length in lengths.items()}, prog_bar=True)
        return torch.stack(list(lengths.values())).sum()

    def validation_step(self, x: Tensor, batch_idx: int) -> Validated:
        with torch.autocast(x.device.type, enabled=False):
            codes = self.codes(x)
        values = {}
        for name, context in zip(self.contexts, self._models(), strict=True):
            each = code_nats(*predicted(context, *codes)).mean((1, 2, 3, 4)) / math.log(2) * self.bpp
            # Bits per pixel of the first k iterations.
            values |= {f"bpp_{name}_{k}": each[:k].sum().item() for k in self.counts}
            values |= {f"saved_{name}_{k}": 1 - values[f"bpp_{name}_{k}"] / (k * self.bpp) for k in self.counts}
        values["bpp"] = sum(values[f"bpp_{name}_{self.iterations}"] for name in self.contexts) / len(self.contexts)
        return {"values": values, "points": [], "reconstructions": [], "maps": {}}

    def charts(self, means: Mapping[str, float]) -> dict[str, Any]:
        rows = [[name, k * self.bpp, means[f"saved_{name}_{k}"]] for name in self.contexts for k in self.counts]
        return {"rate/saved": saved_chart(rows)}


class JointTraining(CodecTraining):
    """Trains a codec and its context model together, to minimize distortion and rate.

    The rate is the code length that the context model estimates for the bits. The loss depends on `distortion`; with
    `rmse`, a change of the rate by one percent counts the same after each iteration.

        l1      distortion + rate_weight * bits per pixel of all iterations together
        rmse    distortion * geometric mean of (bits per pixel up to each iteration) ** rate_weight

    Args:
        context: config of the context model; None for the kind `grouped` with latent networks, `sequential` with
            others. `bits`, and for the grouped kind `groups` and `iterations`, are taken from the codec. The model
            starts from that of `weights` if its config is the same. With a latent network that starts from images, a
            grouped model starts from the odds of the questions.
        context_learning_rate: with `muon`, learning rate of the context model; None for `learning_rate`.
        rate_weight: exponent or factor of the rate, see above. With `rmse`, if quality grows by 6 dB with each doubling
            of the rate, 1 is neutral: twice the bits and half the error have the same loss. The default is for `l1`;
            `configs/small_wider.yaml` has 0.2 for `rmse`.
        last_rate_weight: with `rmse`, the weight at the last of `iterations`, to which it changes linearly from
            `rate_weight` at the first; None for the same weight everywhere.
        others: as in `CodecTraining`.

    Raises:
        ValueError: `last_rate_weight` is given with `l1`.
    """

    monitor = "val/loss", "min"

    def __init__(
        self,
        context: ContextConfig | None = None,
        context_learning_rate: float | None = None,
        rate_weight: float = 0.01,
        last_rate_weight: float | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        if last_rate_weight is not None and self.distortion == "l1":
            raise ValueError("last_rate_weight is for rmse: l1 counts all bits alike")
        self.context = ContextModel(_config(context, self.network.config))
        self.context_learning_rate = context_learning_rate
        if others.get("weights") is not None:
            start = load_weights(others["weights"]).context
            if start is not None and start.config == self.context.config:
                self.context.load_state_dict(start.state_dict())
            else:
                start_context(self.context, self.network)
        self.save_hyperparameters()
        self.plain_hyperparameters(network=asdict(self.network.config), context=asdict(self.context.config))
        self.rate_weight = rate_weight
        self.last_rate_weight = rate_weight if last_rate_weight is None else last_rate_weight

    def on_fit_start(self) -> None:
        super().on_fit_start()
        _check_unroll(self, self.fewest_iterations(), [self.context.config])

    def loss(self, x: Tensor, steps: list[Step]) -> Tensor:
        rates = self.rates([step.bits for step in steps], [step.cases for step in steps])
        self.log("train/bpp", rates[-1], prog_bar=True)
        return self.weighed(super().loss(x, steps), rates)

    def validated_rate(self, bits: list[Tensor], cases: list[Tensor | None], distortion: Tensor) -> dict[str, float]:
        rates = self.rates(bits, cases)
        values = {"bpp": rates[-1].item(), "loss": self.weighed(distortion, rates).item()}
        for k in self.reported:
            values |= {f"bpp_{k}": rates[k - 1].item(), f"saved_{k}": 1 - rates[k - 1].item() / (k * self.raw_bpp)}
        return values

    @property
    def raw_bpp(self) -> float:
        """Bits per pixel of an iteration before entropy coding."""
        return self.network.config.bits / self.network.config.stride**2

    def charts(self, means: Mapping[str, float]) -> dict[str, Any]:
        rows = [["context", k * self.raw_bpp, means[f"saved_{k}"]] for k in self.reported]
        return {"rate/saved": saved_chart(rows)}

    def maps(self, bits: list[Tensor], cases: list[Tensor | None], errors: list[Tensor]) -> dict[str, Tensor]:
        """Where each block of a latent network would stop, at the bits of half of the iterations."""
        if not isinstance(self.network.config, LatentConfig):
            return {}
        nats = code_nats(*predicted(self.context, bits, cases)).sum((1, 2))
        survey = ErrorSurvey(*errors[0].shape, most=len(errors), overhead=0.0)
        for rate, error in zip(nats / math.log(2), errors, strict=True):
            survey.add(rate.double().cpu().numpy(), error.double().cpu().numpy())
        last = survey.choose(survey.for_rate(float(survey.rate[len(errors) // 2 - 1].sum())))
        return {"stops": torch.tensor(last / len(errors))}

    def weighed(self, distortion: Tensor, rates: Tensor) -> Tensor:
        """The loss, from the distortion and the bits per pixel up to each iteration."""
        if self.distortion != "rmse":
            return distortion + self.rate_weight * rates[-1]
        weights = torch.linspace(self.rate_weight, self.last_rate_weight, self.iterations, device=rates.device)
        each = weights[torch.arange(len(rates)).clamp(max=self.iterations - 1)]  # validation may run more iterations
        return distortion * (each * rates.log()).mean().exp()

    def prepare(self) -> None:
        start_context(self.context, self.network)

    def own_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        groups = super().own_rates()
        if self.context_learning_rate is not None:
            groups.append((list(self.context.parameters()), self.context_learning_rate))
        return groups

    def rates(self, bits: list[Tensor], cases: list[Tensor | None]) -> Tensor:
        """The estimated bits per pixel up to each iteration, [T]."""
        nats = code_nats(*predicted(self.context, bits, cases)).mean((1, 2, 3, 4))
        return nats.cumsum(0) / math.log(2) * self.raw_bpp
