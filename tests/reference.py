"""Slow integer versions of parts of FORMAT.md (context models, order of bits, range decoder), and damaged payloads."""

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


class GroupedReference:
    """A context model of the grouped kind with its questions, all of integers; in units of 1 / 256."""

    CLIP = 256

    def __init__(self, exact, channels, channel, cost, edges):
        """Of the questions: latent channels, and the arrays [T, G, S], [T, G, S, 75, 2] and [T, G, 4]."""
        self.weights = {key: value.numpy().astype(np.int64) for key, value in exact.integers().items()}
        self.channels, self.channel, self.cost, self.edges = channels, channel, cost, edges

    def product(self, name, t, x, *part):
        """The sums of a linear map."""
        name = f"grouped.{name}"
        return half_even(x @ self.weights[f"{name}.map"][(t, *part)], int(self.weights[f"{name}.exponent"][t]))

    def bias(self, name, *part):
        return self.weights[f"grouped.{name}"][part]

    def clip(self, x):
        return np.clip(x, -self.CLIP, self.CLIP)

    def around(self, x, row, col):
        """The 3x3 locations around one, row by row, of x [rows, cols, ...], zeros beyond."""
        padded = np.pad(x, [(1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 2))
        return padded[row : row + 3, col : col + 3].reshape(9, *x.shape[2:])

    def run(self, bits):
        """Logits and cases of all iterations, [T, K, rows, cols], for bits of -1, 0 and +1."""
        bits = bits.astype(np.int64).transpose(0, 2, 3, 1)
        count, rows, cols, _ = bits.shape
        logits, cases = np.zeros_like(bits), np.zeros_like(bits)
        history = np.zeros((rows, cols, self.channels), np.int64)
        activity = np.zeros((rows, cols), np.int64)
        passes, groups, size = self.channel.shape
        memory = np.zeros((rows, cols, self.weights["grouped.level"].shape[1]), np.int64)
        places = list(np.ndindex(rows, cols))
        for iteration in range(count):
            t = min(iteration, passes - 1)
            surprise = np.zeros((rows, cols, groups, size), np.int64)
            for group in range(groups):
                asked = slice(group * size, (group + 1) * size)
                case = np.zeros((rows, cols, size), np.int64)
                for r, c in places:
                    beside = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
                    total = 4 * activity[r, c] + sum(
                        activity[min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)] for y, x in beside
                    )
                    busy = sum(total > edge for edge in self.edges[t, group])
                    case[r, c] = history[r, c, self.channel[t, group]] * 5 + busy
                cases[iteration, ..., asked] = case
                odds = self.bias("odds", t, asked)[np.arange(size), case]
                expected = sigmoid(odds.ravel()).reshape(odds.shape)
                for color in range(2):
                    known = surprise.copy()
                    for r, c in places:
                        if (r + c) % 2 != color:
                            continue
                        near = self.around(known, r, c).transpose(1, 0, 2).ravel()
                        x = self.product("known", t, near) + self.bias("turn", t, 2 * group + color)
                        if iteration:
                            x = x + self.product("prior", t, self.clip(memory[r, c] + self.bias("level", t)))
                        x = self.product("middle", t, self.clip(x), group) + self.bias("shift", t, group)
                        logits[iteration, r, c, asked] = self.product("output", t, self.clip(x), group) + odds[r, c]
                        for i, bit in enumerate(bits[iteration, r, c, asked]):
                            surprise[r, c, group, i] = bit and (bit > 0) * 256 - expected[r, c, i]
                for r, c in places:
                    for i, bit in enumerate(bits[iteration, r, c, asked]):
                        if bit:
                            h, k = int(case[r, c, i]) // 5, self.channel[t, group, i]
                            yes = int(bit > 0)
                            history[r, c, k] = 2 * h + 1 + yes if h < 7 else 7 + (2 * (h - 7) + yes) % 8
                            if k >= 10:
                                activity[r, c] += self.cost[t, group, i, case[r, c, i], yes]
            flat = surprise.reshape(rows, cols, -1)
            found = np.array(
                [
                    [self.product("remember", t, self.around(flat, r, c).ravel()) for c in range(cols)]
                    for r in range(rows)
                ]
            )
            memory = np.clip(memory + found, -65536, 65536)
        return logits.transpose(0, 3, 1, 2), cases.transpose(0, 3, 1, 2)


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


def range_decode(payload, probabilities):
    """The range decoder of FORMAT.md in whole numbers."""
    words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
    words += [0] * (len(probabilities) + 2)
    point, lower, size, place, bits = (words[0] << 32) + words[1], 0, 2**64 - 1, 2, []
    for k in probabilities:
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


def damaged(payload, trials=40):
    """A payload cut short, or with a flipped bit, in turns."""
    rng = np.random.default_rng(1)
    for trial in range(trials):
        if trial % 2:
            changed = bytearray(payload)
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
            yield bytes(changed)
        else:
            yield payload[: rng.integers(len(payload))]
