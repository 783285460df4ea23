"""Messages that importing transformers prints if torchao is installed, and that mean nothing here.

torchao reports each of its compiled extensions that was built for another torch, Python or GPU,
and uses torch's own kernels instead; torch reports a deprecated call that torchao makes.
"""

from __future__ import annotations

import logging

LOGGERS = ("torchao", "torch.utils._pytree")


def silence() -> None:
    """Show only errors of these two libraries; called first in every process of ours.

    Importing ``core`` does not do this, so that a program that uses it keeps its own logging.
    """
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
