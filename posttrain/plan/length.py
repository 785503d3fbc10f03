"""How long a run is, from its data: what hours and cost are counted with where `--tokens` is not given."""

from dataclasses import dataclass

from posttrain.config import Config
from posttrain.experiment import build_data, load_tokenizer
from posttrain.objectives.find import build_objective


@dataclass(frozen=True)
class RunLength:
    """The steps of a run as its data make them."""

    steps: int
    epoch_steps: int
    """Of the first epoch."""
    epoch_tokens: int
    """Real tokens in the rows of the first epoch."""
    filled: float
    """Real tokens per place in these rows, 0 to 1; rows that only fill the last batch are not among them."""


def run_length(config: Config) -> RunLength:
    """Counts as training does: tokenizes what is not in the token cache and plans the rows; starts no device.

    Raises `UserError` where the data or the tokenizer are not there, or something is wrong with them.
    """
    objective, tokenizer = build_objective(config.objective), load_tokenizer(config)
    data = build_data(config, tokenizer, rows=objective.rows, mismatched=objective.mismatched, rejects_dir=None)
    train = data.train
    return RunLength(train.num_steps, train.steps_per_epoch[0], train.num_tokens, train.efficiency)
