"""What a decoder is made of: the keys that every family has, and the choices by which families differ.

A family is a short module: a subclass of `ModelConfig` that adds its own keys and says what it chooses. It is read from
a Hugging Face `config.json` of either generation and written back; a value that would otherwise be ignored is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tuner.errors import ModelError
from tuner.models.rope import scaling_problem
from tuner.models.values import accepts, annotations_of, expected
from tuner.types import PackagedTokenizer, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from tuner.models.decoder import Decoder

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""What every `config.json` has to say."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The linear layers of a block's attention, by their names in checkpoints."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "is_causal": (True, None),
    "quantization_config": (None,),
}
"""Keys of a `config.json` that change what a model computes and are not supported, with the values at which they do
nothing."""


@dataclass(frozen=True)
class ModelConfig:
    """Where a decoder's weights come from and, unless a folder says it, its shape.

    Args:
        path: a Hugging Face folder; its `config.json` then gives family and shape.
        package: an installed package that carries the weights as a GGUF file, converted once into such a folder.
        source: a repository of the Hugging Face Hub, ORG/NAME, whose snapshot is such a folder.
        revision: its branch, tag or commit; None is `main`, as it is when the configuration is frozen.
        random_weights: start from random weights and a small packaged tokenizer: for tests and trials.
        random_tokenizer: which one, by the family whose manner it is of; None where weights are not random.
        add_tokens: tokens that tokenizer and model learn; their rows of embedding and head train whatever the method.
        chat_template: another than the one in the folder: the name of a built-in one or a `.jinja` file.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: H.
        num_key_value_heads: K, a divisor of H.
        head_dim: E; None is D / H.
        max_position_embeddings: longest sequence the model was trained for.
        rms_norm_eps: epsilon of every norm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched for a longer context, in the words of `config.json`: `rope_type` (`linear`,
            `llama3` or `longrope`) and its keys, as `factor`; None leaves them as they are.
        tie_word_embeddings: whether the output head is the embedding matrix.
    """

    path: str | None
    package: str | None
    source: str | None
    revision: str | None
    random_weights: bool
    random_tokenizer: PackagedTokenizer | None
    add_tokens: list[str]
    chat_template: str | None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: dict[str, float | str | list[float]] | None
    tie_word_embeddings: bool

    # Not keys: `ClassVar`, or without an annotation.
    beside_config_json = (
        "path",
        "package",
        "source",
        "revision",
        "random_weights",
        "random_tokenizer",
        "add_tokens",
        "chat_template",
    )
    """Keys that say where weights come from and what they learn; the others are the shape, as in a `config.json`."""

    # What a family chooses.
    model_type = ""  # in config.json
    architecture = ""  # in config.json
    absent: ClassVar[Mapping[str, Any]] = {}
    """What a key means that a `config.json` leaves out: the defaults of the family's class in transformers."""
    activation_key = "hidden_act"
    activation_names: ClassVar[tuple[str, ...]] = ("silu",)
    """Words of a `config.json` for the activation; the last is the one in `glu.ACTIVATIONS`."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """As `NEUTRAL`, of this family."""
    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Matrices of the checkpoint that are several layers here, stacked by rows."""
    zero_centered_norms = False
    norms_after_blocks = False
    norms_of_queries_and_keys = False

    def __post_init__(self) -> None:
        """Raises ModelError for a value of another type, heads that do not divide, or a scaling that is not one."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        whose = self.whose
        for field in fields(self):  # plain containers, for config.json: Hydra gives its own
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        for key, annotation in annotations_of(type(self)).items():  # type: ignore[arg-type]
            if key in vars(self) and not accepts(value := getattr(self, key), annotation):
                raise ModelError(f"{whose}{key}={value!r}: expected {expected(annotation)}")
        if heads % kv_heads:
            raise ModelError(f"{whose}num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ModelError(f"{whose}hidden_size={self.hidden_size} is no multiple of {heads} heads: give head_dim")
        if self.size_of_head % 2:
            raise ModelError(f"{whose}head_dim={self.size_of_head}: expected an even number, as rotary positions need")
        if self.rope_scaling is not None and (problem := scaling_problem(self.rope_scaling, self.size_of_head)):
            raise ModelError(f"{whose}rope_scaling: {problem}")

    @property
    def whose(self) -> str:
        """What stands before the name of a key in a message."""
        return f"{self.path}/config.json: " if self.path else "model."

    @property
    def size_of_head(self) -> int:
        """E."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.size_of_head**-0.5)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied with."""
        return 1.0

    @property
    def softcaps(self) -> tuple[float | None, float | None]:
        """The largest magnitude that attention scores and logits can have (arXiv:2408.00118); None for no bound."""
        return None, None

    @property
    def biases(self) -> tuple[str, ...]:
        """The linear layers of a block that have a bias, by their names."""
        return ()

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all that are not later."""
        return None

    def build(self) -> Decoder:
        """The model on the current default device, its parameters still to be filled."""
        from tuner.models.decoder import Decoder

        return Decoder(self)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], path: str | None) -> Self:
        """The configuration that a `config.json` of either generation describes.

        Raises:
            ModelError: a missing key, or a value that this family would otherwise ignore.
        """
        where = f"{path}/config.json" if path else "config.json"
        cls.refuse_unsupported(config, where)
        if missing := [key for key in REQUIRED if key not in config]:
            raise ModelError(f"{where} lacks {', '.join(missing)}")
        theta, scaling = cls.rope_of(config, where)
        given = {field.name: config.get(field.name, cls.absent.get(field.name)) for field in fields(cls)}
        given |= {**dict.fromkeys(cls.beside_config_json), "path": path, "random_weights": False, "add_tokens": []}
        given |= {"rope_theta": theta, "rope_scaling": scaling}
        given["num_key_value_heads"] = given["num_key_value_heads"] or config["num_attention_heads"]
        return cls(**given)

    @classmethod
    def refuse_unsupported(cls, config: Mapping[str, Any], where: str) -> None:
        """Raises ModelError for a value that changes what the model computes and that nothing here reads."""
        activation = config.get(cls.activation_key) or cls.activation_names[-1]
        if activation not in cls.activation_names:
            valid = ", ".join(cls.activation_names)
            raise ModelError(f"{where}: {cls.activation_key}={activation!r} is not supported; valid: {valid}")
        for key, values in {**NEUTRAL, **cls.neutral}.items():
            if key in config and config[key] not in values:
                raise ModelError(f"{where}: {key}={config[key]!r} is not supported; valid: {values[0]!r}")

    @classmethod
    def rope_of(
        cls, config: Mapping[str, Any], where: str
    ) -> tuple[float, dict[str, float | str | list[float]] | None]:
        """The base of the wavelengths and their scaling, from the keys of transformers 5 or of 4.

        Raises:
            ModelError: a share of each head that is not rotated.
        """
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise ModelError(f"{where}: rope_scaling={given!r}: expected a mapping of one scaling's settings")
        rope = {key: value for key, value in given.items() if value is not None}
        theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
        oldest = rope.pop("type", "default")
        scaling = {"rope_type": rope.pop("rope_type", oldest), **rope}
        partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise ModelError(f"{where}: partial_rotary_factor={partial} is not supported; valid: 1.0")
        return theta, None if scaling["rope_type"] == "default" else scaling

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json`, with the rotary settings in both spellings, that of transformers 4 and of 5."""
        shape = {key: value for key, value in asdict(self).items() if key not in self.beside_config_json}
        return {
            **shape,
            "head_dim": self.size_of_head,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            self.activation_key: self.activation_names[-1],
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
