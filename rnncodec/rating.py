"""Rating by people: which of two reconstructions of about the same bytes is closer to the original?

`Study` lists the comparisons that an evaluation's folder allows and puts them in each rater's order, `Votes` keeps what
raters answer, `Server` serves both with the page rating.html, and `summarize` makes scores of the votes.
"""

import hashlib
import io
import ipaddress
import json
import math
import re
import socket
import socketserver
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rnncodec.files.images import load_image, one_line
from rnncodec.metrics.curves import Point, picture_path, read_points

FAR = 0.25  # share of a target rate by which rnncodec may miss it
TOLERANCE = 0.05  # the bytes of what is compared differ by no larger share from those of rnncodec
REPEATS = 0.10  # of the comparisons are shown a second time, with sides swapped
CHECKS = 0.05  # as many honesty checks, as a share of the comparisons
GAP = 5  # trials at least between a comparison and its repeat, where there are so many
HONEST = 0.8  # raters with a smaller share of their checks right are left out
VIRTUAL_WINS = 0.5  # of each codec, and as many losses, against an average opponent
RESAMPLES = 1000  # of a bootstrap interval
CONFIDENCE = 0.95

AHEAD = 3  # trials that the page is told of, to load their pictures
MAX_BODY = 4096  # bytes of a POST
MAX_MILLISECONDS = 24 * 60 * 60 * 1000
MAX_NAME = 60
PAGE = Path(__file__).with_name("rating.html")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Comparison(NamedTuple):
    """Two reconstructions of an image, whose bytes are close to a target rate in bits per pixel."""

    image: str
    rate: float
    first: Point
    second: Point


class Trial(NamedTuple):
    """What a rater is shown at once.

    Attributes:
        token: names the trial, its rater and its sides, and says nothing about them.
        kind: `normal`; `repeat`, a comparison shown before; or `check`, where one side is the original itself.
        rate: in bits per pixel; None for a check.
        left: shown on the left.
        right: shown on the right.
    """

    token: str
    kind: str
    image: str
    rate: float | None
    left: Point
    right: Point


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
        choice: `left` or `right`, which was called closer to the original.
        milliseconds: from the moment both were shown, pauses excluded.
        time: when it was stored, UTC in ISO 8601.
        undone: when the rater took it back, which makes it void; None for a vote that counts.
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


