"""`tuner generate`: text from a model, with an adapter or without."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig

from tuner.errors import ConfigError
from tuner.generation import generate_batch
from tuner.models.decoder import Decoder
from tuner.types import Tokenizer
from tuner.verbs.prompts import Prompt, prompts_of
from tuner.verbs.source import Source, source_of


def generate(cfg: DictConfig, overrides: list[str]) -> Iterator[str]:
    """What the model replies to `prompt`, or a JSON object a line for each prompt of the file `prompts`, in its order.

    Raises:
        TunerError: a model that cannot be loaded, a file that cannot be read, or a prompt that is empty or fills the
            model's context; before anything is written.
    """
    prompts = prompts_of(cfg.prompt, cfg.prompts, cfg.system, chat=cfg.chat)
    source = source_of(cfg, overrides)
    tokenizer = source.tokenizer
    texts = [encoded(prompt, source) for prompt in prompts]
    replies = answered(source.load(), texts, cfg, tokenizer)
    if cfg.prompts is None:
        return replies
    rows = zip(prompts, replies, strict=True)
    return (json.dumps({**prompt.row, "reply": reply}, ensure_ascii=False) for prompt, reply in rows)


def answered(model: Decoder, texts: Sequence[Sequence[int]], cfg: DictConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """The replies to tokenized prompts, `batch_size` of them at a time."""
    for first in range(0, len(texts), cfg.batch_size):
        for ids in generate_batch(
            model,
            texts[first : first + cfg.batch_size],
            max_new_tokens=cfg.max_new_tokens,
            end_ids=tokenizer.reply_end_ids if cfg.chat else tokenizer.end_ids,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=cfg.seed,
        ):
            yield tokenizer.decode(ids, skip_special_tokens=True).strip()


def encoded(prompt: Prompt, source: Source) -> Sequence[int]:
    """The tokens that the model continues.

    Raises:
        TunerError: none, more than the context holds with one of a reply, or tokens that the model does not have.
    """
    if prompt.messages is not None:
        ids = source.tokenizer.apply_chat_template(prompt.messages, tools=prompt.tools, add_generation_prompt=True)
    else:
        # As it is written, control tokens too, and begun as the model's own texts are
        ids = source.tokenizer.encode(prompt.text, control_tokens=True, add_special_tokens=True)
    context = source.model.max_position_embeddings
    if not 0 < len(ids) < context:
        raise ConfigError(
            f"{prompt.where} is {len(ids)} tokens; valid: 1 to {context - 1}, so that a reply fits the context"
        )
    source.require_embedded(ids)
    return ids
