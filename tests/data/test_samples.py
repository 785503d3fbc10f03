"""What becomes of samples before they are packed: truncated, dropped for a reason, held out."""

from pathlib import Path

import numpy as np
import pytest

from posttrain.data.cache import TokenCache, open_cache
from posttrain.data.chat import Sample
from posttrain.data.samples import SampleTable, SourceStats, check_kept, sample_table, split_heldout
from posttrain.errors import UserError


def make_cache(directory: Path, name: str, weights: list[list[float]], first_token: int = 0) -> TokenCache:
    """Samples with these loss weights; tokens count up, so that each tells where it comes from."""
    samples = []
    for line, sample in enumerate(weights, 10):
        tokens = np.arange(first_token, first_token + len(sample), dtype=np.int32)
        samples.append(Sample(tokens, np.array(sample, np.float32), name, line))
        first_token += len(sample)
    return open_cache(name, {"name": name}, lambda writer: writer.append(samples, ()), cache_dir=str(directory))


def tokens_of(table: SampleTable) -> list[list[int]]:
    return [
        table.caches[source].tokens[start : start + length].tolist()
        for source, start, length in zip(table.source, table.starts, table.lengths, strict=True)
    ]


WEIGHTS = [
    [0, 1, 1],  # short enough
    [0, 1, 0, 0, 0, 1],  # trained at both ends
    [0, 0, 0, 0, 0, 1],  # trained at the end
    [0, 1, 1, 0, 0, 0],  # trained at the start
    [1, 0, 0],  # trained on its first token only, which nothing predicts
    [0, 0, 0, 0, 1],  # of the 4 last tokens, trained on the last
    [1],
    [0, 0, 1, 0, 0, 0],  # of the 4 last tokens, trained on the first only
]


@pytest.mark.parametrize(
    ("truncation", "kept", "trained", "dropped"),
    [
        ("keep_start", {10: [0, 1, 2], 11: [3, 4, 5, 6], 13: [15, 16, 17, 18], 17: [30, 31, 32, 33]}, [2, 1, 2, 1],
         {"without a token to train on": 2, "without a token to train on after truncation": 2}),
        ("keep_end", {10: [0, 1, 2], 11: [5, 6, 7, 8], 12: [11, 12, 13, 14], 15: [25, 26, 27, 28]}, [2, 1, 1, 1],
         {"without a token to train on": 2, "without a token to train on after truncation": 2}),
        ("drop", {10: [0, 1, 2]}, [2], {"without a token to train on": 2, "longer than data.max_length": 5}),
    ],
)  # fmt: skip
def test_truncation_policies(tmp_path, truncation, kept, trained, dropped):
    cache = make_cache(tmp_path, "a.jsonl", WEIGHTS)
    table, (stats,) = sample_table([cache], max_length=4, truncation=truncation)
    assert tokens_of(table) == list(kept.values())
    assert [table.where(index) for index in range(len(table))] == [f"a.jsonl:{line}" for line in kept]
    assert table.trained.tolist() == trained
    assert stats == SourceStats(
        path="a.jsonl",
        samples=len(kept),
        tokens=sum(map(len, kept.values())),
        trained_tokens=sum(trained),
        truncated=len(kept) - 1,
        dropped=dropped,
        bad_rows=0,
    )
    assert (table.num_tokens, table.num_trained_tokens) == (stats.tokens, stats.trained_tokens)


def test_several_sources_stay_apart(tmp_path):
    caches = [
        make_cache(tmp_path, "a.jsonl", [[0, 1], [], [0, 0], [0, 1, 1]]),
        make_cache(tmp_path, "empty.jsonl", []),
        make_cache(tmp_path, "b.jsonl", [[0, 0.5, 0.5], [0, 1]], first_token=100),
    ]
    table, stats = sample_table(caches, max_length=8, truncation="keep_start")
    assert tokens_of(table) == [[0, 1], [4, 5, 6], [100, 101, 102], [103, 104]]
    assert [table.where(index) for index in range(4)] == ["a.jsonl:10", "a.jsonl:13", "b.jsonl:10", "b.jsonl:11"]
    assert table.numbers().tolist() == [0, 3, 4, 5]
    assert [(source.path, source.samples) for source in stats] == [("a.jsonl", 2), ("empty.jsonl", 0), ("b.jsonl", 2)]
    assert stats[0].dropped == {"without a token to train on": 2}
    part = table.take(np.array([3, 1]))
    assert tokens_of(part) == [[103, 104], [4, 5, 6]]
    assert part.numbers().tolist() == [5, 3]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.0, 0), (100, 0.02, 2), (100, 0.255, 26), (10, 0.02, 1), (2, 0.01, 1), (1, 0.5, 0)],
)
def test_the_split_is_a_partition_of_the_wanted_size(tmp_path, count, fraction, expected):
    table, _ = sample_table([make_cache(tmp_path, "a", [[0, 1]] * count)], max_length=8, truncation="drop")
    train, heldout = split_heldout(table, fraction, seed=0)
    assert len(heldout) == expected
    assert sorted([*train, *heldout]) == list(range(count))
    assert train.tolist() == sorted(train) and heldout.tolist() == sorted(heldout)


def test_the_split_is_random_and_depends_on_the_seed_alone(tmp_path):
    table, _ = sample_table([make_cache(tmp_path, "a", [[0, 1]] * 1000)], max_length=8, truncation="drop")
    splits = [split_heldout(table, 0.3, seed=seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert np.mean(splits[0]) == pytest.approx(499.5, abs=50)


def test_another_max_length_holds_out_nearly_the_same_samples(tmp_path):
    rng = np.random.default_rng(0)
    weights = [[0.0] * int(n) + [1.0] for n in rng.integers(1, 40, 500)]
    cache = make_cache(tmp_path, "a", weights)
    heldout = []
    for max_length in (40, 35):
        table, _ = sample_table([cache], max_length=max_length, truncation="drop")
        heldout.append({table.where(int(index)) for index in split_heldout(table, 0.2, seed=0)[1]})
    still_there = {place for place in heldout[0] if len(weights[int(place.split(":")[1]) - 10]) <= 35}
    assert len(heldout[0]) - len(still_there) > 5
    assert len(still_there & heldout[1]) >= len(still_there) - 5


def stats(samples: int, dropped: dict[str, int], bad_rows: int = 0) -> SourceStats:
    return SourceStats("a", samples, 0, 0, 0, dropped, bad_rows)


def test_data_of_which_most_drops_out_are_refused():
    check_kept("data.train", [stats(5, {"without a token to train on": 5})])
    with pytest.raises(UserError) as caught:
        check_kept(
            "data.train",
            [stats(5, {"longer than data.max_length": 4}), stats(0, {"without a token to train on": 2})],
        )
    assert str(caught.value) == (
        "data.train: 6 of 11 samples drop out (4 longer than data.max_length, 2 without a token to train on); "
        "raise data.max_length, or set data.truncation to keep_start; check data.loss_on against the rows"
    )
    with pytest.raises(UserError, match=r"data\.heldout\.path: no sample is left: all 3 rows are bad"):
        check_kept("data.heldout.path", [stats(0, {}, bad_rows=3)])
