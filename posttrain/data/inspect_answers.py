"""Prompts and answers measured, where an objective tells answers apart: how long those of each side or label are, and
whether the data contradicts itself.

Under `inspect.py`, over the token caches. An objective may learn whatever tells good answers from bad ones; their
length is the first thing to look at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int

from posttrain.data.inspect_samples import SourceFile

PAIRS, LABELS = ("chosen", "rejected"), ("desirable", "undesirable")
"""The two kinds of answers: the sides of pairs, or labels."""

_MEASURED = 100_000
"""Samples that are measured, spread evenly: about a second's worth."""


@dataclass(frozen=True)
class Answers:
    """Of the samples of the training sources that are trained on or held out, as they are after truncation."""

    counts: Mapping[str, int]
    """Answers of each kind."""
    prompts: Int[np.ndarray, "measured"]
    """Tokens before the first trained one. Where there are very many samples, only some are measured."""
    trained: Mapping[str, Int[np.ndarray, "_"]]
    """Trained tokens of the answers of each kind; of pairs, in the same order."""
    different_prompts: int
    contradictions: int
    """Measured samples that another contradicts: the same two answers the other way round, or the same answer under
    the other label."""
    margins: Float32[np.ndarray, "given"]
    """Of pairs, those that are not 0."""
    over_long: Mapping[str, int]
    """Answers of each kind that are, with their prompts, over `data.max_length`; of all in the files."""

    @property
    def longer(self) -> tuple[int, int]:
        """Measured pairs of which the chosen answer is the longer one, and those of which the rejected one is."""
        chosen, rejected = (self.trained[side] for side in PAIRS)
        return int(np.count_nonzero(chosen > rejected)), int(np.count_nonzero(chosen < rejected))


def measure(files: Sequence[SourceFile], kinds: tuple[str, str], most: int = _MEASURED) -> Answers:
    """Measures the answers of some files, of about `most` samples; `kinds` is `PAIRS` or `LABELS`."""
    used = [np.flatnonzero(file.used) for file in files]
    step = max(1, -(-sum(map(len, used)) // most))
    places = [(file, sample) for file, of_file in zip(files, used, strict=True) for sample in of_file[::step].tolist()]
    prompts: list[int] = []
    trained: dict[str, list[int]] = {kind: [] for kind in kinds}
    seen: list[tuple[int, ...]] = []
    for file, sample in places:
        lengths = [_prompt_and_trained(file, place) for place in file.kept(sample)]
        prompts.append(max(prompt for prompt, _ in lengths))
        label = int(file.cache.labels[sample])
        for kind, (_, count) in zip(kinds if not label else kinds[label < 0 :], lengths, strict=False):
            trained[kind].append(count)
        hashes = [hash(file.cache.tokens[place].tobytes()) for place in file.whole(sample)]
        seen.append((*hashes, label))
    known = set(seen)
    samples = list(zip(files, used, strict=True))
    margins = np.concatenate([np.zeros(0, np.float32), *(file.cache.margins[of] for file, of in samples)])
    prompt_hashes = [np.zeros(0, np.uint64), *(file.cache.prompt_hashes[of] for file, of in samples)]
    return Answers(
        counts={kind: sum(_count(file, kind, file.used) for file in files) for kind in kinds},
        prompts=np.array(prompts, np.int64),
        trained={kind: np.array(counts, np.int64) for kind, counts in trained.items()},
        different_prompts=len(np.unique(np.concatenate(prompt_hashes))),
        contradictions=sum((*hashes[::-1], -label) in known for *hashes, label in seen),
        margins=margins[margins != 0],
        over_long={kind: sum(_count(file, kind, _over_long(file, kind)) for file in files) for kind in kinds},
    )


def length_bias(answers: Answers) -> str:
    """The side whose answers are clearly the longer ones: of at least 60% of the pairs that differ, and by two standard
    errors more than half of them; empty where neither is."""
    longer, differ = answers.longer, sum(answers.longer)
    most = max(longer)
    clear = most >= 0.6 * differ and most - differ / 2 > math.sqrt(differ)  # a standard error is half a square root
    return PAIRS[longer.index(most)] if clear else ""


def _prompt_and_trained(file: SourceFile, place: slice) -> tuple[int, int]:
    trained = file.cache.loss_weights[place][1:] != 0  # nothing predicts the first token
    return int(trained.argmax()) + 1, int(np.count_nonzero(trained))


def _count(file: SourceFile, kind: str, marked: Bool[np.ndarray, "samples"]) -> int:
    """How many of the marked samples have an answer of this kind: every pair has one of each."""
    if kind in LABELS:
        marked = marked & (file.cache.labels == (1 if kind == LABELS[0] else -1))
    return int(np.count_nonzero(marked))


def _over_long(file: SourceFile, kind: str) -> Bool[np.ndarray, "samples"]:
    """Which samples have such an answer that is too long with its prompt."""
    chosen = file.cache.splits
    lengths = chosen if kind == PAIRS[0] else np.diff(file.cache.offsets) - chosen
    return lengths > file.max_length
