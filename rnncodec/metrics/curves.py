"""Rate-distortion curves: points, means over images, interpolation, area under a curve, BD-rate, CSV and JSON."""

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rnncodec.files.images import one_line

NAN = float("nan")


@dataclass(frozen=True)
class Point:
    """A point of a rate-distortion curve, of one image or the mean of several; missing values are nan.

    Attributes:
        image: name of the image; `mean`, or `mean of N` where only so many images have the metrics.
        codec: name of the codec; the name of the evaluated one begins with `rnncodec`.
        setting: iterations, or what the codec calls quality; printed with `:g`.
        bytes: of the whole file.
        bpp: bits per pixel of the image.
        ideal_bpp: bits per pixel of an ideal coder with the context model's probabilities.
        l1: mean absolute error, 0 to 255.
        psnr: in dB; infinite for an equal image.
        ms_ssim: up to 1; nan for an image too small for it.
        psnr_hvs: in dB.
        psnr_hvs_m: in dB.
        encode_seconds: for the whole file; nan where the file is a part of a larger one.
        decode_seconds: likewise.
        picture: path of the decoded picture, relative to the results; empty if it was not saved.
    """

    image: str
    codec: str
    setting: float
    bytes: float
    bpp: float
    ideal_bpp: float = NAN
    l1: float = NAN
    psnr: float = NAN
    ms_ssim: float = NAN
    psnr_hvs: float = NAN
    psnr_hvs_m: float = NAN
    encode_seconds: float = NAN
    decode_seconds: float = NAN
    picture: str = ""

    @property
    def evaluated(self) -> bool:
        """Whether this is a point of the evaluated codec, whose settings are iterations."""
        return self.codec.startswith("rnncodec")

    @property
    def original(self) -> str:
        """Path of the original picture, beside the decoded one."""
        return str(PurePosixPath(self.picture).with_name("original.png"))

    @property
    def spent(self) -> str:
        """Path of the picture of where the bits are, beside the decoded one."""
        return spent_path(self.picture)

    @property
    def ms_ssim_db(self) -> float:
        """MS-SSIM as -10 log10(1 - MS-SSIM)."""
        return math.inf if self.ms_ssim >= 1 else -10 * math.log10(1 - self.ms_ssim)  # rounding may exceed 1


MEASURES = tuple(field.name for field in fields(Point) if field.type is float)[1:]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: in tables, figures and on the page.
        unit: of its values; empty if they have none.
        digits: after the decimal point.
        compressai: CompressAI's name for it; empty if it has none.
        drawn: whether figures, the page, W&B and BD-rates have it. It must rise with quality.
        decibels: whether curves and BD-rates take -10 log10(1 - value), which `Point` has under its name with `_db`.
    """

    title: str
    unit: str
    digits: int
    compressai: str = ""
    drawn: bool = False
    decibels: bool = False

    @property
    def curve_unit(self) -> str:
        """The unit of its curves."""
        return "dB" if self.decibels else self.unit

    def titled(self, unit: str) -> str:
        """The title with a unit, if there is one."""
        return f"{self.title} ({unit})" if unit else self.title


# By the attribute of `Point`; `rnncodec.metrics.distortion.DISTORTIONS` computes them.
METRICS = {
    "l1": Metric("L1", "", 2, "l1"),
    "psnr": Metric("PSNR", "dB", 2, "psnr-rgb", drawn=True),
    "ms_ssim": Metric("MS-SSIM", "", 4, "ms-ssim-rgb", drawn=True, decibels=True),
    "psnr_hvs": Metric("PSNR-HVS", "dB", 2, "psnr-hvs"),
    "psnr_hvs_m": Metric("PSNR-HVS-M", "dB", 2, "psnr-hvs-m", drawn=True),
}
DRAWN = {name: metric for name, metric in METRICS.items() if metric.drawn}
CURVES = {name + "_db" * metric.decibels: metric for name, metric in DRAWN.items()}  # by what curves take of a `Point`
COMPRESSAI = {"bpp": "bpp"} | {metric.compressai: name for name, metric in METRICS.items() if metric.compressai}


def mean_curve(points: Iterable[Point]) -> list[Point]:
    """The mean over images of one codec's points, at each setting that all of them have, in order of setting.

    Every value of a point is a mean over the same images. Metrics that only some images have, as small ones have no
    MS-SSIM, therefore follow in points of their own, named `mean of N`, whose bytes and bpp are those of the N images
    that have the metric at every setting. A mean is infinite if one of its values is, such as the PSNR of an equal
    image; `samples` leaves it out.
    """
    groups: dict[float, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    images = frozenset(point.image for group in groups.values() for point in group)
    # Others are measured only for single images, to match the bytes of a file.
    complete = [group for _, group in sorted(groups.items()) if len(group) == len(images)]
    having = {
        metric: images - {point.image for group in complete for point in group if math.isnan(getattr(point, metric))}
        for metric in METRICS
    }
    curve = []
    for members in sorted({images, *filter(None, having.values())}, key=len, reverse=True):
        name = "mean" if members == images else f"mean of {len(members)}"
        for group in complete:
            chosen = [point for point in group if point.image in members]
            means: dict[str, Any] = {
                measure: float(np.mean([getattr(point, measure) for point in chosen]))
                for measure in MEASURES
                if having.get(measure, members) == members
            }
            curve.append(Point(name, chosen[0].codec, chosen[0].setting, **means))
    return curve


def largest_within(points: Iterable[Point], size: float) -> Point | None:
    """The largest file of at most `size` bytes, among equal sizes that of best PSNR; None if there is none."""
    fitting = (point for point in points if point.bytes <= size)
    return max(fitting, key=lambda point: (point.bytes, point.psnr), default=None)


def samples(curve: Sequence[Point], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rates and values of a metric (an attribute of `Point`), in order of rate, where both are finite."""
    pairs = sorted((point.bpp, getattr(point, metric)) for point in curve)
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    rates, values = np.array(pairs).reshape(-1, 2).T
    return rates, values


