"""Servers that speak S3's and Google Cloud Storage's protocols, and a proxy before them that makes requests fail."""

import contextlib
import functools
import http.client
import json
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"
# (number of the request from 1, method, path) -> None, a status as "503", "reset", "stall" (no answer for ever),
# or "lost" (done, but the answer does not arrive).
Fault = Callable[[int, str, str], str | None]


class Proxy:
    """Passes requests on to a server, except those that `fault` names.

    Attributes:
      fault: what goes wrong; None for nothing.
      requests: method and path of those that came, in their order.
      url: where it listens.
    """

    def __init__(self, port: int) -> None:
        """`port` is the server's."""
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((HOST, 0), functools.partial(_Passing, self, port))
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def note(self, method: str, address: str) -> str | None:
        """Notes a request; what is to go wrong with it."""
        with self._lock:
            self.requests.append((method, address))
            number = len(self.requests)
        return self.fault and self.fault(number, method, address)

    def close(self) -> None:
        """Ends it: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()


class _Passing(BaseHTTPRequestHandler):
    """A connection to a proxy whose server listens at `port`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: Proxy, port: int, *connection: object) -> None:
        self._proxy, self._port = proxy, port
        super().__init__(*connection)  # answers until the peer has gone

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def answer(self) -> None:
        body = self._body()
        fault = self._proxy.note(self.command, self.path)
        if fault == "stall":  # nothing is said until the peer has gone
            self.connection.recv(1)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault not in (None, "lost"):
            self._send(int(fault), [("Content-Type", "application/json")], b"")
        else:
            status, headers, content = self._ask(body)
            if fault == "lost":
                self._reset()
            else:
                self._send(status, headers + self._generation(status), content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server answers: status, headers and content."""
        upstream = http.client.HTTPConnection(HOST, self._port)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
        if self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()

    def _reset(self) -> None:
        """Lingering 0 seconds: the peer sees ECONNRESET, not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _generation(self, status: int) -> list[tuple[str, str]]:
        """What Google's servers say of each object they send, this one does not, and TensorStore needs."""
        address, _, query = self.path.partition("?")
        if status not in (200, 206) or not (address.startswith("/storage/v1/") and query.startswith("alt=media")):
            return []
        with urllib.request.urlopen(f"http://{HOST}:{self._port}{address}") as described:
            return [("X-Goog-Generation", json.load(described)["generation"])]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server of S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@contextlib.contextmanager
def gcs_server() -> Iterator[int]:
    """The port of a server of Google Cloud Storage."""
    from gcp_storage_emulator.server import create_server

    server = create_server(HOST, 0, in_memory=True)
    server.start()
    try:
        yield server._api._httpd.server_port
    finally:
        server.stop()
