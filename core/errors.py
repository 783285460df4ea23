"""One error tree; the same sentence on the command line and on the pages.

    DepthcutError            exit status 1
    ├── InputError           exit status 2: the caller can mend it
    │   ├── OptionError      a flag or field has a value that cannot be used
    │   ├── CheckpointError  a checkpoint is missing, damaged, or of an unsupported kind
    │   ├── DataError        text or score data is missing, too short, or not what it should be
    │   ├── PlanError        the blocks asked for cannot be chosen or dropped
    │   └── OutputError      the output folder exists, or cannot be written
    ├── RunError             exit status 1: the work itself failed
    │   ├── NotFiniteError   NaN or infinity in weights, activations or losses
    │   └── OutOfMemoryError the device is too small for what was asked
    └── Cancelled            exit status 130

Every error carries what is wrong (with the value) and a hint: what to do next.
"""

from __future__ import annotations


class DepthcutError(Exception):
    """Base of all expected failures; ``hint`` says what to do."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        """Store ``message`` (what is wrong, with the value) and ``hint`` (what to do)."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the one sentence shown everywhere: the message, then the hint."""
        return f"{self.message} {self.hint}".strip()


class InputError(DepthcutError):
    """The caller gave something that cannot be used."""

    exit_status = 2


class OptionError(InputError):
    """A flag or field has a value that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or of an unsupported kind."""


class DataError(InputError):
    """Text or score data is missing, too short, or not what it should be."""


class PlanError(InputError):
    """The blocks asked for cannot be chosen or dropped."""


class OutputError(InputError):
    """The output folder exists already, or cannot be written."""


class RunError(DepthcutError):
    """The work itself failed."""


class NotFiniteError(RunError):
    """NaN or infinity turned up in weights, activations or losses."""


class OutOfMemoryError(RunError):
    """The device has too little memory for what was asked."""


class Cancelled(DepthcutError):
    """The run was cancelled on request; what was complete is kept."""

    exit_status = 130
