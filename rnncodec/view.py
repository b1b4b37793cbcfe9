"""Writes one page that shows the pictures of all iterations of a file, and opens it in a browser."""

import base64
import html
import io
import json
import os
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rnncodec.files import format
from rnncodec.files.images import MAX_PIXELS, atomic_write, save_image
from rnncodec.imagecodec import ImageCodec
from rnncodec.loop import Progress

TEMPLATE = Path(__file__).with_name("view.html")
WITHOUT_LOSS = 2**20  # pixels: pictures of more would make pages of hundreds of megabytes


def write_page(
    page: str | os.PathLike[str],
    title: str,
    codec: ImageCodec,
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> int:
    """Writes a page with the pictures of all complete iterations of a file; gives their number.

    Args:
        page: the path of the page, which is written completely or not at all.
        title: its title.
        codec: of the weights that the file needs.
        data: the bytes of the file, which may have been cut.
        max_pixels: larger images are refused.
        progress: is called with the number of pictures made and the number of all.

    Raises:
        ValueError: the file cannot be decoded.
        OSError: the page cannot be written.
    """
    file = format.read(data, max_pixels=max_pixels)
    header, found = file.header, len(file.payloads)
    kind = "png" if header.width * header.height <= WITHOUT_LOSS else "jpeg"
    rows, pictures = [], []
    for number, picture in enumerate(codec.decode_progressive(data, max_pixels=max_pixels), 1):
        end = min(header.ends[number - 1], found) - 1  # of a file that was cut within its last iteration
        rows.append({"bytes": header.sizes[end], "bpp": header.bpp[end]})
        buffer = io.BytesIO()
        save_image(picture, buffer, kind)
        url = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        pictures.append(f'<img alt="after {number} iterations" src="{url}" hidden>\n')
        if progress:
            progress(number, header.iterations)
    shown = "" if kind == "png" else " Shown as JPEG of quality 95; decoded pictures have no such loss."
    parts = {
        "title": html.escape(title),
        "width": str(header.width),
        "height": str(header.height),
        "weights": html.escape(header.weights),
        "shown": shown,
        "pictures": "".join(pictures),
        # Without this character, no end tag and no comment can begin in the JSON.
        "rows": json.dumps(rows).replace("<", "\\u003c"),
    }
    pieces = TEMPLATE.read_text(encoding="utf-8").split("{{")
    text = [pieces[0]]
    for piece in pieces[1:]:  # one after the other, so that a title with braces stays what it is
        name, _, rest = piece.partition("}}")
        text += [parts[name.strip()], rest]
    atomic_write(page, "".join(text).encode(errors="replace"))
    return len(rows)


@contextmanager
def page_path(page: str | None, source: str) -> Iterator[str]:
    """The path of a page, or of a temporary one that is named after a file and stays if it was written."""
    if page is not None:
        yield page
        return
    handle, path = tempfile.mkstemp(prefix=f"{Path(source).stem[:50]}-", suffix=".html")
    os.close(handle)
    try:
        yield path
    finally:
        if not os.path.getsize(path):
            os.unlink(path)


def open_page(page: str) -> bool:
    """Opens a page in the user's browser; false if there is none."""
    return webbrowser.open(Path(page).resolve().as_uri())