class Refused(Exception):
    """A request that is not followed; the message goes to whoever made it."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


def match(points: Sequence[Point], rates: Sequence[float]) -> list[Comparison]:
    """Every pair of codecs of each image at each target rate, at matched bytes.

    The measure is the reconstruction of rnncodec whose rate is nearest to the target, unless it is nearer to another
    target or misses this one by more than a quarter. Of every other codec it is the one whose bytes are nearest to the
    measure's, if they differ by at most 5 %.

    Args:
        points: with pictures.
        rates: targets in bits per pixel.

    Raises:
        ValueError: nothing can be compared; the message says why.
    """
    comparisons = []
    if not any(point.evaluated for point in points):
        raise ValueError("there is no picture of rnncodec, whose bytes the other codecs are to match")
    for image in sorted({point.image for point in points}):
        codecs: dict[str, list[Point]] = {}
        for point in points:
            if point.image == image:
                codecs.setdefault(point.codec, []).append(point)
        own = [point for point in points if point.image == image and point.evaluated]
        for rate in sorted(set(rates)) if own else ():
            measure = min(own, key=lambda point: abs(point.bpp - rate))
            nearest = min(rates, key=lambda other: abs(measure.bpp - other))
            if nearest != rate or abs(measure.bpp - rate) > FAR * rate:
                continue
            matched = [
                measure if codec == measure.codec else min(each, key=lambda point: abs(point.bytes - measure.bytes))
                for codec, each in sorted(codecs.items())
            ]
            matched = [point for point in matched if abs(point.bytes - measure.bytes) <= TOLERANCE * measure.bytes]
            comparisons += [Comparison(image, rate, *pair) for pair in combinations(matched, 2)]
    if not comparisons:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(
            f"nothing to compare: near {listed} bpp no other codec has a picture within {TOLERANCE:.0%} of the bytes "
            "of rnncodec; measure more settings or choose other rates"
        )
    return comparisons


class Study:
    """The comparisons of an evaluation, and the order and sides in which each rater sees them.

    All that is random comes from a hash of seed, rater and trial. So nothing about a rater has to be kept but the
    votes, and images or rates that are added later change neither tokens nor sides of what was there before.

    Args:
        results: folder with points.csv and the pictures.
        rates: targets in bits per pixel.
        seed: another one gives all raters other orders and sides.

    Raises:
        ValueError: points.csv or a picture is missing or faulty, or nothing can be compared.
    """

    def __init__(self, results: Path, rates: Sequence[float], seed: int = 0) -> None:
        self.seed = seed
        points = [point for point in read_points(results) if point.picture]
        if not points:
            raise ValueError(f"{results / 'points.csv'}: no row has a picture; evaluate.py --save-images makes them")
        self.comparisons = match(points, rates)
        self.checks = []  # the original of each image against its worst reconstruction
        for image in sorted({comparison.image for comparison in self.comparisons}):
            worst = min((p for p in points if p.image == image), key=lambda p: (math.isnan(p.psnr), p.psnr))
            size = picture_path(results, worst.original).stat().st_size
            self.checks.append((Point(image, "original", 0, size, math.nan, picture=worst.original), worst))
        shown = [point for _, _, *pair in self.comparisons for point in pair]
        shown += [point for pair in self.checks for point in pair]
        pictures = {self.picture(point): point.picture for point in shown}
        pictures |= {self.reference(original.image): original.picture for original, _ in self.checks}
        # By token; what is not in here is not served.
        self.pictures = {token: picture_path(results, picture) for token, picture in pictures.items()}
        self.trials = lru_cache(maxsize=256)(self._trials)

    def picture(self, point: Point) -> str:
        """The token of a reconstruction's picture."""
        return self._token("candidate", point)

    def reference(self, image: str) -> str:
        """The token of an original as such; as a side of a check it has another one, as it would give itself away."""
        return self._token("reference", image)

    def _trials(self, rater: str) -> tuple[Trial, ...]:
        """All trials of a rater in order: each comparison once, repeats and checks between them."""

        def trial(kind: str, turn: int, image: str, rate: float | None, pair: Sequence[Point]) -> Trial:
            names = rater, kind, turn, image, rate, *map(_file, pair)
            swapped = self._draw("side", *names) < 0.5
            left, right = reversed(pair) if swapped else pair
            return Trial(self._token("trial", swapped, *names), kind, image, rate, left, right)

        comparisons = [trial("normal", 0, c.image, c.rate, (c.first, c.second)) for c in self.comparisons]
        comparisons.sort(key=lambda each: self._draw("order", each.token))
        count = len(comparisons)
        places: list[tuple[float, Trial]] = list(enumerate(comparisons))
        early = sorted(places[: max(1, count - GAP)], key=lambda each: self._draw("repeat", each[1].token))
        for place, first in early[: max(1, round(REPEATS * count))]:
            token = self._token("repeat", first.token)
            start = min(place + GAP, count)
            place = start + self._draw("place", token) * (count - start)
            places.append((place, first._replace(token=token, kind="repeat", left=first.right, right=first.left)))
        images = sorted(self.checks, key=lambda pair: self._draw("check", rater, pair[0].image))
        for i in range(max(1, round(CHECKS * count))):
            turn, index = divmod(i, len(images))
            check = trial("check", turn, images[index][0].image, None, images[index])
            places.append((self._draw("place", check.token) * count, check))
        return tuple(each for _, each in sorted(places, key=lambda each: each[0]))

    def _token(self, *parts: object) -> str:
        return hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=16).hexdigest()

    def _draw(self, *parts: object) -> float:
        """A number in [0, 1)."""
        return int(self._token("draw", *parts)[:13], 16) / 16**13  # 52 bits, which a float holds


def _file(point: Point) -> tuple[str, float, int]:
    """Codec, setting and bytes of what is compared."""
    return point.codec, float(point.setting), int(point.bytes)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------

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


class Votes:
    """The votes in an SQLite database, where each is on disk before the method that stores it returns.

    Every call opens the database anew, so that threads and processes may share it.

    Args:
        path: the file; made if `create` is set and it does not exist.
        create: False only reads.

    Raises:
        ValueError: the file is missing, not a database, or one of another layout, which is left as it is.
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
        """Tokens of the trials that a rater has answered, the last one last."""
        query = "SELECT trial FROM votes WHERE rater = ? AND undone IS NULL ORDER BY rowid"
        with self._database() as database:
            return [trial for (trial,) in database.execute(query, (rater,))]

    def all(self) -> list[Vote]:
        """Every vote in the order they came in, the undone ones too."""
        with self._database() as database:
            return [Vote(*row) for row in database.execute("SELECT * FROM votes ORDER BY rowid")]

    @contextmanager
    def _database(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        """A transaction, committed at its end."""
        try:
            # The default journal and FULL: a committed vote outlives a power failure, and the votes are one file. Even
            # who only reads opens it for writing, as the journal of a killed server has to be rolled back.
            address = f"{self.path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(address, timeout=30, uri=True)) as database:
                database.execute("PRAGMA synchronous = FULL")
                with database:
                    yield database
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: {one_line(error)}") from error


def now() -> str:
    """The time, UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---------------------------------------------------------------------------------------------------------------------
