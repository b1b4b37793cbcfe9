"""Tests of the optimizer against PyTorch's Muon and AdamW, and against the singular value decomposition."""

import pytest
import torch

from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.training.optim import MuonAdamW, bfloat16_pays, orthogonalize, parameter_groups


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request, monkeypatch):
    """Of products on a processor that claims to be fast at it; any can compute in both, if slowly."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param == torch.bfloat16)
    return request.param


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape, dtype):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.dtype == dtype
    result = result.float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ vh
    cosine = (result * nearest).sum((1, 2)) / (result.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_bfloat16_is_for_whatever_is_no_processor():
    assert bfloat16_pays(torch.device("cuda"))


def gradients(shape, steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.usefixtures("dtype")
@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_one_gate_moves_as_in_torch_muon(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = start[..., None, None].clone().requires_grad_()
    theirs = start.clone().requires_grad_()
    optimizer = MuonAdamW([{"params": [ours], "gates": 1, "lr": 0.02}], weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for gradient in gradients(shape, 5):
        ours.grad, theirs.grad = gradient[..., None, None].clone(), gradient.clone()
        optimizer.step()
        reference.step()
    # PyTorch computes the direction in bfloat16, in another order of operations.
    torch.testing.assert_close(ours[..., 0, 0], theirs, atol=0.02 * 5 * 0.02, rtol=0)
    assert (ours[..., 0, 0] - start).abs().max() > 0.01


def test_gates_move_independently():
    together = torch.zeros(12, 4, 3, 3, requires_grad=True)
    alone = [torch.zeros(4, 4, 3, 3, requires_grad=True) for _ in range(3)]
    optimizers = [MuonAdamW([{"params": [together], "gates": 3, "lr": 0.1}])]
    optimizers += [MuonAdamW([{"params": [gate], "gates": 1, "lr": 0.1}]) for gate in alone]
    gradient = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    together.grad = gradient.clone()
    for gate, part in zip(alone, gradient.chunk(3), strict=True):
        gate.grad = part.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-3, rtol=0)


def test_the_rest_moves_as_in_torch_adamw():
    start = torch.randn(7, generator=torch.Generator().manual_seed(4))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = MuonAdamW([{"params": [ours], "gates": 0, "lr": 0.01}], betas=(0.9, 0.99), weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients((7,), 20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_groups_hold_every_parameter_once_and_only_gate_kernels_go_to_muon():
    network = RecurrentCodec(
        NetworkConfig(encoder_cell="gru", encoder_channels=(8, 8, 8, 8), decoder_channels=(8,) * 5)
    )
    groups = parameter_groups(network, 1e-3, 1e-2)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(network.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert (parameter.ndim == 4 and parameter.shape[0] % group["gates"] == 0) if group["gates"] else True
    rest = next(group for group in groups if not group["gates"])["params"]
    names = {name for name, parameter in network.named_parameters() if any(parameter is other for other in rest)}
    assert {"encoder.stem.weight", "decoder.output.weight", "binarizer.features.weight"} <= names
    assert not any("cells" in name and name.endswith("weight") for name in names)


def test_state_survives_a_checkpoint():
    def run(optimizer, parameter, steps):
        for gradient in steps:
            parameter.grad = gradient.clone()
            optimizer.step()

    def make():
        parameter = torch.ones(8, 2, 1, 1, requires_grad=True)
        return parameter, MuonAdamW([{"params": [parameter], "gates": 2, "lr": 0.1}])

    steps = gradients((8, 2, 1, 1), 6)
    whole, optimizer = make()
    run(optimizer, whole, steps)
    first, optimizer = make()
    run(optimizer, first, steps[:3])
    saved = optimizer.state_dict()
    second, optimizer = make()
    second.data.copy_(first.data)
    optimizer.load_state_dict(saved)
    run(optimizer, second, steps[3:])
    assert torch.equal(whole, second)
