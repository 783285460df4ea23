"""The process that imports the libraries and forks: ``python -m core.runs.warm_process``.

Arguments: the descriptor of the socket on which `core.runs.warm` asks, and the libraries.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
from typing import Any

from core import noise
from core.runs import warm

Env = dict[str, str]


def _serve(requests: socket.socket, before: Env, added: Env) -> list[str] | None:
    """Fork for each request; return None once nobody can ask, and its ``argv`` in a new process.

    ``before`` is the environment in which the libraries were imported, ``added`` what they set.
    """
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    ended: dict[int, tuple[int, int]] = {}
    """Descriptor that tells the end of a process -> its pid, and where its status is told."""
    asked = True
    while asked or ended:
        for ready, _ in poll.poll():
            if ready in ended:
                poll.unregister(ready)
                os.close(ready)
                pid, answer = ended.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # nobody waits for it
                    os.write(answer, code.to_bytes(warm.ANSWER_BYTES, "little", signed=True))
                os.close(answer)
                continue
            message, given, _, _ = socket.recv_fds(
                requests, warm.REQUEST_BYTES, warm.STREAMS + 2, socket.MSG_CMSG_CLOEXEC
            )
            if not message:
                asked = False
                poll.unregister(requests)
                continue
            pid = os.fork()
            if pid == 0:
                others = [fd for pair in ended.items() for fd in (pair[0], pair[1][1])]
                for descriptor in (requests.detach(), *others):
                    os.close(descriptor)
                return _become(json.loads(message), given, before, added)
            answer = given.pop(warm.STREAMS)
            for descriptor in given:
                os.close(descriptor)
            watch = os.pidfd_open(pid)
            ended[watch] = (pid, answer)
            poll.register(watch, select.POLLIN)
    return None


def _become(job: dict[str, Any], given: list[int], before: Env, added: Env) -> list[str]:
    """Turn a fork of the template into the process that was asked for; return its ``argv``."""
    *streams, answer, requests = given
    if job["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    warm.inherit(warm.Template(socket.socket(fileno=requests), before, added))
    os.environ.clear()
    os.environ.update(job["env"] | added)
    os.chdir(job["cwd"])
    try:
        os.write(answer, os.getpid().to_bytes(warm.ANSWER_BYTES, "little"))
    except OSError:  # who asked has gone
        os._exit(1)
    os.close(answer)
    return list(job["argv"])


def main() -> None:
    """Import the libraries, say so, and serve; in a new process, run what was asked for."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.set_inheritable(False)
    noise.silence()
    before = dict(os.environ)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        return
    gc.collect()
    gc.freeze()  # collections in the forks leave these objects, and so the shared memory, alone
    try:
        requests.send(b"1")
    except OSError:  # who started us has gone
        return
    added = {k: v for k, v in os.environ.items() if before.get(k) != v}
    argv = _serve(requests, before, added)
    if argv:
        sys.path[0] = os.getcwd()
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
