"""The standard streams of a program that was started without some, as daemons and scripts do it."""

import os
import sys


def open_closed_streams() -> None:
    """Open those that are closed on the null device.

    The next files and sockets would take their numbers, and get what is printed; libuv aborts at
    the end of a loop whose own descriptors are among them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is taken: this one, as those below are open.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
