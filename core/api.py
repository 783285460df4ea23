"""Score, choose, prune and evaluate a transformers model that is in memory.

The functions behind the commands of the same names, for a notebook or a script::

    from core import api

    scores = api.score(model, tokenizer, texts, metrics=("ppl", "taylor"))
    plan = api.choose(scores, "taylor", ratio=0.2)
    api.prune(model, plan.drop)
    api.perplexity(model, tokenizer, text)

They give the numbers that ``importance``, ``plan``, ``prune`` and ``evaluate`` give for the same
model, text and options; docs/python.md has examples. Importing this module does not import torch.
Supported are the causal language models of transformers' LLaMA, Mistral, Qwen2 and Qwen3, on one
device, without quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from core.criteria import DEFAULT_METRICS, METRICS
from core.errors import DataError, OptionError
from core.prune import plan as planning
from core.prune.plan import Plan
from core.prune.score_results import BlockRow
from core.prune.scores import BlockScores

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Plan", "Scores", "choose", "perplexity", "prune", "score"]


@dataclass(frozen=True)
class Scores:
    """What `score` found; a lower score means "remove first" for every criterion."""

    metrics: tuple[str, ...]
    rows: tuple[BlockRow, ...]
    """One per block, as in blocks.csv: ppl, taylor, magnitude, block_influence, relative_update;
    None for what was not computed."""
    dense_ppl: float | None
    """Perplexity of the whole model on the rows; None without the metric ppl."""
    tokens: int
    """Predictions that a perplexity is the mean over."""
    angular: dict[tuple[int, int], float] = field(default_factory=dict)
    """(start, length) -> distance between the input of block start and of start + length."""
    greedy: tuple[int, ...] = ()
    """Blocks in the order in which sleb removed them."""
    sublayers: dict[tuple[int, str], float] = field(default_factory=dict)
    """(block, attention or mlp) -> perplexity without that part; of the metric sublayers."""
    parameters: int = 0
    """Parameters of the model; tied ones count once."""
    block_parameters: tuple[int, ...] = ()
    """Parameters of each block."""
    parts: tuple[dict[str, int], ...] = ()
    """Parameters of the attention and the mlp of each block."""
    neurons: tuple[tuple[int, int], ...] = ()
    """MLP neurons of each block, and parameters of one."""
    path: str = "the model in memory"

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.rows)

    def part_parameters(self, block: int, part: str) -> int:
        """Return the parameters of a block's attention or mlp."""
        return self.parts[block][part]

    def narrowing(self, block: int, neurons: int) -> int:
        """Return the parameters that go if a block's MLP keeps only ``neurons``."""
        now, each = self.neurons[block]
        return (now - neurons) * each

    def to_dict(self) -> dict[str, list[float | int | None]]:
        """Return one list per column of blocks.csv: ``{"block": [0, 1, ...], "ppl": [...]}``."""
        return {name: [getattr(row, name) for row in self.rows] for name in BlockRow.columns()}

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a DataFrame with the columns of blocks.csv."""
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    def block_scores(self) -> BlockScores:
        """Return the scores in the form in which plans read them."""
        from core.criteria import COLUMNS

        columns = {
            criterion: tuple(getattr(row, column) for row in self.rows)
            for column, criterion in COLUMNS.items()
        }
        return BlockScores(
            self.path, self.blocks, columns, self.angular, self.greedy, sublayers=self.sublayers
        )


@overload
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    metrics: Sequence[str] = ...,
    samples: int = ...,
    length: int = ...,
    seed: int = ...,
    rounds: int | None = ...,
) -> Scores: ...


@overload
def score(
    model: PreTrainedModel,
    *,
    rows: Sequence[Sequence[int]],
    metrics: Sequence[str] = ...,
    rounds: int | None = ...,
) -> Scores: ...


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] | None = None,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    samples: int = 10,
    length: int = 128,
    seed: int = 1234,
    rounds: int | None = None,
) -> Scores:
    """Score every block of ``model``.

    Args:
        model: It is not changed; it computes on its own device in its own dtype, and its gradients
            are not touched.
        tokenizer: Encodes ``texts``; not needed with ``rows``.
        texts: Calibration texts. ``samples`` random crops of ``length`` tokens are drawn with
            ``seed``, as by the importance command; short texts are joined if too few are long.
        rows: Token ids instead of texts, each a list of at least two.
        metrics: Names of criteria: ppl, taylor, magnitude, block-influence, angular,
            relative-update, sleb, kl, sublayers.
        samples: Calibration rows.
        length: Tokens per row.
        seed: Seed of rows and crops.
        rounds: Number of blocks that sleb removes. Default: half of them.

    Raises:
        OptionError: An unknown metric, or neither or both of ``texts`` and ``rows``.
        DataError: Too little text, or a token id that the model does not have.
        CheckpointError: The model's family is not supported, or it is quantized.
        NotFiniteError: NaN or infinity in hidden states or gradients.
    """
    from core.data.calibration import sample_texts
    from core.importance import scoring
    from core.importance.branches import make_batch
    from core.model.blocks import BlockView
    from core.model.cutting import refuse_quantized

    refuse_quantized(model)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise OptionError(
            f"There is no metric '{unknown[0]}'.", f"Choose from: {', '.join(METRICS)}."
        )
    if (texts is None) == (rows is None):
        raise OptionError(
            "Neither texts nor rows are given." if rows is None else "Texts and rows are given.",
            "Give either texts with a tokenizer, or rows of token ids.",
        )
    if texts is not None:
        if tokenizer is None:
            raise OptionError("Texts need a tokenizer.", "Give one, or rows of token ids.")
        drawn = sample_texts(list(texts), tokenizer, samples, length, seed, name="texts")
        rows = drawn.rows
    assert rows is not None
    if not rows or any(len(row) < 2 for row in rows):
        raise DataError("A row has fewer than two tokens.", "A row needs something to predict.")
    view = BlockView(model)
    was_training = model.training
    try:
        model.eval()
        batch = make_batch([list(row) for row in rows], view)
        found = scoring.compute(view, batch, metrics, rounds=rounds)
    finally:
        model.train(was_training)
    return Scores(
        metrics=tuple(metrics),
        rows=tuple(found.block_rows()),
        dense_ppl=found.dense_ppl,
        tokens=batch.predictions,
        angular={(row.start, row.length): row.distance for row in found.angular_rows()},
        greedy=tuple(row.block for row in found.greedy_rows()),
        sublayers={(block, part): ppl for block, part, ppl in found.sublayers or ()},
        parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=tuple(_count(b) for b in view.blocks),
        parts=tuple({"attention": _count(b.self_attn), "mlp": _count(b.mlp)} for b in view.blocks),
        neurons=tuple(_neurons(block.mlp) for block in view.blocks),
    )


def _neurons(mlp: Any) -> tuple[int, int]:
    """Return an MLP's neurons, and the parameters of one; 0 and 0 if there is none."""
    if mlp is None:
        return 0, 0
    count, hidden = mlp.down_proj.in_features, mlp.down_proj.out_features
    return count, (_count(mlp.gate_proj) + _count(mlp.up_proj)) // count + hidden


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def choose(
    scores: Scores,
    criterion: str,
    *,
    count: int | None = None,
    ratio: float | None = None,
    params: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    seed: int = 1234,
) -> Plan:
    """Choose the blocks to remove; ``plan.drop`` has them in removal order.

    Exactly one of ``count``, ``ratio`` (share of all parameters) and ``params`` (target number of
    parameters) is given. By default the first 4 and last 2 blocks are protected (1 and 1 of fewer
    than 12). Raises `PlanError` if the request cannot be met, `DataError` if the scores lack the
    criterion.
    """
    return planning.choose(
        scores.block_scores(),
        criterion,
        count=count,
        ratio=ratio,
        params=params,
        info=scores,
        protect_first=protect_first,
        protect_last=protect_last,
        seed=seed,
    )


