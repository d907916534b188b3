"""A web server on 127.0.0.1 for the files of a folder, which can fail as servers do; it stops with its block."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections import Counter


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; `server.faults` gives what the next requests of a path get: a status, or `cut`."""

    def log_message(self, *_args):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.asked[self.path] += 1
            fault = self.server.faults.get(path, [None]).pop(0) if self.server.faults.get(path) else None
            self.server.headers[self.path] = dict(self.headers)
        if fault is None:
            super().do_GET()
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"\x89PNG")
        else:
            status, *headers = fault if isinstance(fault, tuple) else (fault,)
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.send_header("Content-Length", "0")
            self.end_headers()


class FileServer(http.server.ThreadingHTTPServer):
    """Counts what is asked of it."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.lock, self.asked, self.faults, self.headers = threading.Lock(), Counter(), {}, {}
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"

    def handle_error(self, *_args):
        """Say nothing: a client that was killed hangs up."""


def serving(folder):
    """Serve the files of a folder inside a `with` block."""
    return running(FileServer(folder))


@contextlib.contextmanager
def running(made):
    """Answer requests in a thread inside the block, and stop with it."""
    with made as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
