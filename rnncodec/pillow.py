"""A plugin for Pillow, which reads and writes .rnc files as images once this module is imported.

import rnncodec.pillow
from PIL import Image

Image.open("photo.jpg").save("photo.rnc", quality=60)
with Image.open("photo.rnc") as image:
    image.iterations = 4  # of all that the file has
    image.show()
"""

import io
import warnings
from contextlib import suppress
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile

import rnncodec
from rnncodec.files import format as rnc
from rnncodec.files.errors import FormatError, ImageWarning
from rnncodec.files.images import orientation_of, to_rgb
from rnncodec.files.metadata import PREFIX, read_metadata
from rnncodec.files.records import EXIF, XMP, unpack
from rnncodec.imagecodec import ImageCodec
from rnncodec.jobs import read_open
from rnncodec.weights import shipped_name

NAME = "RNC"  # of the format, for Pillow
MAX_PIXELS = 2**32  # Pillow itself refuses or warns of large images
# Of `save`, as of `Codec.encode`.
OPTIONS = "iterations", "quality", "bpp", "max_bytes", "psnr", "tune", "roi", "entropy"

_readers: dict[bytes, ImageCodec] = {}  # by fingerprint
_writers: list[ImageCodec] = []  # the one that writes, if it was chosen or needed


def use(codec: ImageCodec) -> None:
    """Lets a codec write all files from now on, and read those of its weights."""
    _readers[codec.fingerprint] = codec
    _writers[:] = [codec]


class RncImageFile(ImageFile.ImageFile):
    """An .rnc file, whose pixels are decoded when they are needed.

    Attributes:
        header: what the file says of itself.
    """

    format = NAME
    format_description = "recurrent progressive image"
    _file = b""  # what is not decoded yet
    _iterations: int | None = None

    def _open(self) -> None:
        assert self.fp is not None
        try:
            self.header, self._file = read_open(self.fp)
            found = rnc.read(self._file, max_pixels=MAX_PIXELS)
            if not found.payloads:
                raise FormatError("the file has no complete iteration")
        except FormatError as error:
            raise SyntaxError(str(error)) from error
        self._size, self._mode = (self.header.width, self.header.height), "RGB"
        with suppress(FormatError):  # damaged records must not cost the picture
            records = unpack(found.records)
            self.info |= {"exif": PREFIX + records[EXIF]} if EXIF in records else {}
            self.info |= {"xmp": records[XMP]} if XMP in records else {}

    @property
    def iterations(self) -> int | None:
        """How many iterations to decode; None decodes all that are complete.

        Raises:
            ValueError: it is set after the pixels have been decoded.
        """
        return self._iterations

    @iterations.setter
    def iterations(self, count: int | None) -> None:
        if not self._file:
            raise ValueError("iterations must be chosen before the pixels are loaded")
        self._iterations = count

    def load(self) -> Any:
        """Decodes the pixels, as all methods of Pillow do that need them.

        Raises:
            OSError: an iteration is corrupt.
            ValueError: the file needs unknown weights, or has fewer iterations.
        """
        if self._file:
            fingerprint = self.header.fingerprint
            if fingerprint not in _readers:
                _readers[fingerprint] = rnncodec.load(shipped_name(self.header))
            try:
                image = _readers[fingerprint].decode(self._file, self.iterations, max_pixels=MAX_PIXELS)
            except FormatError as error:
                raise OSError(str(error)) from error
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
            self.fp, self._file = io.BytesIO(image.tobytes()), b""
            self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, "RGB")]
        return super().load()

    def load_seek(self, pos: int) -> None:
        """Does nothing, but keeps Pillow from mapping the file into memory, whose bytes are not those of the pixels."""

    def verify(self) -> None:
        """Checks that the file is whole; `open` has compared all checksums.

        Raises:
            OSError: iterations are missing.
            RuntimeError: the image was loaded or verified before.
        """
        if not self._file:
            raise RuntimeError("verify must be called directly after open")
        if len(rnc.read(self._file, max_pixels=MAX_PIXELS).payloads) < len(self.header.entries):
            raise OSError("the file is cut")
        self._file = b""
        super().verify()


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """Writes an image with the options of its `save`: those of `encode` (`roi` may be an image), exif and xmp."""
    if not _writers:
        use(rnncodec.load())
    carrier, lost = Image.new("RGB", (1, 1)), list[str]()
    if exif := image.encoderinfo.get("exif"):
        carrier.info["exif"] = exif.tobytes() if isinstance(exif, Image.Exif) else exif
    xmp = image.encoderinfo.get("xmp", image.info.get("xmp"))
    carrier.info["xmp"] = xmp.encode() if isinstance(xmp, str) else xmp
    records = read_metadata(carrier, lost)
    for reason in lost:
        warnings.warn(reason, ImageWarning, stacklevel=4)
    known = (*OPTIONS, "level") if _writers[0].of_integers else OPTIONS
    options = {name: value for name, value in image.encoderinfo.items() if name in known}
    if isinstance(mask := options.get("roi"), Image.Image):
        options["roi"] = np.asarray(mask.convert("L"))
    # An .rnc file cannot say how to turn its pixels, so that is done here.
    pixels = to_rgb(image, orientation_of(carrier) if exif else None)
    file.write(_writers[0].encode(pixels, records=records, **options))


Image.register_open(NAME, RncImageFile, lambda prefix: prefix.startswith(rnc.MAGIC))
Image.register_save(NAME, _save)
Image.register_extension(NAME, ".rnc")
Image.register_mime(NAME, "image/x-rnc")
