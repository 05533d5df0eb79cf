"""A tokenizer of a few hundred tokens, for `model=tiny` and for tests: written down, not trained, so it never changes.

Byte-level BPE as in GPT-2 and SmolLM2: every text has an encoding, and the merges below (the commonest pairs of English
letters) make it about two thirds as long as its bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# In the order BPE applies them; Ġ stands for a space before the letters
_MERGES = """
Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ c|n d|Ġ o|e s|Ġ w|o r|Ġ f|i s|e n|i t|Ġ b|o u|Ġ p|in g|e d|a n|Ġo f|Ġ m|
a l|Ġt o|Ġ in|a r|Ġa nd|o m|i on|Ġ d|l e|i c|a s|Ġ h|l l|en t|Ġ n|Ġ e|s e|Ġ l|Ġ g|Ġ re|r o|v e|Ġ is|t er|u r|c t|
Ġ u|at ion|Ġf or|u n|s t|Ġb e|i l|e t|c e|Ġs t|o t|Ġt h|Ġth at|m ent|u t|Ġ on|Ġ T|ĠT he|a c|u l|it h|Ġw ith|s s|c h|i f|
m e|t h|o l|a d|r a
"""


def write_tiny_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with a ChatML template into `folder`.

    The same bytes each time. Ids: the special tokens, the 256 bytes, then the merged tokens. `<|im_end|>` ends a reply,
    `<|endoftext|>` pads.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [(left, right) for left, right in (pair.split(" ") for pair in _MERGES.replace("\n", "").split("|"))]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
