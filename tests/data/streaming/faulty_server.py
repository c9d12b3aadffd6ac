"""A real HTTP server on this machine that serves a folder, with faults by plan."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["stall", "cut", "busy", "wrong", "short", "missing"]
# For who meets a stall or a busy server: a slow machine is none, but curl's pause of 2 s before it asks again is one.
STALL_SECONDS = 1.5
STATUSES = {"busy": 503, "missing": 404}


class FaultyServer(ThreadingHTTPServer):
    """Serves files of a folder.

    Attributes:
        url: Where.
        faults: What goes wrong with the next requests of a path, first things first; each happens once.
        requests: How often each path was asked for.
        queries: What stood behind `?` in the requests.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.lock = threading.Lock()
        self.released = threading.Event()

    def fault_of(self, path: str) -> Fault | None:
        with self.lock:
            self.requests[path] += 1
            faults = self.faults.get(path)
            return faults.pop(0) if faults else None


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        path, _, query = self.path.lstrip("/").partition("?")
        self.server.queries.add(query)
        fault = self.server.fault_of(path)
        file = self.server.folder / path
        if fault in STATUSES or not file.is_file():
            self.send_error(STATUSES.get(fault or "missing", 404))
            return
        content = bytearray(file.read_bytes())
        half = len(content) // 2
        if fault == "wrong":
            content[half] ^= 255
        if fault == "short":
            del content[half:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            if fault not in ("stall", "cut"):
                self.wfile.write(content)
                return
            self.wfile.write(content[:half])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(20)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
