"""What every encoder's config shares: the fields, the checks, and Hugging Face's JSON."""

import abc
import dataclasses
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from jaxbrewer.configurations import checks
from jaxbrewer.errors import ConfigError
from jaxbrewer.files import read_json_object, write_json
from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.folders import config_file

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Keys of Hugging Face config files that do not change what an encoder computes.
# fmt: off
BOOKKEEPING_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "_num_labels", "architectures", "attn_implementation", "bos_token_id", "cls_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
    "finetuning_task", "fp16", "gradient_checkpointing", "label2id", "language", "mask_token_id",
    "model_type", "name", "name_or_path", "num_labels", "output_past", "prefix", "return_dict",
    "sep_token_id", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
    "use_cache",
    # What sentence-transformers writes beside a model of transformers.
    "sbert_ce_default_activation_function", "sentence_transformers",
    # Settings of text generation, which older files carry for every kind of model.
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
    "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
})
# fmt: on

# Keys that would change what an encoder computes, and the values that are understood.
FIXED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
}


# Fields that are no keys of config files.
_NOT_IN_FILES = ("output_qkv", "score_activation", "source_folder")


def activation_name(value: Any) -> str:
    """Accepts the name of an activation function."""
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    """Accepts a tuple of text."""
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("expected a tuple of strings")
    return value