def prune(
    model: PreTrainedModel,
    drop: Sequence[int] = (),
    *,
    attention: Sequence[int] = (),
    mlp: Sequence[int] = (),
) -> PreTrainedModel:
    """Remove the blocks ``drop`` from ``model`` and return it: the same object, changed in place.

    The memory of the removed blocks is free once nothing else refers to them; prune
    ``copy.deepcopy(model)`` to keep the original. Blocks are renumbered from 0, and the
    configuration agrees, so that generation with a cache, ``save_pretrained`` and
    ``from_pretrained`` work. Tied weights stay tied.

    ``attention`` and ``mlp`` are blocks that stay, but lose their attention (and its key/value
    cache) or their MLP. What is saved then has the project's own modelling code beside it, and
    loads with ``trust_remote_code=True``.

    Raises `PlanError` for blocks that do not exist, are named twice, lack the part or are all there
    are, and `CheckpointError` for a quantized model or an unsupported family.
    """
    from core.checkpoint.drop import Removal
    from core.model.cutting import refuse_quantized, remove

    refuse_quantized(model)
    lists = [tuple(int(block) for block in blocks) for blocks in (drop, attention, mlp)]
    pruned: PreTrainedModel = remove(model, Removal(lists[0], lists[1], lists[2]))
    return pruned


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 128,
    bos: str = "once",
) -> float:
    """Return the perplexity of ``text``: exp of the mean loss over all predictions.

    The text is one stream of tokens, cut into windows of ``window`` tokens that do not overlap;
    the remainder is dropped. ``bos``: one at the start of the stream (``once``) or of every window
    (``window``), as for the evaluate command. Quantized models work too.

    Raises `DataError` if the text is shorter than one window, `NotFiniteError` for NaN or infinite
    losses.
    """
    from core.data.evaluation import evaluation_windows
    from core.evaluate.perplexity import window_losses

    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    bos_id: Any = tokenizer.bos_token_id
    was_training = model.training
    try:
        model.eval()
        return window_losses(model, evaluation_windows(ids, window, bos, bos_id)).ppl
    finally:
        model.train(was_training)
