"""Which mistakes are told in one sentence, and which keep their traceback."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is this package's: its ValueErrors are sentences for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    named = Path(trace.tb_frame.f_code.co_filename)
    file = named.resolve()  # as _PACKAGE: it may have been imported through a link
    if not named.is_absolute() or not file.is_relative_to(_PACKAGE):  # `<string>` is no file
        return False
    return "site-packages" not in file.relative_to(_PACKAGE).parts  # a .venv inside the checkout


def sentence(error: BaseException) -> str | None:
    """The error in one line, or None where only its traceback helps: a ValueError of a library."""
    if isinstance(error, OSError) or (isinstance(error, ValueError) and raised_here(error)):
        return " ".join(str(error).split())
    return None