# What it means
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What the votes say about a codec at a rate.

    Attributes:
        rate: target in bits per pixel.
        codec: name of the codec.
        score: Bradley-Terry strength in natural logarithms; 0 is the average of the codecs at this rate.
        low: lower end of the 95 % interval of the score.
        high: upper end.
        probability: to win against an average codec, 0 to 1.
        votes: number of votes it took part in.
    """

    rate: float
    codec: str
    score: float
    low: float
    high: float
    probability: float
    votes: int


@dataclass(frozen=True)
class Summary:
    """The scores, and how far the raters are to be trusted.

    Attributes:
        raters: how many voted and were not excluded.
        excluded: how many were, for too many wrong checks.
        votes: that the scores come from: those on comparisons shown for the first time, by raters not excluded.
        undone: votes taken back, which count nowhere.
        checks: answered, by all raters.
        right: how many of them rightly.
        repeats: answered by raters not excluded.
        consistent: how many of them as the first time.
        scores: by rate, best first.
    """

    raters: int
    excluded: int
    votes: int
    undone: int
    checks: int
    right: int
    repeats: int
    consistent: int
    scores: list[Score]


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths of codecs by maximum likelihood, where P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    The likelihood has a finite maximum only if every codec lost, through others, to every other. Half a virtual win
    and half a loss of each against an average opponent, of strength 0, make sure of it. Newton's method, as the MM
    algorithm, though simpler, takes thousands of steps where some codec nearly always wins.

    Args:
        wins: [..., K, K], how often i was preferred to j; the diagonal is not used.

    Returns:
        float [..., K], in natural logarithms, of mean 0.

    Source: Bradley and Terry, Rank analysis of incomplete block designs, Biometrika 39 (1952); Hunter, MM algorithms
    for generalized Bradley-Terry models, Annals of Statistics 32 (2004), for existence and uniqueness.
    """
    eye = np.eye(wins.shape[-1])
    wins = wins * (1 - eye)
    games, won = wins + wins.swapaxes(-1, -2), wins.sum(-1) + VIRTUAL_WINS
    scores = np.zeros(won.shape)
    for _ in range(200):
        p = _logistic(scores[..., :, None] - scores[..., None, :])
        p0 = _logistic(scores)
        gradient = won - (games * p).sum(-1) - 2 * VIRTUAL_WINS * p0
        curvature = games * p * (1 - p)
        hessian = eye * (curvature.sum(-1) + 2 * VIRTUAL_WINS * p0 * (1 - p0))[..., None] - curvature
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(-1, keepdims=True)
        scores = scores + step / np.maximum(size, 1)  # a longer step might overshoot
        if size.max() < 1e-9:
            break
    return scores - scores.mean(-1, keepdims=True)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)  # does not overflow


