"""Results of an evaluation: points, mean curves and summaries, written to a folder and printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console

from rnncodec.evaluation.measure import Source
from rnncodec.evaluation.pictures import figure, rendered
from rnncodec.evaluation.tables import (
    Summary,
    area_table,
    bd_rate_table,
    coder_table,
    curve_table,
    rivals_table,
    summaries,
    summary_csv,
)
from rnncodec.files.images import atomic_write
from rnncodec.metrics.curves import METRICS, Point, mean_curve, to_csv, to_json


@dataclass(frozen=True)
class Results:
    """The measurements of an evaluation, and their means.

    Attributes:
        points: points of every image, codec and setting.
        sources: the codecs, the evaluated ones first.
        evaluated: number of evaluated codecs.
        overlays: mean curves of other codecs, by title.
        sizes: bytes of the whole file up to every iteration, for each image, by entropy coder.
    """

    points: Sequence[Point]
    sources: Sequence[Source]
    evaluated: int
    overlays: dict[str, list[Point]]
    sizes: dict[str, list[list[int]]]

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """The mean curves of all codecs, by name."""
        # Without settings that only match single files, as a curve must not depend on what it is compared with.
        return {
            source.name: mean_curve(p for p in self.points if p.codec == source.name and p.setting in source.settings)
            for source in self.sources
        }

    @cached_property
    def drawn(self) -> dict[str, list[Point]]:
        """The mean curves that are drawn and compared, by title."""
        # A codec with a single setting (PNG) is one point beyond the range.
        drawable = [source for i, source in enumerate(self.sources) if i < self.evaluated or len(source.settings) > 1]
        return {source.title: self.curves[source.name] for source in drawable} | self.overlays

    @cached_property
    def summaries(self) -> list[Summary]:
        """The summaries of the drawn curves."""
        return summaries(self.drawn, {source.title for source in self.sources if source.saturates})

    @property
    def numbers(self) -> dict[str, float]:
        """Areas under the curve of the first codec, and its BD-rates against the others, whose names are appended."""
        names = {source.title: source.name for source in self.sources}
        first, *others = self.summaries
        found = dict(first.named_areas)
        for each in others:
            name = names.get(each.codec, each.codec)
            found |= {f"{key}_{name}": value for key, value in each.named_bd_rates.items()}
        return found

    @cached_property
    def mean_sizes(self) -> dict[str, np.ndarray]:
        """Mean bytes [T] of the whole file, by entropy coder."""
        return {name: np.mean(each, axis=0) for name, each in self.sizes.items()}

    @cached_property
    def images(self) -> str:
        """The number of images that the means are of, and that for each metric that only some of them have."""
        mine = [point for point in self.points if point.codec == self.sources[0].name]
        count = len({point.image for point in mine})
        text = f"{count} image{'s' * (count > 1)}"
        for name, metric in METRICS.items():
            having = len({point.image for point in mine if not np.isnan(getattr(point, name))})
            if 0 < having < count:
                text += f", {metric.title} of the {having} large enough"
        return text

    @property
    def files(self) -> list[str]:
        """The names of the files that `write` creates."""
        names = ["points.csv", "mean.csv", "summary.csv", "rate_distortion.png", "rate_distortion.svg"]
        return names + [f"{source.name}.json" for source in self.sources] + ["coders.csv"] * bool(self.sizes)

    def write(self, folder: Path) -> None:
        """Writes points, means, summaries and figures to a folder."""
        for source in self.sources:
            description = f"{source.description}; whole files, mean of {self.images}"
            text = to_json(self.curves[source.name], source.name, description)
            atomic_write(folder / f"{source.name}.json", text.encode())
        atomic_write(folder / "points.csv", to_csv(self.points).encode())
        means = to_csv(point for curve in self.curves.values() for point in curve)
        atomic_write(folder / "mean.csv", means.encode())
        drawing = figure(self.drawn, list(self.overlays))
        for format in ("png", "svg"):
            atomic_write(folder / f"rate_distortion.{format}", rendered(drawing, format))
        atomic_write(folder / "summary.csv", summary_csv(self.summaries).encode())
        if self.sizes:
            text = "coder,iteration,bytes\n"
            for name, each in self.mean_sizes.items():
                text += "".join(f"{name},{t},{size}\n" for t, size in enumerate(each, 1))
            atomic_write(folder / "coders.csv", text.encode())

    def show(self, console: Console) -> None:
        """Prints the tables."""
        if self.sizes:
            console.print(coder_table(self.mean_sizes))
        first, *rest = self.drawn
        console.print(curve_table(self.drawn[first], self.images))
        if rest:
            console.print(rivals_table(self.drawn))
            console.print(area_table(self.summaries))
            console.print(bd_rate_table(self.summaries))
