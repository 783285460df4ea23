"""One error tree; the same sentence on the command line and on the pages.

    DepthcutError            exit status 1
    ├── InputError           exit status 2: the caller can fix it
    │   ├── OptionError      a flag or field has an invalid value
    │   ├── CheckpointError  a checkpoint is missing, damaged or unsupported
    │   ├── DataError        text or score data is missing, too short, or malformed
    │   ├── PlanError        the requested blocks cannot be chosen or dropped
    │   ├── OutputError      the output folder exists, or cannot be written
    │   └── PlaceError       a place for runs is unknown, refuses, or lacks what runs need
    ├── RunError             exit status 1: the work itself failed
    │   ├── NotFiniteError   NaN or infinity in weights, activations or losses
    │   └── OutOfMemoryError the device has too little memory for the request
    ├── Unreachable          exit status 1: a place cannot be reached at the moment
    ├── HandedOver           exit status 0: other jobs do the rest of the work first
    └── Cancelled            exit status 130

Every error states what is wrong (with the value) and carries a hint: what to do next.
"""

from __future__ import annotations


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class DepthcutError(Exception):
    """Base of all expected failures; ``hint`` is what to do about it."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        """Store ``message`` (what is wrong, with the value) and ``hint`` (what to do).

        Names of files and arguments need not be Unicode; the texts are, so that they can be shown.
        """
        super().__init__(message)
        self.message = _shown(message)
        self.hint = _shown(hint)

    def __str__(self) -> str:
        """Return the one sentence shown everywhere: the message, then the hint."""
        return f"{self.message} {self.hint}".strip()


class InputError(DepthcutError):
    """The caller's input is invalid."""

    exit_status = 2


class OptionError(InputError):
    """A flag or field has an invalid value."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or unsupported."""


class DataError(InputError):
    """Text or score data is missing, too short, or malformed."""


class PlanError(InputError):
    """The requested blocks cannot be chosen or dropped."""


class OutputError(InputError):
    """The output folder already exists, or cannot be written."""


class PlaceError(InputError):
    """A place for runs is unknown, refuses, or lacks what runs need."""


class Unreachable(DepthcutError):
    """A place cannot be reached at the moment; trying again later may help."""


class RunError(DepthcutError):
    """The work itself failed."""


class NotFiniteError(RunError):
    """Weights, activations or losses contain NaN or infinity."""


class OutOfMemoryError(RunError):
    """The device has too little memory for the request."""


class HandedOver(DepthcutError):
    """A recipe waits for steps that other jobs carry out; it continues in a later job."""

    exit_status = 0


class Cancelled(DepthcutError):
    """The run was cancelled on request; completed results are kept."""

    exit_status = 130
