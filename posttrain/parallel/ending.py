"""The end of a process that is one of several and has failed: it must not wait for the others, which wait for it.

JAX has processes leave together: at the interpreter's end each waits up to five minutes for all. After an error that
would be five minutes of idle devices. A process that ends by itself is missed by the others within 100 seconds, process
0 at once, and a launcher starts all of them again, or knows by the exit code that this cannot help.
"""

import atexit
import os
import sys
from types import TracebackType

_failure: int | None = None


def note_failure(code: int) -> None:
    """This process will end with this exit code, because of an error of its own."""
    global _failure
    _failure = code


def end_alone_after_failures() -> None:
    """To be called when this process has joined others: from now on it ends without them after `note_failure`, or an
    exception that nobody caught. Threads are waited for as always, and so is a checkpoint that one of them writes."""
    sys.excepthook = _crash
    atexit.register(_end)  # runs before what was registered earlier, such as JAX's own end


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    note_failure(1)
    sys.__excepthook__(kind, error, trace)


def _end() -> None:
    if _failure is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_failure)
