"""What becomes of samples before they are mixed: truncated, dropped for a reason, limited, without duplicates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from posttrain.config import SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.samples import SampleTable, first_alike, sample_table
from posttrain.data.stats import SourceStats
from tests.data.fake_caches import distinct, fake_cache


def counting(weights: Sequence[Sequence[float]], first: int = 0) -> list[tuple[list[int], Sequence[float]]]:
    """Samples with these loss weights; tokens count up, so that each tells where it comes from."""
    samples = []
    for sample in weights:
        samples.append((list(range(first, first + len(sample))), sample))
        first += len(sample)
    return samples


def tabulate(
    *sources: Sequence[TokenCache], limits: Sequence[int | None] | None = None, **options: Any
) -> tuple[SampleTable, tuple[SourceStats, ...]]:
    """The table of sources with these caches."""
    configs = {
        f"data.train.{i}": SourceConfig(path=f"source-{i}", limit=limits[i] if limits else None)
        for i in range(len(sources))
    }
    defaults = {"max_length": 8, "truncation": "keep_start", "seed": 0}
    return sample_table(dict(zip(configs, sources, strict=True)), configs, **{**defaults, **options})


def tokens_of(table: SampleTable) -> list[list[int]]:
    return [table.segments(sample)[0][0].tolist() for sample in range(len(table))]


def places(table: SampleTable) -> list[str]:
    return [table.where(sample) for sample in range(len(table))]


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
        ("keep_start", {1: [0, 1, 2], 2: [3, 4, 5, 6], 4: [15, 16, 17, 18], 8: [30, 31, 32, 33]}, [2, 1, 2, 1],
         {"without a token to train on": 2, "without a token to train on after truncation": 2}),
        ("keep_end", {1: [0, 1, 2], 2: [5, 6, 7, 8], 3: [11, 12, 13, 14], 6: [25, 26, 27, 28]}, [2, 1, 1, 1],
         {"without a token to train on": 2, "without a token to train on after truncation": 2}),
        ("drop", {1: [0, 1, 2]}, [2], {"without a token to train on": 2, "longer than data.max_length": 5}),
    ],
)  # fmt: skip
def test_truncation_policies(truncation, kept, trained, dropped):
    cache = fake_cache("a.jsonl", counting(WEIGHTS))
    table, (stats,) = tabulate([cache], max_length=4, truncation=truncation)
    assert tokens_of(table) == list(kept.values())
    weight_of = {
        token: weight for ids, weights in counting(WEIGHTS) for token, weight in zip(ids, weights, strict=True)
    }
    for sample in range(len(table)):
        ((ids, weights),) = table.segments(sample)
        assert weights.tolist() == [weight_of[token] for token in ids.tolist()]
    assert places(table) == [f"a.jsonl:{line}" for line in kept]
    assert table.trained.tolist() == trained
    assert table.truncated.tolist() == [len(WEIGHTS[line - 1]) > 4 for line in kept]
    assert stats == SourceStats(
        key="data.train.0",
        path="source-0",
        files=1,
        rows=8,
        left_out=0,
        bad_rows=0,
        samples=len(kept),
        tokens=sum(map(len, kept.values())),
        trained_tokens=sum(trained),
        truncated=len(kept) - 1,
        dropped=dropped,
        duplicates=0,
        notes={},
    )
    assert (table.num_tokens, table.num_trained_tokens) == (stats.tokens, stats.trained_tokens)


def test_sources_and_files_stay_apart_and_are_counted_together():
    first = [
        fake_cache("a.jsonl", counting([[0, 1], [0, 0], [0, 1, 1]]), [1, 3, 4], bad_rows=1, notes={"split": 2, "x": 1}),
        fake_cache("empty.jsonl", [], left_out=5),
        fake_cache("b.jsonl", counting([[0, 1], [0, 0], [0, 0]], first=50), bad_rows=2, notes={"split": 3}),
    ]
    second = [fake_cache("c.jsonl", counting([[0, 0.5, 0.5], [0, 1]], first=100))]
    table, stats = tabulate(first, second)
    assert tokens_of(table) == [[0, 1], [4, 5, 6], [50, 51], [100, 101, 102], [103, 104]]
    assert places(table) == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:1", "c.jsonl:1", "c.jsonl:2"]
    assert [table.source(sample) for sample in range(5)] == [0, 0, 0, 1, 1]
    assert table.source_bounds == (0, 3, 5)
    assert table.numbers().tolist() == [0, 2, 3, 6, 7]
    of_first, of_second = stats
    assert (of_first.files, of_first.rows, of_first.left_out, of_first.bad_rows) == (3, 14, 5, 3)
    assert (of_first.samples, of_first.tokens, of_first.trained_tokens) == (3, 7, 4)
    assert of_first.dropped == {"without a token to train on": 3}
    assert of_first.notes == {"split": 5, "x": 1}
    assert (of_second.key, of_second.path, of_second.samples, of_second.trained_tokens) == (
        *("data.train.1", "source-1"),
        *(2, 3),
    )
    part = table.take(np.array([False, True, False, False, True]))
    assert tokens_of(part) == [[4, 5, 6], [103, 104]]
    assert (part.source_bounds, part.numbers().tolist(), places(part)) == (
        (0, 1, 2),
        [2, 7],
        ["a.jsonl:4", "c.jsonl:2"],
    )


def test_a_source_without_samples_has_an_empty_place():
    table, stats = tabulate([fake_cache("a", distinct(2))], [fake_cache("b", [])], [fake_cache("c", distinct(1, 50))])
    assert table.source_bounds == (0, 2, 2, 3)
    assert [source.samples for source in stats] == [2, 0, 1]


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_limit_takes_a_random_part_of_its_source_over_all_files():
    files = [fake_cache("a", distinct(600)), fake_cache("b", distinct(400, 10_000))]
    other = [fake_cache("c", distinct(50, 20_000))]
    table, (stats, untouched) = tabulate(files, other, limits=[100, None])
    chosen = places(table)[:100]
    assert table.source_bounds == (0, 100, 150)
    assert (stats.samples, stats.tokens, stats.dropped) == (100, 300, {"beyond the limit": 900})
    assert (untouched.samples, untouched.dropped) == (50, {})
    assert sum(place.startswith("a:") for place in chosen) == pytest.approx(60, abs=20)
    assert np.mean([int(place[2:]) for place in chosen if place.startswith("a:")]) == pytest.approx(300, abs=90)
    assert places(tabulate(files, other, limits=[100, None])[0])[:100] == chosen
    assert places(tabulate(files, other, limits=[100, None], seed=1)[0])[:100] != chosen
    assert places(tabulate(files, limits=[1000])[0]) == places(tabulate(files)[0])


def test_a_higher_limit_keeps_what_a_lower_one_chose():
    files = [fake_cache("a", distinct(500))]
    chosen = [set(places(tabulate(files, limits=[limit])[0])) for limit in (10, 11, 300)]
    assert [len(part) for part in chosen] == [10, 11, 300]
    assert chosen[0] < chosen[1] < chosen[2]


def test_two_sources_of_one_file_choose_differently():
    files = [fake_cache("a", distinct(500))]
    table, _ = tabulate(files, files, limits=[100, 100])
    assert len(set(places(table)[:100]) & set(places(table)[100:])) == pytest.approx(20, abs=15)


def test_a_limit_counts_usable_samples_only():
    cache = fake_cache("a", [*distinct(20), *(([900 + i] * 3, [0.0] * 3) for i in range(20))])
    table, (stats,) = tabulate([cache], limits=[15])
    assert len(table) == 15
    assert stats.dropped == {"without a token to train on": 20, "beyond the limit": 5}


# ---- duplicates -----------------------------------------------------------------------------------------------------

A, B, C = ([1, 2, 3], [0.0, 1.0, 1.0]), ([4, 5], [0.0, 1.0]), ([6, 7, 8], [0.0, 0.0, 1.0])
A_WEIGHTED = (A[0], [0.0, 0.5, 1.0])


def test_exact_duplicates_are_counted_and_the_first_is_kept_on_demand():
    sources = [
        [fake_cache("a", [A, B, A]), fake_cache("b", [C, B])],
        [fake_cache("c", [C, A_WEIGHTED, A, A])],
    ]
    table, stats = tabulate(*sources)
    assert len(table) == 9
    assert [source.duplicates for source in stats] == [2, 3]
    assert all(source.dropped == {} for source in stats)
    table, stats = tabulate(*sources, drop_duplicates=True)
    assert places(table) == ["a:1", "a:2", "b:1", "c:2"]
    assert [source.duplicates for source in stats] == [2, 3]
    assert [source.dropped for source in stats] == [
        {"exactly like an earlier sample": 2},
        {"exactly like an earlier sample": 3},
    ]
    assert [(source.samples, source.tokens) for source in stats] == [(3, 8), (1, 3)]


def test_duplicates_are_looked_for_among_what_is_used():
    """What a limit leaves out makes no other sample a duplicate; a sample without trained tokens is none either."""
    untrained = ([9, 9], [0.0, 0.0])
    table, (limited, other) = tabulate(
        [fake_cache("a", [*distinct(50, 100), *distinct(50, 100), untrained])],
        [fake_cache("b", [*distinct(50, 100), untrained])],
        limits=[30, None],
        drop_duplicates=True,
    )
    used = {tuple(tokens) for tokens in tokens_of(table)}
    assert len(used) == len(table) == 50
    assert limited.dropped["beyond the limit"] == 70
    assert limited.samples + limited.duplicates == 30
    assert other.duplicates == limited.samples


def test_duplicates_are_judged_whole():
    """Truncation makes no duplicates of samples that differ behind the cut."""
    twins = [([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0]), ([1, 2, 3, 5], [0.0, 1.0, 1.0, 1.0])]
    table, (stats,) = tabulate([fake_cache("a", twins)], max_length=3, drop_duplicates=True)
    assert tokens_of(table) == [[1, 2, 3]] * 2
    assert stats.duplicates == 0


def test_the_first_of_equal_hashes():
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 60, 200), rng.integers(0, 10**9, 200), np.zeros(0, int), np.zeros(3, int)):
        hashes = values.astype(np.uint64) << np.uint64(40)
        assert first_alike(hashes).tolist() == [hashes.tolist().index(value) for value in hashes.tolist()]


def test_the_table_takes_a_few_bytes_a_sample():
    table, _ = tabulate([fake_cache("a", distinct(10))])
    assert sum(column.itemsize for column in (table.index, table.lengths, table.trained)) == 12
