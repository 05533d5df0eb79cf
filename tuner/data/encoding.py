"""From conversations to tokens, a chunk at a time: what each process that tokenizes does."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tuner.types import Message, Tokenizer, Tools

if TYPE_CHECKING:
    from tuner.data.dataset import Example

TrainOn = Literal["response", "all", "last_turn"]


@runtime_checkable
class BatchEncoder(Protocol):
    """A tokenizer that encodes many conversations at once faster than one by one."""

    def encode_chats(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Tools | None] | None = None,
        last_reply_only: bool = False,
    ) -> list[tuple[list[int], list[bool]]]: ...


@dataclass(frozen=True)
class Encoded:
    """A chunk of examples as tokens: a sample of each, or several of a text that is cut into pieces.

    Attributes:
        tokens: int32, those of all samples one behind the other, each cut at `max_seq_len`.
        trained: uint8, the same length; 1 where a token is trained on.
        lengths: int64 [samples], the tokens of each before it was cut.
        owners: int64 [samples], the number in the chunk of the example that each is of.
        learns: bool [samples], whether a token that is left is trained on and can be predicted.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    owners: NDArray[np.int64]
    learns: NDArray[np.bool_]


@dataclass(frozen=True)
class Encoder:
    """What is done with a chunk; it can be sent to another process.

    Args:
        tokenizer: the model's own.
        train_on: which tokens are trained on: those of every reply, all, or those of the last reply.
        max_seq_len: where samples are cut.
    """

    tokenizer: Tokenizer
    train_on: TrainOn
    max_seq_len: int

    def __call__(self, examples: Sequence[Example]) -> Encoded:
        """The samples of examples, in their order."""
        lengths, owners, learns = [], [], []
        tokens, trained = array("i"), bytearray()
        for owner, ids, mask in self._samples(examples):
            lengths.append(len(ids))
            owners.append(owner)
            tokens.extend(ids[: self.max_seq_len])
            trained.extend(mask[: self.max_seq_len])
            learns.append(True in mask[1 : self.max_seq_len])  # a prediction exists from the second position on
        whole = np.frombuffer(tokens, np.int32), np.frombuffer(trained, np.uint8)
        return Encoded(*whole, np.array(lengths, np.int64), np.array(owners, np.int64), np.array(learns, np.bool_))

    def _samples(self, examples: Sequence[Example]) -> Iterator[tuple[int, Sequence[int], Sequence[bool]]]:
        """Owner, ids and mask of each sample."""
        chats = iter(self._chats([example for example in examples if example.text is None]))
        for owner, example in enumerate(examples):
            if example.text is None:
                ids, is_reply = next(chats)
                yield owner, ids, [True] * len(ids) if self.train_on == "all" else is_reply
                continue
            ids = self._text(example.text)
            size = self.max_seq_len if example.chunk else max(len(ids), 1)
            for at in range(0, len(ids), size):
                piece = ids[at : at + size]
                yield owner, piece, [True] * len(piece)

    def _text(self, text: str) -> list[int]:
        """A whole text with the special tokens around it, so that its end can be learnt too."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return ids if ids[-1:] == [self.tokenizer.eos_id] else [*ids, self.tokenizer.eos_id]

    def _chats(self, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
        last_only = self.train_on == "last_turn"
        if isinstance(self.tokenizer, BatchEncoder):
            conversations, tools = [one.messages for one in examples], [one.tools for one in examples]
            return self.tokenizer.encode_chats(conversations, tools=tools, last_reply_only=last_only)
        return [
            self.tokenizer.encode_chat(one.messages, tools=one.tools, last_reply_only=last_only) for one in examples
        ]
