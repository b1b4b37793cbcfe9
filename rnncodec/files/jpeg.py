"""What JPEG files say of their colors where Pillow does not look for it."""

from PIL import Image

from rnncodec.files.metadata import COLOR_SPACE, EXIF_TAGS, INTEROPERABILITY, quiet

START = 14  # bytes before each piece of a profile: its name, its number and the number of pieces
ADOBE, UNCALIBRATED = 2, 65535  # values of EXIF's tag of the color space
ADOBE_RULE = "R03"  # the name of Adobe RGB in the directory of interoperability, by the rules for cameras (DCF)


def late_profile(image: Image.Image) -> bytes | None:
    """The ICC profile that stands behind the header of the picture; Pillow has collected its pieces."""
    pieces = sorted(getattr(image, "icclist", ()))
    if not pieces or any(piece[12:START] != bytes((i, len(pieces))) for i, piece in enumerate(pieces, 1)):
        return None
    return b"".join(piece[START:] for piece in pieces)


def is_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF of an image says, as cameras do without a profile, that its colors are Adobe RGB."""
    try:
        with quiet():
            exif = image.getexif()
            space = exif.get_ifd(EXIF_TAGS).get(COLOR_SPACE)
            rule = exif.get_ifd(INTEROPERABILITY).get(1, "") if space == UNCALIBRATED else ""
            return space == ADOBE or str(rule).startswith(ADOBE_RULE)
    except Exception:  # corrupt EXIF data must not make an image unreadable
        return False
