"""One config file describes one experiment: typed, frozen records, read from YAML and overridden on the command line.

Checks of single fields live here, checks that need two sections (or the model, or the machine) in `experiment.py`.
"""

from collections.abc import Hashable
from typing import Annotated, Any, Literal

import pydantic
import tyro
import yaml
from etils import epath
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from posttrain.errors import UserError, UserErrors
from posttrain.validation import describe_errors

Switch = Annotated[bool, tyro.conf.FlagConversionOff]
"""On the command line it takes a value, as every config key does: `--data.packing False`."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RunConfig(Section):
    dir: str = "runs/default"
    """Where the run lives: checkpoints, metrics, the resolved config, the export. Any path that epath opens."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of data order and of everything random."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the last checkpoint if there is one; never: refuse a directory that has one; must: refuse one
    that has none."""


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) beside frozen weights: `r`, or the `path` of an adapter, turns them on."""

    r: int | None = Field(default=None, ge=1)
    """Rank. 16 is usual."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is multiplied by alpha / r."""
    use_rslora: Switch = False
    """Multiplied by alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input while training, never in evaluation."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ("all-linear",)
    """Which weights have one: `all-linear` (those of attention and MLP, experts too), names as in PEFT (`q_proj`), or
    regular expressions of whole names with an optional layer range (`layers[0:12]/attn/(q|v)`)."""
    path: str | None = None
    """Start from this adapter, a directory in PEFT's format; it tells rank, alpha and targets."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keep the frozen weights of attention and MLP in 8 or 4 bits while training (Dettmers et al. 2023); needs the
    package qwix. An export is of the adapter as ever, and merges into the weights as they were."""

    @property
    def enabled(self) -> bool:
        return self.r is not None or self.path is not None


def _section(value: Any) -> Any:
    return {} if value is None else value


class ModelConfig(Section):
    path: str = ""
    """Hugging Face directory, hub id, or an exported run."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 on accelerators, float32 on CPU."""
    params_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters that the optimizer updates; bfloat16 ones are rounded stochastically, without which small
    updates would be lost. Under `lora` the others are kept in the compute dtype."""
    attention: Literal["auto", "reference", "chunked", "splash", "triton"] = "auto"
    """reference: quadratic memory; chunked: linear memory, skips blocks of other segments and of the future; splash: a
    kernel for TPUs; triton: one for GPUs, without windows and soft-caps. auto: splash on TPU, triton on GPU where the
    model allows it, else chunked."""
    moe: Literal["auto", "ragged", "blocks", "megablox"] = "auto"
    """How the experts of a mixture of experts multiply. ragged: XLA's `ragged_dot`, on most platforms as costly as all
    experts for every token; blocks: a loop over blocks of tokens, for CPU; megablox: a kernel for TPUs."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Of the load-balance loss of its routers. Default: the model's own where its config.json asks for the loss
    (`output_router_logits`), else 0."""
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    """Of its routers' z loss, which keeps their logits small."""
    remat: Literal["none", "minimal", "dots", "full", "offload"] = "dots"
    """What the backward pass recomputes: none keeps every activation; minimal recomputes elementwise work only; dots
    keeps the results of matrix products with weights; full keeps the layers' inputs only; offload keeps these and what
    attention gives, both in the host's memory."""
    lora: Annotated[LoraConfig, BeforeValidator(_section)] = LoraConfig()


class TokenizerConfig(Section):
    path: str | None = None
    """Default: the model's own."""
    chat_template: str | None = None
    """A .jinja file or a built-in one (chatml, llama3, gemma, minimal); base models need one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}`; a row's own `chat_template_kwargs` win."""
    add_special_tokens: tuple[str, ...] = ()
    """New tokens. The embeddings grow where needed, and the new rows start as the mean of the old ones."""
    eos_token: str | None = None
    """Another end-of-sequence token, from the vocabulary or `add_special_tokens`."""


Format = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "text",
    "prompt",
    "preference",
    "unpaired_preference",
    "ranking",
    "stepwise_supervision",
    "sharegpt",
    "alpaca",
    "hh",
    "tree",
]

Pairs = Literal["all", "best_worst", "neighbours"]


