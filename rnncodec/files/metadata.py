"""Reads EXIF and XMP from images as records of an .rnc file, and gives Pillow what writes them into images."""

import io
import re
import threading
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rnncodec.files.errors import ImageError, ImageWarning, one_line
from rnncodec.files.records import EXIF, XMP, pack

PREFIX = b"Exif\0\0"  # before the EXIF data of JPEG
ORIENTATION = 274
COLOR_SPACE, SRGB = 40961, 1  # a tag of EXIF, and its usual value
EXIF_TAGS, INTEROPERABILITY = 34665, 40965  # directories in the main one, and in that of EXIF
# What the main directory says of a photograph: texts, resolution, ratings, EXIF, GPS. In TIFF, other tags say how the
# pixels are stored.
MAIN_TAGS = {269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 318, 319, 18246, 18249, 33432, EXIF_TAGS, 34853}
MAIN_TAGS |= {40091, 40092, 40093, 40094, 40095}
XMP_TAG, XMP_NAME = 700, "XML:com.adobe.xmp"  # of the packet in TIFF and in PNG
XMP_ORIENTATION = re.compile(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)[0-9]")

warnings_lock = threading.Lock()


def read_metadata(image: Image.Image, lost: list[str]) -> dict[str, bytes]:
    """The records of an image that was loaded and turned upright, see `rnncodec.files.load_photograph`.

    What is corrupt or too large is named in `lost`.
    """
    records = dict[str, bytes]()
    for kind, take in ((EXIF, _exif), (XMP, _xmp)):
        try:
            if value := take(image):
                pack({**records, kind: value})
                records[kind] = value
        except Exception as error:  # decoders raise nearly any exception on malicious input
            lost.append(f"{kind.strip()} left out: {one_line(error)}")
    return records


def save_options(name: str, records: Mapping[str, bytes]) -> dict[str, Any]:
    """The options with which Pillow writes EXIF and XMP into a format; warns of what it cannot write."""
    options, kept, failed = dict[str, Any](), dict[str, bytes](), dict[str, list[str]]()
    for kind in (kind for kind in (EXIF, XMP) if kind in records):
        try:
            with quiet():
                more = _options(name, {**kept, kind: records[kind]})
                Image.new("RGB", (1, 1)).save(io.BytesIO(), name, **more)  # shows what Pillow refuses before the work
        except Exception as error:  # encoders too raise nearly any exception
            failed.setdefault(one_line(error), []).append(kind.strip())
        else:
            options, kept = more, {**kept, kind: records[kind]}
    for reason, kinds in failed.items():
        warnings.warn(f"{' and '.join(kinds)} left out: {reason}", ImageWarning, stacklevel=3)
    return options


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """A context that keeps Pillow's warnings about metadata, for one thread at a time, because filters are global."""
    with warnings_lock, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def _exif(image: Image.Image) -> bytes:
    """The EXIF data without orientation and thumbnail, empty if there is none; may raise anything if it is corrupt."""
    stored = image.info.get("exif")
    with quiet() as said:
        if stored is None:
            exif = image.getexif()  # of TIFF, and of a text of PNG that ImageMagick writes
        else:
            exif = Image.Exif()
            exif.load(stored)
        exif.bigtiff = False
        directory = exif.get_ifd(EXIF_TAGS) if EXIF_TAGS in exif else {}
        if directory.get(COLOR_SPACE, SRGB) != SRGB:  # the pixels are, by now
            directory[COLOR_SPACE] = SRGB
            directory.pop(INTEROPERABILITY, None)
        for tag in list(exif):
            if tag == ORIENTATION or (image.format == "TIFF" and tag not in MAIN_TAGS):
                del exif[tag]
        if exif:
            return exif.tobytes().removeprefix(PREFIX)  # which leaves out the thumbnail
    if stored is not None and said:
        raise ImageError("it is corrupt")
    return b""


def _xmp(image: Image.Image) -> bytes:
    """The XMP packet in UTF-8, with the orientation 1 if it has one, empty if there is none."""
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes):
        return b""
    if packet.startswith((BOM_UTF16_BE, BOM_UTF16_LE)):
        packet = packet.decode("utf-16").encode()
    packet.decode()  # shows whether it is UTF-8
    return XMP_ORIENTATION.sub(rb"\g<1>1", packet)


def _options(name: str, records: Mapping[str, bytes]) -> dict[str, Any]:
    """The options that write records; may raise anything if that cannot be done."""
    if name == "TIFF":
        exif = Image.Exif()
        if EXIF in records:
            exif.load(records[EXIF])
            for tag in set(exif) - MAIN_TAGS:
                del exif[tag]
            directory = exif.get_ifd(EXIF_TAGS)
            if INTEROPERABILITY in directory:  # Pillow would write where it was
                directory[INTEROPERABILITY] = exif.get_ifd(INTEROPERABILITY)
        if XMP in records:
            exif[XMP_TAG] = records[XMP]
        return {"exif": exif}
    if name not in ("JPEG", "PNG", "WEBP", "AVIF"):
        raise ImageError(f"no place in {name} files")
    options: dict[str, Any] = {"exif": PREFIX + records[EXIF]} if EXIF in records else {}
    if XMP in records and name == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(XMP_NAME, records[XMP].decode())
    elif XMP in records:
        options["xmp"] = records[XMP]
    return options
