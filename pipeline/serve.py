"""STAGE serve: scores over HTTP, with bounds on everything."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.progress import say

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.api.scorer import Scorer
    from deltaclip.pipeline.serving.app import Limited
    from deltaclip.pipeline.settings import ServeConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeResult:
    """What was served until the signal to stop: answers by HTTP status."""

    run: Path
    address: str
    seconds: float
    answers: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "run": str(self.run),
            "address": self.address,
            "seconds": self.seconds,
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
        }

    def summary(self) -> str:
        """Return how much was answered."""
        refused = sum(count for status, count in self.answers.items() if status >= 400)
        answered = sum(self.answers.values())
        return f"stopped after {self.seconds:,.0f} s: {answered:,} requests answered, {refused:,} of them refused"


def serve(config: ServeConfig) -> ServeResult:
    """Answer requests for scores of a run until SIGINT or SIGTERM.

    Raises:
        UserError: the extra is not installed, the address is taken, no such root, or a run that cannot be loaded.
    """
    config.check_more()
    if config.root is not None and not config.root.is_dir():
        raise UserError("no such folder", place=config.root, remedy="give the folder of the images as --root")
    with listen(config.host, config.port) as bound, contextlib.ExitStack() as running:
        # What scores is imported once the address is taken: torch takes seconds.
        from deltaclip.pipeline.api.scorer import Scorer
        from deltaclip.pipeline.serving.app import make_server, one_line_log

        running.enter_context(one_line_log())
        host, port = bound.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        scorer = Scorer.load(config.run, device=config.device, backbone=config.backbone, pretrained=config.pretrained)
        app = _application(config, scorer)

        def say_address() -> None:
            # At once, and apart from the result, which follows when the server stops.
            say(f"deltaclip: serving {config.run} on {address}")
            if config.host not in LOOPBACK:
                say("deltaclip: whoever reaches this address may use it: there is no log-in")

        started = time.monotonic()
        make_server(app, on_ready=say_address).run(sockets=[bound])
    return ServeResult(run=config.run, address=address, seconds=time.monotonic() - started, answers=dict(app.answered))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 takes a free one.

    Raises:
        UserError: the address is taken, not this machine's or not allowed.
    """
    with contextlib.ExitStack() as on_error:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = on_error.enter_context(socket.socket(family, kind))
            if os.name == "posix":  # elsewhere it would take an address away from another program
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, UnicodeError) as error:
            message = f"cannot be listened on ({getattr(error, 'strerror', None) or error})"
            is_name = isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.EADDRNOTAVAIL
            remedy = "give --host an address of this machine" if is_name else "give another --port, or 0 for a free one"
            raise UserError(message, place=f"{host}:{port}", remedy=remedy) from error
        on_error.pop_all()
    return bound


def _application(config: ServeConfig, scorer: Scorer) -> Limited:
    from deltaclip.pipeline.serving.app import Limited, Limits, create_app
    from deltaclip.pipeline.serving.service import Service

    max_bytes = int(config.max_request_mb * 1e6)
    service = Service(
        scorer,
        root=config.root,
        max_pixels=int(config.max_megapixels * 1e6),
        max_bytes=max_bytes,
        max_prompt_chars=config.max_prompt_chars,
        coverage=config.coverage,
        batch_size=config.batch_size,
        wait_s=config.batch_wait_ms / 1000,
        queue_size=config.queue_size,
    )
    limits = Limits(
        request_bytes=max_bytes,
        body_s=config.timeout_s,
        answer_s=config.timeout_s,
        num_requests=config.max_requests,
        hosts=frozenset(LOOPBACK) if config.host in LOOPBACK else None,
    )
    return Limited(create_app(service, run=config.run.name), limits)
