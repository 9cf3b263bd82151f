"""What a sentence encoder has beside its encoder, and the files that say so.

They are those of sentence-transformers: ``modules.json`` lists the parts in order, each with its
folder; ``config_sentence_transformers.json`` has the prompts, ``sentence_bert_config.json`` what the
tokenizer is to do. All is checked as it is read: a part, a pooling or a setting that would give
other embeddings than sentence-transformers' is refused by name.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxbrewer.configurations import checks
from jaxbrewer.errors import ConfigError
from jaxbrewer.files import read_json, read_json_object, write_json
from jaxbrewer.zoo.folders import CONFIG, WEIGHTS, inside

logger = logging.getLogger(__name__)

MODULES = "modules.json"
MODEL_SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
# What that file is called in old folders of other encoders.
_OLD_TRANSFORMER_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

POOLINGS = ("mean", "cls", "max")
"""How the vectors of a sentence's tokens become one: `jaxbrewer.zoo.sentence.pooled`."""

DENSE_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "silu": "torch.nn.modules.activation.SiLU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
"""The activations of dense layers, and what files call them."""

# The parts there may be, in order; any number of dense layers, at most one normalisation.
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
# What files call a part: written as older releases of sentence-transformers do, which newer ones
# read too; read under either's name.
_TYPE = "sentence_transformers.models.{}"
_TYPES = "sentence_transformers."
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of a part that are understood at one value alone, which is also the default.
_EMBEDDING = "sentence_embedding"
_OF_EMBEDDING = {
    "module_input_name": (_EMBEDDING,),
    "module_output_name": (_EMBEDDING, None),
}
_OF_TRANSFORMER: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    **dict.fromkeys(("model_args", "model_kwargs", "config_args", "config_kwargs"), ({}, None)),
}
_OF_MODEL = {"model_type": ("SentenceTransformer",), "truncate_dim": (None,)}


def _dense_layers(value: Any) -> tuple["DenseConfig", ...]:
    """Accepts a list or a tuple of dense layers."""
    if not isinstance(value, list | tuple) or not all(isinstance(x, DenseConfig) for x in value):
        raise ValueError("expected a tuple of DenseConfig")
    return tuple(value)


def _prompts(value: Any) -> checks.Options:
    """Accepts texts by name."""
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ValueError("expected texts by name, such as {'query': 'query: '}")
    return checks.Options(value)


def _options(value: Any) -> checks.Options:
    """Accepts what JSON can carry, by name."""
    if not isinstance(value, Mapping):
        raise ValueError("expected a dict")
    return checks.frozen(value)