class RowsConfig(Section):
    """How the rows of a file are read."""

    format: Format = "auto"
    """auto: recognised from the columns."""
    columns: dict[str, str] = {}
    """What the columns are called here, by their usual names: `{prompt: question, completion: answer}`."""
    preference: Literal["error", "chosen"] = "error"
    """What supervised fine-tuning makes of preference rows; chosen: it trains on the chosen answers (of rankings on the
    best one, of equals the first; of unpaired rows on those labelled true)."""
    tree: Literal["all", "best", "pairs"] = "all"
    """Of message trees: all replies, each trained on once; the best-ranked line only; or, for objectives of pairs, the
    pairs of the ranked answers to one message, with the conversation up to it as their prompt."""
    pairs: Pairs = "all"
    """Of rankings (rows with scores or ranks of several answers, and `tree: pairs`): any two answers, the best against
    the worst (of equals the first), or any two with no rank between theirs. Equal answers are never paired."""
    margins: Switch = False
    """Of rankings with scores: a pair's margin is the difference of its scores, in whatever unit they are. For losses
    that read margins; without, they are 0."""


class SourceConfig(RowsConfig):
    path: str = ""
    """File, or pattern such as `chats/*.jsonl`: JSONL, JSON, Parquet or ArrayRecord, compressed or not; local or any
    URL of fsspec (`hf://datasets/ORG/NAME/...`, `gs://`, `s3://`)."""
    weight: float | None = Field(default=None, gt=0)
    """Share in the mixture, in samples; relative to the other sources' weights. Without weights every source is used
    whole."""
    repeat: int = Field(default=1, ge=1)
    """Passes over this source in one epoch; with a weight, at most so many."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most so many of its samples, chosen by run.seed."""


class HeldoutConfig(RowsConfig):
    path: str | None = None
    """A file of its own, or a pattern, for held-out loss."""
    fraction: float = Field(default=0.02, ge=0, lt=1)
    """Without a path: this share of the training samples is held out."""

    def as_source(self) -> SourceConfig:
        """The file as a source of its own. Needs a path."""
        return SourceConfig(**self.model_dump(exclude={"fraction"}))


LossOn = Literal["assistant", "completion", "last_assistant", "all", "system", "developer", "user", "tool"]


def _check_loss_on(value: tuple[LossOn, ...]) -> tuple[LossOn, ...]:
    alone = [name for name in value if name in ("completion", "last_assistant", "all")]
    if not value or (alone and len(value) > 1):
        raise ValueError(f"give one of assistant, completion, last_assistant, all, or roles; got {list(value)}")
    return value


class DataConfig(Section):
    train: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Training files."""
    heldout: HeldoutConfig = HeldoutConfig()
    max_length: int = Field(default=4096, ge=2)
    """Longest sample, in tokens."""
    row_length: int = Field(default=8192, ge=2)
    """Length of a packed row, in tokens; at least max_length."""
    packing: Switch = True
    """Several samples in one row, isolated from each other."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What becomes of samples longer than max_length. They are counted."""
    loss_on: Annotated[tuple[LossOn, ...], BeforeValidator(_as_tuple), AfterValidator(_check_loss_on)] = ("assistant",)
    """What is trained on: `assistant` (every turn), `last_assistant`, `completion` (all behind the prompt of
    prompt-completion rows) or `all`; or a list of roles, e.g. `[assistant, tool]`. Weights by message override it."""
    drop_duplicates: Switch = False
    """Training samples that are exactly alike (tokens and weights) are used once, the first of them, after the limits;
    otherwise they are only counted."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; train.max_steps, when set, decides instead."""
    on_bad_row: Literal["error", "skip"] = "error"
    """skip: bad rows are written to rejects.jsonl, up to max_bad_rows."""
    max_bad_rows: int = Field(default=100, ge=0)
    """With on_bad_row skip: more bad rows than this are an error."""
    cache_dir: str | None = None
    """Where tokenized data is kept; default: ~/.cache/posttrain/tokens (or $XDG_CACHE_HOME)."""


