"""The tokenizer inside a GGUF file -> the files that transformers loads. Called by `gguf.py`.

Of a byte-level BPE ("gpt2") a GGUF holds the tokens, their types, merges and template; how text is split before the
merges it only names, so the names are a table here. Of a sentencepiece vocabulary ("llama") it holds the pieces, their
scores and types. What a file leaves unsaid is as in llama.cpp, whose test vectors the tests hold the ids to.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from posttrain.data.spm import Kind, Pieces, add_tokens, bpe_model, decoder, spaces, surround
from posttrain.errors import UserError
from posttrain.models.weights import write_json

CASE_FREE_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = CASE_FREE_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + WORDS_AND_SPACES
QWEN2_SPLIT = CASE_FREE_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + WORDS_AND_SPACES
"""As in the tokenizer.json of Llama 3 and Qwen2."""


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def _byte_level(*, gpt2_split: bool) -> pre_tokenizers.PreTokenizer:
    """Text to the 256 byte characters; with GPT-2's own split first, or none."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_split)


@dataclass(frozen=True)
class Splitting:
    """What a pre-tokenizer name stands for."""

    steps: Callable[[], list[pre_tokenizers.PreTokenizer]]
    compose: bool = False
    """Whether text is brought to Unicode NFC first."""
    whole_words: bool = False
    """Whether a piece that is a token is taken without looking at the merges."""
    add_bos: bool = False
    """Whether text starts with the BOS token where the file does not say."""


GPT2 = Splitting(lambda: [_byte_level(gpt2_split=True)])
SMOLLM = Splitting(lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level(gpt2_split=True)])
LLAMA3 = Splitting(lambda: [_split(LLAMA3_SPLIT), _byte_level(gpt2_split=False)], whole_words=True, add_bos=True)
QWEN2 = Splitting(lambda: [_split(QWEN2_SPLIT), _byte_level(gpt2_split=False)], compose=True)
DEFAULT = Splitting(
    lambda: [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(gpt2_split=False),
    ]
)

SPLITTINGS = {
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "smollm2": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "default": DEFAULT,
}
"""`tokenizer.ggml.pre` -> how text is split, as llama.cpp (`llama-vocab.cpp`) and the models' own tokenizers do."""


BPE, SPM = "gpt2", "llama"
"""`tokenizer.ggml.model` of the kinds that are served."""

SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of a sentencepiece vocabulary that the file does not give."""

PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's special tokens that leave the whitespace behind them alone; GGUF has no field for it."""


def token_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """Id of the token with a role (`bos`, `eos`, `padding`, `unknown`, `eot`, `eom`), if there is one.

    Raises `UserError` when it is beyond the vocabulary."""
    key = f"tokenizer.ggml.{role}_token_id"
    default = SPM_IDS.get(role) if metadata.get("tokenizer.ggml.model") == SPM else None
    value = metadata.get(key, default)
    count = len(metadata.get("tokenizer.ggml.tokens", ()))
    if value is not None and not 0 <= value < count:
        raise UserError(f"{key}: {value} is not one of the {count} tokens")
    return value


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a turn: EOS first, then end of turn and end of message where the file names them."""
    ids = [token_id(metadata, role) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in ids if i is not None))


def write_tokenizer(metadata: Mapping[str, Any], directory: epath.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Raises `UserError` when the file's tokenizer is of another kind, unknown or inconsistent.
    """
    tokenizer = build_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(metadata, role) for name, role in roles.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = length
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", special)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata (`tokenizer.ggml.*`) describes."""
    model = metadata.get("tokenizer.ggml.model")
    if model == SPM:
        tokenizer, add_bos = _sentencepiece(metadata), True
    elif model == BPE:
        splitting = _splitting(metadata)
        tokenizer, add_bos = _byte_level_bpe(metadata, splitting), splitting.add_bos
    else:
        raise UserError(
            f"tokenizer.ggml.model: {model!r} is not served; "
            f"served: {BPE!r} (byte-level BPE) and {SPM!r} (sentencepiece BPE)"
        )
    _add_bos_and_eos(tokenizer, metadata, add_bos)
    return tokenizer


def _pieces(metadata: Mapping[str, Any]) -> Pieces:
    """The vocabulary. Raises `UserError` where it is inconsistent."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [Kind.NORMAL] * len(tokens))
    if not tokens or len(kinds) != len(tokens):
        raise UserError(f"tokenizer.ggml: {len(tokens)} tokens with {len(kinds)} token types; the file is broken")
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(f"tokenizer.ggml.tokens: {repeated[0]!r} occurs more than once; the file is broken")
    scores = metadata.get("tokenizer.ggml.scores", [])
    if metadata["tokenizer.ggml.model"] == SPM and len(scores) != len(tokens):
        raise UserError(f"tokenizer.ggml.scores: {len(scores)} scores for {len(tokens)} tokens; the file is broken")
    unknown = token_id(metadata, "unknown")
    if unknown is not None:
        # Unused ids only fill the embedding up: they stand for no text. Older converters call them unknown.
        kinds = [Kind.UNUSED if k == Kind.UNKNOWN and id != unknown else k for id, k in enumerate(kinds)]
    return Pieces(tokens, scores, kinds, unknown)


def _byte_level_bpe(metadata: Mapping[str, Any], splitting: Splitting) -> Tokenizer:
    pieces = _pieces(metadata)
    vocab = pieces.vocab
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(metadata, vocab), ignore_merges=splitting.whole_words))
    if splitting.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting.steps())
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, pieces)
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    pieces = _pieces(metadata)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer = Tokenizer(bpe_model(pieces))
    tokenizer.normalizer = normalizers.Sequence(spaces(prefix=prefix))
    tokenizer.decoder = decoder(prefix=prefix)
    name = str(metadata.get("general.name", "")).lower()
    is_phi3 = metadata.get("general.architecture") == "phi3" or "phi-3" in name or "phi3" in name
    strip_right = set(pieces.texts) - set(PHI3_PLAIN) if is_phi3 else ()
    add_tokens(tokenizer, pieces, strip_right=strip_right, escaped=not prefix)
    return tokenizer


def _splitting(metadata: Mapping[str, Any]) -> Splitting:
    name = metadata.get("tokenizer.ggml.pre")
    known = ", ".join(SPLITTINGS)
    if name is None:
        raise UserError(
            f"tokenizer.ggml.pre: missing, so how to split text is unknown; known names: {known}; "
            "a current llama.cpp converter writes it"
        )
    if name not in SPLITTINGS:
        raise UserError(f"tokenizer.ggml.pre: {name!r} is not known; known: {known}")
    return SPLITTINGS[name]


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(metadata.get("tokenizer.ggml.merges", [])):
        pair = tuple(line.split(" "))
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            raise UserError(f"tokenizer.ggml.merges[{number}]: {line!r} does not join two tokens to a third")
        merges.append(pair)
    return merges


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: Mapping[str, Any], add_bos: bool) -> None:
    """BOS before and EOS after the text, as the file's flags say."""
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    found = {}
    for role in (role for role, add in wanted.items() if add):
        index = token_id(metadata, role)
        if index is None:
            raise UserError(f"tokenizer.ggml.add_{role}_token: true, but tokenizer.ggml.{role}_token_id is missing")
        found[role] = (metadata["tokenizer.ggml.tokens"][index], index)
    surround(tokenizer, found.get("bos"), found.get("eos"))
