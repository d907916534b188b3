"""Work in a process of its own that dies at a chosen call to the operating system."""

from __future__ import annotations

import os
import signal


def child(work):
    """Run `work` in a process of its own and return how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OSError as error:
            os._exit(100 if error.filename else 101)
        except BaseException:  # noqa: BLE001 - the exit code is the report
            os._exit(102)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


CALLS = (
    "fsync",
    "replace",
    "unlink",
    "posix_fallocate",
)  # between any two of them the disk may hold any part of what was written


def dying_at(number, work):
    """Work until the call of this number to the operating system, and die there; exit 0 if there are fewer."""

    def run():
        left = [number]

        def count(function):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, count(getattr(os, name)))
        work()

    return run
