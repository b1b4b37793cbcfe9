"""Muon for the gate convolutions and AdamW for the rest, in one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnncodec.network.cells import GateConv

# Quintic polynomial of Jordan et al. 2024 (Muon), which maps singular values to about 1 in five steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32, as they are on all but some processors.

    A processor needs AVX512-BF16: without it, a Xeon with AVX-512 took 1.7 times as long for a training step.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest semi-orthogonal matrices; singular values become about 1 (0.7 to 1.2).

    Args:
        matrices: [N, rows, columns].
        steps: number of Newton-Schulz iterations.

    Returns:
        [N, rows, columns] in bfloat16, or in float32 where that is faster.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if bfloat16_pays(matrices.device) else matrices.float()
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def parameter_groups(network: nn.Module, lr: float, muon_lr: float) -> list[dict[str, Any]]:
    """Parameter groups for `MuonAdamW`: for Muon one for each number of gates, then one for AdamW with all others."""
    groups: dict[int, list[Tensor]] = {}
    matrices = set()
    for module in network.modules():
        if isinstance(module, GateConv):
            groups.setdefault(module.gates, []).append(module.weight)
            matrices.add(module.weight)
    rest = [parameter for parameter in network.parameters() if parameter not in matrices]
    muon = [{"params": params, "gates": gates, "lr": muon_lr} for gates, params in sorted(groups.items())]
    return [*muon, {"params": rest, "gates": 0, "lr": lr}]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) where a group has `gates`, AdamW (Loshchilov and Hutter 2019) where it has none.

    A convolution kernel [gates * out, in, h, w] is a stack of `gates` matrices [out, in * h * w]. Muon moves each by
    the learning rate times its orthogonalized Nesterov momentum times sqrt(max(1, rows / columns)).

    Args:
        groups: parameter groups from `parameter_groups`.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: decoupled weight decay of both.
        eps: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["gates"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, group)
        return loss

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])
        matrices = direction.reshape(group["gates"], parameter.shape[0] // group["gates"], -1)
        scale = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
        parameter.sub_(orthogonalize(matrices).view(parameter.shape), alpha=group["lr"] * scale)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        step = state["step"] = state.get("step", 0) + 1
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        beta1, beta2 = group["betas"]
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
