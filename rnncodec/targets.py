"""What a compressed file is to have: an effort, a number of bytes or a PSNR; and the encoder that comes near it."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from rnncodec.allocation import QUALITIES, SURVEYS, Allocation, Plan, Survey, TuneName
from rnncodec.entropy import ContextModel, ContextSession
from rnncodec.files.format import FormatError, truncate
from rnncodec.loop import Loop, Progress, Start

MARGIN = 0.003  # of the bytes of a target that are left over, so that it is rarely missed
CUT = 0.03  # of the bytes of a target that a file may have too many: without its end, it is nearly as good
HEADER = 64  # bytes of a header, as far as they are known beforehand
TOLERANCE = 0.045  # dB
OVERHEAD = 56  # bits of a payload beside its locations: entry in the header, checksum, end of the code
STEPS = 200  # of progress
ATTEMPTS = 6  # to meet a target, each with what the one before has shown
FEW, MORE = 1024, 20  # locations of images that have more attempts, as single locations count there, and how many
HASTE = 20.0  # dB by which the error to ask for may grow at once, as an image may have none


class Target(ABC):
    """What a file is to have: it gives efforts to try, and takes the files that follow.

    Attributes:
        judges: whether it needs the PSNR of the files.
        short: whether the last file has less than it is to have.
    """

    judges = False
    short = False

    @abstractmethod
    def effort(self, survey: Survey) -> float:
        """The effort to try next, from 0 to 1."""

    @abstractmethod
    def met(self, data: bytes, reached: float) -> bool:
        """Takes a file and its PSNR in dB; says whether it is near enough."""

    @abstractmethod
    def best(self) -> bytes:
        """The best of the files, of which there is at least one.

        Raises:
            FormatError: none is as small as it is to be.
        """


def between(below: tuple[float, float], above: tuple[float, float], goal: float, tried: int) -> float:
    """What to ask for, given what gave a little too little and too much: by interpolation, after some tries by halves.

    Args:
        below: what a request gave, and the request.
        above: likewise.
        goal: what is wanted.
        tried: number of requests.
    """
    share = (goal - below[0]) / (above[0] - below[0]) if tried <= ATTEMPTS else 0.5
    return below[1] + share * (above[1] - below[1])


class EffortTarget(Target):
    """A given effort.

    Args:
        effort: from 0 to 1.
    """

    def __init__(self, effort: float) -> None:
        self.value = effort

    def effort(self, survey: Survey) -> float:
        return self.value

    def met(self, data: bytes, reached: float) -> bool:
        self.data = data
        return True

    def best(self) -> bytes:
        return self.data


class BytesTarget(Target):
    """At most a number of bytes, and nearly as many.

    Args:
        limit: the number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.goal, self.near = limit, limit * (1 - MARGIN), limit * (1 - 3 * MARGIN)
        self.bits = 8 * (self.goal - HEADER)
        self.small = self.cut = b""  # the largest file that fits, and the largest of those that were cut to fit
        self.tried: list[tuple[int, float]] = []  # bytes of files, and the bits that were asked for
        self.error: FormatError | None = None  # of a file of which not even the first payload fits

    def effort(self, survey: Survey) -> float:
        return survey.for_rate(self.bits)

    def met(self, data: bytes, reached: float) -> bool:
        if len(data) <= self.limit:
            self.small = max(self.small, data, key=len)
        else:
            try:
                self.cut = max(self.cut, truncate(data, max_bytes=self.limit), key=len)
            except FormatError as error:
                self.error = error
        self.short = len(data) < self.near
        self.tried.append((len(data), self.bits))
        below = max((tried for tried in self.tried if tried[0] <= self.goal), default=None)
        above = min((tried for tried in self.tried if tried[0] > self.goal), default=None)
        size, bits = min((tried for tried in (below, above) if tried), key=lambda tried: abs(tried[0] - self.goal))
        self.bits = bits + 8 * (self.goal - size)
        if below and above and not below[1] < self.bits < above[1]:
            self.bits = between(below, above, self.goal, len(self.tried))
        return len(data) <= (1 + CUT) * self.limit and max(len(self.small), len(self.cut)) >= self.near

    def best(self) -> bytes:
        """The largest file that fits, if it is nearly as large as it may be, or one that was cut.

        Raises:
            FormatError: there is none.
        """
        if self.error and not (self.small or self.cut):
            raise self.error
        return self.small if len(self.small) >= self.near else max(self.small, self.cut, key=len)


