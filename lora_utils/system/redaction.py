"""Keeps access tokens out of everything that is printed, logged or drawn: ``install()`` once, at the start.

A secret is what looks like a token of a known service, or the value of an environment variable such as
HF_TOKEN. All of them are masked in output. Refused in settings are only those that can be nothing but a
token: a password may be a plain word, and that word be in a prompt or a path.
"""

import contextlib
import io
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

MASK = "***"
ADVICE = "tokens belong in the environment variable HF_TOKEN, in Colab's secrets or in 'hf auth login'"
_SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|API_KEY|ACCESS_KEY|PASSWORD)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; below, a value is more likely a word such as "none"
_SHORTEST_TOKEN = 16  # of a secret that is refused in settings
_LONG_MIX = re.compile(r"(?=[A-Za-z0-9]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20,}")
_CHANGES_OF_A_TOKEN = 0.2  # between lower case, upper case and digits, per character; hexadecimals have 0.47
_TOKEN = re.compile(
    r"hf_(?:oauth[\w.-]{12,}|jwt_[\w.-]{12,}|[A-Za-z0-9]{16,})"
    r"|api_org_[A-Za-z0-9]{16,}"
    r"|(?<![A-Za-z0-9])sk-(?=[\w-]*\d)[\w-]{20,}"  # a digit: sk-a-folder-with-a-long-name is none
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?<=://)[^\s/@:'\"\\]{0,200}:[^\s/'\"\\]{1,200}(?=@)"  # user:password of a URL
)
_HEADER = re.compile(
    r"(\bbearer\s+)(?=\S*\d)[\w.~+/-]{16,}=*"
    r"|(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)\s+)[^\s'\",}]{4,}",
    re.IGNORECASE,
)
_UNPRINTABLE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)


def redacted(text: str) -> str:
    """The text with ``***`` in place of every secret: for what is printed or logged."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    return _without_known_tokens(text)


def without_tokens(text: str) -> str:
    """The text with ``***`` in place of what can be nothing but a token: for files that are read again."""
    for value in filter(_is_token, _environment_secrets()):
        text = text.replace(value, MASK)
    return _without_known_tokens(text)


def holds_secret(text: str) -> bool:
    """Whether ``redacted`` would change the text."""
    return redacted(text) != text


def holds_token(text: str) -> bool:
    """Whether ``without_tokens`` would change the text."""
    return without_tokens(text) != text


def install() -> None:
    """Redact logs, warnings, uncaught errors, and tracebacks of notebooks; calling it again adds what is new.

    The factory of log records covers handlers that come later. In a notebook both what the cell shows and the
    reply to whoever executes it (papermill, nbclient) are redacted.
    """
    factory = logging.getLogRecordFactory()
    if not getattr(factory, "redacts", False):
        logging.setLogRecordFactory(_marked(_redacting_factory(factory)))
    for handler in logging.getLogger().handlers:
        handler.addFilter(_redact_record)
    _wrap(warnings, "formatwarning", _redacting_text)
    _wrap(sys, "excepthook", _redacting_hook)
    _wrap(threading, "excepthook", _redacting_hook)
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        if not getattr(shell._showtraceback, "redacts", False):
            shell.events.register("post_run_cell", _redact_result)
        _wrap(shell, "_showtraceback", _redacting_traceback)


def _environment_secrets() -> list[str]:
    """Values of secret variables now, longest first: Colab's secrets arrive while the program runs."""
    values = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    values |= {repr(value)[1:-1] for value in values}  # as a traceback quotes it
    return sorted((value for value in values if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def _is_token(value: str) -> bool:
    """Whether a secret's value is so long and random that it is no word, name or path which a user writes."""
    value = value.rstrip("\\")  # of a variable that was pasted with the end of its line
    if not re.fullmatch(r"[^\s/.~\\][^\s\\]*", value) or len(value) < _SHORTEST_TOKEN:
        return False
    if _LONG_MIX.search(value):
        return True
    # In words, letters stand beside letters of their case; at random, anything beside anything.
    classes = [char.islower() - char.isupper() for char in value if char.isalnum()]
    changes = sum(left != right for left, right in pairwise(classes))
    return any(char.isdigit() for char in value) and changes >= _CHANGES_OF_A_TOKEN * len(value)


def _without_known_tokens(text: str) -> str:
    text = _HEADER.sub(lambda match: (match[1] or match[2]) + MASK, text)
    return _TOKEN.sub(MASK, text)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    present = getattr(owner, name)
    if not getattr(present, "redacts", False):
        setattr(owner, name, _marked(wrapper(present)))


def _marked(function: Any) -> Any:
    function.redacts = True
    return function


def _redacting_factory(factory: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        _redact_record(record)
        return record

    return make


def _redact_record(record: logging.LogRecord) -> bool:
    """Change only records that hold a secret, so that others keep their arguments; True lets it pass."""
    try:
        message = record.getMessage()
    except _UNPRINTABLE:  # placeholders and arguments do not fit: logging reports that, and would print both
        message = f"{record.msg} {record.args}"
    if holds_secret(message):
        record.msg = redacted(message)
        record.args = ()
    if record.exc_info and record.exc_info[0]:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if holds_secret(trace):
            record.exc_info = None  # else a formatter would write the trace anew
            record.exc_text = redacted(trace)
    if record.stack_info:
        record.stack_info = redacted(record.stack_info)
    return True


def _redacting_text(make_text: Callable[..., str]) -> Callable[..., str]:
    def make(*args: Any, **kwargs: Any) -> str:
        return redacted(make_text(*args, **kwargs))

    return make


def _redacting_hook(hook: Callable[..., Any]) -> Callable[..., None]:
    def report(*args: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as buffer:
            hook(*args)
        sys.stderr.write(redacted(buffer.getvalue()))

    return report


def _redacting_traceback(show: Callable[..., Any]) -> Callable[..., Any]:
    def show_redacted(error_class: type, error: BaseException, lines: list[str]) -> Any:
        return show(error_class, _redacted_error(error), [redacted(line) for line in lines])

    return show_redacted


def _redact_result(result: Any) -> None:
    """The kernel's reply quotes the error of the result, not the traceback that was shown."""
    for name in ("error_before_exec", "error_in_exec"):
        if (error := getattr(result, name, None)) is not None:
            setattr(result, name, _redacted_error(error))


def _redacted_error(error: BaseException) -> BaseException:
    text = str(error)
    if not holds_secret(text):
        return error
    return type(type(error).__name__, (Exception,), {})(redacted(text))
