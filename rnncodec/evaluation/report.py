"""The HTML report of an evaluation: rate curves, and reconstructions beside those of other codecs."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from rnncodec.evaluation.baselines import BASELINES
from rnncodec.files.images import atomic_write
from rnncodec.metrics.curves import DRAWN, Point, largest_within, picture_path, read_points

TEMPLATE = Path(__file__).with_name("report.html")
# Media types of the pictures that browsers show, by suffix.
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}

# Baselines are embedded if browsers show their own files. As PNG, others would be a hundred times as large.
SHOWN_AS_CODED = tuple(suffix for suffix in TYPES if suffix != ".png")

RATES = (
    1 / 32,
    8,
)  # bits per pixel that are black and yellow where bits are drawn; between them the scale is logarithmic
IMAGES = 4  # that a page embeds
STEPS = "steps.csv"  # the points within iterations, of the images that the page embeds

# Attributes of a point that the page has.
COLUMNS = ("image", "codec", "setting", "bytes", "bpp", *DRAWN)


def write_report(results: Path, path: Path | None = None, images: int = IMAGES) -> Path:
    """Writes an evaluation to one HTML file, with its pictures and a script that shows them.

    The page loads no other files. It contains all iterations of the embedded images, and the steps within them that
    were measured; the files that `match` chooses for them of codecs that were evaluated or whose files browsers show;
    pictures of where the bits are; and the numbers of all codecs.

    Args:
        results: folder with points.csv, mean.csv, perhaps steps.csv, and the pictures that they name.
        path: file to write; None writes `report.html` in the folder.
        images: the most images to embed, chosen evenly from their sorted names.

    Returns:
        The path of the file.

    Raises:
        ValueError: `images` is below 1, or the folder lacks something; the message is one line.
        OSError: a picture cannot be read, or the file cannot be written; an existing file stays as it was.
    """
    points = read_points(results)
    codec = next((point.codec for point in points if point.evaluated), None)
    if codec is None:
        raise ValueError(f"{results / 'points.csv'}: no codec's name begins with rnncodec")
    names = embedded(points, codec, images)
    if not names:
        raise ValueError(f"{results / 'points.csv'}: no picture of {codec!r} was saved")
    if (results / STEPS).exists():
        points += read_points(results, STEPS, steps=True)
    place = {point: i for i, point in enumerate(points)}
    pictures: dict[str, str] = {}
    shown = []
    for i, name in enumerate(names):
        saved: dict[str, list[Point]] = {}
        for point in points:
            if point.image == name and point.picture:
                saved.setdefault(point.codec, []).append(point)
        iterations = sorted(saved.pop(codec), key=lambda point: point.setting)
        whole = {point.setting: point for point in iterations if point.setting % 1 == 0}
        others = {
            other: [match(candidates, point.bytes) for point in iterations]
            for other, candidates in saved.items()
            if all(candidate.evaluated or _suffix(candidate.picture) in SHOWN_AS_CODED for candidate in candidates)
        }
        # Where bits are spent within an iteration is shown as at its end.
        spent = {codec: [whole[math.ceil(point.setting)] for point in iterations], **others}
        spent = {other: matches for other, matches in spent.items() if (results / matches[0].spent).exists()}
        pictures[f"original-{i}"] = iterations[0].original
        for point in (*iterations, *(point for matches in others.values() for point in matches)):
            pictures[f"picture-{place[point]}"] = point.picture
        for point in (point for matches in spent.values() for point in matches):
            pictures[f"bits-{place[point]}"] = point.spent
        shown.append(
            {
                "name": name,
                "iterations": [place[point] for point in iterations],
                "others": [
                    {"codec": other, "kind": kind, "points": [place[point] for point in matches]}
                    for kind, all_ in (("picture", others), ("bits", spent))
                    for other, matches in all_.items()
                ],
            }
        )
    urls = {id: _data_url(results, picture) for id, picture in pictures.items()}
    data = {
        "codec": codec,
        "count": len({point.image for point in points}),
        "columns": COLUMNS,
        "metrics": {name: asdict(metric) | {"curve_unit": metric.curve_unit} for name, metric in DRAWN.items()},
        "baselines": {
            name: {"label": baseline.label or baseline.title, "setting": baseline.setting}
            for name, baseline in BASELINES.items()
        },
        "points": [_values(point) for point in points],
        "mean": [_values(point) for point in read_points(results, "mean.csv")],
        "images": shown,
        "rates": RATES,
        "size": sum(len(url) for url in urls.values()),
    }
    blocks = (f'<script type="text/plain" id="{id}">{url}</script>\n' for id, url in urls.items())
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("{{ data }}")
    between, _, after = rest.partition("{{ pictures }}")
    # Without this character, no end tag and no comment can begin in the JSON.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    path = results / "report.html" if path is None else path
    atomic_write(path, "".join((before, text, between, *blocks, after)).encode())
    return path


def embedded(points: Sequence[Point], codec: str, images: int = IMAGES) -> list[str]:
    """The names of the images that a report embeds, spread evenly over those with pictures of a codec.

    Raises:
        ValueError: `images` is below 1.
    """
    if images < 1:
        raise ValueError(f"a report shows at least 1 image, not {images}")
    names = sorted({point.image for point in points if point.codec == codec and point.picture})
    count = min(images, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def match(points: Sequence[Point], size: float) -> Point:
    """The point of a codec to compare with a file of a given size in bytes.

    This is the largest file that is not larger, or the smallest if all are larger; among equal sizes, the best PSNR.
    """
    return largest_within(points, size) or min(points, key=lambda point: (point.bytes, -point.psnr))


def _values(point: Point) -> list[str | float | None]:
    """The columns of a point for JSON, which has neither nan (here null) nor infinity (here text)."""
    values = (getattr(point, column) for column in COLUMNS)
    return [value if isinstance(value, str) else _finite(value) for value in values]


def _finite(value: float) -> str | float | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else "inf"


def _suffix(picture: str) -> str:
    return PurePosixPath(picture).suffix.lower()


def _data_url(results: Path, picture: str) -> str:
    """The file of a picture as a data URL."""
    path = picture_path(results, picture)
    if _suffix(picture) not in TYPES:
        raise ValueError(f"{picture!r} is not of a kind that browsers show: {', '.join(TYPES)}")
    return f"data:{TYPES[_suffix(picture)]};base64,{base64.b64encode(path.read_bytes()).decode()}"
