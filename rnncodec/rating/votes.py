"""The votes of the raters, stored in an SQLite database."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from rnncodec.files.images import one_line

SCHEMA = """
CREATE TABLE votes (
    rater TEXT NOT NULL, name TEXT NOT NULL, trial TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('normal', 'repeat', 'check')), image TEXT NOT NULL, rate REAL,
    left_codec TEXT NOT NULL, left_setting REAL NOT NULL, left_bytes INTEGER NOT NULL,
    right_codec TEXT NOT NULL, right_setting REAL NOT NULL, right_bytes INTEGER NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right')), milliseconds INTEGER NOT NULL,
    time TEXT NOT NULL, undone TEXT
);
CREATE UNIQUE INDEX one_vote ON votes (rater, trial) WHERE undone IS NULL;
"""


@dataclass(frozen=True)
class Vote:
    """A row of the database: an answered trial.

    Attributes:
        rater: random number that the rater's browser keeps, 32 hexadecimal digits.
        name: what the rater is called, may be empty.
        trial: its token.
        kind: `normal`, `repeat` or `check`.
        image: name of the image.
        rate: target in bits per pixel; None for a check.
        left_codec: shown on the left; `original` for the original of a check.
        left_setting: of this codec; 0 for an original.
        left_bytes: of the file.
        choice: `left` or `right`, the side called closer to the original.
        milliseconds: from the moment both were shown, pauses excluded.
        time: when it was stored, UTC in ISO 8601.
        undone: when the rater took it back; None for a vote that counts.
    """

    rater: str
    name: str
    trial: str
    kind: str
    image: str
    rate: float | None
    left_codec: str
    left_setting: float
    left_bytes: int
    right_codec: str
    right_setting: float
    right_bytes: int
    choice: str
    milliseconds: int
    time: str
    undone: str | None = None


class Votes:
    """The votes in an SQLite database; a vote is on disk before `add` returns.

    Every call opens the database anew, so that threads and processes may share it.

    Args:
        path: the file.
        create: whether to make the file if it does not exist.

    Raises:
        ValueError: the file is missing, not a database, or one of another layout, which is not changed.
    """

    def __init__(self, path: Path, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise ValueError(f"{path}: no such file, nobody has voted yet")
        with self._database("rwc" if create else "rw") as database:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY name")]
            if create and not names:
                database.executescript(f"BEGIN EXCLUSIVE; {SCHEMA} COMMIT;")
                return
            columns = [column for _, column, *_ in database.execute("PRAGMA table_info(votes)")]
            if names != ["one_vote", "votes"] or columns != [field.name for field in fields(Vote)]:
                raise ValueError(f"{path}: a database of another layout, not votes of this version")

    def add(self, vote: Vote) -> bool:
        """Stores a vote; False if the rater's vote on this trial is there already."""
        with self._database() as database:
            try:
                database.execute(f"INSERT INTO votes VALUES ({', '.join('?' * len(fields(Vote)))})", astuple(vote))
            except sqlite3.IntegrityError:
                return False
        return True

    def undo(self, rater: str, trial: str) -> bool:
        """Marks a rater's last vote as undone; False if the last is on another trial."""
        with self._database() as database:
            cursor = database.execute(
                "UPDATE votes SET undone = ? WHERE trial = ? AND rowid = "
                "(SELECT max(rowid) FROM votes WHERE rater = ? AND undone IS NULL)",
                (now(), trial, rater),
            )
            return cursor.rowcount == 1

    def trials(self, rater: str) -> list[str]:
        """Tokens of the trials that a rater has answered, in order."""
        query = "SELECT trial FROM votes WHERE rater = ? AND undone IS NULL ORDER BY rowid"
        with self._database() as database:
            return [trial for (trial,) in database.execute(query, (rater,))]

    def all(self) -> list[Vote]:
        """All votes in the order of their arrival, including those undone."""
        with self._database() as database:
            return [Vote(*row) for row in database.execute("SELECT * FROM votes ORDER BY rowid")]

    @contextmanager
    def _database(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        """A transaction, committed at its end."""
        try:
            # With the default journal and FULL, a committed vote survives a power failure, and the votes are one file.
            # Readers open it for writing, too, because the journal of a killed server has to be rolled back.
            address = f"{self.path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(address, timeout=30, uri=True)) as database:
                database.execute("PRAGMA synchronous = FULL")
                with database:
                    yield database
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: {one_line(error)}") from error


def now() -> str:
    """The current time, UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
