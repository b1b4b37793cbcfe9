"""The comparisons that the results of an evaluation allow, and their order and sides for each rater."""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from rnncodec.metrics.curves import Point, picture_path, read_points

FAR = 0.25  # share of a target rate by which rnncodec may miss it
TOLERANCE = 0.05  # share of the bytes of rnncodec by which those of a compared file may differ
REPEATS = 0.10  # of the comparisons are shown a second time, with sides swapped
CHECKS = 0.05  # as many honesty checks, as a share of the comparisons
GAP = 5  # trials at least between a comparison and its repeat, where there are so many


class Comparison(NamedTuple):
    """Two reconstructions of an image, whose bytes are close to a target rate in bits per pixel."""

    image: str
    rate: float
    first: Point
    second: Point


class Trial(NamedTuple):
    """What a rater is shown at once: an original and two pictures to compare with it.

    Attributes:
        token: identifies the trial, its rater and its sides without revealing them.
        kind: `normal`; `repeat`, a comparison shown before; or `check`, where one side is the original itself.
        rate: in bits per pixel; None for a check.
        left: shown on the left.
        right: shown on the right.
    """

    token: str
    kind: str
    image: str
    rate: float | None
    left: Point
    right: Point


def match(points: Sequence[Point], rates: Sequence[float]) -> list[Comparison]:
    """Every pair of codecs of each image at each target rate, at matched bytes.

    The anchor is the reconstruction of rnncodec whose rate is nearest to the target, unless it is nearer to another
    target or misses this one by more than a quarter. Of every other codec it is the one whose bytes are nearest to the
    anchor's, if they differ by at most 5 %.

    Args:
        points: with pictures.
        rates: targets in bits per pixel.

    Raises:
        ValueError: nothing can be compared; the message says why.
    """
    comparisons = []
    if not any(point.evaluated for point in points):
        raise ValueError("there is no picture of rnncodec, whose bytes the other codecs are to match")
    for image in sorted({point.image for point in points}):
        codecs: dict[str, list[Point]] = {}
        for point in points:
            if point.image == image:
                codecs.setdefault(point.codec, []).append(point)
        own = [point for point in points if point.image == image and point.evaluated]
        for rate in sorted(set(rates)) if own else ():
            anchor = min(own, key=lambda point: abs(point.bpp - rate))
            nearest = min(rates, key=lambda other: abs(anchor.bpp - other))
            if nearest != rate or abs(anchor.bpp - rate) > FAR * rate:
                continue
            matched = [
                anchor if codec == anchor.codec else min(each, key=lambda point: abs(point.bytes - anchor.bytes))
                for codec, each in sorted(codecs.items())
            ]
            matched = [point for point in matched if abs(point.bytes - anchor.bytes) <= TOLERANCE * anchor.bytes]
            comparisons += [Comparison(image, rate, *pair) for pair in combinations(matched, 2)]
    if not comparisons:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(
            f"nothing to compare: near {listed} bpp no other codec has a picture within {TOLERANCE:.0%} of the bytes "
            "of rnncodec; measure more settings or choose other rates"
        )
    return comparisons


class Study:
    """The comparisons of an evaluation, and the order and sides in which each rater sees them.

    All random choices come from a hash of seed, rater and trial. So only the votes of a rater have to be stored, and
    images or rates that are added later change neither the tokens nor the sides of earlier trials.

    Args:
        results: folder with points.csv and the pictures.
        rates: targets in bits per pixel.
        seed: another one gives all raters other orders and sides.

    Raises:
        ValueError: points.csv or a picture is missing or faulty, or nothing can be compared.
    """

    def __init__(self, results: Path, rates: Sequence[float], seed: int = 0) -> None:
        self.seed = seed
        points = [point for point in read_points(results) if point.picture]
        if not points:
            raise ValueError(
                f"{results / 'points.csv'}: no row has a picture; `rnncodec evaluate --save-images` makes them"
            )
        self.comparisons = match(points, rates)
        self.checks = []  # the original of each image against its worst reconstruction
        for image in sorted({comparison.image for comparison in self.comparisons}):
            worst = min((p for p in points if p.image == image), key=lambda p: (math.isnan(p.psnr), p.psnr))
            size = picture_path(results, worst.original).stat().st_size
            self.checks.append((Point(image, "original", 0, size, math.nan, picture=worst.original), worst))
        shown = [point for _, _, *pair in self.comparisons for point in pair]
        shown += [point for pair in self.checks for point in pair]
        pictures = {self.picture(point): point.picture for point in shown}
        pictures |= {self.reference(original.image): original.picture for original, _ in self.checks}
        # By token; the server serves no other pictures.
        self.pictures = {token: picture_path(results, picture) for token, picture in pictures.items()}
        self.trials = lru_cache(maxsize=256)(self._trials)

    def picture(self, point: Point) -> str:
        """The token of a reconstruction's picture."""
        return self._token("candidate", point)

    def reference(self, image: str) -> str:
        """The token of an original as the reference; as a side of a check it has another, to stay unrecognized."""
        return self._token("reference", image)

    def _trials(self, rater: str) -> tuple[Trial, ...]:
        """All trials of a rater in order: each comparison once, repeats and checks between them."""

        def trial(kind: str, turn: int, image: str, rate: float | None, pair: Sequence[Point]) -> Trial:
            names = rater, kind, turn, image, rate, *map(file_of, pair)
            swapped = self._draw("side", *names) < 0.5
            left, right = reversed(pair) if swapped else pair
            return Trial(self._token("trial", swapped, *names), kind, image, rate, left, right)

        comparisons = [trial("normal", 0, c.image, c.rate, (c.first, c.second)) for c in self.comparisons]
        comparisons.sort(key=lambda each: self._draw("order", each.token))
        count = len(comparisons)
        places: list[tuple[float, Trial]] = list(enumerate(comparisons))
        early = sorted(places[: max(1, count - GAP)], key=lambda each: self._draw("repeat", each[1].token))
        for place, first in early[: max(1, round(REPEATS * count))]:
            token = self._token("repeat", first.token)
            start = min(place + GAP, count)
            place = start + self._draw("place", token) * (count - start)
            places.append((place, first._replace(token=token, kind="repeat", left=first.right, right=first.left)))
        images = sorted(self.checks, key=lambda pair: self._draw("check", rater, pair[0].image))
        for i in range(max(1, round(CHECKS * count))):
            turn, index = divmod(i, len(images))
            check = trial("check", turn, images[index][0].image, None, images[index])
            places.append((self._draw("place", check.token) * count, check))
        return tuple(each for _, each in sorted(places, key=lambda each: each[0]))

    def _token(self, *parts: object) -> str:
        return hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=16).hexdigest()

    def _draw(self, *parts: object) -> float:
        """A number in [0, 1)."""
        return int(self._token("draw", *parts)[:13], 16) / 16**13  # 52 bits, which a float holds


def file_of(point: Point) -> tuple[str, float, int]:
    """Codec, setting and bytes of the file of a point."""
    return point.codec, float(point.setting), int(point.bytes)
