"""Signals that ask a run to stop: heard at the end of a step, so that nothing of it is lost."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LOGGER = logging.getLogger(__name__)
# SIGBREAK: Windows' Ctrl-Break, which it also sends when a console is closed.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
HEARD = (signal.SIGINT, *ENDING)


def interrupt_when_told_to_end() -> None:
    """From now on SIGTERM interrupts as Ctrl-C does; a machine that is taken away sends it.

    Nothing changes outside of the main thread, where Python hears no signals.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, signal.default_int_handler)


class StopRequest:
    """Whether SIGINT (Ctrl-C, a notebook's stop button) or SIGTERM has come."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.came = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal instead of stopping at once; a second one interrupts as it always does.

        Python hears signals in its main thread alone; elsewhere nothing changes.
        """
        # signal.signal raises anywhere else: a run in a thread, such as a widget's, stops at once or not at
        # all.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in HEARD}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None stands for a handler that was not set from Python, which cannot be put back.
                signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            signal.default_int_handler(number, frame)
        self.came = True
        LOGGER.warning("stopping at the end of this step, with a checkpoint; once more stops at once")
