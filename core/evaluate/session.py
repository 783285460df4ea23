"""One checkpoint being evaluated: its files, tokenizer, device, and its earlier results."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from core.checkpoint import locate
from core.evaluate import estimate as work
from core.evaluate import known, suites, task_code
from core.evaluate.results import Asked, Skills, Text
from core.evaluate.spec import EvaluateSpec, check_model, check_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.evaluate.perplexity import WindowLosses
    from core.importance.capacity import Capacity
    from core.runs.run import Run
    from core.runs.workspace import RunRecord

Kind = TypeVar("Kind", bound=Text | Asked | Skills)


class Session:
    """One checkpoint being evaluated; the model is loaded once something must be measured."""

    def __init__(self, spec: EvaluateSpec, run: Run) -> None:
        """Resolve the checkpoint, and check the options against it."""
        from core.model import loading

        self.spec, self.run = spec, run
        checkpoint = locate.open(spec.checkpoint, run.progress, quantized=True)
        self.folder, self.info = checkpoint.folder, checkpoint.info
        check_model(spec, self.info)
        check_template(spec, self.folder)
        self.places = suites.find(suites.expand(spec.tasks), spec.task_dir) if spec.tasks else ()
        task_code.check(self.places, allowed=spec.allow_task_code)
        self.content = known.checkpoint_content(self.folder)
        self.earlier = None if spec.fresh else known.Earlier()
        self.tokenizer = loading.load_tokenizer(self.folder)
        self.prepared = loading.prepare(spec, checkpoint)
        if spec.tasks:  # which run on the whole model: said before any text is measured
            work.check_whole(spec, self.info, self.prepared.formats)
        self.device, self.dtype = self.prepared.device, self.prepared.dtype
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The loaded model, whole. Raises `OptionError` if it does not fit within the memory."""
        if self._model is None:
            work.check_whole(self.spec, self.info, self.prepared.formats)
            self._model = self.prepared.load(self.run.progress.log)
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether the whole model is in memory."""
        return self._model is not None

    def losses(self, windows: Sequence[Sequence[int]], label: str) -> WindowLosses:
        """Return the losses of windows: by the model in memory, or block by block.

        Raises what `core.evaluate.perplexity.window_losses` and `Capacity.check` raise.
        """
        from core.evaluate.perplexity import batch_of, shared, streamed_losses, window_losses
        from core.importance.capacity import view_of

        room = self.capacity(len(windows), len(windows[0]))
        batch, ranks = batch_of(self.device.type, len(windows[0])), self.run.ranks
        if self._model is not None or room.way == "fits" or self.info.quantization:
            how = partial(window_losses, self.model, progress=self.run.progress, label=label)
            return shared(how, windows, batch, ranks)
        view = view_of(self.prepared, room, self.run.progress.log)
        options: dict[str, Any] = {"progress": self.run.progress, "label": label}
        how = partial(streamed_losses, view, group=room.group, **options)
        found = shared(how, windows, batch, ranks)
        view.close()
        return found

    def capacity(self, windows: int, window: int) -> Capacity:
        """Return how the perplexity of ``windows`` windows runs within the memory."""
        return work.capacity(self.spec, self.info, self.prepared.formats, windows, window)

    def key(self, *libraries: str, **protocol: Any) -> str:
        """Return the key of a result under ``protocol``; versions of ``libraries`` count too."""
        return known.digest(
            {
                "checkpoint": self.content,
                "device": self.device.type,
                "dtype": str(self.dtype),
                "versions": known.versions(*libraries),
                **protocol,
            }
        )

    def known(self, key: str, kind: type[Kind], what: str) -> tuple[RunRecord, Kind] | None:
        """Return the earlier run with this result and its summary entry, and log it.

        All processes of a run go by what the first has found.
        """
        found = self.run.ranks.first(self.earlier.find(key, kind) if self.earlier else None)
        if found:
            self.run.progress.log(f"{what}: already measured in {found[0].id}.")
        return found

    def aside(self, key: str, kind: type[Kind], what: str) -> Kind | None:
        """Return what an unfinished run measured under ``key``, and log it.

        ``reused_from`` names that run; it is None if that is this run, started again.
        """
        found = self.run.ranks.first(self.earlier.aside(key, kind) if self.earlier else None)
        if not found:
            return None
        record, value = found
        self.run.progress.log(f"{what}: already measured in {record.id}, which did not finish.")
        own = record.path.resolve() == self.run.dir.resolve()
        return replace(value, reused_from=None if own else record.id)
