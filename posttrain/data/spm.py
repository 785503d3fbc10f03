"""SentencePiece vocabularies -> fast tokenizers: of `tokenizer.model` files here, of GGUF files in `models/`.

`tokenizer_files.py` calls `convert_directory` for directories that hold a sentencepiece model and no tokenizer.json.
The ids are those of the sentencepiece library, which the tests hold it to, with the text of control and user-defined
pieces cut out first, as fast tokenizers do.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from posttrain.errors import UserError

SPACE = "\u2581"
"""Stands for a space inside pieces."""


class Kind(IntEnum):
    """The type of a piece, as sentencepiece and GGUF both number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """A vocabulary; the index is the id."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unknown_id: int | None

    @property
    def vocab(self) -> dict[str, int]:
        """Text to id, of those that stand for text."""
        return {t: i for i, (t, k) in enumerate(zip(self.texts, self.kinds, strict=True)) if k != Kind.UNUSED}

    @property
    def has_bytes(self) -> bool:
        """Whether text that no piece covers is spelled in bytes."""
        return Kind.BYTE in self.kinds


def bpe_model(pieces: Pieces) -> models.BPE:
    """Byte-pair encoding: neighbours join into the piece with the highest score.

    The library merges by rank instead, so every pair of pieces that makes a piece gets a rank in the order of that
    piece's score. Of equal scores the leftmost pair is to join first, which leaves the longest on the left: so a longer
    left half comes first.
    """
    vocab = pieces.vocab
    ranked = []
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        if kind in (Kind.NORMAL, Kind.USER_DEFINED):
            halves = ((text[:at], text[at:]) for at in range(1, len(text)))
            ranked += [
                (-score, -len(left), (left, right)) for left, right in halves if left in vocab and right in vocab
            ]
    ranked.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab=vocab,
        merges=[pair for _, _, pair in ranked],
        unk_token=None if pieces.unknown_id is None else pieces.texts[pieces.unknown_id],
        fuse_unk=True,
        byte_fallback=pieces.has_bytes,
    )


def spaces(*, prefix: bool) -> list[normalizers.Normalizer]:
    """Spaces to their stand-in, one put before each stretch of text if asked."""
    return [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]


def decoder(*, prefix: bool) -> decoders.Decoder:
    """Pieces to text, less the space that was put before it."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def add_tokens(
    tokenizer: Tokenizer, pieces: Pieces, *, strip_right: Collection[str] = (), escaped: bool = False
) -> None:
    """Make the unknown, control and user-defined pieces tokens that are cut out of text before anything else.

    Those in `strip_right` swallow the whitespace behind them. `escaped`: user-defined pieces spell spaces with the
    stand-in, so these are looked for in normalized text, which must not have gained a space.
    """
    special, plain = [], []
    for text, kind in zip(pieces.texts, pieces.kinds, strict=True):
        if kind in (Kind.UNKNOWN, Kind.CONTROL):
            special.append(AddedToken(text, normalized=False, rstrip=text in strip_right))
        elif kind == Kind.USER_DEFINED:
            normalized = escaped and SPACE in text
            plain.append(AddedToken(text, normalized=normalized, rstrip=text in strip_right))
    # All at once: the library builds its search tree anew at every call, and Gemma has 6,400 of them.
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def surround(tokenizer: Tokenizer, before: tuple[str, int] | None, after: tuple[str, int] | None) -> None:
    """Have a special token (its text and id), such as BOS, put before and after a text."""
    if before is None and after is None:
        return

    def around(text: str, sequence: int) -> list[str]:
        names = (before and before[0], text, after and after[0])
        return [f"{name}:{sequence}" for name in names if name is not None]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=[token for token in (before, after) if token is not None],
    )


# ---- tokenizer.model ------------------------------------------------------------------------------------------------

NO_EQUAL = "no fast tokenizer has the same ids; fix: put the tokenizer.json of the model's authors there"

_READ_HERE = ("legacy", "add_prefix_space", "sp_model_kwargs", "vocab_file", "tokenizer_file", "use_fast")
"""Keys of tokenizer_config.json that describe the conversion, which is done then."""


