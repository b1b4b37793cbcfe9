"""Tests of the questions of a latent network, against their rules in Python and their statistics in NumPy."""

import math

import numpy as np
import pytest
import torch

from rnncodec.network.questions import ACTIVITIES, CASES, QUIET, Questions

CHANNELS, ITERATIONS, BITS, GROUPS = 14, 5, 8, 2
SIZE = BITS // GROUPS


@pytest.fixture
def questions():
    """Random questions, of which each channel is asked again and again."""
    rng = np.random.default_rng(0)
    module = Questions(CHANNELS, ITERATIONS, BITS, GROUPS)
    channel = [[rng.permutation(CHANNELS)[:SIZE] for _ in range(GROUPS)] for _ in range(ITERATIONS)]
    module.channel.copy_(torch.from_numpy(np.array(channel)))
    module.cost.copy_(torch.from_numpy(rng.integers(1, 2000, module.cost.shape)))
    module.edges.copy_(torch.from_numpy(np.sort(rng.integers(0, 20000, module.edges.shape), -1)))
    table = rng.normal(size=module.table.shape)
    table[..., 2] = np.abs(table[..., 2]) + 0.1
    with torch.no_grad():
        module.table.copy_(torch.from_numpy(table))
    return module


class Reference:
    """Every rule, one location at a time, in whole numbers of Python."""

    def __init__(self, questions, batch, height, width):
        self.q = questions
        self.shape = batch, height, width
        self.answers = {(b, c, y, x): [] for b, y, x in self.places() for c in range(CHANNELS)}
        self.activity = dict.fromkeys(self.places(), 0)

    def places(self):
        return list(np.ndindex(*self.shape))

    def around(self, b, y, x):
        _, height, width = self.shape
        beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(min(max(i, 0), height - 1), min(max(j, 0), width - 1)) for i, j in beside]
        return 4 * self.activity[b, y, x] + sum(self.activity[b, i, j] for i, j in inside)

    def case(self, t, g, k, b, y, x):
        answers = self.answers[b, int(self.q.channel[t, g, k]), y, x][-3:]
        history = 2 ** len(answers) - 1 + sum(bit << (len(answers) - 1 - i) for i, bit in enumerate(answers))
        activity = sum(self.around(b, y, x) > int(edge) for edge in self.q.edges[t, g])
        return history * ACTIVITIES + activity

    def tell(self, t, g, cases, bits):
        spent = dict.fromkeys(self.places(), 0)
        for b, y, x in self.places():
            for k in range(SIZE):
                channel, bit = int(self.q.channel[t, g, k]), int(bits[b, k, y, x])
                if bit:
                    self.answers[b, channel, y, x].append(int(bit > 0))
                    cost = self.q.cost[t, g].view(SIZE, CASES, 2)[k, cases[b, k, y, x], int(bit > 0)]
                    spent[b, y, x] += int(cost) * (channel >= QUIET)
        for place, cost in spent.items():
            self.activity[place] += cost


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 3, 4), (1, 1, 1), (1, 1, 5)])
def test_cases_follow_the_rules(questions, batch, height, width):
    rng = np.random.default_rng(1)
    reference = Reference(questions, batch, height, width)
    known = questions.start(torch.zeros(batch, 0, height, width))
    seen = set()
    for t in range(ITERATIONS):
        asked = []

        def answer(group, cases, t=t, asked=asked):
            expected = [
                [
                    [[reference.case(t, group, k, b, y, x) for x in range(width)] for y in range(height)]
                    for k in range(SIZE)
                ]
                for b in range(batch)
            ]
            assert cases.tolist() == expected
            seen.update(cases.flatten().tolist())
            bits = rng.integers(-1, 2, cases.shape)  # some are never sent
            reference.tell(t, group, cases.numpy(), bits)
            asked.append(bits)
            return torch.from_numpy(bits).float()

        bits, cases, known = questions.walk(torch.tensor(t), known, answer)
        np.testing.assert_array_equal(bits.numpy(), np.concatenate(asked, 1))
        assert cases.shape == bits.shape
    assert len(seen) > height * width  # cases that differ from place to place and from pass to pass


def test_bits_are_decided_and_add_up_question_by_question(questions):
    """`ask` and `values` equal the rules, applied to one location and one question after the other."""
    rng = np.random.default_rng(2)
    residual, offset = rng.normal(size=(1, CHANNELS, 2, 3)) * 2, rng.normal(size=(1, BITS, 2, 3)) * 0.1
    reference, known = Reference(questions, 1, 2, 3), questions.start(torch.zeros(1, 0, 2, 3))
    y_hat = np.zeros_like(residual)
    for t in range(ITERATIONS):
        left = torch.from_numpy(residual - y_hat).float()
        asked = questions.ask(torch.tensor(t), known, left, torch.from_numpy(offset).float())
        bits, cases_asked, added, known_after = asked
        for ours, theirs in zip(asked, questions.values(torch.tensor(t), known, bits.detach()), strict=True):
            for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs)), strict=True):
                assert torch.equal(one, other)  # the decoder hears what the encoder has said
        known = known_after
        before = y_hat.copy()
        for g in range(GROUPS):
            cases, found = np.zeros((1, SIZE, 2, 3), int), np.zeros((1, SIZE, 2, 3), int)
            changes = []
            for (_, y, x), k in [(place, k) for place in reference.places() for k in range(SIZE)]:
                cases[0, k, y, x] = case = reference.case(t, g, k, 0, y, x)
                row = (g * SIZE + k) * CASES + case
                threshold, mean, half = questions.table[t, row].tolist()
                channel = int(questions.channel[t, g, k])
                rest = residual[0, channel, y, x] - y_hat[0, channel, y, x]
                found[0, k, y, x] = 1 if rest - threshold + offset[0, g * SIZE + k, y, x] > 0 else -1
                changes.append((channel, y, x, mean + half * found[0, k, y, x]))
            for channel, y, x, value in changes:
                y_hat[0, channel, y, x] += value
            np.testing.assert_array_equal(cases_asked[:, g * SIZE : (g + 1) * SIZE].numpy(), cases)
            np.testing.assert_array_equal(bits[:, g * SIZE : (g + 1) * SIZE].detach().numpy(), found)
            reference.tell(t, g, cases, found)
        np.testing.assert_allclose(added.detach().numpy(), y_hat - before, atol=1e-4)


