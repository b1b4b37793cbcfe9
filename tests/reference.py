"""Slow integer versions of FORMAT.md (context models, order of bits, range coder, stop maps), and damaged payloads."""

import math
import zlib
from collections.abc import Iterator
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
        plane, size = GroupedPlane(self, *bits.shape[2:]), self.channel.shape[2]
        found = [
            plane.step(lambda group, r, c, _, now=now: now[group * size : (group + 1) * size, r, c])
            for now in bits.astype(np.int64)
        ]
        return tuple(np.array(each) for each in zip(*found, strict=True))


class GroupedPlane:
    """A plane, or a band of one, whose iterations a `GroupedReference` codes in order."""

    def __init__(self, reference, rows, cols):
        self.reference, self.rows, self.cols, self.iteration = reference, rows, cols, 0
        self.history = np.zeros((rows, cols, reference.channels), np.int64)
        self.activity = np.zeros((rows, cols), np.int64)
        self.memory = np.zeros((rows, cols, reference.weights["grouped.level"].shape[1]), np.int64)

    def step(self, tell):
        """Logits and cases of the next iteration, [K, rows, cols].

        `tell` gives the bits of a group at a location, of -1, 0 and +1, from group, row, column and their logits; it is
        called in the order of coding.
        """
        model, history, activity, rows, cols = self.reference, self.history, self.activity, self.rows, self.cols
        passes, groups, size = model.channel.shape
        t = min(self.iteration, passes - 1)
        places = list(np.ndindex(rows, cols))
        logits, cases = np.zeros((2, rows, cols, groups * size), np.int64)
        bits = np.zeros((rows, cols, groups * size), np.int64)
        surprise = np.zeros((rows, cols, groups, size), np.int64)
        for group in range(groups):
            asked = slice(group * size, (group + 1) * size)
            case = np.zeros((rows, cols, size), np.int64)
            for r, c in places:
                beside = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
                total = 4 * activity[r, c] + sum(
                    activity[min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)] for y, x in beside
                )
                busy = sum(total > edge for edge in model.edges[t, group])
                case[r, c] = history[r, c, model.channel[t, group]] * 5 + busy
            cases[..., asked] = case
            odds = model.bias("odds", t, asked)[np.arange(size), case]
            expected = sigmoid(odds.ravel()).reshape(odds.shape)
            for color in range(2):
                known = surprise.copy()
                for r, c in places:
                    if (r + c) % 2 != color:
                        continue
                    near = model.around(known, r, c).transpose(1, 0, 2).ravel()
                    x = model.product("known", t, near) + model.bias("turn", t, 2 * group + color)
                    if self.iteration:
                        x = x + model.product("prior", t, model.clip(self.memory[r, c] + model.bias("level", t)))
                    x = model.product("middle", t, model.clip(x), group) + model.bias("shift", t, group)
                    logits[r, c, asked] = model.product("output", t, model.clip(x), group) + odds[r, c]
                    bits[r, c, asked] = tell(group, r, c, logits[r, c, asked])
                    for i, bit in enumerate(bits[r, c, asked]):
                        surprise[r, c, group, i] = bit and (bit > 0) * 256 - expected[r, c, i]
            for r, c in places:
                for i, bit in enumerate(bits[r, c, asked]):
                    if bit:
                        h, k = int(case[r, c, i]) // 5, model.channel[t, group, i]
                        yes = int(bit > 0)
                        history[r, c, k] = 2 * h + 1 + yes if h < 7 else 7 + (2 * (h - 7) + yes) % 8
                        if k >= 10:
                            activity[r, c] += model.cost[t, group, i, case[r, c, i], yes]
        flat = surprise.reshape(rows, cols, -1)
        for r, c in places:
            grown = self.memory[r, c] + model.product("remember", t, model.around(flat, r, c).ravel())
            self.memory[r, c] = np.clip(grown, -65536, 65536)
        self.iteration += 1
        return logits.transpose(2, 0, 1), cases.transpose(2, 0, 1)


