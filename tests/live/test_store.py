"""Models within a budget: least recently used out first, and memory that comes back."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
from live_helpers import CPU

from core.errors import OutOfMemoryError
from core.live.store import Store


def test_least_recently_used_goes_first(tiny_dir):
    names = [str(tiny_dir(v)) for v in ("mha", "gqa", "tied")]
    weights = [Store(CPU, "float32", 100).get(n).weight_bytes / 2**20 for n in names]
    store = Store(CPU, "float32", sum(weights) - 0.01)
    first = weakref.ref(store.get(names[0]).view.model)
    second = weakref.ref(store.get(names[1]).view.model)
    store.get(names[0])
    store.get(names[2])
    gc.collect()
    assert store.names == [names[0], names[2]]
    assert first() is not None
    assert second() is None
    assert store.used_mib <= store.budget_mib
    store.clear()
    gc.collect()
    assert first() is None
    assert store.used_mib == 0


def test_states_make_room_before_models_do(tiny_dir, text):
    from core.live.protocol import Perplexity

    one, two = str(tiny_dir("mha")), str(tiny_dir("gqa"))
    store = Store(CPU, "float32", 100)
    held = store.get(one)
    ask = Perplexity(checkpoint=one, source=str(text), window=24)
    judged, windows, total = held.text(ask, 2**30)
    wanted = judged.answer(()).ppl
    assert judged.windows == windows == total
    assert held.bytes > held.weight_bytes
    needed = Store(CPU, "float32", 100).get(two).weight_bytes
    store.budget_mib = (held.bytes + needed) / 2**20 - 0.01
    store.get(two)
    assert store.names == [one, two]
    assert held.bytes == held.weight_bytes
    assert held.text(ask, 0)[0].answer((1,)).ppl != wanted


def test_a_model_beyond_the_budget_is_told_in_one_sentence(tiny_gqa):
    with pytest.raises(OutOfMemoryError, match=r"needs .* MiB, but .* may use only 0\."):
        Store(CPU, "float32", 0.01).get(str(tiny_gqa))


def test_a_changed_checkpoint_is_loaded_anew(tmp_path):
    import tiny

    folder = tiny.write(tmp_path / "m", "gqa", seed=0)
    store = Store(CPU, "float32", 100)
    before = store.get(str(folder))
    assert store.get(str(folder)) is before
    tiny.write(folder, "gqa", seed=1)
    after = store.get(str(folder))
    assert after is not before
    assert store.names == [str(folder)]
    assert before.info.key != after.info.key


def test_a_quick_question_shares_the_text_and_takes_what_the_device_does_at_once(
    tiny_dir, text, monkeypatch
):
    from core.live import store as stores
    from core.live.protocol import Perplexity

    held = Store(CPU, "float32", 100).get(str(tiny_dir("gqa")))
    ask = {"checkpoint": "x", "source": str(text), "window": 24}
    monkeypatch.setattr(stores, "QUICK_TOKENS", 1)
    monkeypatch.setattr(stores, "QUICK_SMALL", 0)
    held.tokens_per_s = 100 / stores.QUICK_S
    judged, windows, total = held.text(Perplexity(**ask, quick=True), 2**30)
    assert windows == 100 // 24
    assert held.text(Perplexity(**ask), 2**30) == (judged, total, total)
    assert held.text(Perplexity(**ask, tokens=50), 2**30) == (judged, 2, total)
    assert total > windows
    assert len(held.texts) == 1
    rows = held.text(Perplexity(**{**ask, "window": 10}, samples=3, quick=True), 2**30)
    assert rows[1:] == (3, 3)


def test_windows_that_are_spread_are_the_texts_own_and_more_of_them_go_on_from_fewer(
    tiny_dir, text, monkeypatch
):
    from live_helpers import naive_perplexity, windows_of

    from core.live import store as stores
    from core.live.protocol import Perplexity

    folder = tiny_dir("gqa")
    held = Store(CPU, "float32", 100).get(str(folder))
    windows = windows_of(folder, text, 24, "once")
    monkeypatch.setattr(stores, "SMALL", 0)
    monkeypatch.setattr(stores, "QUICK_SMALL", 0)
    for name, value in (("QUICK_TOKENS", 4 * 24), ("LEAST_TOKENS", 9 * 24)):
        monkeypatch.setattr(stores, name, value)
    held.tokens_per_s = 1.0
    ask = {"checkpoint": "x", "source": str(text), "window": 24, "spread": True}
    order = stores.spread(len(windows))
    assert sorted(order) == list(range(len(windows)))
    assert max(b - a for a, b in itertools.pairwise(sorted(order[:8]))) <= 2 * len(windows) / 8
    first, few, total = held.text(Perplexity(**ask, quick=True), 2**30)
    more = held.text(Perplexity(**ask), 2**30)
    assert (few, more, total) == (4, (first, 9, len(windows)), len(windows))
    for count in (few, 9):
        wanted = naive_perplexity(folder, [windows[at] for at in order[:count]])
        assert first.answer((), windows=count).ppl == pytest.approx(wanted, rel=1e-5)


def test_the_rate_decides_how_much_is_evaluated_and_is_measured_once(tiny_dir, monkeypatch):
    from core.live import store as stores

    held = Store(CPU, "float32", 100).get(str(tiny_dir("gqa")))
    tokens = held.tokens_in(2.0, 1)
    assert tokens == int(2 * held.tokens_per_s) > 100
    monkeypatch.setattr(stores.Loaded, "_rate", lambda _: 1.0)
    assert held.tokens_in(2.0, 1) == tokens
    assert held.tokens_in(0.0, 77) == 77
    assert held.tokens_in(0.0, 77, 2e3 * held.info.parameters) == 1000


def test_states_of_a_text_are_bounded_on_a_cpu(tiny_dir, monkeypatch):
    from core.live import store as stores

    held = Store(CPU, "float32", 100).get(str(tiny_dir("gqa")))
    assert held._room(2.0**40) == stores.STATES_MIB * 2**20
    monkeypatch.setattr(stores, "STATES_MIB", 0)
    assert held._room(2.0**40) == held.weight_bytes
