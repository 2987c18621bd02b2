"""A few pages over HTTP, for machines that watch: one organ with one listening thread, ended by `close`.

Whoever asks gets what the page's function returns at that moment; it runs in a thread of the request and so must only
read what nobody changes (values that are replaced whole).

**A taken port is no reason to end a run.** Two runs on one machine have the same port by default; the second one goes
on without being watched there, says so in its notes, and takes the port over once the first has gone: `attend`, called
now and then, tries again. Another port would be worse: a watcher would find the run of somebody else under the number
it knows, or nothing.

Limits: so many requests at a time (`CONNECTIONS_MAX`; more are closed at once and counted) and so long for each read
and write of one (`SOCKET_TIMEOUT_S`).
"""

from __future__ import annotations

import errno
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

from esper_simic.errors import UnavailableError

CONNECTIONS_MAX: Final = 8
SOCKET_TIMEOUT_S: Final = 5.0
RETRY_INTERVAL_S: Final = 10.0
"""How often a port that was taken is tried again."""


class Page(NamedTuple):
    """An answer."""

    content_type: str
    body: bytes
    status: int = HTTPStatus.OK


Pages = Mapping[str, Callable[[str], Page]]
"""Path -> what answers there, given the request's `Accept` header."""


class HttpEndpoint:
    """Serves pages on one address while it is started.

    Args:
        host: Address to listen on; `127.0.0.1` is reached from this machine alone.
        port: Its port; 0 lets the machine choose (see `port`).
        pages: What is served; anything else is 404.
    """

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self._host, self._port, self._pages = host, port, pages
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._due_s = 0.0
        self.note = ""
        """Why nothing is served at present, for people; empty while it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port listened on; as asked for while not started."""
        return self._port if self._server is None else self._server.server_port

    @property
    def shed(self) -> int:
        """Requests closed unanswered because too many were under way."""
        return 0 if self._server is None else self._server.shed

    def attend(self, now_s: float) -> None:
        """Start if that has not succeeded yet and is due; when it does not succeed, `note` says why.

        Args:
            now_s: Now, on a clock that never goes back.
        """
        if self._server is not None or now_s < self._due_s:
            return
        self._due_s = now_s + RETRY_INTERVAL_S
        try:
            self.start()
        except UnavailableError as error:
            self.note = str(error)

    def start(self) -> None:
        """Listen; when this returns, requests are answered. Does nothing when started already.

        Raises:
            UnavailableError: The address cannot be had; another run may have it.
        """
        if self._server is not None:
            return
        try:
            self._server = _Server(self._host, self._port, self._pages)
        except OSError as error:
            remedy = (
                "another run may have it (supervisor.metrics_port chooses another)"
                if error.errno == errno.EADDRINUSE
                else "supervisor.metrics_host and metrics_port choose another, metrics_port=null serves none"
            )
            raise UnavailableError(
                f"metrics are not served: {self._host}:{self._port} cannot be had ({error.strerror or error}); {remedy}"
            ) from error
        self.note = ""
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Listen no more and end the thread; twice is harmless."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None:
            server.shutdown()
            thread.join()
            server.server_close()


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False  # a request's thread ends by its socket's timeout, and nothing waits for it

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self.shed = 0
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own would look up the host's name, for as long as that takes.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shed += 1
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        # Whoever asked may go away in the middle; that concerns nobody else.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SOCKET_TIMEOUT_S
    server_version = "simic"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        page_of = self.server.pages.get(urlsplit(self.path).path)
        if page_of is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = page_of(self.headers.get("Accept", ""))
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Requests of a watcher are no news."""
