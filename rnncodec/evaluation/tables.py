"""Tables and summaries of mean curves: metrics, areas under the curves, BD-rates, entropy coders."""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.table import Table
from rich.text import Text

from rnncodec.metrics.curves import CURVES, METRICS, NAN, Point, area, bd_rate, interpolate
from rnncodec.metrics.distortion import REPORTED_ITERATIONS

WINDOW = (0.25, 1.875)  # bits per pixel; in a fixed range, the area under a curve favors no codec
COMMON = 0.75  # a BD-rate over a smaller share of a curve's range of quality is marked as doubtful
SPANS = {
    "to 2": (None, 2.0),
    f"{WINDOW[0]} to\n{WINDOW[1]}": WINDOW,
}  # bits per pixel; the first as in Toderici et al. 2017
AREAS = ("ms_ssim", "psnr_hvs", "psnr")  # the first two are those of Toderici et al. 2017
COMPARED = ("psnr", "ms_ssim")  # of `rivals_table`


def curve_table(curve: Sequence[Point], images: str) -> Table:
    """A table of all metrics of a mean curve; those that only some images have have rows of their own."""
    result = Table(title=f"{curve[0].codec}, mean of {images}")
    for column in ("", "bytes", "bpp", *(metric.title for metric in METRICS.values())):
        result.add_column(column, justify="right", no_wrap=True)
    for name, points in groupby(curve, key=lambda point: point.image):
        result.add_section()
        for point in points:
            setting = f"{point.setting:g}" if name == "mean" else f"{point.setting:g} ({name})"
            cells = [number(getattr(point, metric), METRICS[metric].digits) for metric in METRICS]
            result.add_row(setting, number(point.bytes, 0), number(point.bpp, 4), *cells)
    return result


def rivals_table(curves: dict[str, list[Point]]) -> Table:
    """A table of all mean curves at the bits per pixel of the first after 1, 2, 4, 8 and 16 iterations."""
    first = next(iter(curves.values()))
    rates = [(p.setting, p.bpp) for p in first if p.image == "mean" and p.setting in REPORTED_ITERATIONS]
    result = Table(title="PSNR and MS-SSIM at the same bits per pixel")
    unit = "iterations" if first[0].setting else "level"  # levels begin at 0
    result.add_column(f"{unit}\nbpp", overflow="fold")
    for setting, bpp in rates:
        result.add_column(f"{setting:g}\n{bpp:.3f}", justify="right", no_wrap=True)
    for name, curve in curves.items():
        cells = [
            "\n".join(number(interpolate(curve, name, bpp), METRICS[name].digits) for name in COMPARED)
            for _, bpp in rates
        ]
        result.add_row(Text(name), *cells, end_section=True)
    return result


@dataclass(frozen=True)
class Summary:
    """The summary of a mean curve.

    Attributes:
        codec: name of the codec.
        areas: areas under the curve, for each metric of `AREAS` and each range of `SPANS`.
        bd_rates: for each metric of `CURVES`, how many percent more bits the first codec takes than this one for
            equal quality, and the share of its range of quality that this one has too; None for the first codec.
    """

    codec: str
    areas: list[list[float]]
    bd_rates: list[tuple[float, float]] | None

    @property
    def named_areas(self) -> dict[str, float]:
        """The areas, by the names of their columns in summary.csv."""
        names = [f"auc_{metric}_{name}" for metric in AREAS for name in ("to_2", "window")]
        return dict(zip(names, (value for pair in self.areas for value in pair), strict=True))

    @property
    def named_bd_rates(self) -> dict[str, float]:
        """The BD-rates and their overlaps, likewise."""
        names = [f"bd_rate_{metric}{end}" for metric in CURVES for end in ("", "_overlap")]
        pairs = self.bd_rates or [(NAN, NAN)] * len(CURVES)
        return dict(zip(names, (value for pair in pairs for value in pair), strict=True))


def summaries(curves: dict[str, list[Point]], saturated: Collection[str] = ()) -> list[Summary]:
    """Computes the areas under all curves, and the BD-rates of the first curve against each of the others.

    The last points of those that are `saturated` are the largest files that their codecs make.
    """
    mine = next(iter(curves.values()))
    result = []
    for name, curve in curves.items():
        areas = [
            [area(curve, metric, *span, saturates=name in saturated) for span in SPANS.values()] for metric in AREAS
        ]
        bd_rates = None if curve is mine else [bd_rate(curve, mine, metric) for metric in CURVES]
        result.append(Summary(name, areas, bd_rates))
    return result


def summary_csv(summaries: Sequence[Summary]) -> str:
    """Writes summaries as CSV, one row for each curve; missing values are left empty."""
    rows: list[list[str]] = []
    for each in summaries:
        values = each.named_areas | each.named_bd_rates
        rows = rows or [["codec", *values]]
        rows.append([each.codec, *("" if np.isnan(value) else repr(float(value)) for value in values.values())])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def area_table(summaries: Sequence[Summary]) -> Table:
    """A table of the areas under all curves."""
    result = Table(title="area under the curves, over bits per pixel")
    names = [f"{METRICS[name].title}\n{span}" for name in AREAS for span in SPANS]
    for column in ("codec", *names):
        result.add_column(column, justify="left" if column == "codec" else "right", overflow="fold")
    for each in summaries:
        result.add_row(Text(each.codec), *(number(value, 3) for pair in each.areas for value in pair))
    return result


def bd_rate_table(summaries: Sequence[Summary]) -> Table:
    """A table of how many more bits the first codec takes than each of the others."""
    first, *others = summaries
    result = Table(title=f"BD-rate: how many more bits {first.codec} takes for the same quality")
    for column in ("than", *(metric.title for metric in CURVES.values())):
        result.add_column(column, justify="left" if column == "than" else "right")
    partial = False
    for each in others:
        cells = []
        for difference, overlap in each.bd_rates or ():
            doubtful = not np.isnan(difference) and overlap < COMMON
            partial |= doubtful
            cells.append("-" if np.isnan(difference) else f"{difference:+.1f} %" + "*" * doubtful)
        result.add_row(Text(each.codec), *cells)
    if partial:
        result.caption = f"* over less than {COMMON:.0%} of the range of quality of {first.codec}"
    return result


def coder_table(mean: dict[str, np.ndarray]) -> Table:
    """A table of mean bytes [T] of raw files, and the share of them that each entropy coder saves."""
    names = [name for name in mean if name != "none"]
    result = Table(title="bytes of the whole file, and the share that each entropy coder saves")
    for column in ("iteration", "raw", *names):
        result.add_column(column, justify="right")
    for t, raw in enumerate(mean["none"]):
        result.add_row(str(t + 1), f"{raw:.0f}", *(f"{1 - mean[name][t] / raw:.1%}" for name in names))
    return result


def number(value: float, digits: int) -> str:
    """A value with `digits` decimals, or `-` for nan."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"
