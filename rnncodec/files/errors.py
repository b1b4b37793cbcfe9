"""Errors and warnings of files, and what any error says in one line."""


class FormatError(ValueError):
    """Raised for bytes that are not a valid .rnc file, or values that it cannot hold; the message is one line."""


class ImageError(ValueError):
    """Raised for images that cannot be read or written; the message is one line and names the file."""


class ImageWarning(UserWarning):
    """Warns that an image was read or written, but not all of it was kept; the message is one line without its name.

    Args:
        message: what was lost.
        source: the file that was read, or "" for others.
    """

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


def one_line(error: BaseException) -> str:
    """The first line of an error's message (PyTorch's have pages), or the type of the error if it has none."""
    if isinstance(error, OSError) and error.strerror:  # without the number of the error
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