def _check_fields(config: Any) -> None:
    """Checks the fields of a frozen config and sets those that are kept in another form."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kept, problems = checks.values(given, config._checks)
    if problems:
        raise ConfigError(type(config).__name__, problems)
    for name, value in kept.items():
        object.__setattr__(config, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """One dense layer after the pooling: ``activation(W · embedding + b)``, ``width`` wide.

    ``activation`` is a name in `DENSE_ACTIVATIONS`. Raises ``ConfigError`` that lists what is wrong.
    """

    width: int
    activation: str = "tanh"
    bias: bool = True

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "width": checks.integer(1),
        "activation": checks.one_of(DENSE_ACTIVATIONS),
        "bias": checks.boolean,
    }

    def __post_init__(self):
        _check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """How hidden states become an embedding, and what is to be done with the sentences before.

    ``pooling`` is one of `POOLINGS`, ``dense`` are the layers after it, ``normalize`` makes the
    result a unit vector.

    The rest is for whoever tokenizes, and goes into the folder that the model is saved in.
    Sentences are cut to ``max_seq_length`` tokens (``None`` leaves it to
    ``tokenizer_config.json``), in lower case where ``do_lower_case`` says so, and begin with one of
    the texts in ``prompts``, by default with that of ``default_prompt_name``.
    ``similarity_fn_name`` says how embeddings are compared. ``kept`` holds what else the two files
    of settings say, by file, and is written as it was read.

    Raises ``ConfigError`` that lists every field that is wrong.
    """

    pooling: str = "mean"
    dense: tuple[DenseConfig, ...] = ()
    normalize: bool = False
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "pooling": checks.one_of(POOLINGS),
        "dense": _dense_layers,
        "normalize": checks.boolean,
        "max_seq_length": checks.optional(checks.integer(1)),
        "do_lower_case": checks.boolean,
        "prompts": _prompts,
        "default_prompt_name": checks.optional(checks.text),
        "similarity_fn_name": checks.optional(checks.text),
        "kept": _options,
    }

    def __post_init__(self):
        _check_fields(self)
        name = self.default_prompt_name
        if name is not None and name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            problem = f"default_prompt_name={name!r} is not in prompts, which has {known}"
            raise ConfigError(type(self).__name__, [problem])

    @property
    def prompt(self) -> str:
        """The text that sentences begin with by default; empty where there is none."""
        return self.prompts.get(self.default_prompt_name or "", "")

    def width(self, hidden_width: int) -> int:
        """How wide the embeddings of hidden states of some width are."""
        return self.dense[-1].width if self.dense else hidden_width

    def replace(self, **changes: Any) -> "SentenceConfig":
        """The same config with some fields changed."""
        names = [field.name for field in dataclasses.fields(self)]
        if problems := checks.keys(changes, names):
            raise ConfigError(type(self).__name__, problems)
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """What a folder of a sentence encoder says.

    ``encoder`` is the folder of the encoder, ``pooled_width`` the width that the pooling was made
    for, ``dense`` the folders of the dense layers' weights.
    """

    config: SentenceConfig
    encoder: Path
    pooled_width: int
    dense: tuple[Path, ...]


# --- Reading --------------------------------------------------------------------------------------


def is_sentence_encoder(folder: Path) -> bool:
    """Whether a folder lists its parts as sentence-transformers does, and is no cross-encoder."""
    if not (folder / MODULES).is_file():
        return False
    _, settings = _settings(folder, MODEL_SETTINGS)
    return settings.get("model_type") != "CrossEncoder"


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Reads what a folder says of a sentence encoder, all but the weights.

    Where it has prompts, a line in the log gives their texts.

    Raises ``ValueError`` that names the file and what in it is not understood.
    """
    parts = _parts(folder)
    (_, transformer), (_, pooling), *after = parts
    encoder = inside(folder, f"{transformer}{CONFIG}", folder / MODULES).parent
    mode, width = _pooling(inside(folder, f"{pooling}{CONFIG}", folder / MODULES))
    dense, before = [], width
    folders = [path for kind, path in after if kind == "Dense"]
    for path in folders:
        dense.append(_dense(inside(folder, f"{path}{CONFIG}", folder / MODULES), before))
        before = dense[-1].width
    for kind, path in after:
        if kind == "Normalize" and (folder / path / CONFIG).exists():
            file = inside(folder, f"{path}{CONFIG}", folder / MODULES)
            _fixed(read_json_object(file), _OF_EMBEDDING, file)
    config = SentenceConfig(
        pooling=mode,
        dense=tuple(dense),
        normalize=any(kind == "Normalize" for kind, _ in after),
        **_texts(folder, transformer),
    )
    weights = tuple(_weights(folder, path) for path in folders)
    _say_prompts(folder, config)
    return SentenceFolder(config, encoder, width, weights)


def _parts(folder: Path) -> list[tuple[str, str]]:
    """The kind of each part and its folder, ``""`` or with a ``/`` at its end."""
    file = folder / MODULES
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{file}: expected a list of modules, each with a 'type' and a 'path'")
    parts = []
    for number, module in enumerate(modules):
        name, path = module.get("type"), module.get("path")
        if not isinstance(name, str) or not isinstance(path, str):
            raise ValueError(f"{file}: module {number} needs a 'type' and a 'path', two texts")
        kind = name.rpartition(".")[2]
        if not name.startswith(_TYPES) or kind not in _KINDS:
            raise ValueError(
                f"{file}: module {number} is a {checks.short(name)}; known here are those of "
                f"sentence_transformers called {', '.join(_KINDS)}"
            )
        parts.append((kind, f"{path}/" if path else ""))
    kinds = [kind for kind, _ in parts]
    dense = ["Dense"] * (len(kinds) - 2 - kinds.count("Normalize"))
    if kinds not in (
        ["Transformer", "Pooling", *dense],
        ["Transformer", "Pooling", *dense, "Normalize"],
    ):
        raise ValueError(
            f"{file}: the modules are {', '.join(kinds) or 'none'}; expected Transformer, Pooling, then "
            "any number of Dense, and a Normalize at the end or none"
        )
    return parts


