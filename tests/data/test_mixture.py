"""Mixtures: the shares that were asked for, streams that repeat nothing too early, and any epoch without the others."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from posttrain.config import SourceConfig
from posttrain.data.mixture import Mixture, epoch_counts, epoch_use
from posttrain.data.samples import sample_table
from posttrain.errors import UserErrors
from tests.data.fake_caches import distinct, fake_cache


def sources(*settings: tuple[float | None, int]) -> list[SourceConfig]:
    return [SourceConfig(path="a", weight=weight, repeat=repeat) for weight, repeat in settings]


# ---- how many -------------------------------------------------------------------------------------------------------


def test_without_weights_every_source_is_used_whole():
    assert epoch_counts([10, 3, 7], sources((None, 1), (None, 4), (None, 2))) == (10, 12, 14)


@pytest.mark.parametrize(
    ("sizes", "settings", "counts"),
    [
        ([100, 1000], [(1.0, 1), (1.0, 1)], (100, 100)),
        ([100, 1000], [(1.0, 3), (1.0, 1)], (300, 300)),
        ([100, 1000], [(1.0, 50), (1.0, 1)], (1000, 1000)),
        ([100, 1000], [(0.1, 1), (1.0, 1)], (100, 1000)),
        ([300, 50], [(3.0, 1), (1.0, 1)], (151, 50)),  # 201 samples: 150.75 and 50.25
        ([300, 50], [(30.0, 1), (10.0, 1)], (151, 50)),  # weights are relative
        ([7], [(0.3, 1)], (7,)),
        ([7], [(0.3, 2)], (14,)),
    ],
)
def test_weights_are_shares_in_samples(sizes, settings, counts):
    assert epoch_counts(sizes, sources(*settings)) == counts


def test_an_epoch_is_as_large_as_the_passes_allow():
    """Against trying every size from above."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        count = int(rng.integers(1, 4))
        sizes = rng.integers(5, 40, count).tolist()
        settings = list(
            zip(rng.integers(1, 9, count).astype(float).tolist(), rng.integers(1, 4, count).tolist(), strict=True)
        )
        total_weight = sum(Fraction(weight) for weight, _ in settings)

        def rounded(n: int, total_weight: Fraction = total_weight, settings: list = settings) -> list[int]:
            return [floor(Fraction(weight) / total_weight * n + Fraction(1, 2)) for weight, _ in settings]

        most = [size * repeat for size, (_, repeat) in zip(sizes, settings, strict=True)]
        best = max(n for n in range(2000) if all(a <= b for a, b in zip(rounded(n), most, strict=True)))
        assert epoch_counts(sizes, sources(*settings)) == tuple(rounded(best))


def test_a_share_of_no_sample_is_refused():
    with pytest.raises(UserErrors) as caught:
        epoch_counts([500, 100, 500], sources((0.001, 1), (1.0, 2), (0.0002, 1)))
    assert list(caught.value.problems) == [
        f"data.train.{index}.weight = {weight}: an epoch of 200 samples would have none of this source; raise the "
        "weight, or data.train.1.repeat, which bounds the epoch"
        for index, weight in ((0, 0.001), (2, 0.0002))
    ]


def test_weights_for_some_sources_only_mean_nothing():
    with pytest.raises(ValueError, match="of every source, or of none"):
        epoch_counts([5, 5], sources((1.0, 1), (None, 1)))


# ---- which, and in what order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(7, 40, 3), (10, 4, 25), (30, 13, 1), (10, 13, 5)])
def test_a_stream_goes_on_and_repeats_nothing_before_everything_was_seen(counts):
    sizes = (10, 13, 5)
    mixture = Mixture(sizes, counts, seed=3)
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        first = sum(sizes[:source])
        epochs = [mixture.draws(source, epoch).tolist() for epoch in range(60)]
        assert all(len(draws) == count for draws in epochs)
        stream = [sample for draws in epochs for sample in draws]
        passes = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        assert all(sorted(one) == list(range(first, first + size)) for one in passes)
        assert len(set(map(tuple, passes))) == len(passes) or size == 5


def test_any_epoch_is_known_without_the_others():
    sizes, counts = (100, 37), (30, 80)
    running = Mixture(sizes, counts, seed=1)
    orders = [running.order(epoch) for epoch in range(12)]
    for epoch in (11, 0, 5, 6, 4):
        fresh = Mixture(sizes, counts, seed=1).order(epoch)
        np.testing.assert_array_equal(fresh, orders[epoch])
        np.testing.assert_array_equal(running.order(epoch), orders[epoch])  # going back, too
    assert Mixture(sizes, counts, seed=2).order(3).tolist() != orders[3].tolist()


def test_an_epoch_interleaves_its_sources_and_keeps_their_streams():
    mixture = Mixture((1000, 5000, 200), (2000, 3000, 1000), seed=0)
    order = mixture.order(1)
    assert order.dtype == np.int32
    source = np.searchsorted([1000, 6000], order, side="right")
    for number in range(3):
        np.testing.assert_array_equal(order[source == number], mixture.draws(number, 1))
    for part in np.array_split(source, 10):  # everywhere in the proportion of the whole
        np.testing.assert_allclose(np.bincount(part, minlength=3) / len(part), [1 / 3, 1 / 2, 1 / 6], atol=0.08)
    assert mixture.order(0).tolist() != order.tolist()


def test_an_epoch_of_every_sample_once_needs_no_order():
    assert Mixture((5, 6), (5, 6), seed=0).order(3) is None


def test_the_order_of_a_mixture_is_pinned():
    """A run that resumes under a later version reads on in the order it began with."""
    assert Mixture((4, 6), (3, 4), seed=7).order(2).tolist() == [0, 5, 6, 1, 4, 0, 7]


def test_what_an_epoch_uses_is_told():
    lengths = np.random.default_rng(0).integers(2, 30, 60).tolist()
    samples = [sample for i, n in enumerate(lengths) for sample in distinct(1, 100 * i, n)]
    config = {f"data.train.{i}": SourceConfig(path="a") for i in range(3)}
    parts = (samples[:10], samples[10:50], samples[50:])
    caches = {key: [fake_cache("x", part)] for key, part in zip(config, parts, strict=True)}
    table, _ = sample_table(caches, config, max_length=100, truncation="drop", seed=0)
    mixture = Mixture((10, 40, 10), (25, 15, 10), seed=0)
    uses = epoch_use(table, mixture)
    order = mixture.order(0)
    for number, (use, first, end) in enumerate(zip(uses, (0, 10, 50), (10, 50, 60), strict=True)):
        drawn = order[(order >= first) & (order < end)]
        assert (use.available, use.samples) == (end - first, len(drawn)) == (mixture.sizes[number], len(drawn))
        assert use.tokens == sum(lengths[sample] for sample in drawn)
        assert use.trained_tokens == sum(lengths[sample] - 1 for sample in drawn)
    assert [use.passes for use in uses] == [2.5, 0.375, 1.0]
    assert [use.sample_share for use in uses] == [0.5, 0.3, 0.2]
    total = sum(lengths[sample] for sample in order)
    assert [use.token_share for use in uses] == pytest.approx([use.tokens / total for use in uses])
    assert sum(use.trained_share for use in uses) == pytest.approx(1.0)
