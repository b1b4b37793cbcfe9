"""FORMAT.md in slow whole numbers: the context models, one location at a time, the order of bits, the range decoder."""

import math
from fractions import Fraction

import numpy as np


def half_even(numerator, exponent):
    """numerator / 2^exponent, rounded to whole numbers, halves to even."""
    quotient, rest = np.divmod(numerator, 1 << exponent)
    double = 2 * rest - (1 << exponent)
    return quotient + ((double > 0) | ((double == 0) & (quotient % 2 == 1)))


def look_up(function, values):
    """Activations in units of 1 / 256."""
    return np.array([round(Fraction(function(max(-2048, min(2048, int(v))) / 256)) * 256) for v in values], np.int64)


def tanh(values):
    return look_up(math.tanh, values)


def sigmoid(values):
    return look_up(lambda v: 1 / (1 + math.exp(-v)), values)


class Reference:
    """A context model of integers; activations and logits are in units of 1 / 256, memories of 1 / 4096."""

    def __init__(self, exact):
        self.kind, self.groups = exact.config.kind, exact.config.groups
        self.own = exact.config.iterations
        self.weights = {key: value.numpy().astype(np.int64) for key, value in exact.integers().items()}

    def conv(self, name, x, row, col):
        """The output of a convolution at one location of x [channels, rows, cols], zeros beyond."""
        weight, exponent = self.weights[f"{name}.weight"], int(self.weights[f"{name}.exponent"])
        total = self.weights.get(f"{name}.bias", np.zeros(len(weight), np.int64)) * 256
        _, _, tall, wide = weight.shape
        for i in range(tall):
            for j in range(wide):
                r, c = row + i - tall // 2, col + j - wide // 2
                if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                    total = total + weight[:, :, i, j] @ x[:, r, c]
        return half_even(total, exponent)

    def lstm(self, gates, memory):
        i, f, o, j = np.split(gates, 4)
        new = (sigmoid(i) * tanh(j)) * 16 + sigmoid(f) * memory
        new = np.clip(half_even(new, 8), -8 * 4096, 8 * 4096)
        return half_even(sigmoid(o) * tanh(half_even(new, 4)), 8), new

    def logits(self, bits):
        """Of all iterations, [T, bits, rows, cols], for bits of -1 and +1."""
        bits = bits.astype(np.int64)
        count, _, rows, cols = bits.shape
        width = len(self.weights["history.prior.weight"])
        hidden, memory = np.zeros((2, width, rows, cols), np.int64)
        found = np.zeros_like(bits)
        for t in range(count):
            prior = np.zeros_like(hidden)
            for r, c in np.ndindex(rows, cols):
                prior[:, r, c] = tanh(self.conv("history.prior", hidden, r, c))
            name = f"predictors.{min(t, max(self.own, 1) - 1)}"
            found[t] = getattr(self, self.kind)(name, bits[t], prior)
            now = np.zeros_like(hidden)
            for r, c in np.ndindex(rows, cols):
                # Bits are whole, in units of an activation 256.
                now[:, r, c] = tanh(self.conv("history.bits", bits[t] * 256, r, c))
            before = hidden.copy()
            for r, c in np.ndindex(rows, cols):
                gates = self.conv("history.input", now, r, c)
                if t:
                    gates = gates + self.conv("history.hidden", before, r, c)
                hidden[:, r, c], memory[:, r, c] = self.lstm(gates, memory[:, r, c])
        return found

    def sequential(self, name, bits, prior):
        rows, cols = bits.shape[1:]
        width = len(prior)
        known = np.zeros_like(bits)  # only what a decoder has
        features = np.concatenate([np.zeros_like(prior), prior])
        hidden, memory = np.zeros((2, width, rows, cols), np.int64)
        found = np.zeros_like(bits)
        for r, c in np.ndindex(rows, cols):
            features[:width, r, c] = tanh(self.conv(f"{name}.context", known * 256, r, c))
            gates = self.conv(f"{name}.input", features, r, c)
            if r:
                gates = gates + self.conv(f"{name}.hidden", hidden[:, r - 1 : r], 0, c)
            hidden[:, r, c], memory[:, r, c] = self.lstm(gates, memory[:, r - 1, c] if r else np.zeros(width, np.int64))
            middle = tanh(self.conv(f"{name}.middle", hidden, r, c))
            found[:, r, c] = self.conv(f"{name}.output", middle[:, None, None], 0, 0)
            known[:, r, c] = bits[:, r, c]
        return found

    def parallel(self, name, bits, prior):
        count, rows, cols = bits.shape
        known, found = np.zeros_like(bits), np.zeros_like(bits)
        for turn in range(2 * self.groups):
            group, color = divmod(turn, 2)
            first, second = np.zeros((2, len(prior), rows, cols), np.int64)
            for r, c in np.ndindex(rows, cols):
                x = self.conv(f"{name}.known", known * 256, r, c) + self.conv(f"{name}.prior", prior, r, c)
                first[:, r, c] = tanh(x + self.weights[f"{name}.turn"][turn])
            for r, c in np.ndindex(rows, cols):
                second[:, r, c] = tanh(self.conv(f"{name}.middle", first, r, c))
            channels = slice(group * count // self.groups, (group + 1) * count // self.groups)
            places = [(r, c) for r, c in np.ndindex(rows, cols) if (r + c) % 2 == color]
            for r, c in places:
                found[channels, r, c] = self.conv(f"{name}.output", second, r, c)[channels]
            for r, c in places:
                known[channels, r, c] = bits[channels, r, c]
        return found


def order(kind, groups, shape):
    """The bits (channel, row, column) of a plane in the order of coding."""
    bits, rows, cols = shape
    if kind == "sequential":
        places = sorted(np.ndindex(rows, cols), key=lambda place: (place[1] + 4 * place[0], place[0]))
        return [(c, y, x) for y, x in places for c in range(bits)]
    size = bits // groups
    return [
        (c, y, x)
        for turn in range(2 * groups)
        for y, x in np.ndindex(rows, cols)
        if (x + y) % 2 == turn % 2
        for c in range(turn // 2 * size, (turn // 2 + 1) * size)
    ]


def chance(logit):
    """P(1) * 65536 of a logit in units of 1 / 256."""
    return round(65536 / (1 + math.exp(-max(-2048, min(2048, int(logit))) / 256)))


def range_decode(payload, chances):
    """The range decoder of FORMAT.md in whole numbers."""
    words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
    words += [0] * (len(chances) + 2)
    point, lower, size, place, bits = (words[0] << 32) + words[1], 0, 2**64 - 1, 2, []
    for k in chances:
        scale = size >> 24
        quantile = ((point - lower) % 2**64) // scale
        zero = (65536 - k) * (2**24 - 2) // 65536 + 1
        bits.append(quantile >= zero)
        lower = (lower + scale * (zero if bits[-1] else 0)) % 2**64
        size = scale * (2**24 - zero if bits[-1] else zero)
        if size < 2**32:
            size, lower = size << 32, (lower << 32) % 2**64
            point, place = (point << 32) % 2**64 + words[place], place + 1
    return bits