def _pooling(file: Path) -> tuple[str, int]:
    """The pooling, and the width it is for."""
    values = read_json_object(file)
    width = values.pop("embedding_dimension", values.pop("word_embedding_dimension", None))
    flags = {key: values.pop(key) for key in _POOLING_FLAGS if key in values}
    modes = values.pop("pooling_mode", None)
    if modes is None:
        modes = [_POOLING_FLAGS[key] for key, is_on in flags.items() if is_on] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{file}: pooling_mode={checks.short(modes)}; known here is one of {', '.join(POOLINGS)}"
        )
    _fixed(values, {"include_prompt": (True,)}, file)
    return modes[0], _size(width, "embedding_dimension", file)


def _dense(file: Path, width_in: int) -> DenseConfig:
    """A dense layer that takes embeddings of some width."""
    values = read_json_object(file)
    if (given := values.pop("in_features", None)) != width_in:
        raise ValueError(f"{file}: in_features={checks.short(given)}, but {width_in} come in")
    width = _size(values.pop("out_features", None), "out_features", file)
    bias = values.pop("bias", True)
    name = values.pop("activation_function", DENSE_ACTIVATIONS["tanh"])
    found = [ours for ours, theirs in DENSE_ACTIVATIONS.items() if _same_class(name, theirs)]
    if not found:
        known = ", ".join(theirs.rpartition(".")[2] for theirs in DENSE_ACTIVATIONS.values())
        raise ValueError(
            f"{file}: activation_function={checks.short(name)}; known here are torch's {known}"
        )
    _fixed(values, {**_OF_EMBEDDING, "use_residual": (False,)}, file)
    try:
        return DenseConfig(width=width, activation=found[0], bias=bias)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _same_class(name: Any, theirs: str) -> bool:
    """Whether a name is of torch's class, in the module that defines it or in ``torch.nn``."""
    return name in (theirs, f"torch.nn.{theirs.rpartition('.')[2]}")


def _weights(folder: Path, path: str) -> Path:
    """The folder of a dense layer's weights, once they are known to be there."""
    if not (folder / path / WEIGHTS).exists() and list((folder / path).glob("*.bin")):
        raise ValueError(
            f"{folder / path} has its weights in a pickle, which can run code when read: convert it "
            f"once, with sentence_transformers.SentenceTransformer({str(folder)!r})"
            f".save_pretrained({str(folder) + '-safetensors'!r})"
        )
    return inside(folder, f"{path}{WEIGHTS}", folder / MODULES).parent


def _size(value: Any, name: str, file: Path) -> int:
    try:
        return checks.integer(1)(value)
    except ValueError as error:
        raise ValueError(f"{file}: {name}={checks.short(value)}: {error}") from error


def _fixed(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], file: Path) -> None:
    """Refuses keys that are not known, and values that are not understood."""
    if problems := checks.keys(values, allowed):
        raise ValueError(f"{file}: {'; '.join(problems)}")
    for key, value in values.items():
        if value not in allowed[key]:
            raise ValueError(
                f"{file}: {key}={checks.short(value)} is not supported, only {allowed[key][0]!r} is"
            )


def _settings(folder: Path, *names: str) -> tuple[Path, dict[str, Any]]:
    """The first of some files of settings that is there, and what it says; nothing for none."""
    for name in names:
        if (folder / name).is_file():
            file = inside(folder, name, folder / MODULES)
            return file, read_json_object(file)
    return folder / names[0], {}


