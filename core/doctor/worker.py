"""Carries out checks in a separate process: ``python -m core.doctor.worker``.

One JSON request per line on standard input, one JSON answer per line on standard output; it exits
when standard input closes. Everything else that is printed goes to standard error. A check that
raises an error is reported, and so is whether the device still works after it: a failed kernel
leaves a CUDA process unusable, and the caller then starts another one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import IO, Any

from core import noise
from core.errors import DepthcutError, OptionError


def main() -> None:
    """Answer requests until standard input closes."""
    noise.silence()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    bench: Any = None
    while True:
        request = requests.get()
        if bench is None:
            bench = _answer(answers, functools.partial(_bench, request))
            if bench is None:
                return
            continue
        _answer(answers, functools.partial(_check, bench, request))


def _listen(requests: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)  # the caller has gone; a check in progress is of no use to anyone


def _bench(request: dict[str, Any]) -> Any:
    """Return the bench on the requested device; the answer tells about the machine."""
    from core.doctor.checks import Bench
    from core.model.precision import resolve_device

    return Bench(resolve_device(request["device"]), Path(request["folder"]))


def _check(bench: Any, request: dict[str, Any]) -> dict[str, Any]:
    from core.doctor import checks, facts, paths

    name, _, argument = str(request["check"]).partition(":")
    if name == "machine":
        return {"machine": facts.machine(bench.device)}
    function = getattr(paths, name, None) or getattr(checks, name)
    outcome = function(bench, *([argument] if argument else []))
    return {"agrees": bool(outcome.agrees), "text": outcome.text}


def _answer(answers: IO[str], work: Any) -> Any:
    """Do ``work`` and write its answer; return what it made, or None if it raised an error."""
    result: Any = None
    try:
        result = work()
        answer = result if isinstance(result, dict) else {"device": str(result.device)}
    except Exception as error:
        traceback.print_exc()
        known = isinstance(error, DepthcutError)
        said = " ".join(str(error).split())
        text = said if known else f"{type(error).__name__}: {said[:600]}"
        answer = {"error": text, "input": isinstance(error, OptionError), "works": _works()}
        if isinstance(error, DepthcutError):
            answer |= {"message": error.message, "hint": error.hint}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return result


def _works() -> bool:
    """Whether CUDA still computes, if it was used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    with contextlib.suppress(Exception):
        torch.zeros(8, device="cuda").sum().item()
        torch.cuda.synchronize()
        return True
    return False


if __name__ == "__main__":
    main()
