"""Reward models as Hugging Face directories: sequence classification with one label, `XForSequenceClassification`.

The same for every family: `hf.py` shows a family such a config as that of its causal model and asks here for what
differs, the weight table's head and a few keys of config.json. transformers scores the last token of a row that is not
`pad_token_id` (its `GenericForSequenceClassification`), so config.json must name one for batches to be scored at all.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.errors import UserError
from posttrain.models.decoder import DecoderConfig
from posttrain.models.weights import Weight
from posttrain.records import Head

log = logging.getLogger(__name__)

SCORE = Weight("score/kernel", "score.weight", "C D -> C D")

CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"


def is_reward_model(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classification model; raises `UserError` unless it has one label."""
    if not any(name.endswith(CLASSIFIER) for name in _architectures(raw)):
        return False
    entries, stated = raw.get("id2label"), raw.get("num_labels")
    key, labels = "num_labels", stated
    if stated in (None, 1):  # transformers: 2 where nothing is said
        key, labels = ("id2label", len(entries)) if isinstance(entries, Mapping) else (key, stated or 2)
    if labels != 1:
        raise UserError(f"{key}: {_architectures(raw)[0]} with {labels!r} labels is not served: a reward model has 1")
    return True


def as_causal(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What its family sees of a reward model's config.json; another one as it is."""
    names = _architectures(raw)
    if not any(name.endswith(CLASSIFIER) for name in names):
        return dict(raw)
    return {**raw, "architectures": [_renamed(name, (CLASSIFIER,), CAUSAL) for name in names]}


def with_head(config: DecoderConfig, head: Head, raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """The config of a model of `raw` that gets this head. A language model may become a reward model, whose score is
    new; a reward model has no vocabulary projection to become a language model with: raises `UserError`."""
    if head == "lm" and config.num_labels:
        raise UserError(
            f"{where}: a reward model ({_architectures(raw)[0]}), which scores texts and has no vocabulary projection "
            "to predict tokens with; use posttrain score or objective.name reward, or name a causal language model"
        )
    return replace(config, num_labels=1) if head == "score" else config


def weight_table(weights: tuple[Weight, ...], head_name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """A family's table as a model of this config has it: of a reward model with the score in place of the head."""
    if not config.num_labels:
        return weights
    return (*(weight for weight in weights if weight.name != head_name), SCORE)


def exported_config(
    written: Mapping[str, Any], raw: Mapping[str, Any], causal: Sequence[str], pad_id: int | None
) -> dict[str, Any]:
    """What a family has written for a reward model that came from `raw`, as transformers writes one with one label:
    there `num_labels` is the length of `id2label`. `causal` is what its causal model is called."""
    result = {**written, "architectures": [_renamed(name, (CAUSAL, "Model"), CLASSIFIER) for name in causal]}
    if not is_reward_model(raw):
        result.pop("num_labels", None)
        result |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return result if pad_id is None else {**result, "pad_token_id": pad_id}


def pad_id(tokenizer: Tokenizer | None) -> int | None:
    """A token to pad with that is never taken for a part of a text: the tokenizer's own if it can be, else a special
    token that no text has. Where every special token is in use it is the tokenizer's own, or its end token.

    transformers 5 and 4.5x score the last token that is not `pad_token_id`, earlier 4.x the one before the first that
    is; where texts end with it, as they do when it is the end token, both would score another token than was trained.
    """
    if tokenizer is None:
        return None
    used = {tokenizer.eos_id, tokenizer.bos_id, *_rendered_ids(tokenizer)}
    if tokenizer.pad_id is not None and tokenizer.pad_id not in used:
        return tokenizer.pad_id
    free = [id for id in sorted(tokenizer.special_ids) if id not in used]
    named = [id for word in ("pad", "reserved", "unused") for id in free if word in tokenizer.added_texts[id].lower()]
    if not free:
        log.warning(
            "%s: no special token is free to pad with, so one pads that texts have too: transformers will score texts "
            "that end with it at another token than posttrain",
            tokenizer.source,
        )
        return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return [*named, *free][0]


def _rendered_ids(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is None:
        return []
    try:
        return tokenizer.encode(
            tokenizer.render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
        )
    except RenderError:  # a template for another kind of conversation
        return []


def _renamed(name: str, endings: Sequence[str], ending: str) -> str:
    for old in endings:
        if name.endswith(old):
            return name.removesuffix(old) + ending
    return name


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []
