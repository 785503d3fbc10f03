"""Data of which most is lost are refused, each source by its name; the rest is told."""

import logging
from dataclasses import replace

import pytest

from posttrain.data.stats import EpochUse, SourceStats, check_kept, log_epoch_use, log_source
from posttrain.errors import UserErrors

WHOLE = SourceStats(
    key="data.train.0", path="a.jsonl", files=1, rows=5, left_out=0, bad_rows=0, samples=5, tokens=20, trained_tokens=9,
    truncated=0, dropped={}, duplicates=0, notes={},
)  # fmt: skip
UNTRAINED, TOO_LONG = "without a token to train on", "longer than data.max_length"


def lossy(number: int, samples: int, dropped: dict[str, int]) -> SourceStats:
    return replace(WHOLE, key=f"data.train.{number}", path=f"{number}.jsonl", samples=samples, dropped=dropped)


def problems(*stats: SourceStats) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        check_kept(stats)
    return list(caught.value.problems)


def test_most_samples_of_all_sources_together():
    check_kept([lossy(0, 5, {UNTRAINED: 5})])
    check_kept([lossy(0, 1, {UNTRAINED: 5}), lossy(1, 4, {})])  # most of one source, but not of all together
    assert problems(lossy(0, 3, {TOO_LONG: 4}), lossy(1, 1, {UNTRAINED: 2}), lossy(2, 1, {})) == [
        "data.train.0: 4 of 7 samples drop out (4 longer than data.max_length); raise data.max_length, or set "
        "data.truncation to keep_start",
        "data.train.1: 2 of 3 samples drop out (2 without a token to train on); check data.loss_on against the rows",
        "together 6 of 11 samples drop out, which is most of them",
    ]
    assert len(problems(lossy(0, 3, {TOO_LONG: 3, UNTRAINED: 1}))) == 1


def test_what_the_config_asked_for_is_no_loss():
    check_kept([lossy(0, 1, {"beyond the limit": 500, "exactly like an earlier sample": 300, TOO_LONG: 700})])


def test_a_source_of_which_nothing_is_left():
    empty = replace(WHOLE, key="data.train.3", path="3.jsonl", samples=0, rows=7, bad_rows=4, left_out=3)
    assert problems(
        WHOLE,
        lossy(1, 0, {UNTRAINED: 1, TOO_LONG: 1}),
        lossy(2, 0, {"exactly like an earlier sample": 6}),
        empty,
        replace(empty, key="data.train.4", rows=0, bad_rows=0, left_out=0),
    ) == [
        "data.train.1: no sample of 1.jsonl is left: all 2 drop out (1 without a token to train on, 1 longer than "
        "data.max_length); check data.loss_on against the rows; raise data.max_length, or set data.truncation to "
        "keep_start",
        "data.train.2: all samples of 2.jsonl are exactly like earlier ones; leave this source out",
        "data.train.3: 3.jsonl gives no sample: of 7 rows 4 are bad and 3 are left out",
        "data.train.4: 3.jsonl gives no sample: it has no rows",
    ]


def test_a_source_is_told_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    use = EpochUse(5, 10, 40, 18, 0.5, 0.25, 0.125)
    log_source(replace(WHOLE, files=3, notes={"conversation split": 2}, heldout=1, left_out=4, epoch=use))
    log_source(
        replace(WHOLE, truncated=2, dropped={TOO_LONG: 3, "beyond the limit": 8}, bad_rows=1, duplicates=6, epoch=use)
    )
    log_source(replace(WHOLE, dropped={"exactly like an earlier sample": 6}, duplicates=6))
    log_epoch_use([replace(WHOLE, epoch=use), replace(WHOLE, key="data.heldout")])
    log_epoch_use([replace(WHOLE, epoch=EpochUse(5, 5, 20, 9, 1.0, 1.0, 1.0))])  # whole, and alone: nothing to tell
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "data.train.0, a.jsonl (3 files): 5 samples, 20 tokens, 9 trained on; 4 rows left out; "
         "2 x conversation split; 1 held out"),
        ("WARNING", "data.train.0, a.jsonl: 5 samples, 20 tokens, 9 trained on; 2 truncated; 3 dropped, longer than "
         "data.max_length; 1 bad rows skipped; 6 exactly like an earlier sample (data.drop_duplicates would use them "
         "once); 8 left out, beyond the limit"),
        ("INFO", "data.train.0, a.jsonl: 5 samples, 20 tokens, 9 trained on; 6 left out, exactly like an earlier "
         "sample"),
        ("INFO", "an epoch takes 10 of 5 samples of data.train.0 (2 passes): 50.0% of its samples, 25.0% of its "
         "tokens, 12.5% of its trained tokens"),
    ]  # fmt: skip