def _absolute(value: Any) -> str:
    """Accepts a path; keeps it as text, from the root."""
    return os.path.abspath(checks.folder(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the config of every model has: fields under Hugging Face's names, frozen and hashable.

    ``num_labels`` and ``label_names`` stand for Hugging Face's ``id2label``: ``label_names[i]`` is
    the name of class ``i``, ``None`` means ``LABEL_0``, ``LABEL_1`` and so on.

    A config does not change: where a TextBrewer script writes
    ``config.output_hidden_states = True``, write ``config.replace(output_hidden_states=True)`` or
    give the readers the change: ``from_json_file(path, output_hidden_states=True)``.

    ``score_activation`` is torch's name of what a cross-encoder of sentence-transformers applies to
    the logits where it gives scores, ``None`` its default (a sigmoid of one label). Models here
    give the logits; the name is kept for the folders they are saved in.

    ``source_folder`` is the folder that the config was read from, whose tokenizer's files go into
    the folders that a model of it is saved in. It is in no file, and two configs that differ in it
    alone are equal.

    A subclass adds the checks of its fields to ``_checks``: by a field's name, what returns the
    value to keep or raises ``ValueError`` that says what was expected.

    Raises ``ConfigError``, a ``ValueError`` that lists every field that is wrong.
    """

    model_type: ClassVar[str] = ""
    bookkeeping_keys: ClassVar[Collection[str]] = BOOKKEEPING_KEYS
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = FIXED_VALUES

    vocab_size: int = 30522
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    num_labels: int = 2
    label_names: tuple[str, ...] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    return_dict: bool = True
    score_activation: str | None = None
    source_folder: str | None = dataclasses.field(default=None, compare=False, repr=False)

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "vocab_size": checks.integer(1),
        "initializer_range": checks.not_negative,
        "pad_token_id": checks.optional(checks.integer(0)),
        "num_labels": checks.integer(1),
        "label_names": checks.optional(_names),
        "problem_type": checks.optional(checks.one_of(PROBLEM_TYPES)),
        "output_hidden_states": checks.boolean,
        "return_dict": checks.boolean,
        "score_activation": checks.optional(checks.text),
        "source_folder": checks.optional(_absolute),
    }

    def __post_init__(self):
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept, problems = checks.values(given, self._checks)
        for name, value in kept.items():
            object.__setattr__(self, name, value)
        if problems := problems or list(self._problems()):
            raise ConfigError(type(self).__name__, problems)
        names = self.label_names
        if names is not None and names == _default_label_names(self.num_labels):
            object.__setattr__(self, "label_names", None)

    def _problems(self) -> Iterable[str]:
        """What is wrong with fields that are right each alone, one sentence each."""
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            yield "single_label_classification needs num_labels of 2 or more"
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            yield f"num_labels={self.num_labels} but label_names has {len(self.label_names)}"
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            yield f"pad_token_id={self.pad_token_id} is outside vocab_size={self.vocab_size}"

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class, by number."""
        return dict(enumerate(self.label_names or _default_label_names(self.num_labels)))

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each class, by name."""
        return {name: number for number, name in self.id2label.items()}

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument of the model, the number that its ids must stay below."""
        return {"input_ids": self.vocab_size}

    def replace(self, **changes: Any) -> Self:
        """The same config with some fields changed.

        A new ``num_labels`` drops the old names and the ``score_activation``, a new ``vocab_size``
        the ``source_folder``.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if problems := checks.keys(changes, names):
            raise ConfigError(type(self).__name__, problems)
        if changes.get("num_labels", self.num_labels) != self.num_labels:
            changes = {"label_names": None, "score_activation": None, **changes}
        if changes.get("vocab_size", self.vocab_size) != self.vocab_size:
            changes.setdefault("source_folder", None)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, ignore: Collection[str] = (), **changes: Any
    ) -> Self:
        """Builds a config from Hugging Face's or TextBrewer's keys.

        ``ignore`` names keys to pass over, ``changes`` are fields to set on top. Keys that change
        nothing here (`BOOKKEEPING_KEYS`) are passed over.

        Raises ``ValueError`` for a key that is not known (with the nearest known one), for another
        ``model_type``, and for a setting that would change what the model computes.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"expected a mapping of config keys, got {type(values).__name__}")
        given = {key: value for key, value in values.items() if key not in ignore}
        model_type = given.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this config is of model_type {model_type!r}, but {cls.__name__} reads "
                f"{cls.model_type!r}: use the classes of that model"
            )
        for key, allowed in cls.fixed_values.items():
            if (value := given.pop(key, allowed[0])) not in allowed:
                raise ValueError(f"{key}={value!r} is not supported, only {allowed[0]!r} is")
        fields = [f.name for f in dataclasses.fields(cls) if f.name not in _NOT_IN_FILES]
        chosen = {key: given[key] for key in fields if key in given}
        chosen.update(_labels_from(given))
        chosen["score_activation"] = _score_activation(given)
        unknown = sorted(given.keys() - {*fields, *cls.bookkeeping_keys, "id2label"})
        if unknown:
            *others, last = checks.keys(unknown, fields)
            names = repr(unknown) if len(unknown) <= 20 else "[…], with all their names,"
            advice = (
                "(if the model does not depend on it, take it out of the file, or in Python pass "
                f"ignore={names})"
            )
            raise ConfigError(cls.__name__, [*others, f"{last} {advice}"])
        return cls(**chosen).replace(**changes)

    @classmethod
    def from_json_file(
        cls, path: str | os.PathLike[str], *, ignore: Collection[str] = (), **changes: Any
    ) -> Self:
        """Reads a config file; the arguments and errors of `from_dict`, each naming the file."""
        values = read_json_object(path)
        try:
            return cls.from_dict(values, ignore=ignore, **changes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, ignore: Collection[str] = (), **changes: Any
    ) -> Self:
        """Reads the config in a folder; the arguments and errors of `from_dict`."""
        changes = {"source_folder": folder, **_score_activation_in(Path(folder)), **changes}
        return cls.from_json_file(config_file(folder), ignore=ignore, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The config under Hugging Face's keys, which `from_dict` and transformers read back."""
        values = dataclasses.asdict(self)
        for name in ("label_names", "num_labels", *_NOT_IN_FILES):
            values.pop(name, None)
        if self.score_activation is not None:
            values["sentence_transformers"] = {"activation_fn": self.score_activation}
        for name in (
            "output_hidden_states",
            "output_attentions",
            "output_attention_scores",
            "gradient_checkpointing",
        ):
            if not values.get(name):
                values.pop(name, None)
        if values.get("tie_word_embeddings"):
            del values["tie_word_embeddings"]
        if self.return_dict:
            del values["return_dict"]
        if self.problem_type is None:
            del values["problem_type"]
        values["id2label"] = {str(number): name for number, name in self.id2label.items()}
        values["label2id"] = self.label2id
        values["model_type"] = self.model_type
        return dict(sorted(values.items()))

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig, abc.ABC):
    """What the config of every model with attention has.

    ``output_attention_scores`` is ours; see `jaxbrewer.zoo.attention.attend`. So is ``output_qkv``,
    which is in no file; see `jaxbrewer.zoo.encoder`.
    ``gradient_checkpointing`` saves memory for time: the backward pass keeps what goes into each
    layer and computes the rest again. The numbers stay, but no submodule of a layer can be matched
    by its path then.

    ``tie_word_embeddings`` is of models of masked words: whether the table of the embeddings scores
    the words, or a matrix of its own.
    """

    max_position_embeddings: int = 512
    output_attentions: bool = False
    output_attention_scores: bool = False
    output_qkv: bool = False
    gradient_checkpointing: bool = False
    tie_word_embeddings: bool = True

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **ModelConfig._checks,
        "max_position_embeddings": checks.integer(1),
        "output_attentions": checks.boolean,
        "output_attention_scores": checks.boolean,
        "output_qkv": checks.boolean,
        "gradient_checkpointing": checks.boolean,
        "tie_word_embeddings": checks.boolean,
    }

    @property
    @abc.abstractmethod
    def sizes(self) -> "StackConfig":
        """The config under the names that `jaxbrewer.zoo.blocks` reads."""

    @property
    def output_width(self) -> int:
        """How wide the last hidden state is."""
        return self.sizes.hidden_size

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument of the model, the number that its ids must stay below."""
        return {**super().id_limits, "position_ids": self.max_position_embeddings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(TransformerConfig):
    """The fields that `jaxbrewer.zoo.blocks` reads: a stack of layers; the defaults are BERT-base's."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **TransformerConfig._checks,
        "hidden_size": checks.integer(1),
        "num_hidden_layers": checks.integer(1),
        "num_attention_heads": checks.integer(1),
        "intermediate_size": checks.integer(1),
        "hidden_act": activation_name,
        "hidden_dropout_prob": checks.rate,
        "attention_probs_dropout_prob": checks.rate,
        "layer_norm_eps": checks.not_negative,
    }

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        if self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def sizes(self) -> "StackConfig":
        """This config: its names are those that `jaxbrewer.zoo.blocks` reads."""
        return self

    @property
    def embedding_width(self) -> int:
        """The width of the embedding tables, before any projection to ``hidden_size``."""
        return self.hidden_size

    @property
    def token_types(self) -> int:
        """The rows of the table of token types, 0 where there is none."""
        return 0

    @property
    def positions(self) -> int:
        """The rows of the table of positions, 0 where there is none."""
        return self.max_position_embeddings

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier."""
        return self.hidden_dropout_prob

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument of the model, the number that its ids must stay below."""
        rows = {"position_ids": self.positions, "token_type_ids": self.token_types}
        return {"input_ids": self.vocab_size} | {name: n for name, n in rows.items() if n}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
    """The fields of BERT and of the models that share its names; the defaults are BERT-base's."""

    type_vocab_size: int = 2
    classifier_dropout: float | None = None

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **StackConfig._checks,
        "type_vocab_size": checks.integer(1),
        "classifier_dropout": checks.optional(checks.rate),
    }

    @property
    def token_types(self) -> int:
        """The rows of the table of token types."""
        return self.type_vocab_size

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate


