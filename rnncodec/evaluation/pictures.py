"""Pictures of an evaluation: the figure of the mean curves, and comparisons of reconstructions."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from rnncodec.evaluation.measure import Coded, Source
from rnncodec.evaluation.report import RATES, embedded
from rnncodec.files.images import atomic_write, load_image, save_image
from rnncodec.metrics.curves import CURVES, Point, largest_within, samples, spent_path
from rnncodec.metrics.distortion import REPORTED_ITERATIONS

PANEL = (224, 224)  # width and height in pixels of a picture in a comparison


def figure(curves: dict[str, list[Point]], overlays: Sequence[str] = ()) -> Figure:
    """Draws mean curves over bpp, each with a label on the right; the first sets the range, overlays are dashed."""
    mine = next(iter(curves.values()))
    end = max(point.bpp for point in mine)
    drawing = Figure(figsize=(5 * len(CURVES), 4.8), dpi=110, layout="constrained")
    panels = drawing.subplots(1, len(CURVES), squeeze=False)[0]
    for axes, (attribute, metric) in zip(panels, CURVES.items(), strict=True):
        labels = []
        for i, (name, curve) in enumerate(curves.items()):
            x, y = samples(curve, attribute)
            if not len(x) or x[0] > end:
                continue
            last = min(end, x[-1])
            visible = x <= last
            # A curve that exceeds the range ends at its edge.
            x_visible, y_visible = np.append(x[visible], last), np.append(y[visible], np.interp(last, x, y))
            style = "--" if name in overlays else "-"
            axes.plot(x_visible, y_visible, style, color=f"C{i}", linewidth=2.2 if i == 0 else 1.4)
            axes.plot(x[visible], y[visible], "o" if i == 0 else ".", color=f"C{i}", markersize=4)
            labels.append([y_visible[-1], name, f"C{i}"])
        axes.set_xlim(0, end * 1.02)
        axes.set_xlabel("bits per pixel, whole files")
        fewer = {f", {p.image}" for p in mine if p.image != "mean" and not np.isnan(getattr(p, attribute))}
        axes.set_title(metric.titled(metric.curve_unit) + "".join(fewer), loc="left", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        low, high = axes.get_ylim()
        labels.sort()
        heights = spread([value for value, *_ in labels], (high - low) / 22, high)
        for (_, name, color), height in zip(labels, heights, strict=True):
            place = end, height
            text = axes.annotate(name, place, (6, 0), textcoords="offset points", va="center", color=color, fontsize=9)
            text.set_parse_math(False)  # a name may contain dollar signs
    return drawing


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Moves rising heights until no two are closer than the gap and none is above the top."""
    result: list[float] = []
    for height in heights:
        result.append(max(height, result[-1] + gap) if result else height)
    for i in reversed(range(len(result))):
        top = result[i] = min(result[i], top)
        top -= gap
    return result


def rendered(drawing: Figure, format: str) -> bytes:
    """The bytes of a figure as png or svg."""
    file = io.BytesIO()
    drawing.savefig(file, format=format, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


class Panel(NamedTuple):
    """A picture of a comparison, uint8 [H, W, 3] or None, with its caption."""

    caption: str
    picture: np.ndarray | None


def comparison(x: np.ndarray, columns: Sequence[tuple[Panel | None, Panel | None]]) -> np.ndarray:
    """Draws the middle of an image, unscaled, and that of its reconstructions by two codecs, one above the other."""
    (width, height), margin, caption = PANEL, 8, 40
    sheet = Image.new("RGB", ((width + margin) * (len(columns) + 1) + margin, 2 * (height + caption) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, column in enumerate([(Panel("original", x), None), *columns]):
        for j, panel in enumerate(column):
            if panel is None:
                continue
            corner = margin + i * (width + margin), j * (height + caption)
            draw.text((corner[0], corner[1] + 4), panel.caption, "black", font)
            if panel.picture is not None:
                top, left = (
                    max(0, (a - b) // 2) for a, b in zip(panel.picture.shape[:2], (height, width), strict=True)
                )
                crop = Image.fromarray(panel.picture[top : top + height, left : left + width])
                sheet.paste(crop, (corner[0], corner[1] + caption))
    return np.asarray(sheet)


def compared(name: str, baseline: str, x: np.ndarray, points: Sequence[Point], folder: Path) -> np.ndarray | None:
    """Compares a codec's saved pictures at 1, 2, 4, 8 and 16 iterations with a baseline's of about the same bytes."""
    rivals = [point for point in points if point.codec == baseline and point.picture]
    columns: list[tuple[Panel | None, Panel | None]] = []
    for point in points:
        if point.codec != name or point.setting not in REPORTED_ITERATIONS or not point.picture:
            continue
        plural = "" if point.setting == 1 else "s"
        mine = f"{point.setting:g} iteration{plural}, {point.bpp:.3f} bpp\n{point.psnr:.2f} dB"
        theirs = Panel(f"{baseline}: no file is as small", None) if rivals else None
        if best := largest_within(rivals, point.bytes):
            caption = f"{baseline} {best.setting:g}, {best.bpp:.3f} bpp\n{best.psnr:.2f} dB"
            theirs = Panel(caption, load_image(folder / best.picture))
        columns.append((Panel(mine, load_image(folder / point.picture)), theirs))
    return comparison(x, columns) if columns else None


def shown_pictures(points: Sequence[Point], name: str, baseline: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of a table with a codec's pictures at 1, 2, 4, 8 and 16 iterations, of the images that a report embeds.

    Each has the original, the reconstruction, where its bits are, and a baseline's picture of about the same bytes.
    Pictures are paths, and None where there are none.
    """
    rows: list[dict[str, Any]] = []
    for image in embedded(points, name):
        own = [point for point in points if point.image == image and point.picture]
        for point in own:
            if point.codec != name or point.setting not in REPORTED_ITERATIONS:
                continue
            rival = largest_within((other for other in own if other.codec == baseline), point.bytes)
            rows.append(
                {
                    "image": image,
                    "iterations": point.setting,
                    "bpp": point.bpp,
                    "psnr": point.psnr,
                    "ms_ssim": point.ms_ssim,
                    "original": folder / point.original,
                    "picture": folder / point.picture,
                    "bits": _existing(folder / point.spent),
                    "baseline": rival and f"{rival.codec} {rival.setting:g}",
                    "baseline_bpp": rival and rival.bpp,
                    "baseline_psnr": rival and rival.psnr,
                    "baseline_picture": rival and folder / rival.picture,
                }
            )
    return rows


def _existing(path: Path) -> Path | None:
    """A path, or None if there is no such file."""
    return path if path.exists() else None


def drawn_rates(rates: np.ndarray) -> np.ndarray:
    """Draws where bits are spent, uint8 [H, W, 3], from the bits per pixel [H, W]."""
    low, high = np.log2(RATES)
    shares = (np.log2(np.maximum(rates, RATES[0])) - low) / (high - low)
    return matplotlib.colormaps["inferno"](shares, bytes=True)[..., :3]


def save_picture(source: Source, coded: Coded, folder: Path) -> str:
    """Saves a reconstruction in a format that browsers show, and where its bits are; gives the name of the former."""
    path = folder / f"{source.name}-{coded.setting:g}{source.suffix}"
    if coded.file is None:
        save_image(coded.x_hat, path)
    else:
        atomic_write(path, coded.file)
    if coded.spent is not None:
        save_image(drawn_rates(coded.spent()), folder / spent_path(path.name))
    return path.name
