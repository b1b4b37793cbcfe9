"""Runs a network on images of any size: its loop in tiles, its transforms in windows."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnncodec import tiling
from rnncodec.allocation import HALO, PATIENCE, Plan, Survey, TuneName, block_errors
from rnncodec.network import LatentConfig, RecurrentCodec, State, Step, pad_to_blocks, to_uint8
from rnncodec.tiling import MAX_ITERATIONS, MAX_SIDE, Box, Tile, inside, windows

WINDOW = 1024  # pixels, side of the windows of the transforms of a latent network, without halo

Progress = Callable[[int, int], None]


class Start(NamedTuple):
    """An encoding whose first iterations are those of any other in which locations stop only later.

    Attributes:
        planes: bits of its iterations, int8 [bits, rows, cols].
        states: what follows from some of the iterations, by their number.
    """

    planes: list[np.ndarray]
    states: dict[int, State]


class Loop:
    """Encodes and decodes whole images with a network; training runs the same steps on patches.

    Args:
        network: the network, on its device.
        tile: side of the tiles in pixels, see `Codec`.
    """

    def __init__(self, network: RecurrentCodec, tile: int | None = None) -> None:
        self.network, self.config, self.tile = network, network.config, tile
        self.device = next(network.parameters()).device
        self.max_iterations = self.config.iterations if isinstance(self.config, LatentConfig) else MAX_ITERATIONS

    def encode(self, images: Tensor, iterations: int, progress: Progress | None) -> Iterator[np.ndarray]:
        """Yields the bits of images [B, 3, H, W], int8 [B, bits, rows, columns] for each iteration."""
        height, width = images.shape[-2:]
        areas = self.tiles(height, width)
        if len(areas) == 1:  # an iteration is computed only when it is asked for
            with exact():  # not around `yield`, where it would apply to the caller, too
                steps = self.network.unroll(self._input(images, areas[0].area), iterations)
            for t in range(iterations):
                with exact():
                    step = next(steps)
                if progress:
                    progress(t + 1, iterations)
                yield _plane(step)
            return
        planes = np.empty((iterations, len(images), self.config.bits, *self.grid(height, width)), np.int8)
        with exact():
            for i, tile in enumerate(areas):
                for t, step in enumerate(self.network.unroll(self._input(images, tile.area), iterations)):
                    planes[t][..., *tile.core] = _plane(step)[..., *inside(tile)]
                    if progress:
                        progress(i * iterations + t + 1, len(areas) * iterations)
        yield from planes

    def inputs(self, image: Tensor) -> list[Tensor]:
        """The input of the loop for each tile of an image."""
        with exact():
            return [self._input(image, tile.area) for tile in self.tiles(*image.shape[-2:])]

    def survey(
        self, image: Tensor, inputs: list[Tensor], plan: Plan, progress: Progress | None
    ) -> tuple[Survey, Start]:
        """Encodes an image without stops, as far as the wish may need; see `rnncodec.allocation`.

        Args:
            image: [1, 3, H, W], of a latent network.
            inputs: of the image.
            plan: of the survey.
            progress: is called with the number of steps done and the number of all steps.

        Returns:
            The survey, and for `encode_stopped` its last iterations, unless the image is coded in tiles.
        """
        areas, most = self.tiles(*image.shape[-2:]), self.max_iterations
        groups = self.network.binarizer.questions.groups
        surveys: list[Survey] = []
        start = Start([], {})
        for i, (tile, y) in enumerate(zip(areas, inputs, strict=True)):
            rows, cols = (cut.stop - cut.start for cut in tile.area)
            survey = plan.kind(rows, cols, most, plan.overhead, None if plan.weight is None else plan.weight[tile.area])
            cost, start, last = plan.price(rows, cols), Start([], {}), np.full((rows, cols), most)
            for t in range(1, most + 1):
                with exact():
                    limit = torch.from_numpy(last).to(self.device)[None] * groups
                    step = self.network(start.states.get(t - 1), y=y, limit=limit)
                    latent = torch.einsum("c,chw->hw", plan.worth, (y - step.state.y_hat)[0].square())
                start.planes.append(_plane(step)[0])
                start.states[t] = step.state
                start.states.pop(t - max(1, plan.reconstructions), None)
                survey.add(cost(start.planes[-1]), latent.double().cpu().numpy())
                if progress:
                    progress(i * most + t, len(areas) * most)
                # With several tiles, the wish depends on the others, too.
                if len(areas) == 1 and t >= plan.least and t % survey.checked == 0:
                    best = survey.choose(plan.wish(survey))
                    if survey.done(best):
                        break
                    last = np.where(best > t - PATIENCE, last, np.minimum(last, t))
            measured = list(start.states.values())[: plan.reconstructions]  # one more is kept than none
            survey.errors = [self._errors(state, image, tile, survey.measure) for state in measured]
            surveys.append(survey)
        return plan.kind.joined(surveys), start if len(areas) == 1 else Start([], {})

    def _errors(self, state: State, image: Tensor, tile: Tile, measure: TuneName) -> np.ndarray:
        """The errors of the locations of a tile, float64 [rows, cols]; see `block_errors`."""
        height, width = image.shape[-2:]
        (rows, cols), stride = tile.area, self.config.stride
        size = min(rows.stop * stride, height) - rows.start * stride, min(cols.stop * stride, width)
        decoded = torch.empty(1, 3, *size, dtype=torch.uint8)
        for (y, x), x_hat in self._pictures(state, tile, height, width):
            decoded[..., y.start - rows.start * stride : y.stop - rows.start * stride, x] = to_uint8(x_hat).cpu()
        errors = torch.empty(rows.stop - rows.start, cols.stop, device=self.device)
        for window, core in windows(*tile.area, HALO, self._window()):
            below = window[0].start - rows.start
            here = slice(below, below + window[0].stop - window[0].start), window[1]
            with exact():
                pixels = self._pixels(image, window), self._pixels(decoded, here)
                found = block_errors(*pixels, stride, measure)
            errors[inside(Tile(tile.area, core))] = found[inside(Tile(window, core))]
        return errors.double().cpu().numpy()

    def encode_stopped(
        self,
        image: Tensor,
        inputs: list[Tensor],
        last: np.ndarray,
        start: Start,
        progress: Progress | None,
        judge: bool,
    ) -> tuple[np.ndarray, float]:
        """Encodes an image of which each location stops after an iteration of its own.

        Args:
            image: [1, 3, H, W], of a latent network.
            inputs: of the image.
            last: the last iteration of each location, from 1, [rows, cols].
            start: from the survey of the image; what it has of the iterations before the first stop is not done again.
            progress: is called with the number of steps done and the number of all steps.
            judge: whether to reconstruct the image.

        Returns:
            The bits, int8 [iterations, bits, rows, cols], and the PSNR in dB, nan unless `judge` is set.
        """
        height, width = image.shape[-2:]
        areas, groups = self.tiles(height, width), self.network.binarizer.questions.groups
        planes = np.zeros((int(last.max()), self.config.bits, *last.shape), np.int8)
        done = max((t for t in start.states if t <= last.min()), default=0)
        if done:
            planes[:done] = start.planes[:done]
        total = 0
        with exact():
            for i, (tile, y) in enumerate(zip(areas, inputs, strict=True)):
                limit = torch.from_numpy(last[tile.area]).to(self.device)[None] * groups
                state = start.states.get(done)
                for t in range(done, int(last[tile.area].max())):
                    step = self.network(state, y=y, limit=limit)
                    planes[t][:, *tile.area], state = _plane(step)[0], step.state
                    if progress:
                        progress(i * len(planes) + t + 1, len(areas) * len(planes))
                if judge and state is not None:
                    for box, x_hat in self._pictures(state, tile, height, width):
                        total += _squared_error(image, x_hat, box)
        return planes, _decibel(total, image) if judge else math.nan

    def encode_to(self, target: float, image: Tensor, progress: Progress | None) -> np.ndarray:
        """Encodes one image like `encode`, with the fewest iterations that reach a PSNR, or all with a warning."""
        height, width = image.shape[-2:]
        areas = self.tiles(height, width)
        most, best = self.max_iterations, -math.inf
        if len(areas) == 1:  # the encoder already has the decoder's reconstruction
            found = []
            with exact():
                for t, step in enumerate(self.network.unroll(self._input(image, areas[0].area), most)):
                    found.append(_plane(step))
                    pictures = self._pictures(step.state, areas[0], height, width)
                    reached = _decibel(sum(_squared_error(image, x_hat, box) for box, x_hat in pictures), image)
                    if progress:
                        progress(most if reached >= target else t + 1, most)
                    if reached >= target:
                        return np.stack(found)
                    best = max(best, reached)
            planes = np.stack(found)
        else:
            steps = most * len(areas)
            first = progress and (lambda done, _: progress(done, 2 * steps))
            planes = np.stack(list(self.encode(image, most, first)))
            errors = [0] * most
            later = progress and (lambda done, _: progress(steps + done, 2 * steps))
            for t, box, x_hat in self.decode(planes, most, height, width, later, pictures=1):
                errors[t] += _squared_error(image, x_hat, box)
            for t, error in enumerate(errors):
                if _decibel(error, image) >= target:
                    return planes[: t + 1]
            best = _decibel(min(errors), image)
        warnings.warn(f"{target:g} dB are out of reach, {most} iterations reach {best:.2f} dB", stacklevel=3)
        return planes

    def decode(
        self,
        planes: Iterable[np.ndarray],
        count: int,
        height: int,
        width: int,
        progress: Progress | None,
        pictures: int = 0,
    ) -> Iterator[tuple[int, Box, Tensor]]:
        """Decodes iterations, int8 [B, bits, rows, columns]; yields numbers of pictures, boxes in pixels, and x_hat.

        Args:
            planes: the bits of each iteration.
            count: of iterations.
            height: of the image in pixels.
            width: of the image in pixels.
            progress: is called with the number of steps done and the number of all steps.
            pictures: how many to reconstruct of each iteration, after as many parts of its bits; 0 for only the last of
                the last iteration.
        """
        areas = self.tiles(height, width)
        if len(areas) > 1:
            planes = list(planes)
        for i, tile in enumerate(areas):
            state = None
            for t, plane in enumerate(planes):
                bits = torch.from_numpy(plane[..., *tile.area]).to(self.device).float()
                for part in range(1, pictures):
                    some = bits.clone()
                    some[:, len(some[0]) * part // pictures :] = 0
                    partly = self._decoded(state, some)
                    for box, x_hat in self._pictures(partly, tile, height, width):
                        yield t * pictures + part - 1, box, x_hat
                state = self._decoded(state, bits)
                if progress:
                    progress(i * count + t + 1, len(areas) * count)
                if pictures or t == count - 1:
                    for box, x_hat in self._pictures(state, tile, height, width):
                        yield (t + 1) * pictures - 1, box, x_hat

    def _decoded(self, state: State | None, bits: Tensor) -> State:
        """The state after one more iteration."""
        with exact():
            return self.network(state, bits=bits.contiguous(memory_format=torch.channels_last)).state

    def _pictures(self, state: State, tile: Tile, height: int, width: int) -> Iterator[tuple[Box, Tensor]]:
        """Reconstructs a tile from its state: yields boxes of the image in pixels, and their x_hat."""
        stride, halo = self.config.stride, self.network.transforms.halos[1]
        for area, core in windows(*tile.area, halo, self._window()):
            kept = tuple(
                slice(max(c.start, t.start), min(c.stop, t.stop)) for c, t in zip(core, tile.core, strict=True)
            )
            if any(cut.start >= cut.stop for cut in kept):
                continue
            box = tuple(
                slice(cut.start * stride, min(cut.stop * stride, length))
                for cut, length in zip(kept, (height, width), strict=True)
            )
            with exact():
                x_hat = self.network.picture(state, inside(Tile(tile.area, area)))
            y, x = (
                slice(cut.start - start.start * stride, cut.stop - start.start * stride)
                for cut, start in zip(box, area, strict=True)
            )
            yield (box[0], box[1]), x_hat[..., y, x]

    def _input(self, images: Tensor, area: Box) -> Tensor:
        """The input of the loop for an area of images, in blocks."""
        halo, grid = self.network.transforms.halos[0], self.grid(*images.shape[-2:])
        cuts = windows(*area, halo, self._window(), grid)
        if cuts[0][0] == area:
            return self.network.analyse(self._pixels(images, area))
        parts = []
        for window, core in cuts:
            y = self.network.analyse(self._pixels(images, window))
            parts.append((core, y[..., *inside(Tile(window, core))]))
        rows, columns = (cut.stop - cut.start for cut in area)
        whole = parts[0][1].new_empty(*parts[0][1].shape[:2], rows, columns)
        for core, y in parts:
            whole[..., *inside(Tile(area, core))] = y
        return whole.contiguous(memory_format=torch.channels_last)

    def _pixels(self, images: Tensor, area: Box) -> Tensor:
        """The pixels of an area of images in [-1, 1]; the last ones are repeated up to whole blocks."""
        stride = self.config.stride
        rows, columns = area
        x = images[..., rows.start * stride : rows.stop * stride, columns.start * stride : columns.stop * stride]
        x = x.to(self.device)
        x = 2 * x.float() / 255 - 1 if x.dtype == torch.uint8 else 2 * x.float() - 1
        return pad_to_blocks(x, stride).contiguous(memory_format=torch.channels_last)

    def _window(self) -> int:
        """Side of the windows of the transforms, in blocks."""
        if isinstance(self.config, LatentConfig):
            return math.ceil((self.tile or WINDOW) / self.config.stride)
        return MAX_SIDE

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the blocks of an image."""
        return math.ceil(height / self.config.stride), math.ceil(width / self.config.stride)

    def tiles(self, height: int, width: int) -> list[Tile]:
        return tiling.tiles(self.config, *self.grid(height, width), self.tile)


def _squared_error(image: Tensor, x_hat: Tensor, box: Box) -> int:
    """The squared error of a box of a reconstruction in 8-bit values."""
    return int((to_uint8(x_hat).cpu().int() - image[..., *box].int()).square().sum())


def _decibel(error: int, image: Tensor) -> float:
    """The PSNR of an image with a squared error."""
    return 10 * math.log10(255**2 * image.numel() / error) if error else math.inf


def _plane(step: Step) -> np.ndarray:
    """The bits of a step, int8."""
    return step.bits.to(torch.int8).cpu().numpy()


@contextmanager
def exact() -> Iterator[None]:
    """A context without gradients or TF32: encoder and decoder must agree, and tilings differ as little as possible."""
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
        ),
    ):
        yield
