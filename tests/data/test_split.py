"""Held-out samples: so many, at random, never like those trained on, and what they share with them all the same."""

from collections.abc import Sequence

import numpy as np
import pytest

from posttrain.config import SourceConfig
from posttrain.data.cache import TokenCache
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.split import Overlap, find_overlap, split_heldout
from tests.data.fake_caches import distinct, fake_cache


def table_of(*caches: TokenCache, max_length: int = 100) -> SampleTable:
    source = {"data.train.0": SourceConfig(path="a")}
    table, _ = sample_table({"data.train.0": caches}, source, max_length=max_length, truncation="drop", seed=0)
    return table


def contents(table: SampleTable, marked: np.ndarray | None = None) -> list[bytes]:
    chosen = range(len(table)) if marked is None else np.flatnonzero(marked).tolist()
    return [b"".join(part.tobytes() for part in table.segments(sample)[0]) for sample in chosen]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.0, 0), (100, 0.02, 2), (100, 0.255, 26), (10, 0.02, 1), (2, 0.01, 1), (1, 0.5, 0)],
)
def test_the_wanted_number_is_held_out(count, fraction, expected):
    marked = split_heldout(table_of(fake_cache("a.jsonl", distinct(count))), fraction, seed=0)
    assert marked.shape == (count,)
    assert marked.sum() == expected


