"""Downloads and unpacks the CLIC archives; an interrupted download is resumed."""

import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import DownloadColumn, Progress, TaskID, TransferSpeedColumn

from rnncodec.data.cache import DataError, check_space

CLIC_URL = "https://data.vision.ee.ethz.ch/cvl/clic/"
CLIC_ARCHIVES = {  # folder: archive and, where it is known, its MD5
    "professional/train": ("professional_train_2020.zip", "a6845cac88c3dd882246575f7a2fc5f9"),
    "professional/valid": ("professional_valid_2020.zip", "7111ee240435911db04dbc5f40d50272"),
    "mobile/train": ("mobile_train_2020.zip", None),
    "mobile/valid": ("mobile_valid_2020.zip", None),
}
MAX_MEMBER, MAX_UNPACKED = 2**28, 2**35  # bytes of one image of an archive, and of all
RETRIES, RETRY_SECONDS, TIMEOUT_SECONDS = 5, 1.0, 60.0


def download_clic(root: Path, url: str = CLIC_URL) -> None:
    """Downloads the CLIC 2020 archives that are not there yet and unpacks them to professional/train, mobile/valid ...

    An interrupted download is resumed. A folder appears when it is complete.

    Raises:
        DataError: the server cannot be reached or lacks a file, or an archive is corrupt or refused.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".clic.lock"), Progress(
            *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()
        ) as progress:  # fmt: skip
            for name, (archive, md5) in CLIC_ARCHIVES.items():
                if (root / name).is_dir():
                    continue
                path = root / archive
                if not path.exists():
                    fetch(f"{url.rstrip('/')}/{archive}", path, md5, progress)
                unpack(path, root / name, progress)
                path.unlink()
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from error


def fetch(url: str, path: Path, md5: str | None, progress: Progress) -> None:
    """Downloads a file, which appears at its path when it is complete and its MD5, if known, is right.

    Raises:
        DataError: the server cannot be reached or lacks the file, the disk is full, or the MD5 is wrong.
    """
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url}: not an http address")
    part = path.with_name(f"{path.name}.part")
    task = progress.add_task(path.name, total=None)
    failures = most = 0
    while True:
        try:
            complete, reason = _receive(url, part, progress, task)
            if complete:
                break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(f"{url}: {error.code} {error.reason}") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
                raise
            reason = str(error) or type(error).__name__
        have = part.stat().st_size if part.exists() else 0
        failures, most = (0, have) if have > most else (failures + 1, most)
        if failures > RETRIES:
            raise DataError(f"{url}: {reason}; the next download goes on from here")
        time.sleep(RETRY_SECONDS * 2**failures)

    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5" if md5 else "sha256").hexdigest()
    if md5 is None:
        rank_zero_info(f"{path.name}: no checksum is known; its SHA-256 is {digest}")
    elif digest != md5:
        part.unlink()
        raise DataError(f"{url}: the MD5 is {digest} where {md5} was expected; the file was deleted")
    os.replace(part, path)


def _receive(url: str, part: Path, progress: Progress, task: TaskID) -> tuple[bool, str]:
    """Downloads the rest of a partial file; gives whether it is complete, and if not, why."""
    with open(part, "ab") as file:
        have = file.tell()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True, ""
            file.truncate(0)
            return False, "the partial file is longer than the server's"
        with response:
            if have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                file.truncate(0)
                have = 0
                if response.status == 206:
                    return False, "the server sent another range than it was asked for"
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdecimal() else None
            if total is not None:
                check_space(part.parent, total - have, part.name)
            while chunk := response.read(2**18):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have, total=total)
        return total in (None, have), f"the connection closed after {have} of {total} bytes"


def unpack(archive: Path, folder: Path, progress: Progress) -> None:
    """Unpacks the images of a zip archive, whose outermost folder becomes `folder`, which appears when it is complete.

    Raises:
        DataError: the archive is corrupt, or has unsafe paths or sizes; it is deleted.
    """
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = []
            for info in file.infolist():
                path = PurePosixPath(info.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in info.filename:
                    raise zipfile.BadZipFile(f"{info.filename!r} leads out of the folder")
                hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
                if not info.is_dir() and not hidden and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
                    members.append((info, Path(*path.parts[1:] or path.parts)))
            total = sum(info.file_size for info, _ in members)
            if total > MAX_UNPACKED or any(info.file_size > MAX_MEMBER for info, _ in members):
                raise zipfile.BadZipFile("it unpacks to more than photographs do")
            if not members:
                raise zipfile.BadZipFile("no images in it")
            check_space(archive.parent, total, f"the images of {archive.name}")
            for info, path in progress.track(members, description=f"unpacking {archive.name}"):
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, open(temporary / path, "wb") as target:
                    shutil.copyfileobj(source, target)
        temporary.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        archive.unlink()
        raise DataError(f"{archive}: refused and deleted: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
