"""Run a program at a place and copy files there and back: here, or with the stock ssh and rsync.

Host keys are always checked and no password is ever asked for or stored: ssh uses the keys, the
agent and the configuration of the user. Whatever ssh says is turned into one sentence.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from core.errors import DepthcutError, PlaceError, Unreachable
from core.places.place import Place

CONNECT_S = 10
ANSWER_S = 120.0
"""How long a single question may take."""
LOST = (10, 12, 30, 35)
"""Exit statuses of rsync for a connection that broke."""
NOT_FOUND = 127
FROM_SSH = 255
NEVER_COPIED = (".run", ".*.tmp", "__pycache__")


class Shell(Protocol):
    """What it takes to work at a place."""

    def argv(self, words: Sequence[str]) -> list[str]:
        """Return the command here that runs ``words`` there."""

    def ask(self, words: Sequence[str], given: bytes = b"", seconds: float = ANSWER_S) -> bytes:
        """Run ``words`` there with ``given`` as its input and return its output.

        Raises `Unreachable`, or `PlaceError` with the program's last line if it failed.
        """

    def problem(self, status: int, told: str) -> DepthcutError:
        """Return the error for a program there that ended with ``status``, having ``told`` this."""


def of(place: Place) -> Here | Ssh:
    """Return what works at a place."""
    return Ssh(place) if place.is_remote else Here(place)


class Here:
    """This machine."""

    def __init__(self, place: Place) -> None:
        """Work at ``place``, which shares this machine's files."""
        self.place = place

    def argv(self, words: Sequence[str]) -> list[str]:
        """Return ``words``."""
        return list(words)

    def ask(self, words: Sequence[str], given: bytes = b"", seconds: float = ANSWER_S) -> bytes:
        """Run a program; see `Shell.ask`."""
        return _ask(self, words, given, seconds)

    def problem(self, status: int, told: str) -> DepthcutError:
        """Return the error for a program that failed."""
        return PlaceError(f"{self.place.name}: {last_line(told) or f'exit status {status}'}.")


