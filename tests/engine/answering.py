"""A child process for tests: it does what it is told."""

import os
import time
from typing import Any

from engine.child_process import answer_questions


def answer(question: Any) -> Any:
    what, value = question
    if what == "sleep":
        time.sleep(value)
    if what == "kill":
        os.kill(os.getpid(), value)
    if what == "exit":
        os._exit(value)
    while what == "loop":
        pass
    return sorted(os.environ) if what == "environment" else value


if __name__ == "__main__":
    answer_questions(lambda _: answer)
