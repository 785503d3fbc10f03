"""Batches of packed rows: exact assembly, exact steps, the same rows for everyone; and the loader over them."""

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from posttrain.config import DataConfig, HeldoutConfig, SourceConfig
from posttrain.data.mixture import Mixture
from posttrain.data.packed import PackedDataset, plan_fingerprint
from posttrain.data.pipeline import Datasets, build_datasets
from posttrain.data.samples import SampleTable, sample_table
from posttrain.data.split import Overlap
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.records import Batch
from tests.data.fake_caches import fake_cache

FIELDS = ("tokens", "segment_ids", "positions", "loss_weights")


Samples = list[tuple[list[int], list[float]]]


def make_samples(count: int) -> Samples:
    """(Tokens, loss weights): 2 to 40 tokens, all different; the last one is always trained on."""
    rng = np.random.default_rng(0)
    samples: Samples = []
    token = 1
    for length in rng.integers(2, 41, count).tolist():
        weights = rng.choice([0.0, 0.5, 1.0], length).tolist()
        samples.append((list(range(token, token + length)), [*weights[:-1], 1.0]))
        token += length
    return samples


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples(300)


def table_of(samples: Samples, *sizes: int, max_length: int = 64) -> SampleTable:
    """A table of sources of these sizes, each in a file of its own."""
    caches, start = {}, 0
    for number, size in enumerate(sizes):
        caches[f"data.train.{number}"] = [fake_cache(f"{'abc'[number]}.jsonl", samples[start : start + size])]
        start += size
    configs = {key: SourceConfig(path=key) for key in caches}
    return sample_table(caches, configs, max_length=max_length, truncation="drop", seed=0)[0]


@pytest.fixture(scope="module")
def make(samples):
    """A data set of rows of 64 places over the samples."""

    def make_dataset(count: int = 300, **options: Any) -> PackedDataset:
        table = table_of(samples, count)
        return PackedDataset(table, **{"row_length": 64, "global_batch_size": 8, "seed": 0, **options})

    return make_dataset


@pytest.fixture(scope="module")
def mix(samples):
    """The same over a mixture of three sources: 1/4 pass, 2.25 passes, 2 passes in an epoch."""
    sizes, counts = (200, 80, 20), (50, 180, 40)

    def make_dataset(**options: Any) -> PackedDataset:
        options = {"row_length": 64, "global_batch_size": 8, "seed": 0, **options}
        return PackedDataset(table_of(samples, *sizes), mixture=Mixture(sizes, counts, seed=options["seed"]), **options)

    return make_dataset


def equal(first: Batch, second: Batch) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def whole(dataset: PackedDataset, step: int) -> Batch:
    return dataset.read(step, np.arange(dataset.global_batch_size))