class PsnrTarget(Target):
    """A PSNR of the decoded image.

    Args:
        psnr: in dB.
        values: number of values of the image.
    """

    judges = True

    def __init__(self, psnr: float, values: int) -> None:
        self.psnr = psnr
        self.level = 10 * math.log10(values) - psnr  # of the squared error to ask for, in dB, of values in [0, 1]
        self.files: list[tuple[float, bytes]] = []
        self.tried: list[tuple[float, float]] = []  # what was reached, and the level that was asked for

    def effort(self, survey: Survey) -> float:
        return survey.for_squared(4 * 10 ** (self.level / 10))

    def met(self, data: bytes, reached: float) -> bool:
        self.files.append((reached, data))
        self.short = reached < self.psnr
        self.tried.append((reached, self.level))
        below = max((tried for tried in self.tried if tried[0] <= self.psnr), default=None)
        above = min((tried for tried in self.tried if tried[0] > self.psnr), default=None)
        self.level += min(reached - self.psnr, HASTE)
        if below and above and (len(self.tried) > 3 or not above[1] < self.level < below[1]):
            self.level = between(below, above, self.psnr, len(self.tried))
        return abs(reached - self.psnr) <= TOLERANCE

    def best(self) -> bytes:
        """The file whose PSNR is nearest; warns if it is not near."""
        reached, data = min(self.files, key=lambda file: abs(file[0] - self.psnr))
        if reached < self.psnr - 2 * TOLERANCE:
            most = max(reached for reached, _ in self.files)
            reason = "are out of reach" if most < self.psnr else "are not met"
            warnings.warn(f"{self.psnr:g} dB {reason}, the image has {reached:.2f} dB", stacklevel=4)
        return data


class Allocator:
    """Encodes images with a number of iterations for each location.

    Args:
        loop: of a latent network.
        context: its exact context model, of the kind `grouped`.
        allocation: of the weights; `survey` needs none.
    """

    def __init__(self, loop: Loop, context: ContextModel, allocation: Allocation | None) -> None:
        self.loop, self.context, self.allocation = loop, context, allocation

    def effort(self, quality: float, tune: TuneName) -> float:
        """The effort of a quality from 1 to 100."""
        assert self.allocation is not None
        return float(np.interp(quality, QUALITIES, self.allocation.quality[tune]))

    def target(
        self, quality: float | None, max_bytes: int | None, psnr: float | None, tune: TuneName, values: int
    ) -> Target | None:
        """The target of an image of so many values; None if all its locations get as many iterations."""
        if max_bytes is not None:
            return BytesTarget(max_bytes)
        if psnr is not None:
            return PsnrTarget(psnr, values)
        return EffortTarget(self.effort(quality, tune)) if quality is not None and tune == "psnr" else None

    def encode(
        self,
        pixels: Tensor,
        target: Target,
        tune: TuneName,
        weight: np.ndarray | None,
        write: Callable[[Iterable[np.ndarray]], bytes],
        parts: int,
        progress: Progress | None,
    ) -> bytes:
        """Encodes an image to meet a target.

        Args:
            pixels: uint8 [1, 3, H, W].
            target: what the file is to have.
            tune: the way to allocate.
            weight: how much the error of each location counts, [rows, cols]; None counts all alike.
            write: makes a file of the bits of every iteration.
            parts: payloads of an iteration in that file.
            progress: is called with the number of steps done and the number of all steps.
        """
        assert self.allocation is not None
        worth, inputs = torch.tensor(self.allocation.worth, device=self.loop.device), self.loop.inputs(pixels)
        shown = 0

        def half() -> Progress | None:
            """Shows a survey or an attempt to encode as half of the steps that are left."""
            nonlocal shown
            show, first = progress, shown
            shown += (STEPS - shown) // 2
            share = shown - first
            return show and (lambda done, total: show(first + share * done // total, STEPS))

        kind = SURVEYS[tune]
        reconstructions = max(kind.reconstructions, int(target.judges))
        plan = Plan(kind, target.effort, self._price, worth, reconstructions, OVERHEAD * parts, weight)
        survey, start = self.loop.survey(pixels, inputs, plan, half())
        made = dict[bytes, tuple[bytes, float]]()
        fell_short = False  # whether the largest effort was too little
        for _ in range(ATTEMPTS if survey.weight.size > FEW else MORE):
            last = survey.choose(effort := target.effort(survey))
            while survey.short(last):  # it ended too early, by estimates that were wrong
                plan = plan._replace(least=2 * len(survey.rate))
                survey, start = self.loop.survey(pixels, inputs, plan, half())
                last = survey.choose(effort := target.effort(survey))
            everything = fell_short and effort >= 1
            if everything:  # also what the survey estimates to save nothing
                last, start = np.full_like(last, self.loop.max_iterations), Start([], {})
            if last.tobytes() not in made:
                planes, reached = self.loop.encode_stopped(pixels, inputs, last, start, half(), target.judges)
                made[last.tobytes()] = write(planes), reached
            if target.met(*made[last.tobytes()]) or everything:
                break
            fell_short = fell_short or (target.short and effort >= 1)
        if progress:
            progress(STEPS, STEPS)
        return target.best()

    def survey(self, pixels: Tensor, worth: Tensor) -> Survey:
        """Surveys an image, uint8 [1, 3, H, W], with all iterations, to calibrate weights; see `Loop.survey`."""
        plan = Plan(SURVEYS["psnr"], lambda _: 1.0, self._price, worth, 1, least=self.loop.max_iterations + 1)
        return self.loop.survey(pixels, self.loop.inputs(pixels), plan, None)[0]

    def _price(self, rows: int, cols: int) -> Callable[[np.ndarray], np.ndarray]:
        """A function that gives the cost of the next iteration of rows x cols locations, see `ContextSession.price`."""
        questions = self.loop.network.binarizer.questions
        return ContextSession(self.context, self.loop.config.bits, rows, cols, questions).price
