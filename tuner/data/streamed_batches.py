"""Batches of a stream of samples, from any place of it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.data.batches import batches_by_length
from tuner.errors import CheckpointError, DataError
from tuner.types import Batch, DrawnSample, SampleStream, StreamPosition


class StreamedBatches:
    """Endless iterator over windows, as `tuner.data.batches.Batches`.

    Every sample of the stream occurs once per epoch; the last window of an epoch may be smaller.

    Args:
        stream: of samples.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a window.
        pad_id: token written behind short samples.
        seed: with the stream's fingerprint and the epoch, decides the order.

    Attributes:
        position: behind the last window; equal positions continue equally.
    """

    def __init__(self, stream: SampleStream, *, batch_size: int, accumulation: int, pad_id: int, seed: int) -> None:
        self.position = StreamPosition()
        self._stream, self._seed = stream, seed
        self._batch_size, self._window, self._pad_id = batch_size, batch_size * accumulation, pad_id
        self._left: Iterator[DrawnSample] | None = None
        self._next: DrawnSample | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next window.

        Raises:
            DataError: a row that cannot be read, or a whole epoch without a sample.
        """
        if self._left is None:
            self._left = self._stream.samples(self._seed, self.position)
            self._next = next(self._left, None)
        window: list[DrawnSample] = []
        while self._next is not None and len(window) < self._window:
            window.append(self._next)
            self._next = next(self._left, None)
        if not window:
            raise DataError("data.streaming: there is no sample to train on in all of the data")
        self.position = window[-1].after
        if self._next is None:
            self.position, self._left = StreamPosition(self.position.epoch + 1), None
        samples, numbers = [drawn.sample for drawn in window], [drawn.number for drawn in window]
        return batches_by_length(samples, self._batch_size, self._pad_id, numbers)

    @property
    def at_epoch_end(self) -> bool:
        return self.position == StreamPosition(self.position.epoch) and self.position.epoch > 0

    @property
    def epochs_done(self) -> int:
        return self.position.epoch

    def described(self) -> Mapping[str, Any]:
        return {"packing": "none"}

    def state_dict(self) -> dict[str, Any]:
        at = self.position
        return {"epoch": at.epoch, "index": at.index, "piece": at.piece, "fingerprint": self._stream.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position in the same data.

        Raises:
            CheckpointError: it is of other data.
        """
        if (before := state["fingerprint"]) != (now := self._stream.fingerprint):
            raise CheckpointError(
                f"the data is not what this run began with: its fingerprint was {before[:16]} and is {now[:16]}; give"
                " another out, or the data as it was"
            )
        self.position, self._left = StreamPosition(state["epoch"], state["index"], state["piece"]), None
