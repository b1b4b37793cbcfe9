"""The page of an evaluation: rate curves, and every iteration of some images beside other codecs at the same bytes."""

import base64
import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rnncodec.images import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}

# Baselines whose own files a browser shows. Others would come as PNG, each a hundred times the size of its file.
SHOWN_AS_CODED = (".jpg", ".webp", ".avif")


class Point(NamedTuple):
    """A measured file, as in points.csv.

    Attributes:
        image: name of the image, or `mean`.
        codec: name of the codec; that of the evaluated one begins with `rnncodec`.
        setting: iterations, or the codec's quality.
        bytes: of the whole file.
        bpp: bits per pixel of the image.
        psnr: in dB; infinite for an equal picture.
        ms_ssim: up to 1; nan where it was not measured, like every metric.
        psnr_hvs_m: in dB.
        picture: path of the decoded picture in the folder of results, or empty.
    """

    image: str
    codec: str
    setting: str
    bytes: float
    bpp: float
    psnr: float
    ms_ssim: float
    psnr_hvs_m: float
    picture: str


NUMBERS = ("bytes", "bpp", "psnr", "ms_ssim", "psnr_hvs_m")


def write_report(results: Path, path: Path | None = None, images: int = 4) -> Path:
    """Writes one HTML file that holds an evaluation, its pictures and the script that shows them.

    The page loads nothing from anywhere. It holds all iterations of the embedded images; of JPEG, WebP and AVIF the
    files that `match` chooses for some iteration; of other codecs their numbers.

    Args:
        results: folder with points.csv, and the pictures it names.
        path: the file; None writes `report.html` into the folder.
        images: how many images to embed at most, spread evenly over their sorted names.

    Returns:
        The path of the file.

    Raises:
        ValueError: something is missing in the folder; the message is one line.
        OSError: the file cannot be written; an existing one is as it was.
    """
    if images < 1:
        raise ValueError(f"a report shows at least 1 image, not {images}")
    points = read_points(results / "points.csv")
    codec = next((point.codec for point in points if point.codec.startswith("rnncodec")), None)
    if codec is None:
        raise ValueError(f"{results / 'points.csv'}: no codec's name begins with rnncodec")
    names = sorted({point.image for point in points if point.codec == codec and point.picture})
    if not names:
        raise ValueError(f"{results / 'points.csv'}: no picture of {codec!r} was saved")
    count = min(images, len(names))
    place = {point: i for i, point in enumerate(points)}
    pictures: dict[str, str] = {}
    embedded = []
    for i in range(count):
        name = names[i * len(names) // count]
        saved: dict[str, list[Point]] = {}
        for point in points:
            if point.image == name and point.picture:
                saved.setdefault(point.codec, []).append(point)
        iterations = sorted(saved.pop(codec), key=lambda point: int(point.setting))
        others = {
            other: [match(candidates, point.bytes) for point in iterations]
            for other, candidates in saved.items()
            if all(_suffix(candidate.picture) in SHOWN_AS_CODED for candidate in candidates)
        }
        pictures[f"original-{i}"] = str(PurePosixPath(iterations[0].picture).with_name("original.png"))
        for point in (*iterations, *(point for matches in others.values() for point in matches)):
            pictures[f"picture-{place[point]}"] = point.picture
        embedded.append(
            {
                "name": name,
                "iterations": [place[point] for point in iterations],
                "others": [
                    {"codec": other, "points": [place[point] for point in matches]} for other, matches in others.items()
                ],
            }
        )
    urls = {id: _data_url(results, picture) for id, picture in pictures.items()}
    data = {
        "codec": codec,
        "count": len({point.image for point in points}),
        "columns": Point._fields,
        "points": [_values(point) for point in points],
        "mean": [_values(point) for point in mean_points(points)],
        "images": embedded,
        "size": sum(len(url) for url in urls.values()),
    }
    blocks = (f'<script type="text/plain" id="{id}">{url}</script>\n' for id, url in urls.items())
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("{{ data }}")
    between, _, after = rest.partition("{{ pictures }}")
    # No end tag and no comment begins in JSON without this character.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    path = results / "report.html" if path is None else path
    atomic_write(path, "".join((before, text, between, *blocks, after)).encode())
    return path


def read_points(path: Path) -> list[Point]:
    """Reads points.csv.

    Raises:
        ValueError: the file is missing, has no point, lacks a column, or holds what is not a number.
    """
    points = []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            for column in Point._fields:
                if column not in (reader.fieldnames or ()):
                    raise ValueError(f"{path}: there is no column {column}")
            for row in reader:
                try:
                    points.append(_point(row))
                except ValueError as error:
                    raise ValueError(f"{path}: line {reader.line_num}: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not points:
        raise ValueError(f"{path}: there are no points")
    return points


def mean_points(points: Iterable[Point]) -> list[Point]:
    """The mean over images of each codec's points at each setting; a metric's is over the images that have one."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.codec, point.setting), []).append(point)
    means = []
    for (codec, setting), group in groups.items():
        numbers = {}
        for number in NUMBERS:
            measured = [value for point in group if not math.isnan(value := getattr(point, number))]
            numbers[number] = sum(measured) / len(measured) if measured else math.nan
        means.append(Point("mean", codec, setting, picture="", **numbers))
    return means


def match(points: Sequence[Point], size: float) -> Point:
    """A codec's point to hold against a file of a size in bytes.

    The largest file that is not larger, or the smallest if all are; the better PSNR where several are of its size.
    """
    below = [point for point in points if point.bytes <= size]
    if below:
        return max(below, key=lambda point: (point.bytes, point.psnr))
    return min(points, key=lambda point: (point.bytes, -point.psnr))


def _point(row: dict[str, str]) -> Point:
    """A row of points.csv; columns that a point does not have are left out."""
    if None in row or None in row.values():
        raise ValueError("not as many fields as columns")

    def number(column: str) -> float:
        try:
            value = float(row[column] or "nan")
        except ValueError as error:
            raise ValueError(f"{column} is not a number: {row[column]!r}") from error
        if value == -math.inf or (column in ("bytes", "bpp") and not 0 < value < math.inf):
            raise ValueError(f"{column} cannot be {row[column]!r}")
        return value

    numbers = {column: number(column) for column in NUMBERS}
    point = Point(row["image"], row["codec"], row["setting"], picture=row["picture"], **numbers)
    if point.codec.startswith("rnncodec") and not point.setting.isdecimal():
        raise ValueError(f"iterations are a whole number, not {point.setting!r}")
    return point


def _values(point: Point) -> list[str | float | None]:
    """For JSON, which knows neither nan, here null, nor infinity, here text."""
    return [value if isinstance(value, str) else _finite(value) for value in point]


def _finite(value: float) -> str | float | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else "inf"


def _suffix(picture: str) -> str:
    return PurePosixPath(picture).suffix.lower()


def _data_url(results: Path, picture: str) -> str:
    """A picture's file, byte by byte, as a URL."""
    relative = PurePosixPath(picture)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{picture!r} is not a picture in {results}")
    if _suffix(picture) not in TYPES:
        raise ValueError(f"{picture!r} is not of a kind that browsers show: {', '.join(TYPES)}")
    try:
        content = (results / relative).read_bytes()
    except OSError as error:
        raise ValueError(f"{results}: {picture!r}: {error.strerror}") from error
    return f"data:{TYPES[_suffix(picture)]};base64,{base64.b64encode(content).decode()}"
