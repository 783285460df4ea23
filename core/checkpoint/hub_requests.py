"""Requests to the Hub that end, whatever the server does.

A server that sends nothing is given up after 10 seconds (HF_HUB_DOWNLOAD_TIMEOUT). One that sends
next to nothing, less than `LEAST_BYTES` in `answer_s` seconds, is given up too. Requests run in
threads of their own, so that Ctrl-C and a cancelled run end at once. If the server asks to wait
(Retry-After), it is asked once more after that time, unless that is more than `LONGEST_WAIT_S`.
Answers are read up to a size, and only as what they should be.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from core import outside
from core.runs.progress import Progress

T = TypeVar("T")
LEAST_BYTES = 65536
"""In `answer_s` seconds; a connection of 10 kbit/s sends as much."""
LONGEST_WAIT_S = 60
"""The longest Retry-After that is honoured instead of reported."""
MOST_HEADER = 25_000_000
"""Bytes of a safetensors header, as huggingface_hub allows."""
FIRST_REQUEST = 100_000
"""Last byte of the first request for a header; most headers are shorter."""
_LARGEST_ANSWER = 32 << 20
_AT_ONCE = 8
_POLL_S = 0.05


class TooSlow(Exception):
    """The Hub did not finish answering in time."""


class Busy(Exception):
    """The Hub asks to wait longer than is honoured."""

    def __init__(self, wait_s: int) -> None:
        """Hold the seconds of its Retry-After."""
        super().__init__(f"{wait_s} s")
        self.wait_s = wait_s


class Unusable(Exception):
    """The Hub's answer is not what it should be; the text names the reason."""


def answer_s() -> float:
    """Return the seconds after which a slow server is given up (DEPTHCUT_HUB_TIMEOUT or 60)."""
    try:
        return max(0.1, float(os.environ.get("DEPTHCUT_HUB_TIMEOUT") or 60.0))
    except ValueError:
        return 60.0


def call(function: Callable[[], T], progress: Progress, moved: Callable[[], int] = lambda: 0) -> T:
    """Return what ``function`` returns, run in a separate thread.

    ``moved`` returns the bytes received so far.

    Raises:
        Busy: The Hub asks to wait longer than `LONGEST_WAIT_S`.
        TooSlow: Less than `LEAST_BYTES` arrived in `answer_s` seconds.
        Unusable: The library could not make sense of the answer.
        Cancelled: The run was cancelled meanwhile.
    """
    for attempt in (1, 2):
        try:
            return _watched(function, progress, moved)
        except Exception as error:
            wait = retry_after(error)
            if wait is None or wait > LONGEST_WAIT_S or attempt == 2:
                raise
            progress.log(f"The Hub asks to wait {wait} s before the next request.")
            end = time.monotonic() + wait
            while time.monotonic() < end:
                progress.check_cancel()
                time.sleep(min(_POLL_S, max(0.0, end - time.monotonic())))
    raise AssertionError("unreachable")


