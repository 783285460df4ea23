"""Shares of what retraining brought back, by loss and by KL, and when a gain is adaptation."""

import pytest

from core.retrain import shares
from core.retrain.results import Heldout, Measure, Summary
from core.retrain.shares import Share

SUMMARY = Summary(recovered=0.49, recovered_kl=-0.06, heldout=Heldout(source="text/c4.jsonl"))


def measured(source, measure, dense, before, after):
    return Measure(source=source, measure=measure, dense=dense, before=before, after=after)


def test_every_text_has_both_shares():
    table = [
        measured("held out", "loss", 3.0, 4.0, 3.5),
        measured("held out", "kl", 0.0, 0.5, 0.53),
        measured("in/boolq.jsonl", "loss", 2.0, 3.0, 2.6),
        measured("in/boolq.jsonl", "kl", 0.0, 0.5, 0.45),
        measured("stories", "accuracy", 0.9, 0.5, 0.6),
        measured("tiny", "loss", 2.0, 2.01, 2.0),
        measured("broken", "loss", None, 3.0, 2.0),
    ]
    held, other = shares.shares(SUMMARY, table)
    assert held == Share("text/c4.jsonl", 0.49, -0.06, is_held_out=True)
    assert other.source == "in/boolq.jsonl"
    assert (other.by_loss, other.by_kl) == (pytest.approx(0.4), pytest.approx(0.1))
    told = shares.sentence((held, other))
    assert told.startswith(
        "Retraining recovered 49% of the loss gap and -6% of the KL to the dense model on held-out "
        "rows of c4.jsonl; 40% of the loss gap and 10% of the KL to the dense model on boolq.jsonl."
    )
    assert "closed less than the loss: part of the gain is adaptation" in told


def test_adaptation_is_only_said_where_it_is():
    near, far = Share("a", 0.30, 0.25), Share("b", 0.30, 0.10)
    assert (near.is_adaptation, far.is_adaptation) == (False, True)
    assert "adaptation" not in shares.sentence((near,))
    assert "less than the loss on b: part of" in shares.sentence((near, far))
    assert not Share("a", 0.9).is_adaptation  # the KL is not known
    assert not Share("a", -0.1, -0.5).is_adaptation  # nothing was gained
    assert shares.sentence(()) == ""


def test_the_kl_of_the_held_out_rows_may_come_from_the_table():
    bare = Summary(recovered=0.5, heldout=Heldout(source="x"))
    (found,) = shares.shares(bare, [measured("held out", "kl", 0.0, 0.4, 0.3)])
    assert (found.by_loss, found.by_kl) == (0.5, pytest.approx(0.25))
    assert shares.shares(Summary(), []) == ()


def test_a_share_between_perplexities_is_one_of_losses():
    found = shares.between("english", 2.0, 3.0, 2.25)
    assert found == Share("english", pytest.approx(0.75))
    assert shares.between("english", 2.0, 2.01, 2.0) is None
