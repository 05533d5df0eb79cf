"""`tuner generate`: text from a model, with an adapter or without."""

from __future__ import annotations

from omegaconf import DictConfig

from tuner.build import require_embedded
from tuner.errors import ConfigError
from tuner.generation import generate as continue_tokens
from tuner.types import Message
from tuner.verbs.source import source_of


def generate(cfg: DictConfig, overrides: list[str]) -> str:
    """What the model replies to `prompt`.

    Raises:
        TunerError: a model that cannot be loaded, or a prompt that is empty or fills the model's context.
    """
    source = source_of(cfg, overrides)
    tokenizer = source.tokenizer
    if cfg.chat:
        system: list[Message] = [{"role": "system", "content": cfg.system}] if cfg.system else []
        messages: list[Message] = [*system, {"role": "user", "content": cfg.prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        prompt = tokenizer.encode(cfg.prompt)
    require_embedded(prompt, source.model)
    context = source.model.max_position_embeddings
    if not 0 < len(prompt) < context:
        raise ConfigError(
            f"prompt is {len(prompt)} tokens; valid: 1 to {context - 1}, so that a reply fits the context"
        )
    ids = continue_tokens(
        source.load(),
        prompt,
        max_new_tokens=cfg.max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
    )
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
