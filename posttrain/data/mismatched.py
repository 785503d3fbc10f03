"""Each labelled answer's prompt with the answer to another prompt: what KTO measures the model's drift on.

KTO's point of reference is the mean log-ratio of answers that have nothing to do with their prompts (arXiv:2402.01306,
section 4.1). The other answer is that of the sample before in the data, of the last one for the first, as in TRL; where
that one has the same prompt, of the nearest before with another, so that no answer meets a prompt that it answers.
Which answers meet is thus a property of the data: packing, batches and mesh do not change it.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int, UInt64

from posttrain.data.packing import index_dtype
from posttrain.data.samples import SampleTable
from posttrain.errors import UserError


def with_partners(table: SampleTable) -> SampleTable:
    """The table with a second segment for each sample, of its prompt and its partner's answer. Raises UserError where
    all prompts are the same."""
    prompts = np.empty(len(table), np.uint64)
    before, behind = np.empty((2, len(table)), np.int64)
    for cache, part in table.parts():
        index = table.index[part]
        prompts[part] = cache.prompt_hashes[index]
        trained = np.flatnonzero(cache.loss_weights)
        starts, ends = cache.offsets[index], cache.offsets[index + 1]
        first = trained[np.searchsorted(trained, starts + 1)]
        before[part], behind[part] = first - starts, ends - first
    partners = _partners(prompts)
    lengths = np.minimum(before + behind[partners], table.max_length)
    return replace(table, partners=partners, lengths=(table.lengths + lengths).astype(table.lengths.dtype))


def _partners(prompts: UInt64[np.ndarray, "samples"]) -> Int[np.ndarray, "samples"]:
    """For each sample the nearest one before it, in a circle, that has another prompt."""
    starts = np.flatnonzero(np.append(True, prompts[1:] != prompts[:-1]))  # of runs of equal prompts
    if len(starts) < 2:
        raise UserError(
            f"data: all {len(prompts)} labelled answers have the same prompt, and the loss compares each prompt with "
            "the answer to another; give answers to several prompts, or use apo_zero_unpaired"
        )
    before = starts - 1
    before[0] = len(prompts) - 1 if prompts[-1] != prompts[0] else starts[-1] - 1
    run = np.cumsum(np.append(False, prompts[1:] != prompts[:-1]))
    return before[run].astype(index_dtype(len(prompts)))
