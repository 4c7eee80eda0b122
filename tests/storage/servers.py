"""Servers that speak S3's and Google Cloud Storage's protocols, and a proxy before them that makes requests fail."""

import contextlib
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
    """Passes requests on to a server, except those that `fault` names."""

    def __init__(self, port: int) -> None:
        """`port` is the server's."""
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def answer(self) -> None:
                body = self._body()
                with proxy._lock:
                    proxy.requests.append((self.command, self.path))
                    number = len(proxy.requests)
                fault = proxy.fault and proxy.fault(number, self.command, self.path)
                if fault == "stall":  # nothing is said until the peer has gone
                    self.connection.recv(1)
                    self.close_connection = True
                    return
                if fault == "reset":
                    self._reset()
                    return
                if fault not in (None, "lost"):
                    self._send(int(fault), [("Content-Type", "application/json")], b"")
                    return
                upstream = http.client.HTTPConnection(HOST, port)
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection")
                }
                if self.command in ("PUT", "POST"):
                    headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                content = response.read()
                if fault == "lost":
                    self._reset()
                    return
                self._send(response.status, response.getheaders() + self._generation(response.status), content)
                upstream.close()

            def _reset(self) -> None:
                """Lingering 0 seconds: the peer sees ECONNRESET, not an orderly end."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def _generation(self, status: int) -> list[tuple[str, str]]:
                """What Google's servers say of each object they send, this one does not, and TensorStore needs."""
                address, _, query = self.path.partition("?")
                if status not in (200, 206) or not (
                    address.startswith("/storage/v1/") and query.startswith("alt=media")
                ):
                    return []
                with urllib.request.urlopen(f"http://{HOST}:{port}{address}") as described:
                    return [("X-Goog-Generation", json.load(described)["generation"])]

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

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

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Ends it: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()


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