def interpolate(curve: Sequence[Point], metric: str, bpp: float) -> float:
    """A metric of a curve at a rate, linear between its points and nan outside them."""
    rates, values = samples(curve, metric)
    return float(np.interp(bpp, rates, values, left=NAN, right=NAN)) if len(rates) else NAN


def area(curve: Sequence[Point], metric: str, low: float | None, high: float, saturates: bool = False) -> float:
    """The integral of a metric over bits per pixel, by trapezoids, as in Toderici et al. 2017.

    Args:
        curve: in any order.
        metric: an attribute of `Point`.
        low: lower end; None for the first point of the curve, as in the paper, which favors curves that start lower.
        high: upper end.
        saturates: whether the last point is the largest file that the codec makes. The curve then keeps its value at
            higher rates.

    Returns:
        nan if the curve does not reach from low to high.
    """
    rates, values = samples(curve, metric)
    if saturates and len(rates) and rates[-1] < high:
        rates, values = np.append(rates, high), np.append(values, values[-1])
    low = rates[0] if low is None and len(rates) else low
    if not len(rates) or low is None or not rates[0] <= low < high <= rates[-1]:
        return NAN
    inside = (rates > low) & (rates < high)
    x = np.array([low, *rates[inside], high])
    return float(np.trapezoid(np.interp(x, rates, values), x))


def bd_rate(anchor: Sequence[Point], curve: Sequence[Point], metric: str) -> tuple[float, float]:
    """BD-rate: how many more bits a curve takes than the anchor for equal quality (Bjontegaard 2001; Akima splines).

    Args:
        anchor: the curve to compare with.
        curve: at least four points, as the anchor.
        metric: an attribute of `Point` that rises with quality.

    Returns:
        The difference in percent, and the share of the curve's values of the metric that the anchor has too, over
        which the difference is a mean; nan and 0 if they share none or have too few points.
    """
    import bjontegaard  # imports SciPy and pyplot, which nothing else here needs

    sides = []
    for points in (anchor, curve):
        rates, values = samples(points, metric)
        # A spline over the metric needs rising values, so points that cost more but are no better are left out.
        keep = [i for i in range(len(values)) if i == 0 or values[i] > values[:i].max()]
        sides.append((rates[keep], values[keep]))
    (anchor_rates, anchor_values), (rates, values) = sides
    if min(len(rates), len(anchor_rates)) < 4:
        return NAN, 0.0
    low, high = max(values[0], anchor_values[0]), min(values[-1], anchor_values[-1])
    overlap = (high - low) / (values[-1] - values[0])
    if overlap <= 0:
        return NAN, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about little overlap, which is returned
        difference: Any = bjontegaard.bd_rate(
            anchor_rates, anchor_values, rates, values, method="akima", require_matching_points=False
        )
    return float(difference), float(overlap)


