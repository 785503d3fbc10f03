"""Several answers to one prompt, scored or ranked, to pairs of answers: a form of rows, and what message trees hold.

`formats.py` calls the readers as it does those of `forms.py`. A ranking says of any two of its answers which is better,
or that they are equal; the source's `pairs` says which of those pairs become rows. For supervised fine-tuning the best
answer is used once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from posttrain.config import Pairs
from posttrain.data.fields import Fields
from posttrain.data.messages import Talk
from posttrain.data.pair_forms import check_answer, talk_pair, without_prompt
from posttrain.data.problems import Number, type_name
from posttrain.data.rows import Row
from posttrain.data.trees import read_siblings

UNRANKED = "answers in no pair, because they have no rank or nothing beside them has"
ALL_EQUAL = "rankings in no pair, because all their answers are equal"
"""Why answers are left out."""

_BOTH = " (prompt and completions: all strings or all lists of messages)"


@dataclass(frozen=True)
class _Ranking:
    """A prompt and its answers."""

    prompt: Talk | str
    answers: Sequence[Talk | str]
    """Each as the prompt is."""
    keys: Sequence[str]
    """Where in the file each answer stands."""
    ranks: Sequence[Number | None]
    """Of each answer; lower is better. None: it has none."""
    scored: bool = False
    """Whether the ranks are scores, negated."""


def choose_pairs(ranks: Sequence[Number], which: Pairs) -> list[tuple[int, int]]:
    """(better, worse) of each pair, as indices into `ranks` (lower is better); of equal ones none.

    `all`: any two; `neighbours`: any two with no rank between theirs; `best_worst`: one pair, the first of the best and
    the first of the worst.
    """
    levels = sorted(set(ranks))
    if len(levels) < 2:
        return []
    if which == "best_worst":
        return [(ranks.index(levels[0]), ranks.index(levels[-1]))]
    following = dict(pairwise(levels))
    return [
        (i, j)
        for i, better in enumerate(ranks)
        for j, worse in enumerate(ranks)
        if better < worse and (which == "all" or following[better] == worse)
    ]


# ---- readers --------------------------------------------------------------------------------------------------------


def read_ranking(fields: Fields) -> list[Row]:
    """`prompt`, `completions` and one of `scores` (higher is better) and `ranks` (lower is better)."""
    columns, problems = fields.columns, fields.problems
    by = "scores" if "scores" in columns else "ranks"
    if by == "scores" and "ranks" in columns:
        problems.add(fields.key("ranks"), f"the row has {fields.key('scores')} too; fix: keep one of them")
    if by == "ranks":
        _refuse_margins(fields, fields.key("ranks"))
    key, given, prompt = fields.key("completions"), columns["completions"], columns["prompt"]
    if not isinstance(given, list) or len(given) < 2:
        what = f"{len(given)}" if isinstance(given, list) else type_name(given)
        problems.add(key, f"must be a list of two answers or more, not {what}; fix: leave the row out")
        given = []
    keys = [f"{key}[{index}]" for index in range(len(given))]
    ranks = _read_ranks(fields, by, len(given))
    answers: Sequence[Talk | str]
    if isinstance(prompt, str) and not any(isinstance(answer, list | dict) for answer in given):
        prompt = fields.text("prompt", may_be_empty=True)
        answers = [fields.checked_text(answer, at) for answer, at in zip(given, keys, strict=True)]
    else:
        prompt = fields.talk("prompt", other=_BOTH)
        talks = [fields.answer(answer, at, other=_BOTH) for answer, at in zip(given, keys, strict=True)]
        answers = without_prompt(prompt, talks)
    if problems:
        return []
    return _expand(fields, _Ranking(prompt, answers, keys, ranks, by == "scores"))


def _read_ranks(fields: Fields, by: str, count: int) -> list[Number | None]:
    """The column as ranks; null for an answer that has none."""
    given, key, problems = fields.columns[by], fields.key(by), fields.problems
    if not isinstance(given, list):
        problems.add(key, f"must be a list of numbers, one for each answer, not {type_name(given)}")
        return []
    if count and len(given) != count:
        problems.add(key, f"has {len(given)} numbers for {count} answers; fix: one for each, null where there is none")
    numbers = [
        None if value is None else problems.number(value, f"{key}[{index}]", whole=by == "ranks")
        for index, value in enumerate(given)
    ]
    return numbers if by == "ranks" else [None if number is None else -number for number in numbers]


def read_tree_pairs(fields: Fields) -> list[Row]:
    """The pairs of a message tree: the ranked answers to one message, each behind the whole conversation up to it."""
    key = fields.key("prompt")
    _refuse_margins(fields, key)
    rows = []
    for prompt, answers, ranks in read_siblings(fields.columns["prompt"], key, fields.problems, fields.left_out):
        keys = [answer.keys[-1] for answer in answers]
        rows += _expand(fields, _Ranking(prompt, answers, keys, ranks))
    return rows


def _refuse_margins(fields: Fields, key: str) -> None:
    if fields.source.margins:
        reason = "ranks say no margin, and the source's margins is true; fix: scores, or margins: false"
        fields.problems.add(key, reason)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _expand(fields: Fields, ranking: _Ranking) -> list[Row]:
    """The pairs that the source asks for, or the best answer where it asks for that."""
    ranked = [(i, rank) for i, rank in enumerate(ranking.ranks) if rank is not None]
    if len(ranked) < 2:
        ranked = []
    fields.left_out[UNRANKED] += len(ranking.ranks) - len(ranked)
    if not ranked:
        return []
    for i, _ in ranked:
        answer = ranking.answers[i]
        if isinstance(answer, Talk):
            check_answer(fields, answer)
    if fields.source.preference == "chosen":
        best, _ = min(ranked, key=lambda item: item[1])
        return [_best(fields, ranking.prompt, ranking.answers[best], ranking.keys[best])]
    pairs = choose_pairs([rank for _, rank in ranked], fields.source.pairs)
    if not pairs:
        fields.left_out[ALL_EQUAL] += 1
    rows = []
    for better, worse in pairs:
        (i, high), (j, low) = ranked[better], ranked[worse]
        margin = float(low - high) if ranking.scored and fields.source.margins else None
        rows += _pair(fields, ranking, i, j, margin)
    return rows


def _best(fields: Fields, prompt: Talk | str, answer: Talk | str, key: str) -> Row:
    if isinstance(prompt, Talk) and isinstance(answer, Talk):
        return fields.row("prompt_completion", prompt + answer, prompt_length=len(prompt), origin=key)
    return fields.strings("prompt_completion", prompt=prompt, completion=answer)


def _pair(fields: Fields, ranking: _Ranking, better: int, worse: int, margin: float | None) -> list[Row]:
    """The pair of two answers, by their numbers."""
    prompt, chosen, rejected = ranking.prompt, ranking.answers[better], ranking.answers[worse]
    if isinstance(prompt, Talk) and isinstance(chosen, Talk) and isinstance(rejected, Talk):
        if chosen.messages == rejected.messages:
            _refuse_equal(fields, ranking, better, worse)
        return talk_pair(fields, prompt, chosen, rejected, origin=ranking.keys[better], margin=margin)
    if chosen == rejected:
        _refuse_equal(fields, ranking, better, worse)
    return [fields.strings("preference", prompt=prompt, completion=chosen, rejected=rejected, margin=margin)]


def _refuse_equal(fields: Fields, ranking: _Ranking, better: int, worse: int) -> None:
    reason = f"is the same answer as {ranking.keys[better]}, and ranked otherwise; fix: leave one of them out"
    fields.problems.add(ranking.keys[worse], reason)