def _texts(folder: Path, transformer: str) -> dict[str, Any]:
    """The fields of `SentenceConfig` that the two files of settings give."""
    names = (TRANSFORMER_SETTINGS, *_OLD_TRANSFORMER_SETTINGS)
    model, of_model = _settings(folder, MODEL_SETTINGS)
    file, of_transformer = _settings(folder, *(f"{transformer}{name}" for name in names))
    _fixed({key: value for key, value in of_model.items() if key in _OF_MODEL}, _OF_MODEL, model)
    known = {key: value for key, value in of_transformer.items() if key in _OF_TRANSFORMER}
    _fixed(known, _OF_TRANSFORMER, file)
    _check_modality(of_transformer, file)
    found = {
        "prompts": of_model.pop("prompts", None) or {},
        "default_prompt_name": of_model.pop("default_prompt_name", None),
        "similarity_fn_name": of_model.pop("similarity_fn_name", None),
        "max_seq_length": of_transformer.pop("max_seq_length", None),
        "do_lower_case": of_transformer.pop("do_lower_case", False),
        "kept": {MODEL_SETTINGS: of_model, TRANSFORMER_SETTINGS: of_transformer},
    }
    try:
        SentenceConfig(**found)
    except ValueError as error:
        raise ValueError(f"{model} or {file.name}: {error}") from error
    return found


def _check_modality(settings: Mapping[str, Any], file: Path) -> None:
    """Refuses a transformer whose texts go elsewhere than through its last hidden state."""
    default = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    modalities = settings.get("modality_config", default)
    of_text = modalities.get("text") if isinstance(modalities, dict) else None
    if of_text != default["text"]:
        raise ValueError(
            f"{file}: modality_config={checks.short(modalities)} is not supported, only the "
            "last_hidden_state of forward for texts is"
        )


def _say_prompts(folder: Path, config: SentenceConfig) -> None:
    texts = {name: text for name, text in config.prompts.items() if text}
    if not texts:
        return
    default = config.default_prompt_name
    logger.warning(
        "%s has prompts, which sentences begin with and which you add before tokenizing: %s (%s; in "
        "Python, model.sentence.prompts)",
        folder,
        ", ".join(f"{name!r}: {text!r}" for name, text in texts.items()),
        "none by default" if default is None else f"{default!r} by default",
    )


# --- Writing --------------------------------------------------------------------------------------


def dense_folder(folder: Path, number: int) -> Path:
    """The folder of a dense layer, counted from 0."""
    return folder / f"{number + 2}_Dense"


def write_sentence_folder(folder: Path, config: SentenceConfig, hidden_width: int) -> None:
    """Writes all that a folder says of a sentence encoder, the list of its parts last.

    The encoder's own files and the weights of the dense layers are there already.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * len(config.dense)]
    kinds += ["Normalize"] * config.normalize
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    flags = {key: mode == config.pooling for key, mode in _POOLING_FLAGS.items()}
    known = {key: flags[key] for key in list(flags)[:4]}  # those that every release knows
    write_json(folder / paths[1] / CONFIG, {"word_embedding_dimension": hidden_width, **known})
    width = hidden_width
    for number, dense in enumerate(config.dense):
        values = {
            "in_features": width,
            "out_features": dense.width,
            "bias": dense.bias,
            "activation_function": DENSE_ACTIVATIONS[dense.activation],
        }
        write_json(dense_folder(folder, number) / CONFIG, values)
        width = dense.width
    if config.normalize:
        (folder / paths[-1]).mkdir(exist_ok=True)
    _write_settings(folder, config)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE.format(kind)}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / MODULES, modules)


def _write_settings(folder: Path, config: SentenceConfig) -> None:
    of_transformer: dict[str, Any] = {"do_lower_case": config.do_lower_case}
    if config.max_seq_length is not None:
        of_transformer["max_seq_length"] = config.max_seq_length
    of_model = {
        "prompts": dict(config.prompts),
        "default_prompt_name": config.default_prompt_name,
        "similarity_fn_name": config.similarity_fn_name,
    }
    for file, values in ((TRANSFORMER_SETTINGS, of_transformer), (MODEL_SETTINGS, of_model)):
        write_json(folder / file, {**config.kept.get(file, {}), **values})
