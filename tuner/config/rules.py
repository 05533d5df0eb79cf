"""What the choices of different groups say about each other, as one table.

A rule reads facts (`tuner.config.facts`) by name and gets their values in that order: keys (`peft.lora_rank`), members
of groups by the names of their YAMLs (`quantization` is `nf4`), and what is derived from those. A rule of which a fact
is absent does not apply: a configuration without an adapter has no rank. `check` and a sweep's plan judge by one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tuner.hub_errors import is_repository
from tuner.types import ChatTemplateName


@dataclass(frozen=True)
class Rule:
    """One thing that cannot be.

    Attributes:
        name: what a sweep's table calls it.
        facts: what it reads.
        broken: whether these values break it.
        sentence: what is wrong and what to do, `{0}`, `{1}` being the values.
    """

    name: str
    facts: tuple[str, ...]
    broken: Callable[..., bool]
    sentence: str


WHOLE_WEIGHTS = ("full", "last_layers")
"""Methods that train weights of the model and leave a model."""

WITHOUT_MATRICES = ("ia3", "layernorm")
"""Methods that train vectors which begin at about 1."""

WITHOUT_B = (*WHOLE_WEIGHTS, *WITHOUT_MATRICES)
"""Methods without the matrices A and B."""

CHAT_TEMPLATES = get_args(ChatTemplateName)

RULES = (
    Rule(
        "out_is_named",
        ("out",),
        lambda out: isinstance(out, str) and not out.strip(),
        "out={0}: expected the name of a run folder",
    ),
    Rule(
        "adapter_brings_its_method",
        ("adapter", "peft"),
        lambda adapter, peft: adapter is not None and peft != "adapter",
        "peft=... adapter={0}: the adapter brings its own method; leave out peft=... (quantization=nf4 is 4 bits)",
    ),
    Rule(
        "adapter_is_named",
        ("adapter", "peft"),
        lambda adapter, peft: adapter is None and peft == "adapter",
        "peft=adapter: the adapter needs a value, as adapter=FOLDER",
    ),
    Rule(
        "adapter_is_said_once",
        ("adapter", "peft.path"),
        lambda adapter, path: adapter is not None and adapter != path,
        "peft.path={1} adapter={0}: two adapters; adapter=FOLDER alone sets both keys",
    ),
    Rule(
        "one_place_of_weights",
        ("model.path", "model.source"),
        lambda path, source: path is not None and source is not None,
        "model.path={0} model.source={1}: a model is in a folder or on the Hugging Face Hub; give one of them",
    ),
    Rule(
        "random_weights_have_a_tokenizer",
        ("model.random_weights", "model.random_tokenizer", "model.path", "model.source"),
        lambda random, tokenizer, path, source: random is True and tokenizer is path is source is None,
        "model.random_weights={0} model.random_tokenizer={1}: random weights need one of the packaged tokenizers",
    ),
    Rule(
        "source_is_a_repository",
        ("model.source",),
        lambda source: source is not None and not is_repository(source),
        "model.source={0}: expected ORG/NAME, as HuggingFaceTB/SmolLM2-135M-Instruct; a folder is model.path",
    ),
    Rule(
        "revision_of_a_source",
        ("model.source", "model.revision"),
        lambda source, revision: source is None and revision is not None,
        "model.revision={1}: of which repository? say model.source=ORG/NAME too",
    ),
    Rule(
        "qlora_needs_quantization",
        ("peft.name", "quantization"),
        lambda name, quantization: name == "qlora" and quantization == "none",
        "peft=qlora quantization={1}: QLoRA is LoRA over a quantized base; say peft=lora for weights as they are",
    ),
    Rule(
        "full_needs_dense_weights",
        ("peft", "quantization"),
        lambda peft, quantization: peft == "full" and quantization != "none",
        "peft=full quantization={1}: quantized weights cannot be trained; say peft=qlora, or quantization=none",
    ),
    Rule(
        "last_layers_need_dense_weights",
        ("peft", "quantization"),
        lambda peft, quantization: peft == "last_layers" and quantization != "none",
        "peft=last_layers quantization={1}: the blocks that train would be packed, which do not train; say "
        "quantization=none, or peft=qlora",
    ),
    Rule(
        "last_layers_are_there",
        ("peft.num_layers", "model.num_hidden_layers"),
        lambda layers, there: layers > there,
        "peft.num_layers={0}: more than the model's {1} blocks; valid: 1 to {1}",
    ),
    Rule(
        "ia3_scales_something",
        ("peft.attn_modules", "peft.apply_to_mlp"),
        lambda attention, mlp: not (attention or mlp),
        "peft.attn_modules=[] peft.apply_to_mlp=false: (IA)³ on no module; name at least one of q_proj, k_proj, "
        "v_proj, output_proj, or set peft.apply_to_mlp=true",
    ),
    Rule(
        "rows_of_new_tokens_have_a_place",
        ("peft", "model.add_tokens"),
        lambda peft, tokens: peft in WITHOUT_MATRICES and bool(tokens),
        "peft={0} model.add_tokens={1}: an adapter of this kind has no place for rows of tokens; say "
        "peft=lora, dora, last_layers or full",
    ),
    Rule(
        "lora_adapts_something",
        ("peft.lora_attn_modules", "peft.apply_lora_to_mlp", "peft.apply_lora_to_output"),
        lambda attention, mlp, output: not (attention or mlp or output),
        "peft.lora_attn_modules=[] peft.apply_lora_to_mlp=false peft.apply_lora_to_output=false: LoRA on no module; "
        "name at least one of q_proj, k_proj, v_proj, output_proj, or set one of the two to true",
    ),
    Rule(
        "output_lora_on_tied_embeddings",
        ("peft.apply_lora_to_output", "model.tie_word_embeddings"),
        lambda output, tied: output and tied,
        "peft.apply_lora_to_output=true: this model's output layer is its embedding matrix "
        "(model.tie_word_embeddings), so an adapter on one would have to be merged into both; set it to false",
    ),
    Rule(
        "chat_template_is_one",
        ("model.chat_template",),
        lambda chosen: chosen is not None and chosen not in CHAT_TEMPLATES and not chosen.endswith(".jinja"),
        "model.chat_template={0}: valid: null (the model's own), " + ", ".join(CHAT_TEMPLATES) + ", or a .jinja file",
    ),
    Rule(
        "new_tokens_show",
        ("model.add_tokens",),
        lambda tokens: not all(token.strip() for token in tokens),
        "model.add_tokens={0}: a token of no characters or of blanks alone; name tokens as '<|tool|>'",
    ),
    Rule(
        "new_tokens_differ",
        ("model.add_tokens",),
        lambda tokens: len(set(tokens)) < len(tokens),
        "model.add_tokens={0}: a token is named twice; name each once",
    ),
    Rule(
        "adapter_brings_its_tokens",
        ("adapter", "model.add_tokens"),
        lambda adapter, tokens: adapter is not None and bool(tokens),
        "model.add_tokens={1} adapter={0}: an adapter's layers and rows are those it was begun with; leave out "
        "model.add_tokens, or merge the adapter (tuner merge) and add tokens to that model",
    ),
    Rule(
        "output_lora_on_new_rows",
        ("peft.apply_lora_to_output", "model.add_tokens"),
        lambda output, tokens: output and bool(tokens),
        "peft.apply_lora_to_output=true model.add_tokens={1}: new rows of the output head train themselves, and an "
        "adapter on the head would change them too; say peft.apply_lora_to_output=false",
    ),
    Rule(
        "packed_rows_hold_a_sample",
        ("data.pack_len", "data.max_seq_len"),
        lambda row, sample: isinstance(row, int) and isinstance(sample, int) and row < sample,
        "data.pack_len={0} data.max_seq_len={1}: a sample is never cut, so a row has to hold the longest; raise "
        "data.pack_len or lower data.max_seq_len",
    ),
    Rule(
        "length_of_packed_rows",
        ("data.pack_len", "data.packing"),
        lambda row, packing: row is not None and packing != "pack",
        "data.pack_len={0} data.packing={1}: rows have a length of their own where they are packed; say "
        "data.packing=pack or leave out data.pack_len",
    ),
    Rule(
        "lora_rank_within_matrix",
        ("peft.lora_rank", "smallest adapted dimension"),
        lambda rank, smallest: rank > smallest,
        "peft.lora_rank={0}: larger than the smallest side of an adapted matrix, {1}; valid: 1 to {1}",
    ),
    Rule(
        "full_trains_what_it_computes_with",
        ("peft", "precision", "precision.trainable"),
        lambda peft, precision, trainable: peft in WHOLE_WEIGHTS and {precision, trainable} == {"fp32", "bf16"},
        "precision.trainable={2} precision={1} peft={0}: full weights train, which are the very ones it computes with; "
        "say precision={2}, or precision.trainable=auto",
    ),
    Rule(
        "something_is_rounded",
        ("peft", "precision", "precision.trainable"),
        lambda peft, precision, trainable: (
            peft not in WHOLE_WEIGHTS and (precision, trainable) == ("bf16_stochastic", "auto")
        ),
        "precision=bf16_stochastic peft={0}: precision.trainable=auto keeps adapters in fp32, so there is no update to "
        "round; say precision=bf16, which is the same, or precision.trainable=bf16 for adapters in bf16, or peft=full",
    ),
    Rule(
        "numbers_around_one_are_in_fp32",
        ("peft", "precision", "precision.trainable"),
        lambda peft, precision, trainable: (
            peft in WITHOUT_MATRICES and trainable == "bf16" and precision != "bf16_stochastic"
        ),
        "precision.trainable={2} peft={0}: what trains begins at about 1, where bf16 has no number nearer than 1/256, "
        "and most updates are smaller; say precision.trainable=auto, or precision=bf16_stochastic",
    ),
    Rule(
        "compiled_layers_choose_themselves",
        ("memory.activation_checkpointing", "train.compile"),
        lambda checkpointing, compiled: checkpointing == "selective" and compiled is True,
        "memory.activation_checkpointing={0} train.compile={1}: torch.compile itself chooses what a layer keeps and "
        "what it computes again; say memory.activation_checkpointing=none or full, or train.compile=false",
    ),
    Rule(
        "activations_are_moved_from_a_gpu",
        ("memory.activation_offloading", "device"),
        lambda offloading, device: offloading is True and device == "cpu",
        "memory.activation_offloading={0} device={1}: activations are in the CPU's memory already, to which they would "
        "be moved; say memory.activation_offloading=false",
    ),
    Rule(
        "what_is_kept_is_moved",
        ("memory.activation_offloading", "memory.activation_checkpointing"),
        lambda offloading, checkpointing: offloading is True and checkpointing == "selective",
        "memory.activation_offloading={0} memory.activation_checkpointing={1}: the products that selective keeps would "
        "stay on the GPU; say memory.activation_checkpointing=full, whose layer inputs are moved, or none",
    ),
    Rule(
        "state_is_moved_from_a_gpu",
        ("memory.offload_optimizer", "device"),
        lambda offloading, device: offloading is True and device == "cpu",
        "memory.offload_optimizer={0} device={1}: the optimizer's state is in the CPU's memory already, to which it "
        "would be moved; say memory.offload_optimizer=false",
    ),
    Rule(
        "pages_are_moved_already",
        ("memory.offload_optimizer", "optimizer._target_"),
        lambda offloading, target: offloading is True and target.rpartition(".")[2].lower().startswith("paged"),
        "memory.offload_optimizer={0} optimizer._target_={1}: a paged optimizer moves its state to the host itself, "
        "when the GPU runs short; say optimizer=adamw, or memory.offload_optimizer=false",
    ),
    Rule(
        "one_backward_pass_a_step",
        ("memory.optimizer_in_bwd", "train.gradient_accumulation_steps"),
        lambda in_backward, passes: in_backward is True and passes > 1,
        "memory.optimizer_in_bwd={0} train.gradient_accumulation_steps={1}: each backward pass steps and frees its "
        "gradients, so none are there to add to; say train.gradient_accumulation_steps=1, or "
        "memory.optimizer_in_bwd=false",
    ),
    Rule(
        "global_norm_needs_all_gradients",
        ("memory.optimizer_in_bwd", "train.clip_grad_norm"),
        lambda in_backward, clip: in_backward is True and clip is not None,
        "memory.optimizer_in_bwd={0} train.clip_grad_norm={1}: the norm of the whole gradient is known when all "
        "parameters but the last are stepped; say train.clip_grad_norm=null, and "
        "train.clip_grad_norm_per_parameter=N to clip each by itself",
    ),
    Rule(
        "steps_in_backward_stand",
        ("memory.optimizer_in_bwd", "train.on_nonfinite"),
        lambda in_backward, on_nonfinite: in_backward is True and on_nonfinite == "skip",
        "memory.optimizer_in_bwd={0} train.on_nonfinite={1}: a gradient that is not finite may be found when others "
        "are stepped, which cannot be taken back; say train.on_nonfinite=stop, or memory.optimizer_in_bwd=false",
    ),
    Rule(
        "what_was_stepped_is_not_done_again",
        ("memory.optimizer_in_bwd", "train.on_oom"),
        lambda in_backward, on_oom: in_backward is True and on_oom == "retry",
        "memory.optimizer_in_bwd={0} train.on_oom={1}: memory that runs out in backward does so when some parameters "
        "are stepped, so the step cannot be done again; say train.on_oom=stop, or memory.optimizer_in_bwd=false",
    ),
    Rule(
        "scale_is_taken_out_before_a_step",
        ("memory.optimizer_in_bwd", "precision"),
        lambda in_backward, precision: in_backward is True and precision == "amp_fp16",
        "memory.optimizer_in_bwd={0} precision={1}: whether the scale of the loss was too large is known when all "
        "gradients are there; say precision=amp_bf16, or memory.optimizer_in_bwd=false",
    ),
    Rule(
        "one_way_to_clip",
        ("train.clip_grad_norm", "train.clip_grad_norm_per_parameter"),
        lambda whole, each: None not in (whole, each),
        "train.clip_grad_norm={0} train.clip_grad_norm_per_parameter={1}: two ways to clip; set one of them to null",
    ),
    Rule(
        "something_is_left",
        ("peft", "checkpoint.save_adapter", "checkpoint.save_merged"),
        lambda peft, adapter, merged: peft not in WHOLE_WEIGHTS and adapter is False and merged is False,
        "checkpoint.save_adapter=false checkpoint.save_merged=false peft={0}: the run would leave neither an adapter "
        "nor a model; set one of the two to true",
    ),
    Rule(
        "loraplus_needs_adapters",
        ("optimizer.loraplus_lr_ratio", "peft"),
        lambda ratio, peft: ratio is not None and peft in WITHOUT_B,
        "optimizer.loraplus_lr_ratio={0} peft={1}: LoRA+ gives the matrices B of adapters another learning rate, and "
        "there are none; say peft=lora, or optimizer.loraplus_lr_ratio=null",
    ),
    Rule(
        "muon_needs_matrices",
        ("optimizer", "peft"),
        lambda optimizer, peft: optimizer == "muon" and peft in WITHOUT_MATRICES,
        "optimizer=muon peft={1}: Muon steps matrices of blocks and adapters, and none trains; say optimizer=adamw",
    ),
    Rule(
        "warmup_within_run",
        ("schedule.warmup_steps", "train.max_steps"),
        lambda warmup, steps: None not in (warmup, steps) and warmup > steps,
        "schedule.warmup_steps={0}: longer than the run, train.max_steps={1}; say schedule.warmup_steps=0",
    ),
    Rule(
        "steps_or_epochs",
        ("train.max_steps", "train.epochs"),
        lambda steps, epochs: (steps is None) == (epochs is None),
        "train.max_steps={0} train.epochs={1}: the length of a run is one of the two; say train.max_steps=null "
        "train.epochs=N, or train.max_steps=N train.epochs=null",
    ),
    Rule(
        "early_stopping_is_before_the_end",
        ("train.early_stopping_patience", "train.val_every_steps", "train.epochs", "train.max_steps"),
        lambda patience, every, epochs, steps: patience is not None and (steps == 1 or (epochs == 1 and every is None)),
        "train.early_stopping_patience={0} train.val_every_steps={1} train.epochs={2} train.max_steps={3}: the only "
        "evaluation is at the end, so there is nothing to stop early; say train.early_stopping_patience=null, or "
        "train.val_every_steps=N in a longer run",
    ),
    Rule(
        "streaming_counts_steps",
        ("data.streaming", "train.max_steps"),
        lambda streaming, steps: streaming is True and steps is None,
        "data.streaming={0} train.max_steps={1}: nobody knows how long an epoch is before it has been read; say "
        "train.max_steps=N train.epochs=null, or data.streaming=false",
    ),
    Rule(
        "streaming_takes_all",
        ("data.streaming", "data.max_samples"),
        lambda streaming, samples: streaming is True and samples is not None,
        "data.streaming={0} data.max_samples={1}: a choice among all rows is made before training; say "
        "data.max_samples=null, with train.max_steps=N as the limit, or data.streaming=false",
    ),
    Rule(
        "streaming_packs_nothing",
        ("data.streaming", "data.packing"),
        lambda streaming, packing: streaming is True and packing != "none",
        "data.streaming={0} data.packing={1}: rows are put together from the lengths of all samples, which are known "
        "before training; say data.packing=none, or data.streaming=false",
    ),
    Rule(
        "data_is_somewhere",
        ("data.path", "data.source"),
        lambda path, source: path is None and source is None,
        "data.path: needs a value, as data.path=FILE, a file, a folder or a pattern; or say data.source=ORG/NAME",
    ),
    Rule(
        "one_place_of_data",
        ("data.path", "data.source"),
        lambda path, source: path is not None and source is not None,
        "data.path={0} data.source={1}: data is in files or on the Hugging Face Hub; give one of them",
    ),
    Rule(
        "data_source_is_a_repository",
        ("data.source",),
        lambda source: source is not None and not is_repository(source),
        "data.source={0}: expected ORG/NAME, as tatsu-lab/alpaca; a file or a folder is data.path",
    ),
    Rule(
        "one_place_of_validation",
        ("data.val_path", "data.val_split"),
        lambda path, split: path is not None and split is not None,
        "data.val_path={0} data.val_split={1}: two places to validate on; give one of them",
    ),
    Rule(
        "parts_of_a_source",
        ("data.source", "data.subset", "data.val_split", "data.revision"),
        lambda source, *parts: source is None and any(part is not None for part in parts),
        "data.subset={1} data.val_split={2} data.revision={3}: of which dataset? say data.source=ORG/NAME too",
    ),
    Rule(
        "sequence_within_context",
        ("data.max_seq_len", "model.max_position_embeddings"),
        lambda length, context: length is not None and length > context,
        "data.max_seq_len={0}: longer than the model's context, {1} tokens",
    ),
)


def broken_rules(facts: Mapping[str, Any]) -> Iterator[tuple[Rule, str]]:
    """The rules that `facts` break, each with its sentence."""
    for rule in RULES:
        if all(name in facts for name in rule.facts):
            values = [facts[name] for name in rule.facts]
            if rule.broken(*values):
                yield rule, rule.sentence.format(*values)
