"""The user's code: which code it is, and its lines, for messages that name them."""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
from pathlib import Path

import torch

_OURS = (str(Path(__file__).parent.parent), torch.__path__[0])
_PASSED_THROUGH = (contextlib.__file__, "<eval_with_key>")  # of torch.fx: the code of graphs


def is_user_code(path: str) -> bool:
    """Whether a file of code lies outside torch and this package."""
    return not path.startswith(_OURS)


def running_line() -> str:
    """'file:line `code`' of the innermost frame that runs user code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{line} `{linecache.getline(path, line).strip()}`"


def failing_line(error: BaseException) -> str:
    """' at file:line `code`' of the innermost frame of user code in a traceback, or ''."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_code(frame.filename) and not frame.filename.startswith(_PASSED_THROUGH):
            return f" at {Path(frame.filename).name}:{frame.lineno} `{frame.line}`"
    return ""


__all__ = ["failing_line", "is_user_code", "running_line"]