def segments(batch: Batch) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(tokens, loss weights) of every segment, by the segment ids alone."""
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            (places,) = np.nonzero(batch.segment_ids[row] == segment)
            assert len(places) and (np.diff(places) == 1).all()
            assert batch.positions[row, places].tolist() == list(range(len(places)))
            found.append((tuple(batch.tokens[row, places].tolist()), tuple(batch.loss_weights[row, places].tolist())))
    return found


# ---- rows and steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"shuffle": False}])
@pytest.mark.parametrize("global_batch_size", [1, 7, 500])
def test_an_epoch_holds_every_sample_once_and_nothing_else(make, samples, global_batch_size, options):
    dataset = make(global_batch_size=global_batch_size, **options)
    found: Counter[Any] = Counter()
    for step in range(dataset.num_steps):
        batch = whole(dataset, step)
        for name, dtype in zip(FIELDS, (np.int32, np.int32, np.int32, np.float32), strict=True):
            values = getattr(batch, name)
            assert values.shape == (global_batch_size, 64) and values.dtype == dtype
            assert not values[batch.segment_ids == 0].any()
        found.update(segments(batch))
    expected = Counter((tuple(tokens), (0.0, *weights[1:])) for tokens, weights in samples)
    assert found == expected


def test_steps_and_epochs_are_exact(make):
    dataset = make(epochs=3)
    rows = [sum(len(dataset.describe(step, row)) > 0 for row in range(8)) for step in range(dataset.num_steps)]
    per_epoch = dataset.steps_per_epoch
    assert len(per_epoch) == 3 and sum(per_epoch) == dataset.num_steps
    ends = np.cumsum(per_epoch)
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        assert all(count == 8 for count in rows[first : end - 1])  # only an epoch's last batch has empty rows
        lines = [line for step in range(first, end) for row in range(8) for line in dataset.describe(step, row)]
        assert sorted(lines) == sorted(f"a.jsonl:{line}" for line in range(1, 301))
        assert dataset.epoch(int(end)) == np.searchsorted(ends, end) + 1
    assert sum(rows[: ends[0]]) == dataset.num_rows
    assert (dataset.num_samples, dataset.num_tokens) == (300, dataset.table.num_tokens)
    assert [dataset.epoch(step) for step in (0, 1)] == [0.0, 1 / per_epoch[0]]
    assert dataset.epoch(int(ends[0]) + 1) == 1 + 1 / per_epoch[1]
    places = dataset.num_rows * 64
    assert dataset.efficiency == pytest.approx(dataset.table.num_tokens / places)


def test_max_steps_decides_over_epochs_and_goes_beyond_them(make):
    three = make(epochs=3)
    for max_steps in (1, three.steps_per_epoch[0], three.num_steps - 1):
        dataset = make(epochs=1, max_steps=max_steps)
        assert dataset.num_steps == max_steps
        assert all(equal(whole(dataset, step), whole(three, step)) for step in range(max_steps))
    assert make(max_steps=three.num_steps).steps_per_epoch == three.steps_per_epoch
    assert make(max_steps=1).steps_per_epoch == three.steps_per_epoch[:1]
    many = make(max_steps=100_000)
    assert equal(whole(many, 3), whole(three, 3))
    assert many.epoch(three.num_steps) == 3.0


def test_epochs_and_seeds_differ_in_order_and_in_company(make):
    dataset = make(epochs=2)
    first = [tuple(dataset.describe(step, row)) for step in range(dataset.steps_per_epoch[0]) for row in range(8)]
    second = [
        tuple(dataset.describe(step, row))
        for step in range(dataset.steps_per_epoch[0], dataset.num_steps)
        for row in range(8)
    ]
    assert first != second
    assert len(set(first) & set(second)) < len(first) / 2
    assert not equal(whole(dataset, 0), whole(make(seed=1), 0))
    assert equal(whole(dataset, 0), whole(make(), 0))
    unshuffled = make(epochs=2, shuffle=False)
    assert equal(whole(unshuffled, 0), whole(unshuffled, unshuffled.steps_per_epoch[0]))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_rows_of_all_processes_are_the_global_batch(make, processes):
    reference = make(epochs=2)
    datasets = [make(epochs=2) for _ in range(processes)]
    for step in range(reference.num_steps):
        parts = [dataset.read(step, np.arange(8)[i::processes]) for i, dataset in enumerate(datasets)]
        expected = whole(reference, step)
        for i, part in enumerate(parts):
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(part, name), getattr(expected, name)[i::processes])


def test_rows_are_described_by_file_and_line(make, samples):
    dataset = make()
    batch = whole(dataset, 2)
    line_of = {np.array(tokens, np.int32).tobytes(): line for line, (tokens, _) in enumerate(samples, 1)}
    for row in range(8):
        tokens = [batch.tokens[row, batch.segment_ids[row] == s] for s in range(1, batch.segment_ids[row].max() + 1)]
        assert dataset.describe(2, row) == [f"a.jsonl:{line_of[t.tobytes()]}" for t in tokens]


def test_what_is_not_there_is_refused(make):
    dataset = make()
    for step, row in ((-1, 0), (dataset.num_steps, 0), (0, -1), (0, 8)):
        with pytest.raises(IndexError):
            dataset.read(step, np.array([row]))
    for start, stop in ((-1, None), (dataset.num_steps + 1, None), (3, 2), (0, dataset.num_steps + 1)):
        with pytest.raises(ValueError, match="steps"):
            dataset.loader(np.arange(8), start, stop)
    with pytest.raises(ValueError, match="at least one sample"):
        PackedDataset(dataset.table.take(np.zeros(300, bool)), row_length=64, global_batch_size=1, seed=0)


# ---- mixtures -------------------------------------------------------------------------------------------------------


def test_every_epoch_of_a_mixture_holds_what_it_draws(mix):
    dataset = mix(epochs=4)
    mixture = Mixture((200, 80, 20), (50, 180, 40), seed=0)
    assert (dataset.num_samples, len(dataset.table)) == (270, 300)
    first = 0
    seen: Counter[str] = Counter()
    for epoch, steps in enumerate(dataset.steps_per_epoch):
        found = Counter(
            line for step in range(first, first + steps) for row in range(8) for line in dataset.describe(step, row)
        )
        drawn = np.concatenate([mixture.draws(source, epoch) for source in range(3)])
        assert found == Counter(dataset.table.where(int(sample)) for sample in drawn)
        seen += found
        first += steps
    assert first == dataset.num_steps
    assert {line: n for line, n in seen.items() if line.startswith("a")} == {f"a.jsonl:{n}": 1 for n in range(1, 201)}
    assert {n for line, n in seen.items() if line.startswith("b")} == {9}  # 4 x 180 of 80
    assert {n for line, n in seen.items() if line.startswith("c")} == {8}


def test_a_mixture_is_found_again_at_any_step_by_any_process(mix):
    reference = mix(max_steps=70)
    assert len(reference.steps_per_epoch) > 5
    batches = [whole(reference, step) for step in range(70)]
    assert all(equal(whole(mix(max_steps=70), step), batches[step]) for step in (69, 0, 35, 34))
    parts = [mix(max_steps=70).loader(np.arange(8)[i::2], 29) for i in range(2)]
    for (step, even), (_, odd) in zip(*parts, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(even, name), getattr(batches[step], name)[::2])
            np.testing.assert_array_equal(getattr(odd, name), getattr(batches[step], name)[1::2])
    assert step == 69


def test_plans_are_told_apart(make, mix):
    datasets = [make(), make(seed=1), make(packing=False), make(epochs=2), make(299), make(shuffle=False)]
    prints = [plan_fingerprint(dataset) for dataset in (*datasets, mix(), mix(seed=1))]
    assert len(set(prints)) == len(prints)
    assert prints[0] == plan_fingerprint(make()) and prints[-2] == plan_fingerprint(mix())


def test_plans_of_other_samples_are_told_apart():
    """Of the same lengths, in the same order."""
    table = table_of([([number] * 5, [1.0] * 5) for number in range(20)], 20)
    halves = [table.take(np.arange(20) < 10), table.take(np.arange(20) >= 10)]
    prints = [
        plan_fingerprint(PackedDataset(half, row_length=64, global_batch_size=1, seed=0))
        for half in (*halves, halves[0])
    ]
    assert prints[0] == prints[2] != prints[1]


# ---- the loader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_that_starts_late_gives_the_rest(make, prefetch):
    rows = np.array([1, 2, 5])
    everything = list(make(epochs=2).loader(rows, prefetch=prefetch))
    assert [step for step, _ in everything] == list(range(len(everything)))
    assert len(everything) == make(epochs=2).num_steps
    for start in (1, 17, len(everything) - 1, len(everything)):
        dataset = make(epochs=2)  # knows nothing of what was read before
        tail = list(dataset.loader(rows, start, prefetch=prefetch))
        assert [step for step, _ in tail] == list(range(start, len(everything)))
        assert all(equal(batch, everything[step][1]) for step, batch in tail)
    assert [step for step, _ in make(epochs=2).loader(rows, 3, 5, prefetch=prefetch)] == [3, 4]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("end", ["close", "delete", "exhaust"])
def test_a_loader_ends_its_thread(make, end):
    loader = make(epochs=2).loader(np.arange(8), 0, 12)
    next(loader)
    assert loader_threads()
    if end == "close":
        loader.close()
    elif end == "exhaust":
        assert len(list(loader)) == 11
    del loader
    assert not loader_threads()


def test_a_loader_reads_ahead_but_not_far(make, monkeypatch):
    dataset = make(epochs=2)
    read: list[int] = []
    original = dataset.read
    monkeypatch.setattr(dataset, "read", lambda step, rows: read.append(step) or original(step, rows))
    loader = dataset.loader(np.arange(8), prefetch=2)
    next(loader)
    deadline = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == [0, 1, 2, 3]  # one taken, two waiting, one in the thread's hands
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("error", [OSError("the disk is gone"), StopIteration("a bug")])
def test_errors_while_reading_reach_the_consumer(make, monkeypatch, error, prefetch):
    dataset = make()
    original = dataset.read

    def failing(step: int, rows: np.ndarray) -> Batch:
        if step == 4:
            raise error
        return original(step, rows)

    monkeypatch.setattr(dataset, "read", failing)
    steps: list[int] = []
    with pytest.raises((OSError, RuntimeError), match=r"the disk is gone|the data ended at step 4 of"):
        steps.extend(step for step, _ in dataset.loader(np.arange(8), prefetch=prefetch))
    assert steps == [0, 1, 2, 3]
    assert not loader_threads()


def test_reading_is_fast():
    table = table_of([([1] * 200, [1.0] * 200)] * 5000, 5000, max_length=200)
    start = time.process_time()
    dataset = PackedDataset(table, row_length=1024, global_batch_size=8, seed=0)
    tokens = sum(int((batch.segment_ids > 0).sum()) for _, batch in dataset.loader(np.arange(8)))
    assert tokens == 1_000_000
    assert tokens / (time.process_time() - start) > 500_000  # ten times that without the type checks


# ---- from the config ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte, and ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    directory = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(str(directory), chat_template="chatml")


def chats(path: Path, count: int, *, answer: str = "answer") -> str:
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{answer} {number}"}]}
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def build(
    tmp_path: Path,
    tokenizer: Tokenizer,
    train: Sequence[str | SourceConfig],
    *,
    max_steps: int | None = None,
    seed: int = 0,
    gather: Callable[[str], Sequence[str]] = lambda text: [text],
    **options: Any,
) -> Datasets:
    defaults = {"max_length": 64, "row_length": 256, "cache_dir": str(tmp_path / "cache")}
    sources = tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in train)
    return build_datasets(
        DataConfig(train=sources, **{**defaults, **options}),
        tokenizer,
        global_batch_size=4,
        max_steps=max_steps,
        seed=seed,
        rejects_dir=tmp_path / "run",
        gather=gather,
    )


def lines(dataset: PackedDataset) -> list[str]:
    return [
        place
        for step in range(dataset.num_steps)
        for row in range(dataset.global_batch_size)
        for place in dataset.describe(step, row)
    ]


def test_a_fraction_is_held_out_and_the_rest_is_trained_on(tmp_path, tokenizer):
    paths = [chats(tmp_path / "a.jsonl", 60), chats(tmp_path / "b.jsonl", 40, answer="no")]
    datasets = build(tmp_path, tokenizer, paths, heldout=HeldoutConfig(fraction=0.1), epochs=2)
    assert datasets.heldout is not None
    train, heldout = lines(datasets.train), lines(datasets.heldout)
    assert len(heldout) == 10
    assert sorted(train) == sorted(2 * list(set(train)))  # each once an epoch
    assert sorted([*set(train), *heldout]) == sorted(
        [f"{paths[0]}:{n}" for n in range(1, 61)] + [f"{paths[1]}:{n}" for n in range(1, 41)]
    )
    assert [(source.path, source.samples) for source in datasets.stats] == [(paths[0], 60), (paths[1], 40)]
    text = tokenizer.decode(whole(datasets.train, 0).tokens[0].tolist())
    assert "<|im_start|>assistant\n" in text
    trained = whole(datasets.train, 0)
    assert "user" not in tokenizer.decode(trained.tokens[trained.loss_weights > 0].tolist())
    nothing = build(tmp_path, tokenizer, paths, heldout=HeldoutConfig(fraction=0.0))
    assert nothing.heldout is None
    assert len(lines(nothing.train)) == 100


def test_a_file_of_its_own_is_held_out(tmp_path, tokenizer):
    train, heldout = chats(tmp_path / "a.jsonl", 50), chats(tmp_path / "b.jsonl", 7, answer="no")
    datasets = build(tmp_path, tokenizer, [train], heldout=HeldoutConfig(path=heldout), max_steps=3)
    assert datasets.heldout is not None
    assert sorted(lines(datasets.heldout)) == [f"{heldout}:{line}" for line in range(1, 8)]
    assert datasets.train.num_steps == 3
    assert len(datasets.train.table) == 50
    assert [source.path for source in datasets.stats] == [train, heldout]


def test_the_held_out_rows_come_in_one_order(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", 50)
    datasets = build(tmp_path, tokenizer, [path], heldout=HeldoutConfig(fraction=0.5), packing=False)
    assert datasets.heldout is not None
    numbers = [int(place.rsplit(":", 1)[1]) for place in lines(datasets.heldout)]
    assert numbers == sorted(numbers) and len(numbers) == 25


def test_sources_are_mixed_by_weight(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    paths = [chats(tmp_path / f"{name}.jsonl", 60, answer=name * 5) for name in "ab"]
    sources = [SourceConfig(path=paths[0], weight=3), SourceConfig(path=paths[1], weight=1, limit=10, repeat=2)]
    datasets = build(tmp_path, tokenizer, sources, heldout=HeldoutConfig(fraction=0.0), epochs=2)
    train = lines(datasets.train)
    counts = Counter(place.rsplit(":", 1)[0] for place in train)
    assert counts == {paths[0]: 120, paths[1]: 40}  # two epochs of 80: one pass over a, two over ten of b
    chosen = Counter(place for place in train if place.startswith(paths[1]))
    assert sorted(chosen.values()) == [4] * 10
    first, second = datasets.stats
    assert (first.epoch.available, first.epoch.samples, first.epoch.passes) == (60, 60, 1.0)
    assert (second.epoch.available, second.epoch.samples, second.epoch.passes) == (10, 20, 2.0)
    assert (first.epoch.sample_share, second.epoch.sample_share) == (0.75, 0.25)
    assert second.dropped == {"beyond the limit": 50}
    tokens = [
        int(whole(datasets.train, step).segment_ids.astype(bool).sum()) for step in range(datasets.train.num_steps)
    ]
    assert sum(tokens) == 2 * (first.epoch.tokens + second.epoch.tokens)
    assert "an epoch takes 20 of 10 samples of data.train.1 (2 passes): 25.0% of its samples, " in caplog.text


def test_sources_are_repeated(tmp_path, tokenizer):
    paths = [chats(tmp_path / "a.jsonl", 20), chats(tmp_path / "b.jsonl", 5, answer="no")]
    sources = [SourceConfig(path=paths[0]), SourceConfig(path=paths[1], repeat=3)]
    counts = Counter(lines(build(tmp_path, tokenizer, sources, heldout=HeldoutConfig(fraction=0.0)).train))
    assert counts == {f"{paths[0]}:{n}": 1 for n in range(1, 21)} | {f"{paths[1]}:{n}": 3 for n in range(1, 6)}


def test_a_pattern_is_one_source(tmp_path, tokenizer):
    paths = [chats(tmp_path / f"part-{number}.jsonl", 10, answer="x" * number) for number in (2, 1)]
    pattern = str(tmp_path / "part-*.jsonl")
    datasets = build(tmp_path, tokenizer, [pattern], heldout=HeldoutConfig(fraction=0.0))
    assert {place.rsplit(":", 1)[0] for place in lines(datasets.train)} == set(paths)
    (stats,) = datasets.stats
    assert (stats.path, stats.files, stats.rows, stats.samples) == (pattern, 2, 20, 20)


def test_duplicates_and_overlap_are_told(tmp_path, tokenizer, caplog):
    path = chats(tmp_path / "a.jsonl", 30)
    twice = tmp_path / "b.jsonl"
    twice.write_text("".join(f"{line}\n" for line in 2 * Path(path).read_text().splitlines()))
    datasets = build(tmp_path, tokenizer, [path, str(twice)], heldout=HeldoutConfig(path=path))
    assert [source.duplicates for source in datasets.stats] == [0, 60, 0]
    assert len(datasets.train.table) == 90
    assert datasets.overlap == Overlap(heldout=30, samples=30, prompts=30)
    assert "60 exactly like an earlier sample (data.drop_duplicates would use them once)" in caplog.text
    assert "held out: 30 of 30 samples are exactly among the training samples, and 30 have a prompt" in caplog.text
    caplog.clear()
    datasets = build(tmp_path, tokenizer, [str(twice)], heldout=HeldoutConfig(fraction=0.2), drop_duplicates=True)
    assert (len(datasets.train.table), len(datasets.heldout.table)) == (24, 6)
    assert datasets.overlap == Overlap(heldout=6, samples=0, prompts=6)  # they all ask the same
    assert "held out: 0 of 6 samples are exactly among the training samples, and 6 have a prompt" in caplog.text
    with pytest.raises(UserError, match=r"data\.train\.1: all samples of .*b\.jsonl are exactly like earlier ones"):
        build(tmp_path, tokenizer, [path, str(twice)], drop_duplicates=True)


def test_processes_must_agree(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", 20)
    told: list[str] = []

    def alike(text: str) -> list[str]:
        told.append(text)
        return [text] * 3

    datasets = build(tmp_path, tokenizer, [path], gather=alike)
    assert told == [f"{datasets.fingerprint} {plan_fingerprint(datasets.train)}"]
    samples, plan = told[0].split()
    for texts, problem in (
        (
            [f"{samples} {plan}", f"{samples} other", f"{samples} other"],
            "of 3 processes, 1, 2 planned other rows than pro",
        ),
        (
            [f"{samples} {plan}", f"other {plan}"],
            "of 2 processes, 1 read other samples than process 0; give all of them",
        ),
    ):
        with pytest.raises(UserError, match=problem):
            build(tmp_path, tokenizer, [path], gather=lambda text, texts=texts: texts)


def test_the_fingerprint_is_that_of_the_samples(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", 20)
    first = build(tmp_path, tokenizer, [path]).fingerprint
    chats(tmp_path / "b.jsonl", 20)
    assert build(tmp_path, tokenizer, [str(tmp_path / "b.jsonl")]).fingerprint == first
    chats(tmp_path / "b.jsonl", 20, answer="other")
    assert build(tmp_path, tokenizer, [str(tmp_path / "b.jsonl")]).fingerprint != first


def test_unsuitable_data_are_refused(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", 10)
    with pytest.raises(UserError, match=r"data\.train\.0: .*: all 10 drop out \(10 longer than data\.max_length\)"):
        build(tmp_path, tokenizer, [path], max_length=16, truncation="drop")
    with pytest.raises(UserError, match=r"data\.train\.0: .* all 10 .* after truncation\); raise data\.max_length"):
        build(tmp_path, tokenizer, [path], max_length=16)
    with pytest.raises(UserError, match=r"data\.heldout\.fraction=0\.8 holds out 8 of 10 samples, more than is left"):
        build(tmp_path, tokenizer, [path], heldout=HeldoutConfig(fraction=0.8))
    single = chats(tmp_path / "c.jsonl", 1, answer="one")
    with pytest.raises(UserError, match=r"data\.train\.1: all its 1 samples are held out"):
        for number in range(40):
            build(tmp_path, tokenizer, [path, single], heldout=HeldoutConfig(fraction=0.45), seed=number)
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"data\.train\.1: .*bad\.jsonl gives no sample: of 1 rows 1 are bad"):
        build(tmp_path, tokenizer, [path, str(tmp_path / "bad.jsonl")], on_bad_row="skip")


def test_what_is_lost_is_logged(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    path = chats(tmp_path / "a.jsonl", 10)
    chats(tmp_path / "b.jsonl", 2, answer="long " * 20)
    Path(path).write_text(Path(path).read_text() + "\n" + (tmp_path / "b.jsonl").read_text() + '\n{"text": 3}\n')
    build(tmp_path, tokenizer, [path], on_bad_row="skip", max_length=60, heldout=HeldoutConfig(fraction=0.0))
    assert f"data.train.0, {path}: 12 samples, " in caplog.text
    assert "trained on; 2 truncated; 1 bad rows skipped" in caplog.text
    assert re.search(r"an epoch has [1-3] rows, fewer than train\.global_batch_size=4", caplog.text)
    assert "nothing is held out" in caplog.text


@pytest.mark.acceptance
def test_real_chats_fill_their_rows(tmp_path, smollm2, shared):
    data = DataConfig(
        train=(SourceConfig(path=str(shared / "bench" / "chat.jsonl")),),
        heldout=HeldoutConfig(fraction=0.0),
        max_length=1024,
        row_length=1024,
        cache_dir=str(tmp_path),
    )
    train = build_datasets(
        data, Tokenizer.load(str(smollm2)), global_batch_size=1, max_steps=None, seed=0, rejects_dir=tmp_path
    ).train
    assert len(train.table) == 512
    filled = [(whole(train, step).segment_ids > 0).mean() for step in range(train.num_steps)]
    assert 1 - np.mean(sorted(filled)[1:]) < 0.02
