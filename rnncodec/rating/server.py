"""The web server of a study, which serves the page and the pictures, and takes the votes."""

import io
import ipaddress
import json
import re
import socket
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from rnncodec.files.images import load_image, one_line
from rnncodec.rating.study import Study, file_of
from rnncodec.rating.votes import Vote, Votes, now

AHEAD = 3  # trials that the page gets in advance, to load their pictures
MAX_BODY = 4096  # bytes of a POST
MAX_MILLISECONDS = 24 * 60 * 60 * 1000
MAX_NAME = 60
PAGE = Path(__file__).with_name("page.html")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """Raised for a request that is refused; the message is sent to the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a study to any number of raters, a thread for each connection.

    Args:
        study: what is compared.
        votes: where the answers go.
        host: address or name to listen at.
        port: 0 for any that is free.

    Raises:
        OSError: the server cannot listen there.
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
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the name of the host, which only CGI needs

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # browsers close connections at any time
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers `/` (the page), `/state` (what comes next), `/picture/TOKEN`, and posts to `/vote` and `/undo`."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until an idle connection is closed
    disable_nagle_algorithm = True  # it would delay the body of an answer, sent after the head

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
        sides = (*file_of(trial.left), *file_of(trial.right))
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
        """The progress of a rater: how many trials are done, what can be undone, and the tokens of the next trials."""
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
        """The JSON object that was posted, after checks."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the body is missing")
        data = self.rfile.read(min(int(length), 16 * MAX_BODY))  # unread data may cost the client the answer
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
        """Refuses requests from pages of other sites, both cross-site requests (CSRF) and DNS rebinding."""
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
            if not isinstance(error, Refused):  # raters should not see the paths in messages
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
    """Encodes a picture as PNG without compression, so that all of an image have the same type and number of bytes.

    Raises:
        ValueError: it cannot be read.
    """
    file = io.BytesIO()
    Image.fromarray(load_image(path)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this computer itself; the port is ignored, because a tunnel may change it."""
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