def _score_activation(values: Mapping[str, Any]) -> Any:
    """What cross-encoders note of their scores in a config, today and before."""
    noted = values.get("sentence_transformers")
    today = noted.get("activation_fn") if isinstance(noted, dict) else None
    return today or values.get("sbert_ce_default_activation_function")


def _score_activation_in(folder: Path) -> dict[str, Any]:
    """What a cross-encoder notes of its scores beside its config, as a field to set."""
    file = folder / "config_sentence_transformers.json"
    values = read_json_object(file) if file.is_file() else {}
    is_noted = values.get("model_type") == "CrossEncoder" and values.get("activation_fn")
    return {"score_activation": values["activation_fn"]} if is_noted else {}


def _default_label_names(number: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(number))


def _labels_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """``num_labels`` and ``label_names`` out of ``id2label``, ``num_labels``, ``_num_labels``."""
    counts = {key: values[key] for key in ("num_labels", "_num_labels") if values.get(key)}
    id2label = values.get("id2label")
    if id2label is None:
        return {"num_labels": next(iter(counts.values()))} if counts else {}
    try:
        by_number = {int(number): str(name) for number, name in id2label.items()}
        if len(by_number) < len(id2label) or any(
            name is None or isinstance(name, dict | list) for name in id2label.values()
        ):
            raise ValueError
    except (AttributeError, ValueError):
        shown = reprlib.repr(id2label)
        raise ValueError(f"id2label={shown} is not a map from number to name") from None
    if sorted(by_number) != list(range(len(by_number))):
        shown = reprlib.repr(sorted(by_number))
        raise ValueError(f"id2label numbers {shown}, expected 0, 1, 2 and so on")
    for key, count in counts.items():
        if count != len(by_number):
            raise ValueError(f"{key}={count} but id2label has {len(by_number)}: make them agree")
    names = tuple(by_number[number] for number in range(len(by_number)))
    return {"num_labels": len(names), "label_names": names}