def convert_directory(source: Path, target: Path, name: str) -> dict[str, bool]:
    """Write the tokenizer.json and tokenizer_config.json that transformers loads for `source`/tokenizer.model.

    Returns whether BOS and EOS (`add_bos_token`, `add_eos_token`) go around a text: as a tokenizer_config.json beside
    the model says, otherwise BOS where the model has one. For the conversion count, too, its `add_prefix_space`
    (otherwise as the model says) and `legacy` (true: the space is put before each stretch between special tokens, as
    old versions of transformers did and as is done for models that normalize text; otherwise before the whole text
    only). The rest of it is kept. `name` is what errors call the directory. Raises UserError for what cannot be read or
    not be tokenized the same.
    """
    proto = _read_model(source / "tokenizer.model", f"{name}/tokenizer.model")
    config = _read_config(source / "tokenizer_config.json", f"{name}/tokenizer_config.json")
    asked = config.get("add_prefix_space")
    prefix = proto.normalizer_spec.add_dummy_prefix if asked is None else bool(asked)
    if prefix and any(piece.type == Kind.USER_DEFINED and SPACE in piece.piece for piece in proto.pieces):
        raise UserError(
            f"{name}/tokenizer.model: user-defined pieces with spaces, and a space before the text; {NO_EQUAL}"
        )
    tokenizer = _convert(proto, prefix=prefix, legacy=bool(config.get("legacy")))
    trainer = proto.trainer_spec
    roles = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    roles["pad_token"] = trainer.pad_id
    special = {role: proto.pieces[id].piece for role, id in roles.items() if 0 <= id < len(proto.pieces)}
    kept = {key: value for key, value in config.items() if key not in _READ_HERE and value is not None}
    kept = {"clean_up_tokenization_spaces": False, **special, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    added = {"add_bos_token": "bos_token" in special, "add_eos_token": False}
    return {key: default if (value := config.get(key)) is None else bool(value) for key, default in added.items()}


def _read_model(file: Path, name: str) -> Any:
    """The model's protocol buffer. Raises UserError where it is broken or asks for what has no equal."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        reason = "to read it takes the packages sentencepiece and protobuf; fix: pip install sentencepiece protobuf"
        raise UserError(f"{name}: {reason}") from error
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(f"{name}: no readable sentencepiece model ({error}); fix: copy or download it again") from error
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    unigram = trainer.model_type == trainer.UNIGRAM
    problems = {
        "neither BPE nor unigram": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        "no unknown piece": not 0 <= trainer.unk_id < len(proto.pieces),
        "spaces as suffix": trainer.treat_whitespace_as_suffix,
        "spaces as they are": not spec.escape_whitespaces,
        "byte pieces of a unigram model": unigram and Kind.BYTE in kinds,
        "unused pieces of a unigram model": unigram and Kind.UNUSED in kinds,
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise UserError(f"{name}: {', '.join(found)}; {NO_EQUAL}")
    return proto


def _read_config(file: Path, name: str) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name}: no JSON: {error}; fix: copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{name}: no JSON object; fix: copy it again")
    if "auto_map" in config:
        raise UserError(f"{name}: auto_map asks for code of the model's own, which is not run; fix: a tokenizer.json")
    return config


def _convert(proto: Any, *, prefix: bool, legacy: bool) -> Tokenizer:
    """The tokenizer of a model, without what is put around a text.

    In two things the `tokenizers` library, and so every tokenizer.json made of such a model, is not exact. It loses a
    combining mark behind a character that a table of Unicode normalization replaces; and it adds up unigram scores in
    double precision, so that of two spellings with the same score (`....` as 1 + 3 or 3 + 1) it may take the other.
    """
    spec = proto.normalizer_spec
    pieces = Pieces(
        texts=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        # Spaces become their stand-in: a piece with a plain one is never found.
        kinds=[Kind.UNUSED if " " in piece.piece else piece.type for piece in proto.pieces],
        unknown_id=proto.trainer_spec.unk_id,
    )
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        scored = list(zip(pieces.texts, pieces.scores, strict=True))
        tokenizer = Tokenizer(models.Unigram(scored, pieces.unknown_id, False))
    else:
        tokenizer = Tokenizer(bpe_model(pieces))
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    # The start of the text is found by its offset, which normalization moves.
    once = prefix and not legacy and not steps
    steps += spaces(prefix=prefix and not once)
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if once:
        # Metaspace puts no space before one; none is left here, so a plain one is put there and then replaced.
        put, replace = pre_tokenizers.Metaspace(" ", "first", False), pre_tokenizers.Metaspace(SPACE, "never", False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([put, replace])
    tokenizer.decoder = decoder(prefix=prefix)
    add_tokens(tokenizer, pieces, escaped=True)
    return tokenizer