class Ssh:
    """Another machine, through the stock ssh."""

    def __init__(self, place: Place) -> None:
        """Connect to ``place.host``."""
        self.place = place

    def _ssh(self) -> list[str]:
        """Return ssh with its options, without host and command."""
        place, options = self.place, dict(_OPTIONS)
        if place.known_hosts:
            options["UserKnownHostsFile"] = os.path.expanduser(place.known_hosts)
        if place.identity:
            options["IdentitiesOnly"] = "yes"
        words = ["ssh", "-T"]
        for key, value in options.items():
            words += ["-o", f'{key}="{value}"' if " " in value else f"{key}={value}"]
        if place.port:
            words += ["-p", str(place.port)]
        if place.identity:
            words += ["-i", os.path.expanduser(place.identity)]
        return words

    def argv(self, words: Sequence[str]) -> list[str]:
        """Return the ssh command; a word that begins with ``~/`` is below the home there."""
        line = " ".join(map(_quoted, words))
        return [*self._ssh(), self.place.address, "--", line]

    def ask(self, words: Sequence[str], given: bytes = b"", seconds: float = ANSWER_S) -> bytes:
        """Run a program there; see `Shell.ask`."""
        return _ask(self, words, given, seconds)

    def push(self, source: Path, target: str, *, more: Sequence[str] = ()) -> None:
        """Copy a file to ``target``, or a folder's content into it; what is there is not resent.

        Links are followed: a checkpoint in a cache is a folder of links.
        """
        inside = f"{source}/" if source.is_dir() else str(source)
        end = "/" if source.is_dir() else ""
        skip = [f"--exclude={name}" for name in NEVER_COPIED] if source.is_dir() else []
        self._rsync(["-L", *skip, *more, inside, f"{self._host}:{target}{end}"])

    def pull(self, source: str, target: Path, *, more: Sequence[str] = ()) -> None:
        """Copy a folder's content from there into ``target``; what is here is not sent again."""
        self._rsync([*more, f"{self._host}:{source}/", f"{target}/"])

    @property
    def _host(self) -> str:
        return self.place.address if ":" not in self.place.host else f"[{self.place.address}]"

    def _rsync(self, words: Sequence[str]) -> None:
        if not shutil.which("rsync"):
            raise PlaceError(
                f"rsync is not installed here, but runs at {self.place.name} need it.",
                "Install rsync on both machines.",
            )
        remote = shlex.join(self._ssh())
        # -s: names with spaces arrive as they are, also with an older rsync at the other end
        line = ["rsync", "-rtp", "-s", "--partial", "--timeout=120", "-e", remote, *words]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            told = done.stderr.decode(errors="replace")
            raise self._copying(done.returncode, told)

    def _copying(self, status: int, told: str) -> DepthcutError:
        name, place = self.place.name, self.place
        if status == FROM_SSH or _refused(told):
            return self.problem(FROM_SSH, told)
        if status in LOST and "command not found" not in told:
            return Unreachable(f"The connection to {name} ({place.host}) broke while copying.")
        if status == NOT_FOUND or "command not found" in told:
            return PlaceError(f"rsync is not installed at {name}.", "Install it there.")
        if "No space left" in told:
            return PlaceError(f"No disk space is left for copying to or from {name}.", "Free some.")
        return PlaceError(f"Copying to or from {name} failed: {_reason(told)}.")

    def problem(self, status: int, told: str) -> DepthcutError:
        """Return the error for an ssh that failed, or a program there that did."""
        place = self.place
        where = f"{place.name} ({place.host}{f', port {place.port}' if place.port else ''})"
        if "IDENTIFICATION HAS CHANGED" in told:
            return PlaceError(
                f"The host key of {where} has changed: another machine may be answering.",
                "If the change is known, remove the old key with ssh-keygen -R and connect once.",
            )
        if "Host key verification failed" in told or "host key is known for" in told:
            return PlaceError(
                f"The host key of {where} is not known here.",
                f"Connect once with: ssh {place.address}. Compare the fingerprint and accept it.",
            )
        if "Could not resolve hostname" in told:
            return PlaceError(f"No machine named {place.host} is known.", "Check the place's host.")
        if "Permission denied" in told and status == FROM_SSH:
            return PlaceError(
                f"{where} did not accept the login: {_reason(told)}.",
                "Set up a key without a password, or one in ssh-agent; passwords are never asked.",
            )
        if "Too many authentication failures" in told or "Bad owner or permissions" in told:
            return PlaceError(f"{where} did not accept the login: {_reason(told)}.")
        if "Identity file" in told and "not accessible" in told and status == FROM_SSH:
            return PlaceError(f"The key {place.identity} of {where} cannot be read.")
        if status == FROM_SSH:
            return Unreachable(
                f"{where} cannot be reached: {_reason(told)}.",
                "Check that the machine is on and that ssh reaches it from here.",
            )
        return PlaceError(f"{place.name}: {_reason(told) or f'exit status {status}'}.")


_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",
    "ConnectTimeout": str(CONNECT_S),
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ForwardAgent": "no",
    "ClearAllForwardings": "yes",
    "LogLevel": "ERROR",
}


def _ask(shell: Shell, words: Sequence[str], given: bytes, seconds: float) -> bytes:
    line = shell.argv(words)
    try:
        done = subprocess.run(line, input=given, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"No answer within {seconds:g} s.", "Try again later.") from None
    except OSError as error:
        raise PlaceError(f"Cannot start {line[0]}: {error.strerror}.", "Install it.") from error
    if done.returncode:
        raise shell.problem(done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout


def _quoted(word: str) -> str:
    """Return a word for a shell there; ``~/`` at its beginning stays the home folder."""
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") and word[2:] else shlex.quote(word)


def _refused(told: str) -> bool:
    """Whether what rsync told comes from ssh, which could not log in."""
    signs = ("Permission denied (", "Host key verification failed", "IDENTIFICATION HAS CHANGED")
    return any(sign in told for sign in (*signs, "Could not resolve", "Connection refused"))


def last_line(told: str) -> str:
    """Return the last line of what a program wrote, without its full stop."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:300] if lines else ""


def _reason(told: str) -> str:
    """Return the line that says why ssh or rsync failed."""
    lines = [line for line in told.splitlines() if line.strip() and "rsync error" not in line]
    lines = [line for line in lines if "unexpectedly closed" not in line] or lines
    return last_line("\n".join(lines)).removeprefix("ssh: ") or "no reason given"