class StopReference:
    """Stop maps, location by location."""

    def __init__(self, rows, cols):
        self.rows, self.cols, self.iteration = rows, cols, 0
        self.living = set(np.ndindex(rows, cols))
        self.counts = {context: [1, 8] for context in range(15)}

    def read(self, digit, flag):
        """The locations that go on in the next iteration.

        Args:
            digit: gives a digit of the level from its number and k.
            flag: gives a location's flag from row, column and k.
        """
        self.iteration += 1
        if self.iteration == 1:
            return self.living
        level, counts, most = sum(digit(i, 32768) << 3 - i for i in range(4)), self.counts, 64
        if level:
            start = [1, 2 ** (9 - level)] if level < 9 else [2 ** (level - 9), 1]
            counts, most = {context: start.copy() for context in range(15)}, max(64, sum(start))
        stopped, going = set(np.ndindex(self.rows, self.cols)) - self.living, set()
        for turn in ((0, 0), (1, 1), (0, 1), (1, 0)):
            told = []
            for y, x in np.ndindex(self.rows, self.cols):
                if (y, x) not in self.living or (y % 2, x % 2) != turn:
                    continue
                around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
                s, g = (sum(place in places for place in around) for places in (stopped, going))
                context = 3 * sum(n <= s for n in (1, 2, 3, 5)) + sum(n <= g for n in (1, 3))
                no, yes = counts[context]
                told.append(((y, x), context, flag(y, x, 65536 * yes // (no + yes))))
            for place, context, yes in told:
                counts[context][yes] += 1
                (going if yes else stopped).add(place)
            for pair in counts.values():
                while sum(pair) > most:
                    pair[:] = [(n + 1) // 2 for n in pair]
        assert going
        self.living = going
        return going


def plain_records(data):
    """The records of an inflated block, by type."""
    records = {}
    while data:
        kind, length, shift, place = data[:4].decode("ascii"), 0, 0, 4
        while data[place] >= 128:
            length, shift, place = length + (data[place] - 128 << shift), shift + 7, place + 1
        length, place = length + (data[place] << shift), place + 1
        records[kind], data = data[place : place + length], data[place + length :]
    return records


def parts_file(data):
    """The fields and payloads of a whole file of version 3, payloads as pairs (coded, bytes)."""
    place = 0

    def take(count):
        nonlocal place
        place += count
        assert place <= len(data)
        return data[place - count : place]

    def number(count):
        return int.from_bytes(take(count), "big")

    assert take(5) == b"\x8fRNC\x03"
    fields = {"width": number(2), "height": number(2), "fingerprint": take(8), "context": take(8)}
    fields |= {"stride": number(1), "bits": number(1), "name": take(number(1)).decode("ascii")}
    fields |= {"coding": number(1), "parts": number(1), "flags": number(1)}

    def septets():
        value, shift, byte = 0, 0, 128
        while byte >= 128:
            byte = number(1)
            value, shift = value + (byte % 128 << shift), shift + 7
        return value

    entries = []
    for _ in range(number(2)):
        value = septets()
        entries.append((value // 2, value % 2 == 1, number(2)))
    block = (septets(), number(4)) if fields["flags"] & 2 else (0, 0)
    assert zlib.crc32(data[:place]) == number(4)
    records = take(block[0])
    assert zlib.crc32(records) == block[1]
    if records:
        fields["records"] = plain_records(zlib.decompress(records))
    payloads = []
    for length, coded, checksum in entries:
        payload = take(length)
        register = 0xFFFF
        for bit in "".join(f"{byte:08b}" for byte in payload):
            register ^= int(bit) << 15
            register = (register << 1 ^ (0x1021 if register >> 15 else 0)) & 0xFFFF
        assert register == checksum
        payloads.append((coded, payload))
    assert place == len(data)
    return fields, payloads


def least_bytes(coding, locations, bits, number=0, parts=1, maps=False):
    """The fewest bytes of a payload, from FORMAT.md: its coding, the geometry, and its number from 0 in the file."""
    (iteration, part), bits = divmod(number, parts), bits // parts
    count, flags = locations * bits, 0
    if maps and iteration > 0:
        count = bits
        flags = 0 if part else locations if iteration == 1 else 1
    if flags:
        count += flags + 4
    if coding < 2:
        return math.ceil(count / (16516 if coding else 8))
    if coding == 2:
        g = 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1
        return {4: 8, 2: 2, 1: 1}[g] + math.ceil(count / (8 * g))
    if coding == 3:
        return bits + math.ceil(count / 1417)
    return math.ceil(count / 363406) if coding == 4 else 1


class PartsReference:
    """Decodes the payloads of version 3.

    Args:
        model: a `GroupedReference`.
        rows, cols: of the plane.
        band: rows of a band.
        parts, maps: as the header says.
    """

    def __init__(self, model, rows, cols, band, parts, maps):
        self.model, self.rows, self.cols, self.parts, self.maps = model, rows, cols, parts, maps
        self.stops = StopReference(rows, cols)
        tops = range(0, rows, band)
        self.bands = [(top, GroupedPlane(model, min(band, rows - top), cols)) for top in tops]

    def decode(self, payloads):
        """The bits of the next iteration, [K, rows, cols] of -1, 0 and +1, from pairs (coded, bytes)."""
        readers = [RangeReader(payload) if coded else RawReader(payload) for coded, payload in payloads]
        _, groups, size = self.model.channel.shape
        plane = np.zeros((groups * size, self.rows, self.cols), np.int64)
        if self.maps:
            self.stops.read(lambda i, k: readers[0].read(k), lambda y, x, k: readers[0].read(k))
        for top, band in self.bands:

            def tell(group, r, c, logits, top=top):
                part = group * self.parts // groups
                bits = np.zeros(size, np.int64)
                if (top + r, c) in self.stops.living and part < len(readers):
                    bits = np.array([1 if readers[part].read(chance(logit)) else -1 for logit in logits])
                plane[group * size : (group + 1) * size, top + r, c] = bits
                return bits

            band.step(tell)
        for reader in readers:
            reader.finish()
        return plane


class IntegersReference:
    """Decodes payloads of integers, one decision at a time.

    Args:
        channels, rows, cols: shape of the integers.
    """

    def __init__(self, channels, rows, cols):
        self.shape = channels, rows, cols

    def decode(self, coding, payload, table=()):
        """Integers [channels, rows, cols]; `table` is that of the weights at the level of the file."""
        channels, rows, cols = self.shape
        count = channels * rows * cols
        if coding == 0:
            found = [int.from_bytes(payload[2 * i : 2 * i + 2], "big", signed=True) for i in range(count)]
        elif coding == 2:
            found = self._huffman(payload, count)
        elif coding == 4:
            return self._adaptive(RangeReader(payload))
        else:
            ks = [[*map(int, row), 32768] for row in table] if coding == 5 else []
            place = 0
            while len(ks) < channels:
                u = payload[place]
                assert 1 <= u <= 16
                ks.append([256 * s for s in payload[place + 1 : place + 1 + u]] + [32768] * (17 - u))
                place += 1 + u
            reader, found = RangeReader(payload[place:]), []
            for first in range(0, count, 512 * channels):
                some = min(512 * channels, count - first)
                found += self._decide(lambda i, d: reader.read(ks[i % channels][d]), some)
            reader.finish()
        return np.array(found).reshape(rows, cols, channels).transpose(2, 0, 1)

    def _decide(self, answer, count):
        """The integers, from the answer to a decision of each."""
        size, sign, r = [0] * count, [1] * count, {}
        going = [i for i in range(count) if answer(i, 0)]
        for i in going:
            size[i] = 1
            sign[i] = -1 if answer(i, 1) else 1
        for least in range(2, 16):
            going = [i for i in going if answer(i, least)]
            for i in going:
                size[i] = least
        left, longer = dict.fromkeys(going, 0), going
        for more in range(1, 16):
            longer = [i for i in longer if answer(i, 16)]
            for i in longer:
                left[i] = more
        r = dict.fromkeys(going, 1)
        for digit in range(15, 0, -1):
            for i in going:
                if left[i] >= digit:
                    r[i] = 2 * r[i] + answer(i, 16)
        return [s * (r[i] + 14 if i in r else n) for i, (s, n) in enumerate(zip(sign, size, strict=True))]

    def _huffman(self, payload, count):
        m = int.from_bytes(payload[:2], "big")
        bits = "".join(f"{byte:08b}" for byte in payload[2:])
        lengths = [int(bits[4 * i : 4 * i + 4], 2) for i in range(2 * m + 1)]
        codes, code, before = {}, 0, 0
        for length, symbol in sorted((n, symbol) for symbol, n in enumerate(lengths) if n):
            code <<= length - before
            codes[f"{code:0{length}b}"] = symbol
            code, before = code + 1, length
        rest, found = bits[math.ceil((2 * m + 1) / 2) * 8 :], []
        while len(found) < count:
            length = next(n for n in range(1, 16) if rest[:n] in codes)
            found.append(codes[rest[:length]] - m)
            rest = rest[length:]
        assert rest == "0" * (len(rest) % 8)
        return found

    def _adaptive(self, reader):
        channels, rows, cols = self.shape
        counts = {}
        found = np.zeros((channels, rows, cols), int)
        for y, x in np.ndindex(rows, cols):
            near = [
                [min(2, abs(found[c, v, u])) if v >= 0 and u >= 0 else 0 for v, u in ((y - 1, x), (y, x - 1))]
                for c in range(channels)
            ]

            def answer(c, decision):
                if decision == 16:
                    return reader.read(32768)
                yes, all_answers = counts.get((c, decision, *near[c]), (0, 0))  # noqa: B023
                bit = reader.read(min(65535, max(1, 65536 * (2 * yes + 1) // (2 * all_answers + 2))))
                counts[c, decision, *near[c]] = yes + bit, all_answers + 1  # noqa: B023
                return bit

            found[:, y, x] = self._decide(answer, channels)
        reader.finish()
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


class RangeReader:
    """The range decoder in whole numbers, bit by bit."""

    def __init__(self, payload):
        assert len(payload) % 4 == 0
        self.words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
        self.point, self.lower, self.size, self.place = (self._word(0) << 32) + self._word(1), 0, 2**64 - 1, 2

    def _word(self, place):
        assert place <= len(self.words) or not self.words  # a code needs at most one word that is not there
        return self.words[place] if place < len(self.words) else 0

    def read(self, k):
        """The next bit, whose P(1) is k / 65536."""
        scale = self.size >> 24
        quantile = ((self.point - self.lower) % 2**64) // scale
        zero = (65536 - k) * (2**24 - 2) // 65536 + 1
        bit = quantile >= zero
        self.lower = (self.lower + scale * (zero if bit else 0)) % 2**64
        self.size = scale * (2**24 - zero if bit else zero)
        if self.size < 2**32:
            self.size, self.lower = self.size << 32, (self.lower << 32) % 2**64
            self.point, self.place = (self.point << 32) % 2**64 + self._word(self.place), self.place + 1
        return bit

    def finish(self):
        """Checks that no words are left."""
        assert len(self.words) <= self.place


class RawReader:
    """Bits without coding, whatever their probabilities."""

    def __init__(self, payload):
        self.bits = "".join(f"{byte:08b}" for byte in payload)

    def read(self, _):
        bit, self.bits = self.bits[0] == "1", self.bits[1:]
        return bit

    def finish(self):
        """Checks that less than a byte is left, of zeros."""
        assert self.bits == "0" * (len(self.bits) % 8)


def range_decode(payload, probabilities):
    """All bits of a code."""
    reader = RangeReader(payload)
    return [reader.read(k) for k in probabilities]


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


def damaged_files(data: bytes) -> Iterator[bytes]:
    """200 damages of a file by turns: one byte changed, or cut anywhere."""
    rng = np.random.default_rng(2)
    for trial in range(200):
        if trial % 2:
            yield data[: rng.integers(len(data))]
        else:
            changed = bytearray(data)
            changed[rng.integers(len(data))] ^= int(rng.integers(1, 256))
            yield bytes(changed)
