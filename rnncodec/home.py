"""The folder in which commands keep what they can make again."""

from pathlib import Path

from platformdirs import user_cache_path


def cache_folder(option: str) -> Path:
    """The folder `rnncodec` in the user's cache folder, which need not exist.

    Args:
        option: what names another folder.

    Raises:
        ValueError: the user has no home.
    """
    try:
        folder = user_cache_path("rnncodec")
    except RuntimeError:
        folder = Path("~")
    if not folder.is_absolute():  # in older versions of platformdirs
        raise ValueError(f"this user has no home folder for a cache; {option} names a folder")
    return folder