def test_the_split_is_random_and_depends_on_the_seed_alone():
    table = table_of(fake_cache("a.jsonl", distinct(1000)))
    splits = [np.flatnonzero(split_heldout(table, 0.3, seed=seed)).tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert np.mean(splits[0]) == pytest.approx(499.5, abs=50)


def test_another_max_length_holds_out_nearly_the_same_samples():
    lengths = np.random.default_rng(0).integers(2, 41, 500).tolist()
    cache = fake_cache("a.jsonl", [sample for i, n in enumerate(lengths) for sample in distinct(1, 50 * i, n)])
    heldout = []
    for max_length in (40, 35):
        table = table_of(cache, max_length=max_length)
        marked = split_heldout(table, 0.2, seed=0)
        heldout.append({table.where(int(sample)) for sample in np.flatnonzero(marked)})
    still_there = {place for place in heldout[0] if lengths[int(place.split(":")[1]) - 1] <= 35}
    assert len(heldout[0]) - len(still_there) > 5
    assert len(still_there & heldout[1]) >= len(still_there) - 5


@pytest.mark.parametrize("seed", range(5))
def test_equal_samples_are_on_one_side(seed):
    rng = np.random.default_rng(seed)
    pool = distinct(150)
    files = [
        fake_cache(name, [pool[i] for i in np.minimum(rng.geometric(0.02, 150), 150) - 1]) for name in ("a.jsonl", "b")
    ]
    table = table_of(*files)
    marked = split_heldout(table, 0.1, seed=seed)
    heldout, train = contents(table, marked), contents(table, ~marked)
    assert not set(heldout) & set(train)
    assert len(heldout) == 30
    assert find_overlap(table.take(~marked), table.take(marked)).samples == 0


def test_samples_of_one_row_are_on_one_side():
    """Of one conversation that was split, of one ranking. Lines tell nothing of it: a .json file may have only one."""
    lines = [line for line in range(1, 41) for _ in range(3)]
    table = table_of(fake_cache("a.jsonl", distinct(120), lines))
    marked = split_heldout(table, 0.1, seed=0)
    heldout = np.flatnonzero(marked)
    assert len(heldout) == 12
    assert sorted({lines[sample] for sample in heldout}) == [lines[sample] for sample in heldout[::3]]
    on_one_line = table_of(fake_cache("a.json", distinct(120), [1] * 120, begins=[True, False, False] * 40))
    assert split_heldout(on_one_line, 0.1, seed=0).tolist() == marked.tolist()
    alone = table_of(fake_cache("a.json", distinct(120), [1] * 120, begins=[True] * 120))
    assert alone.first_of_row().tolist() == list(range(120)) and split_heldout(alone, 0.1, seed=0).sum() == 12


def test_a_record_whose_first_sample_is_dropped_is_still_one() -> None:
    table = table_of(fake_cache("a.json", distinct(6), [1] * 6, begins=[True, False, False] * 2))
    assert table.take(np.array([False, True, True, True, False, True])).first_of_row().tolist() == [0, 0, 2, 2]


def test_rows_of_equal_number_in_two_files_are_not_one():
    table = table_of(fake_cache("a.jsonl", distinct(1)), fake_cache("b.jsonl", distinct(1, 50)))
    assert table.first_of_row().tolist() == [0, 1]


def test_samples_that_are_connected_through_others_are_on_one_side():
    """1 and 2 are of one row, 2 is like 3, which is of one row with 4, and so on."""
    chain = distinct(40, 1000)
    cache = fake_cache(
        "a.jsonl",
        [sample for link in range(39) for sample in (chain[link], chain[link + 1])] + distinct(400, 5000),
        [line for line in range(1, 40) for _ in range(2)] + list(range(100, 500)),
    )
    table = table_of(cache)
    held = set()
    for seed in range(30):
        marked = split_heldout(table, 0.3, seed=seed)
        assert marked[:78].all() or not marked[:78].any()
        assert marked.sum() == round(0.3 * len(table))
        held.add(bool(marked[0]))
    assert held == {False, True}


def test_groups_too_large_for_the_wanted_number():
    twins = distinct(2)
    table = table_of(fake_cache("a.jsonl", [twins[0]] * 30 + [twins[1]] * 10))
    marked = split_heldout(table, 0.02, seed=0)
    assert marked.tolist() == [False] * 30 + [True] * 10  # at least one, and then the smallest group
    alike = table_of(fake_cache("a.jsonl", [twins[0]] * 10))
    assert not split_heldout(alike, 0.5, seed=0).any()


# ---- overlap --------------------------------------------------------------------------------------------------------


def chat(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[float]]:
    return [*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer)


def test_the_overlap_of_two_files():
    train = table_of(
        fake_cache("a", [chat([1, 2, 3], [4]), chat([1, 2], [9])]), fake_cache("b", [chat([5, 6], [7, 8])])
    )
    heldout = table_of(
        fake_cache(
            "h",
            [
                chat([1, 2, 3], [4]),  # the very same
                chat([1, 2, 3], [5]),  # the same prompt
                chat([5, 6], [7, 8]),
                chat([1, 2, 3, 4], [4]),  # neither
                chat([5], [6, 7, 8]),
            ],
        )
    )
    assert find_overlap(train, heldout) == Overlap(heldout=5, samples=2, prompts=3)


def test_texts_have_no_prompt_to_share():
    """All of a text is trained on but its first token, and that is often the same."""
    train = table_of(fake_cache("a", [([1, 5, 6], [1.0] * 3), ([1, 7, 8], [0.0, 1.0, 1.0])]))
    heldout = table_of(fake_cache("h", [([1, 9, 6], [1.0] * 3), ([1, 9, 8], [0.0, 1.0, 1.0]), ([1, 5, 6], [1.0] * 3)]))
    assert find_overlap(train, heldout) == Overlap(heldout=3, samples=1, prompts=1)


def test_the_overlap_is_that_of_sets():
    rng = np.random.default_rng(0)
    samples = [chat([int(p), 50], [int(a)]) for p, a in rng.integers(0, 12, (400, 2))]
    train, heldout = table_of(fake_cache("a", samples[:60])), table_of(fake_cache("h", samples[60:]))
    exact = {tuple(ids) for ids, _ in samples[:60]}
    prompts = {ids[:2] for ids in exact}
    assert find_overlap(train, heldout) == Overlap(
        heldout=340,
        samples=sum(tuple(ids) in exact for ids, _ in samples[60:]),
        prompts=sum(tuple(ids[:2]) in prompts for ids, _ in samples[60:]),
    )