def _watched(function: Callable[[], T], progress: Progress, moved: Callable[[], int]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    _watch_waits()
    _waits.clear()
    threading.Thread(target=work, daemon=True, name="hub").start()
    limit = answer_s()
    since, before = time.monotonic(), moved()
    try:
        while not done.wait(_POLL_S):
            progress.check_cancel()
            if _waits and _waits[-1] > LONGEST_WAIT_S:
                raise Busy(_waits[-1])
            if _waits:  # the library waits, then asks again
                since = time.monotonic() + _waits.pop() + 1
            if moved() - before >= LEAST_BYTES:
                since, before = time.monotonic(), moved()
            elif time.monotonic() - since > limit:
                raise TooSlow(f"{limit:g} s")
    finally:
        if not done.is_set():
            _hang_up()
    if errors:
        known = _classified(errors[0])
        if known is errors[0]:
            raise known
        raise known from errors[0]
    return results[0]


_waits: list[int] = []
"""Retry-After of answers that the library deals with by itself, in seconds."""


@functools.cache
def _watch_waits() -> None:
    """Have the library's client note when the Hub asks to wait: it sleeps that long, in silence."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def note(response: Any) -> None:
        wait = _seconds(response)
        if wait is not None:
            _waits.append(wait)

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "response": [note]}
        return made

    set_client_factory(client)


def _hang_up() -> None:
    """Close the library's connections, so that threads that still wait for them end."""
    from huggingface_hub import close_session

    with contextlib.suppress(Exception):
        close_session()


def _classified(error: BaseException) -> BaseException:
    """Return `Unusable` for what the library raises over an answer of the wrong kind."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError | HfHubHTTPError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "TooManyRedirects" in kinds:
        return Unusable("it redirects in circles")
    if kinds & {"DecodingError", "InvalidURL", "UnsupportedProtocol"}:
        return Unusable(outside.brief(str(error)))
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return Unusable("the file is not as long as announced")
    if isinstance(error, ValueError | TypeError | AttributeError | KeyError | RecursionError):
        return Unusable(f"the library cannot read it ({type(error).__name__})")
    return error


def retry_after(error: BaseException | None) -> int | None:
    """Return the seconds that the Hub asked to wait in the answer behind an error, if it did."""
    while error is not None:
        if isinstance(error, Busy):
            return error.wait_s
        wait = _seconds(getattr(error, "response", None))
        if wait is not None:
            return wait
        error = error.__cause__ or error.__context__
    return None


def _seconds(response: Any) -> int | None:
    """Return the Retry-After of an answer that refuses for now; None without one."""
    if getattr(response, "status_code", None) not in (429, 503):
        return None
    value = str(response.headers.get("Retry-After") or "").strip()
    return int(value) if value.isascii() and value.isdigit() and len(value) < 9 else None


def listing(repo: str, revision: str | None, progress: Progress) -> tuple[str, dict[str, int]]:
    """Return the commit and the size of every file at the repository's top; raises as `call`."""
    from urllib.parse import quote

    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    path = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{constants.ENDPOINT}/api/models/{repo}{path}"
    count = _Count()
    ask = functools.partial(_get, url, _LARGEST_ANSWER, count, params={"blobs": "true"})
    found = _json(call(ask, progress, count.total))
    commit, siblings = found.get("sha"), found.get("siblings")
    if not isinstance(commit, str) or not commit.isalnum() or not isinstance(siblings, list):
        raise Unusable("it does not list a commit and files")
    sizes = {}
    for file in siblings:
        name = file.get("rfilename") if isinstance(file, dict) else None
        size = file.get("size") if isinstance(file, dict) else None
        if not isinstance(name, str) or not isinstance(size, int | None) or (size or 0) < 0:
            raise Unusable("it lists a file without a name or a size")
        if "/" not in name:
            sizes[name] = size or 0
    return commit, sizes


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = outside.loads(data)
    except outside.Malformed as error:
        raise Unusable(f"it is not JSON ({outside.brief(str(error))})") from error
    if not isinstance(value, dict):
        raise Unusable("it is not a JSON object")
    return value


def headers(
    repo: str, commit: str, sizes: Mapping[str, int], progress: Progress
) -> dict[str, bytes]:
    """Return the safetensors headers (the JSON after the length) of files, read at once.

    ``sizes``: bytes of each file. Raises as `call`; `Unusable` also for a header that its file
    cannot hold.
    """
    from huggingface_hub import hf_hub_url

    urls = {file: hf_hub_url(repo, file, revision=commit) for file in sizes}
    count = _Count()
    files = {file: (urls[file], size) for file, size in sizes.items()}
    return call(lambda: _all(files, count), progress, count.total)


class _Count:
    """Bytes received by several threads."""

    def __init__(self) -> None:
        self.bytes = 0

    def total(self) -> int:
        return self.bytes


def _all(files: Mapping[str, tuple[str, int]], count: _Count) -> dict[str, bytes]:
    """Read headers in daemon threads: those of a pool would keep the process from ending."""
    found: dict[str, bytes] = {}
    errors: list[BaseException] = []
    left = list(files.items())
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left or errors:
                    return
                file, (url, size) = left.pop(0)
            try:
                header = _header(file, url, size, count)
            except BaseException as error:
                errors.append(error)
                return
            with lock:
                found[file] = header

    _join(threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(files))))
    if errors:
        raise errors[0]
    return {file: found[file] for file in files}


def _join(threads: Iterable[threading.Thread]) -> None:
    started = list(threads)
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def _header(file: str, url: str, size: int, count: _Count) -> bytes:
    if size < 8:
        raise Unusable(f"{file} is too small: it has {size:,} bytes")
    start = _get(url, FIRST_REQUEST + 1, count, f"bytes=0-{FIRST_REQUEST}", cut=True)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length == 0:
        raise Unusable(f"{file} does not begin with the length of its header")
    if length > MOST_HEADER:
        raise Unusable(f"the header of {file} is too big: {length:,} bytes")
    if length > size - 8:
        raise Unusable(f"{file} is truncated: its header takes {length:,} of {size:,} bytes")
    if length <= len(start) - 8:
        return start[8 : 8 + length]
    whole = _get(url, length, count, f"bytes=8-{length + 7}", cut=True)
    if len(whole) < length:
        raise Unusable(f"the header of {file} is cut off")
    return whole


def _get(
    url: str,
    most: int,
    count: _Count,
    part: str = "",
    *,
    cut: bool = False,
    params: dict[str, str] | None = None,
) -> bytes:
    """Return an answer's body; with ``cut`` no more than ``most`` bytes, else refuse more."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = (
        build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": part} if part else {})
    )
    body = bytearray()
    with get_session().stream(
        "GET", url, headers=wanted, params=params, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as answer:
        hf_raise_for_status(answer)
        if part and answer.status_code == 200 and not part.startswith("bytes=0-"):
            raise Unusable("it does not send parts of files")
        for piece in answer.iter_bytes(65536):
            body += piece
            count.bytes += len(piece)
            if len(body) > most or (cut and len(body) == most):
                break
    if len(body) > most and not cut:
        raise Unusable(f"it is longer than {most:,} bytes")
    return bytes(body[:most])
