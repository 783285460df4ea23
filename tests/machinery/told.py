"""Prints what its process is like, for tests that compare two ways of starting one."""

import gc
import json
import os
import signal
import sys
import threading
import time

if __name__ == "__main__":
    known = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD]
    told = {
        "argv": sys.argv[1:],
        "module": os.path.basename(sys.argv[0]) or sys.argv[0],
        "env": {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"},
        "cwd": os.getcwd(),
        "input": sys.stdin.read(),
        "leads": os.getsid(0) == os.getpid(),
        "signals": [str(signal.getsignal(number)).split(" at ")[0] for number in known],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "threads": threading.active_count(),
        "gc": gc.isenabled(),
        "umask": os.umask(0o22),
    }
    print(json.dumps(told))
    print("last", file=sys.stderr)
    if "--wait" in sys.argv:
        time.sleep(60)
    sys.exit(3)
