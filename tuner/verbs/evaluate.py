"""`tuner evaluate`: loss and perplexity on a dataset's validation split."""

from __future__ import annotations

import math

from hydra.utils import instantiate
from omegaconf import DictConfig

from tuner.data.batches import batches_by_length
from tuner.loop import evaluate as mean_loss
from tuner.row_limit import RowLimit
from tuner.types import Dataset
from tuner.verbs.source import source_of


def evaluate(cfg: DictConfig, overrides: list[str]) -> str:
    """Mean cross-entropy a trained token, in nats, and its exponential.

    Batches that memory runs out for are halved, which changes the mean by rounding, and warned of.

    Raises:
        TunerError: a model or data that cannot be loaded.
    """
    source = source_of(cfg, overrides)
    dataset: Dataset = instantiate(source.settings.data).load(source.tokenizer)
    source.require_embedded([source.tokenizer.pad_id, dataset.largest_token])
    batches = batches_by_length(dataset.validation, cfg.batch_size, source.tokenizer.pad_id)
    loss = mean_loss(source.load(), batches, source.device, RowLimit(halves=True))
    trained = sum(batch.num_trained for batch in batches)
    return (
        f"data: {dataset.name}, {len(dataset.validation)} validation samples, {trained} trained tokens, "
        f"fingerprint {dataset.fingerprint[:16]}\nval_loss: {loss}\nperplexity: {math.exp(min(loss, 700.0))}"
    )
