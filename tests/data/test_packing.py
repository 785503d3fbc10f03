"""The packing plan's laws: nothing lost, nothing too long, the same everywhere, well filled, and well mixed."""

import time

import numpy as np
import pytest

from posttrain.data.packing import MIN_WINDOW, Plan, plan_rows


def lognormal(count: int, mu: float, sigma: float, longest: int = 2048, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(mu, sigma, count)
    return np.clip(drawn, 2, longest).astype(np.int32)


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan.row(index).tolist() for index in range(plan.num_rows)]


def best_fit_decreasing_rows(lengths: list[int], row_length: int, max_segments: int | None) -> list[list[int]]:
    """The textbook algorithm, trying every open row for every sample."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [
            row for row in rows if sum(row) + length <= row_length and (max_segments is None or len(row) < max_segments)
        ]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("packing", "max_segments"), [(True, None), (True, 3), (True, 1), (False, None)])
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_every_sample_lies_in_one_row_and_no_row_is_too_full(count, packing, max_segments, shuffle):
    lengths = lognormal(count, 4.5, 1.0, longest=512)
    plan = plan_rows(
        lengths, 512, seed=3, epoch=1, packing=packing, shuffle=shuffle, window=MIN_WINDOW, max_segments=max_segments
    )
    rows = rows_of(plan)
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    assert all(row and sum(int(lengths[i]) for i in row) <= 512 for row in rows)
    assert all(len(row) <= (max_segments or count) for row in rows)
    assert plan.row_tokens.tolist() == [sum(int(lengths[i]) for i in row) for row in rows]
    assert plan.efficiency == pytest.approx(int(lengths.sum()) / (512 * len(rows)) if count else 1.0)
    if not packing:
        assert all(len(row) == 1 for row in rows)


@pytest.mark.parametrize("max_segments", [None, 2, 5])
def test_rows_are_those_of_best_fit_decreasing(max_segments):
    """The sums that the textbook algorithm gives; which of two equally full rows is taken does not change them."""
    for seed in range(20):
        lengths = lognormal(150, 3.5, 1.0, longest=100, seed=seed)
        expected = best_fit_decreasing_rows(lengths.tolist(), 100, max_segments)
        plan = plan_rows(lengths, 100, seed=seed, epoch=0, max_segments=max_segments)
        if max_segments is None:
            assert sorted(plan.row_tokens.tolist()) == sorted(map(sum, expected))
        else:  # equally full rows may then differ in the places they have left
            assert abs(plan.num_rows - len(expected)) <= 1


def test_the_plan_depends_on_seed_and_epoch_alone():
    lengths = lognormal(3000, 5.0, 1.0)
    plans = {(s, e): rows_of(plan_rows(lengths, 2048, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    again = plan_rows(lengths.astype(np.int64), 2048, seed=1, epoch=1)
    assert rows_of(again) == plans[1, 1]
    assert len({str(rows) for rows in plans.values()}) == 4
    unshuffled = [rows_of(plan_rows(lengths, 2048, seed=s, epoch=s, shuffle=False)) for s in (0, 1)]
    assert unshuffled[0] == unshuffled[1]


def test_the_order_of_the_data_is_pinned():
    """A run that resumes under a later version reads on in the order it began with."""
    plan = plan_rows(np.full(12, 4, np.int32), 8, seed=7, epoch=2, packing=False)
    assert plan.sample_ids.tolist() == [0, 3, 5, 1, 8, 11, 4, 10, 9, 2, 6, 7]
    packed = plan_rows(np.arange(1, 13, dtype=np.int32), 16, seed=7, epoch=2)
    assert rows_of(packed) == [[8, 6], [4, 10], [3, 11], [5, 9], [0, 1, 2, 7]]


@pytest.mark.parametrize("packing", [True, False])
def test_an_order_says_which_samples_are_planned_and_how_often(packing):
    lengths = lognormal(3000, 4.5, 1.0, longest=512)
    order = np.random.default_rng(1).integers(0, 2000, 7000).astype(np.int32)
    plan = plan_rows(lengths, 512, seed=3, epoch=1, order=order, packing=packing, window=MIN_WINDOW)
    rows = rows_of(plan)
    assert np.bincount(plan.sample_ids, minlength=3000).tolist() == np.bincount(order, minlength=3000).tolist()
    assert plan.row_tokens.tolist() == [sum(int(lengths[i]) for i in row) for row in rows]
    assert max(plan.row_tokens) <= 512
    if packing:  # samples stay near their place in the order
        in_order = plan_rows(lengths, 512, seed=3, epoch=1, order=order, shuffle=False, window=MIN_WINDOW)
        first = in_order.sample_ids[:2000]
        np.testing.assert_array_equal(np.isin(first, order[: 2000 + 2 * MIN_WINDOW]), True)
    else:
        assert plan.sample_ids.tolist() == order.tolist()


def test_an_order_is_what_the_shuffle_would_be():
    lengths = lognormal(3000, 5.0, 1.0)
    shuffled = plan_rows(lengths, 2048, seed=4, epoch=2)
    order = plan_rows(lengths, 2048, seed=4, epoch=2, packing=False).sample_ids
    again = plan_rows(lengths, 2048, seed=4, epoch=2, order=order)
    assert rows_of(again) == rows_of(shuffled)


@pytest.mark.parametrize("window", [1024, 4096])
@pytest.mark.parametrize(("mu", "sigma"), [(3.0, 1.0), (5.0, 1.0), (6.0, 1.0), (6.5, 0.8), (6.0, 0.5)])
def test_over_99_percent_of_the_places_are_filled(mu, sigma, window):
    lengths = lognormal(20_000, mu, sigma)
    plan = plan_rows(lengths, 2048, seed=0, epoch=0, window=window)
    assert plan.efficiency > 0.99


def test_few_samples_leave_under_2_percent_of_full_rows_empty():
    """Some hundred conversations: all rows but the emptiest, which holds what is left over."""
    lengths = lognormal(512, 5.0, 0.7, longest=1024)
    plan = plan_rows(lengths, 1024, seed=0, epoch=0)
    full = np.sort(plan.row_tokens)[1:]
    assert 1 - full.mean() / 1024 < 0.02


def test_rows_much_longer_than_samples_are_filled_too():
    """1024 short samples make a few such rows; the window is widened, so that the last row's gap is of no account."""
    plan = plan_rows(lognormal(100_000, 4.0, 1.0), 32_768, seed=0, epoch=0, window=1024)
    assert plan.efficiency > 0.985