def to_csv(points: Iterable[Point]) -> str:
    """Writes points as CSV, one in each row; missing values are left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Point))
    for point in points:
        size = int(point.bytes) if float(point.bytes).is_integer() else point.bytes  # a mean may not be
        row = replace(point, setting=f"{point.setting:g}", bytes=size)  # whole numbers as such
        writer.writerow("" if value != value else value for value in astuple(row))
    return text.getvalue()


def from_csv(text: str, steps: bool = False) -> list[Point]:
    """Reads what `to_csv` writes; columns may be in any order, and others are ignored.

    Args:
        text: of the file.
        steps: whether files of the evaluated codec may end within an iteration.

    Raises:
        ValueError: a column is missing or a value is invalid; the message names the line.
    """
    rows = csv.DictReader(io.StringIO(text, newline=""))
    points = []
    try:
        missing = [field.name for field in fields(Point) if field.name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}")
        for row in rows:
            try:
                points.append(_from_row(row, steps))
            except ValueError as error:
                raise ValueError(f"line {rows.line_num}: {error}") from error
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error
    return points


def _from_row(row: dict[str, str], steps: bool) -> Point:
    if None in row or None in row.values():
        raise ValueError("not as many fields as columns")

    def number(name: str) -> float:
        try:
            value = float(row[name] or "nan")
        except ValueError as error:
            raise ValueError(f"{name} is not a number: {row[name]!r}") from error
        known = math.isfinite(value) or name not in ("setting", "bytes", "bpp")
        if not known or value == -math.inf or (name in ("bytes", "bpp") and value <= 0):
            raise ValueError(f"{name} cannot be {row[name]!r}")
        return value

    numbers: dict[str, Any] = {name: number(name) for name in ("setting", *MEASURES)}
    point = Point(row["image"], row["codec"], picture=row["picture"], **numbers)
    # The levels of a codec of integers begin at 0.
    valid = point.setting > 0 if steps else point.setting >= 0 and point.setting.is_integer()
    if point.evaluated and not valid:
        raise ValueError(f"iterations are a {'positive' if steps else 'whole'} number, not {row['setting']!r}")
    return point


def read_points(results: Path, name: str = "points.csv", steps: bool = False) -> list[Point]:
    """Reads the points from the folder of an evaluation, or their means from mean.csv; `steps` as in `from_csv`.

    Raises:
        ValueError: the file is missing, faulty or without points; the message is one line and names it.
    """
    path = results / name
    try:
        points = from_csv(path.read_bytes().decode(), steps)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if not points:
        raise ValueError(f"{path}: there are no points")
    return points


def spent_path(picture: str) -> str:
    """The path of the picture of where the bits are, from that of the decoded one."""
    path = PurePosixPath(picture)
    return str(path.with_name(f"{path.stem}-bits.png"))


def picture_path(results: Path, picture: str) -> Path:
    """The path of a picture that points.csv names.

    Raises:
        ValueError: there is no such file, or it is not in the folder of results.
    """
    path = Path(os.path.realpath(results / picture))
    if not path.is_relative_to(os.path.realpath(results)):
        raise ValueError(f"{picture!r} is not in {results}")
    if not os.path.isfile(path):
        raise ValueError(f"{results}: {picture!r}: no such file")
    return path


def to_json(curve: Sequence[Point], name: str, description: str) -> str:
    """Writes a mean curve as CompressAI's JSON; what is not finite becomes null, a metric of nulls is left out."""
    results: dict[str, list[float | None]] = {}
    for key, attribute in COMPRESSAI.items():
        values = [getattr(point, attribute) for point in curve]
        if any(map(math.isfinite, values)):
            results[key] = [value if math.isfinite(value) else None for value in values]
    return json.dumps({"name": name, "description": description, "results": results}, indent=2) + "\n"


def from_json(path: Path) -> tuple[str, list[Point]]:
    """Reads the name and the points of a curve from CompressAI's JSON.

    Raises:
        ValueError: the file is not such JSON.
        OSError: the file cannot be read.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        name, results = str(document["name"]), dict(document["results"])
        columns = {attribute: results[key] for key, attribute in COMPRESSAI.items() if key in results}
        rates = columns.pop("bpp")
        if not rates or not columns or any(len(values) != len(rates) for values in columns.values()):
            raise ValueError("its columns are missing or of different lengths")
        rows = zip(rates, *columns.values(), strict=True)
        points = []
        for i, (rate, *values) in enumerate(rows, 1):
            measures: dict[str, Any] = {k: NAN if v is None else float(v) for k, v in zip(columns, values, strict=True)}
            points.append(Point("mean", name, i, NAN, float(rate), **measures))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a rate curve in CompressAI's JSON ({error})") from error
    return name, points
