"""A sentencepiece `tokenizer.model`, written in sentencepiece's own protobuf.

Its settings are those of the tokenizers that Llama, Mistral, Phi-3 and Gemma were published with: BPE, no
normalisation, spaces kept, what no piece spells as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The numbers of sentencepiece's `ModelProto.SentencePiece.Type`, which GGUF files use too."""

BPE = 2
"""`TrainerSpec.ModelType`."""

SPACE = "\u2581"
"""How a piece spells a space."""


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]],
    roles: Mapping[str, int],
    *,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """The content of a `tokenizer.model`.

    Args:
        pieces: text, score and type of each, by id.
        roles: id of `unk`, `bos`, `eos` and `pad`, -1 for one that there is not; `unk` is the piece of type `UNKNOWN`.
        dummy_prefix: a space is put before a text.
        remove_extra_whitespaces: spaces at its ends and repeated ones are taken away.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined] # made when it is imported
    for text, score, type_ in pieces:
        model.pieces.add(piece=text, score=score, type=type_)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = any(type_ == BYTE for _, _, type_ in pieces)
    for role, id_ in roles.items():
        setattr(trainer, f"{role}_id", id_)
        if id_ >= 0:
            setattr(trainer, f"{role}_piece", pieces[id_][0])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = dummy_prefix
    normalizer.remove_extra_whitespaces = remove_extra_whitespaces
    normalizer.escape_whitespaces = True
    content: bytes = model.SerializeToString()
    return content