def test_packing_keeps_the_shuffle():
    """Samples stay near their place in the permutation: a window to either side, and one more for those carried."""
    lengths = lognormal(20_000, 5.5, 1.0)
    plan = plan_rows(lengths, 2048, seed=0, epoch=0, shuffle=False, window=1024)
    places = np.empty(len(lengths), np.int64)
    places[plan.sample_ids] = np.arange(len(lengths))
    assert np.abs(places - np.arange(len(lengths))).max() <= 2 * 1024
    for row in rows_of(plan):
        assert max(row) // 1024 - min(row) // 1024 <= 1


def test_mixture_proportions_hold_all_along():
    """Two sources of very different lengths: every stretch of rows has both in the proportion of the whole."""
    rng = np.random.default_rng(5)
    is_long = rng.random(40_000) < 0.25
    lengths = np.where(is_long, lognormal(40_000, 6.8, 0.4), lognormal(40_000, 4.0, 0.6, seed=1)).astype(np.int32)
    plan = plan_rows(lengths, 2048, seed=0, epoch=0, window=1024)
    token_share = lengths[is_long].sum() / lengths.sum()
    for rows in np.array_split(np.arange(plan.num_rows), 10):
        samples = np.concatenate([plan.row(int(row)) for row in rows])
        share = lengths[samples][is_long[samples]].sum() / lengths[samples].sum()
        assert share == pytest.approx(token_share, abs=0.04)
        assert is_long[samples].mean() == pytest.approx(is_long.mean(), abs=0.03)


def test_rows_of_long_samples_do_not_come_first():
    lengths = lognormal(4096, 5.5, 1.0)
    plan = plan_rows(lengths, 2048, seed=0, epoch=0)
    longest = np.array([lengths[plan.row(row)].max() for row in range(plan.num_rows)])
    first, second = np.array_split(longest, 2)
    assert first.mean() == pytest.approx(second.mean(), rel=0.1)


def test_planning_is_fast():
    lengths = lognormal(300_000, 6.0, 1.0)
    start = time.process_time()
    plan_rows(lengths, 2048, seed=0, epoch=0)
    assert time.process_time() - start < 5.0  # about 0.3 s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 9]}, "sample 1 has 9 tokens; a row holds samples of 1 to 8"),
        ({"lengths": [3, 0]}, "sample 1 has 0 tokens"),
        ({"window": 100}, "at least 1024 samples, got 100"),
        ({"max_segments": 0}, "max_segments must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    lengths = np.array(arguments.pop("lengths", [3, 4]))
    with pytest.raises(ValueError, match=message):
        plan_rows(lengths, 8, **{"seed": 0, "epoch": 0, **arguments})


def test_rows_out_of_range_are_refused():
    plan = plan_rows(np.array([3, 4]), 8, seed=0, epoch=0)
    for index in (-1, plan.num_rows):
        with pytest.raises(IndexError, match=f"row {index} of a plan with 1 rows"):
            plan.row(index)
