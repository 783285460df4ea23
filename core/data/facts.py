"""What a result records about its text, besides which it was."""

from __future__ import annotations

from dataclasses import dataclass

UNFIT = 0.05
"""Share of unknown and byte tokens from which a warning is given. Ordinary text has almost none;
WikiText-2, in which rare words are written as ``<unk>``, up to 0.03."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """How the rows or windows of one text were obtained."""

    joined: bool = False
    """Whether rows of the source were concatenated."""
    skipped: int = 0
    """Rows without usable text, among those read."""
    pool: int | None = None
    """Rows that were sampled from, if the source has more than that."""
    chat_template: bool = False
    """Whether chat and instruction rows were written with the tokenizer's chat template."""
    refused: int = 0
    """Rows that the chat template did not accept."""
    refusal: str = ""
    """Its reason for the first of them."""
    unfit: float | None = None
    """Share of tokens that are unknown or single bytes; None if it was not counted."""

    @property
    def warning(self) -> str:
        """A sentence if text and tokenizer do not fit, else an empty string."""
        if self.unfit is None or self.unfit < UNFIT:
            return ""
        return (
            f"The tokenizer does not fit this text: {self.unfit:.0%} of its tokens are unknown or "
            "single bytes. Results on such text say little about the model."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the log and the pages: what was skipped, joined or left unread."""
        found = []
        if self.skipped:
            rows = "row has" if self.skipped == 1 else "rows have"
            found.append(f"{self.skipped:,} {rows} no usable text: skipped.")
        if self.chat_template:
            found.append("Written with the tokenizer's chat template (--chat-template).")
        if self.refused:
            rows = "1 row is" if self.refused == 1 else f"{self.refused:,} rows are"
            found.append(f"{rows} skipped. {self.refusal}")
        if self.joined:
            found.append("Rows were joined (--join).")
        if self.pool is not None:
            found.append(f"Sampled from the first {self.pool:,} rows of a larger source.")
        return (*found, *filter(None, [self.warning]))