class ReferenceConfig(Section):
    """The model that preference losses compare with."""

    path: str | None = None
    """Default: the model that is trained, as it was at the start."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    logps: Literal["cached", "online", "adapter_off"] = "cached"
    """cached: its log-probabilities are computed once and kept on disk; online: it stays in memory; adapter_off: under
    model.lora, the frozen weights without the adapter, which take no memory of their own. Under model.lora the default
    model is the one without adapter, whichever is chosen."""


class ObjectiveConfig(BaseModel):
    """The loss by name; its own parameters stand beside the name and are checked where the loss is built."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True)
    name: str | tuple[str, ...] = "sft"
    """Which loss: sft, one of preference pairs (sigmoid, ipo, simpo, ...) or labelled answers (kto, ...), or reward;
    several losses of pairs, and sft of their chosen answers, are added up with loss_weights."""
    file: str | None = None
    """A Python file with losses of your own, named like the others."""


class TrainConfig(Section):
    global_batch_size: int = Field(default=64, ge=1)
    """Rows per optimizer step, over all devices and processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows per accumulation step, over all devices; default: as few as the mesh allows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps instead of after data.epochs."""
    grad_reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype in which gradients are reduced; default: the compute dtype."""
    xla_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Compiler options for the train step, over those of the chip (`train/chips.py`), for instance
    `{xla_jf_spmd_threshold_for_windowed_einsum_mib: 1000000}`, which turns collective matmul off on TPU."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite changes nothing; then stop (with its rows saved), or go on."""


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=2e-5, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant; linear or cosine decay to min_learning_rate_ratio; wsd: constant, then linear decay
    over the last fifth of the steps."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises linearly from 0."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where a decay ends, as a share of learning_rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which both moments are kept; they are updated in float32. In bfloat16 the second one is rounded
    stochastically: to the nearest it could not shrink, since a step takes less from it than half of what it can tell.
    """
    memory: Literal["device", "host"] = "device"
    """Where the moments are between steps. host: in the host's memory, from which a layer at a time visits the device.
    """
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = (".*norm/scale", ".*/bias")
    """Parameters without decay: regular expressions of whole names, with an optional layer range
    (`layers[0:12]/.*`)."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this global norm; null: never."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: regular expressions as in no_decay."""
    only_new_tokens: Switch = False
    """Train the embedding rows of tokenizer.add_special_tokens and nothing else."""


class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1: whatever devices remain. Without any, replica runs across slices
    and fsdp within one; where the rows are too few for that, context takes what remains."""

    replica: int = 1
    """Across slices: rows are split, parameters are repeated."""
    data: int = 1
    """Rows are split, parameters are repeated."""
    fsdp: int = -1
    """Rows are split, and so are parameters and optimizer state."""
    context: int = 1
    """Tokens of a row are split, and so are parameters and optimizer state. row_length must be a multiple of twice it.
    """
    tensor: int = 1
    """Heads, MLP width and vocabulary are split."""
    expert: int = 1
    """Rows are split, and so are the experts of a mixture of experts; all else is as with fsdp."""


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints kept for the lowest held-out loss, beside the last ones."""
    export_at_end: Switch = True
    """Write the Hugging Face directory, or under model.lora that of the adapter, when training ends."""


class EvaluateConfig(Section):
    every: int = Field(default=100, ge=1)
    """Steps between held-out losses; the start and the end are always evaluated."""


class LogConfig(Section):
    every: int = Field(default=1, ge=1)
    """Steps between logged metrics."""
    tensorboard: Switch = True
    wandb: str | None = None
    """Weights & Biases project (not served yet)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profile written to the run directory."""


class Config(Section):
    """One experiment."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own loader lets the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one section; remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str) -> Config:
    """Reads a YAML config. Raises `UserErrors` with every unknown key and wrong value at once."""
    file = epath.Path(path)
    if not file.is_file():
        hint = " (it is a directory)" if file.is_dir() else ""
        raise UserError(f"{path}: no such config file{hint}; see configs/ for examples")
    try:
        raw = yaml.load(file.read_text(), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(raw).__name__}")
    return parse_config(raw, path)


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Validates a raw mapping; `origin` names it in errors."""
    try:
        return Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise UserErrors([f"{origin}: {problem}" for problem in describe_errors(error, Config)]) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