def bootstrap(wins: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of the strengths.

    Raters are resampled, as the votes of one are not independent; the votes, if there is one rater.

    Args:
        wins: integers [R, K, K], how often each rater preferred i to j.
        seed: of the resampling.

    Returns:
        Lower and upper ends, float [K] each.
    """
    rng = np.random.default_rng(seed)
    raters = len(wins)
    if raters > 1:
        weights = rng.multinomial(raters, np.full(raters, 1 / raters), size=RESAMPLES)
        samples = np.tensordot(weights, wins, 1)
    else:
        total = wins[0].ravel()
        samples = rng.multinomial(total.sum(), total / total.sum(), size=RESAMPLES).reshape(-1, *wins[0].shape)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(bradley_terry(samples), (tail, 1 - tail), axis=0)
    return low, high


def summarize(votes: Sequence[Vote], seed: int = 0) -> Summary:
    """Scores of every codec at every rate."""
    valid = [vote for vote in votes if vote.undone is None]
    checks: dict[str, list[bool]] = {}
    for vote in valid:
        if vote.kind == "check":
            checks.setdefault(vote.rater, []).append(preferred(vote) == "original")
    excluded = {rater for rater, right in checks.items() if sum(right) < HONEST * len(right)}
    trusted = [vote for vote in valid if vote.rater not in excluded]
    normal = [vote for vote in trusted if vote.kind == "normal"]
    first = {(vote.rater, compared(vote)): preferred(vote) for vote in normal}
    again = [
        first[key] == preferred(vote)
        for vote in trusted
        if vote.kind == "repeat" and (key := (vote.rater, compared(vote))) in first
    ]
    scores = []
    for rate in sorted({vote.rate for vote in normal if vote.rate is not None}):
        here = [vote for vote in normal if vote.rate == rate]
        codecs = sorted({codec for vote in here for codec in (vote.left_codec, vote.right_codec)})
        raters = sorted({vote.rater for vote in here})
        wins = np.zeros((len(raters), len(codecs), len(codecs)), dtype=np.int64)
        for vote in here:
            left, right = codecs.index(vote.left_codec), codecs.index(vote.right_codec)
            pair = (left, right) if vote.choice == "left" else (right, left)
            wins[raters.index(vote.rater), *pair] += 1
        total = wins.sum(0)
        strengths = bradley_terry(total)
        columns = strengths, *bootstrap(wins, seed), _logistic(strengths), total.sum(0) + total.sum(1)
        rows = [Score(rate, codec, *(column[i].item() for column in columns)) for i, codec in enumerate(codecs)]
        scores += sorted(rows, key=lambda row: -row.score)
    return Summary(
        raters=len({vote.rater for vote in trusted}),
        excluded=len(excluded),
        votes=len(normal),
        undone=len(votes) - len(valid),
        checks=sum(map(len, checks.values())),
        right=sum(map(sum, checks.values())),
        repeats=len(again),
        consistent=sum(again),
        scores=scores,
    )


def preferred(vote: Vote) -> str:
    """The codec that was called closer to the original."""
    return vote.left_codec if vote.choice == "left" else vote.right_codec


def compared(vote: Vote) -> tuple[str, float | None, frozenset[tuple[str, float]]]:
    """What a vote compares, whatever the sides."""
    sides = (vote.left_codec, vote.left_setting), (vote.right_codec, vote.right_setting)
    return vote.image, vote.rate, frozenset(sides)


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown
# ---------------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves a study to any number of raters, a thread for each connection.

    Args:
        study: what is compared.
        votes: where the answers go.
        host: address or name to listen at.
        port: 0 for any that is free.

    Raises:
        OSError: it is not possible to listen there.
    """

    request_queue_size = 128

    def __init__(self, study: Study, votes: Votes, host: str, port: int) -> None:
        self.study, self.votes = study, votes
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of the name is empty or too long
            number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "no such name")
            raise OSError(number, text, f"{host}:{port}") from error
        bound, port = self.server_address[:2]
        self.loopback = ipaddress.ip_address(str(bound)).is_loopback
        self.url = f"http://[{bound}]:{port}/" if ":" in str(bound) else f"http://{bound}:{port}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who we are, and uses it for CGI only

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # browsers leave without a word
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers `/` (the page), `/state` (what comes next), `/picture/TOKEN`, and posts to `/vote` and `/undo`."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until an idle connection is closed
    disable_nagle_algorithm = True  # head and body of an answer are sent apart, and the second would wait

    def version_string(self) -> str:
        return "rnncodec"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        def answer() -> tuple[str, str, bytes]:
            self._check_origin()
            path, _, query = self.path.partition("?")
            if path == "/":
                return "text/html; charset=utf-8", "no-store", PAGE.read_bytes()
            if path == "/state":
                return self._state(_valid_id(query.removeprefix("rater="), "rater"))
            token = path.removeprefix("/picture/")
            if token not in self.server.study.pictures:
                raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
            return "image/png", "private, max-age=3600", encode_picture(self.server.study.pictures[token])

        self._respond(answer)

    def do_POST(self) -> None:
        def answer() -> tuple[str, str, bytes]:
            document = self._document()
            post = {"/vote": self._vote, "/undo": self._undo}.get(self.path)
            if post is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
            post(document)
            return self._state(document["rater"])

        self._respond(answer)

    def _vote(self, document: dict[str, Any]) -> None:
        """Stores a vote on the trial that comes next."""
        _check_keys(document, "rater", "name", "trial", "choice", "milliseconds")
        rater, token = _valid_id(document["rater"], "rater"), _valid_id(document["trial"], "trial")
        name, choice, milliseconds = document["name"], document["choice"], document["milliseconds"]
        if not (isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable()):
            raise Refused(HTTPStatus.BAD_REQUEST, f"a name has at most {MAX_NAME} printable characters")
        if choice not in ("left", "right"):
            raise Refused(HTTPStatus.BAD_REQUEST, "the choice is left or right")
        if type(milliseconds) is not int or not 0 <= milliseconds <= MAX_MILLISECONDS:
            raise Refused(HTTPStatus.BAD_REQUEST, f"milliseconds are 0 to {MAX_MILLISECONDS}")
        trials = {trial.token: trial for trial in self.server.study.trials(rater)}
        if token not in trials:
            raise Refused(HTTPStatus.BAD_REQUEST, "this rater has no such trial")
        done = set(self.server.votes.trials(rater))
        trial = trials[token]
        sides = (*_file(trial.left), *_file(trial.right))
        vote = Vote(rater, name, token, trial.kind, trial.image, trial.rate, *sides, choice, milliseconds, now())
        following = next((each for each in trials if each not in done), None)
        if token != following or not self.server.votes.add(vote):
            raise Refused(HTTPStatus.CONFLICT, "this trial has been answered, or is not the next one")

    def _undo(self, document: dict[str, Any]) -> None:
        """Takes the last vote back."""
        _check_keys(document, "rater", "trial")
        rater, token = _valid_id(document["rater"], "rater"), _valid_id(document["trial"], "trial")
        if token not in {trial.token for trial in self.server.study.trials(rater)}:
            raise Refused(HTTPStatus.BAD_REQUEST, "this rater has no such trial")
        if not self.server.votes.undo(rater, token):
            raise Refused(HTTPStatus.CONFLICT, "this is not the last vote")

    def _state(self, rater: str) -> tuple[str, str, bytes]:
        """Where a rater is: how many trials are done, what can be undone, and the tokens of what comes next."""
        study = self.server.study
        trials = study.trials(rater)
        answered = self.server.votes.trials(rater)
        known, done = {trial.token for trial in trials}, set(answered)
        left = [trial for trial in trials if trial.token not in done]
        state = {
            "done": len(trials) - len(left),
            "total": len(trials),
            "last": answered[-1] if answered and answered[-1] in known else None,
            "trials": [
                {
                    "trial": trial.token,
                    "original": study.reference(trial.image),
                    "left": study.picture(trial.left),
                    "right": study.picture(trial.right),
                }
                for trial in left[:AHEAD]
            ],
        }
        return "application/json", "no-store", json.dumps(state).encode()

    def _document(self) -> dict[str, Any]:
        """The JSON object that was posted, if it may be."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the body is missing")
        data = self.rfile.read(min(int(length), 16 * MAX_BODY))  # else the answer may be lost with what is not read
        if int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY} bytes")
        self._check_origin()
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
        return document

    def _check_origin(self) -> None:
        """Refuses what another site's page asks for, under its own name (CSRF) or one that leads here (rebinding)."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.loopback and not _is_loopback(host):
            raise Refused(HTTPStatus.FORBIDDEN, "this server is for this computer only")
        if origin not in (None, f"http://{host}", f"https://{host}"):
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not do this")

    def _respond(self, answer: Callable[[], tuple[str, str, bytes]]) -> None:
        try:
            status, (kind, cache, body) = HTTPStatus.OK, answer()
        except (Refused, ValueError, OSError, MemoryError) as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            status = error.status if isinstance(error, Refused) else HTTPStatus.INTERNAL_SERVER_ERROR
            kind, cache, body = "text/plain; charset=utf-8", "no-store", f"{one_line(error)}\n".encode()
            self.close_connection = True  # part of a body may not have been read
            if not isinstance(error, Refused):  # paths are for who runs the server, not for raters
                print(f"rnncodec: error: {one_line(error)}", file=sys.stderr, flush=True)
                body = b"the server failed\n"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Cache-Control": cache, **SECURITY}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def encode_picture(path: Path) -> bytes:
    """A picture as PNG, not compressed, so that all of an image have the same type and the same number of bytes.

    Raises:
        ValueError: it cannot be read.
    """
    file = io.BytesIO()
    Image.fromarray(load_image(path)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this computer to itself; the port does not matter, a tunnel may have another."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _valid_id(value: object, name: str) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value)):
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is 32 hexadecimal digits")
    return value


def _check_keys(document: dict[str, Any], *keys: str) -> None:
    if document.keys() != set(keys):
        raise Refused(HTTPStatus.BAD_REQUEST, f"the fields are {', '.join(keys)}")