def test_what_is_not_sent_adds_nothing(questions):
    known = questions.start(torch.zeros(1, 0, 2, 2))
    left = torch.tensor([[[2, 1], [0, 5]]])  # groups of a pass of 2
    residual = torch.randn(1, CHANNELS, 2, 2)
    bits, _, added, after = questions.ask(torch.tensor(0), known, residual, torch.zeros(1, BITS, 2, 2), left)
    sent = bits.unflatten(1, (GROUPS, SIZE)).abs().mean(2)[0]
    assert sent.tolist() == [[[1, 1], [0, 1]], [[1, 0], [0, 1]]]
    assert not added[..., 1, 0].any()
    assert added[..., 0, 0].any()
    assert not after.history[..., 1, 0].any()
    # A location that has all its bits is coded as if it were alone in this, but for the activity of those beside it.
    whole = questions.ask(torch.tensor(0), known, residual, torch.zeros(1, BITS, 2, 2)).bits
    assert torch.equal(bits[:, :SIZE, 0], whole[:, :SIZE, 0])


def test_the_gradient_is_straight_through_between_the_two_values(questions):
    known = questions.start(torch.zeros(1, 0, 1, 1))
    channel = int(questions.channel[0, 0, 0])
    case = int(questions.case(torch.tensor(0), 0, known)[0, 0, 0, 0])
    threshold, mean, half = questions.table[0, case].tolist()
    for distance, expected in ((0.5, 1.0), (-0.5, 1.0), (1.5, 0.0), (-1.5, 0.0)):
        residual = torch.zeros(1, CHANNELS, 1, 1)
        residual[0, channel] = threshold + distance * half
        residual.requires_grad_()
        bit = questions.ask(torch.tensor(0), known, residual, torch.zeros(1, BITS, 1, 1)).bits[0, 0, 0, 0]
        (gradient,) = torch.autograd.grad(mean + half * bit, residual)
        assert bit.item() == (1 if distance > 0 else -1)
        assert gradient[0, channel].item() == pytest.approx(expected, rel=1e-5)


def test_learned_tables_are_the_statistics_of_their_cases():
    """In each case of the first group, values are the means on both sides of the threshold, and costs frequencies."""
    torch.manual_seed(0)
    spread = torch.linspace(3, 0.1, CHANNELS).view(-1, 1, 1)
    y = torch.randn(40, CHANNELS, 8, 8) * spread * torch.rand(40, 1, 8, 8).add(0.1)
    questions = Questions(CHANNELS, ITERATIONS, BITS, GROUPS)
    deviations = questions.learn(y, torch.ones(CHANNELS))
    np.testing.assert_allclose(deviations[0].numpy(), y.square().mean((0, 2, 3)).sqrt().numpy(), rtol=1e-4)
    assert set(questions.channel[0, 0].tolist()) <= set(range(6))  # the first questions are of the widest channels
    residual, known, total, spent = y.clone(), questions.start(y), y.square().mean().item(), 0.0
    for t in range(ITERATIONS):
        iteration = torch.tensor(t)
        with torch.no_grad():
            asked = questions.ask(iteration, known, residual, torch.zeros(len(y), BITS, 8, 8))
        bits, cases, added, known = asked
        if t == 0:
            for k in range(SIZE):
                channel = int(questions.channel[0, 0, k])
                for case in cases[:, k].unique().tolist():
                    found = residual[:, channel][cases[:, k] == case].double().numpy()
                    threshold, mean, half = questions.table[0, k * CASES + case].tolist()
                    high, low = found[found > threshold], found[found <= threshold]
                    assert mean + half == pytest.approx(high.sum() / (len(high) + 2), rel=1e-3)
                    assert mean - half == pytest.approx(low.sum() / (len(low) + 2), rel=1e-3)
                    share = (len(high) + 0.5) / (len(found) + 1)
                    cost = questions.cost[0, 0].view(SIZE, CASES, 2)[k, case].tolist()
                    assert cost == [round(-256 * math.log2(1 - share)), round(-256 * math.log2(share))]
        log_odds = questions.odds()[t].flatten()[cases + CASES * torch.arange(BITS).view(-1, 1, 1)]
        spent += torch.nn.functional.softplus(-log_odds * bits).sum().item() / math.log(2)
        residual = residual - added
    # 40 bits for 14 channels, of which most cost less than one: the error falls below a fifth.
    assert residual.square().mean().item() < 0.2 * total
    assert spent / y[:, 0].numel() < ITERATIONS * BITS
