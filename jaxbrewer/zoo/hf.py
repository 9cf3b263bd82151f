"""Reading and writing Hugging Face folders: ``config.json`` and safetensors.

The names of an architecture's tensors are one table (`TensorNames`). From it and a model follows
the exact set of tensors a folder must hold, and reading is strict both ways: what is missing, what
is left over and what has another shape is one error that lists it all.
"""

import dataclasses
import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from jaxbrewer.files import read_json_object, write_json
from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.folders import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Stored,
    WeightsMismatchError,
    architectures_of,
    check_sizes,
    config_file,
    find_tensors,
    write_tensors,
)
from jaxbrewer.zoo.tokenizer_files import copy_tokenizer, tokenizer_files

__all__ = [
    "CONFIG", "INDEX", "WEIGHTS", "PretrainedModel", "TensorNames", "WeightsMismatchError",
    "existing_folder", "export_weights", "load_weights", "model_class", "tasks_of",
]  # fmt: skip

MODELS: dict[str, dict[str | None, type["PretrainedModel"]]] = {}
"""``model_type`` → task → class; an encoder without a head has the task ``None``.

Filled as classes are defined: importing `jaxbrewer.zoo` defines those of its families.
"""


def model_class(model_type: str, task: str | None = None) -> type["PretrainedModel"]:
    """The class of a ``model_type`` for a task, or its encoder for ``None``.

    Raises ``ValueError`` that lists the types, or the tasks of the type.
    """
    tasks = tasks_of(model_type)
    if task not in tasks:
        known = ", ".join(map(repr, tasks))
        raise ValueError(f"no {model_type} here is for the task {task!r}: choose from {known}")
    return tasks[task]


def tasks_of(model_type: Any) -> dict[str | None, type["PretrainedModel"]]:
    """The classes of a ``model_type`` by task; raises ``ValueError`` that lists the types."""
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise ValueError(
            f"no model here is of model_type {model_type!r}: choose from "
            + ", ".join(map(repr, MODELS))
        )
    return MODELS[model_type]


# How the names end of classes with a head for a task, as against those of pretraining.
_HEADED = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)

# Our names of leaves, and Hugging Face's; only a kernel is stored the other way round.
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# What other tools made of a tensor's name: torch's DataParallel, and TensorFlow's norms.
_OTHER_NAMES = (
    (re.compile(r"^(module\.)+"), ""),
    (re.compile(r"\.gamma$"), ".weight"),
    (re.compile(r"\.beta$"), ".bias"),
)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """One architecture's names in Hugging Face files.

    ``prefix`` is what tensors of the encoder begin with in a file of a model with a head, and our
    attribute for the encoder there. ``modules`` pairs a pattern of our module path, below the
    encoder, with Hugging Face's; ``tensors`` does so for whole names where that is not enough.
    ``extras`` are patterns of tensors, without the prefix, that a
    file may hold and no model here needs; ``heads`` those of task heads and poolers, which are
    passed over by a model that has no use for them.

    ``head`` pairs whole names beside the encoder, where ours are not Hugging Face's. ``aliases`` pairs
    another name of a head's tensor with the one that counts where a file has both; ``copies`` pairs
    a name with a second one that it is written under, too.
    """

    prefix: str
    modules: tuple[tuple[str, str], ...]
    extras: tuple[str, ...]
    heads: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...] = ()
    head: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    def theirs(self, module: str, leaf: str) -> str:
        """Hugging Face's name of a tensor of the encoder."""
        return _renamed(f"{_renamed(module, self.modules)}.{leaf}", self.tensors)

    def of_head(self, ours: str) -> str:
        """Hugging Face's name of a tensor beside the encoder."""
        return _renamed(ours, self.head)

    def alias(self, name: str) -> str:
        """The name that counts of a head's tensor in a file."""
        return _renamed(name, self.aliases)

    def is_extra(self, name: str) -> bool:
        """Whether a tensor is known to be of no use to any model."""
        return any(re.fullmatch(pattern, name) for pattern in self.extras)

    def is_head(self, name: str) -> bool:
        """Whether a tensor belongs to a task head or a pooler."""
        return any(re.fullmatch(pattern, name) for pattern in self.heads)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The name by the first pattern that fits it, or as it is."""
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Where a tensor lives in the model: its path, its shape in the file, whether transposed."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    transposed: bool


class PretrainedModel(nnx.Module):
    """What every model here can do: be read from and written to a Hugging Face folder.

    ``architecture`` is Hugging Face's name of the class, by default its own, which subclasses of
    the same ``model_type`` keep; ``tensor_names`` is the table of its tensors, ``config_class`` the
    config it is built from, ``task`` what its head is for. The first class with a config's
    ``model_type`` and a task is the one that `MODELS` gives for them.
    """

    architecture: ClassVar[str]
    tensor_names: ClassVar[TensorNames]
    config_class: ClassVar[type[ModelConfig]]
    task: ClassVar[str | None] = None
    config: ModelConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "config_class"):  # what several families share
            return
        known = MODELS.setdefault(cls.config_class.model_type, {})
        if known.setdefault(cls.task, cls) is cls and "architecture" not in vars(cls):
            cls.architecture = cls.__name__

    @property
    def base_model(self) -> Any:
        """The encoder; the model itself where it has no head."""
        return getattr(self, self.tensor_names.prefix, self)

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument, the number that its ids must stay below (and they must not be negative).

        An id outside its table cannot raise under ``jit`` and would give NaN; check it before.
        """
        return self.config.id_limits

    def check_stored(self, found: Mapping[str, Stored], folder: Path) -> None:
        """Refuses what a file holds besides this model's tensors, where the two contradict.

        Raises ``WeightsMismatchError`` that says how. ``found`` is by Hugging Face's names.
        """

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        config: ModelConfig | None = None,
        ignore: Collection[str] = (),
        new_head: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
        **changes: Any,
    ) -> Self:
        """Reads a model from a folder in Hugging Face's format; returns it in eval mode.

        ``model.safetensors`` or its shards, in any float type, become ``param_dtype``. ``config``
        stands in for the folder's ``config.json``; ``ignore`` names keys there that the model does
        not depend on; ``changes`` are fields of it to set, such as ``num_labels=3`` or
        ``output_hidden_states=True``, or options of the constructor, such as
        ``add_pooling_layer=False``. ``rngs`` gives dropout its randomness
        and a new head its weights; the default is ``nnx.Rngs(0)``.

        ``new_head=True`` starts a new head (and a pooler, where the file has none), whatever heads
        the file holds: it is how to fine-tune from an encoder.

        Raises ``WeightsMismatchError`` that lists every tensor missing, left over or of another
        shape; ``ValueError`` for a folder or file that cannot be read, for an index that names
        files outside of the folder, and for weights that are not finite. Names and shapes are
        compared before the model is built.

        A sentence encoder such as ``sentence-transformers/all-MiniLM-L6-v2`` is a folder without
        a head. To see that it computes here what it does in transformers::

            import numpy as np, torch, transformers
            from jaxbrewer.zoo import BertModel

            ids = np.random.default_rng(0).integers(1000, 30000, (4, 64))
            ours = BertModel.from_pretrained(folder)(ids)
            theirs = transformers.BertModel.from_pretrained(folder).eval()(torch.tensor(ids))
            theirs = theirs.last_hidden_state.detach().numpy()
            assert np.abs(np.asarray(ours.last_hidden_state) - theirs).max() < 1e-4
        """
        folder = existing_folder(folder)
        if config is None:
            config = cls.config_class.from_pretrained(folder, ignore=ignore)
        elif config.source_folder is None and tokenizer_files(folder):
            config = config.replace(source_folder=folder)
        constructor = inspect.signature(cls.__init__).parameters
        options = {name: changes.pop(name) for name in constructor if name in changes}
        config = config.replace(**changes)
        stored = find_tensors(folder)
        check_sizes(config, stored, folder)

        def made(rngs: nnx.Rngs) -> Any:
            return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)  # type: ignore[call-arg]

        # By shape first: no memory is taken for sizes that the file does not have.
        _match(nnx.eval_shape(lambda: made(nnx.Rngs(0))), stored, folder, new_head)
        model = made(nnx.Rngs(0) if rngs is None else rngs)
        load_weights(model, stored, folder, new_head=new_head)
        model.eval()
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``model.safetensors`` and ``config.json``, which transformers reads back.

        Each file appears whole or not at all, weights first. Parameters keep their dtype. The files
        of the tokenizer are copied from the folder that the model, or the config it was made of,
        came from (`jaxbrewer.zoo.tokenizer_files`).
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file, expected a folder to write to")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = export_weights(self)
        write_tensors(folder / WEIGHTS, tensors)
        values = {"architectures": [self.architecture], **self.config.to_dict()}
        values["dtype"] = str(next(iter(tensors.values())).dtype)
        write_json(folder / CONFIG, dict(sorted(values.items())))
        copy_tokenizer(self.config.source_folder, folder)


def export_weights(model: PretrainedModel) -> dict[str, np.ndarray]:
    """The model's parameters as numpy arrays, under Hugging Face's names and in its layout."""
    _check_leaves(model)
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    tensors = {}
    for name, leaf in _expected_tensors(model).items():
        value = np.asarray(jax.device_get(values[leaf.path][...]))
        tensors[name] = np.ascontiguousarray(value.T if leaf.transposed else value)
    copies = dict(model.tensor_names.copies)
    return tensors | {copies[name]: tensors[name].copy() for name in copies if name in tensors}


def load_weights(
    model: PretrainedModel,
    stored: Mapping[str, Stored],
    folder: Path,
    *,
    new_head: bool = False,
) -> None:
    """Sets the model's parameters from tensors on disk, after checking every name and shape.

    Raises ``ValueError`` that names file and tensor for numbers that are not finite, too.
    """
    wanted, found = _match(model, stored, folder, new_head)
    if not new_head:
        model.check_stored(found, folder)
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for name, leaf in wanted.items():
        array = found[name].read(values[leaf.path][...].dtype)
        value = jnp.asarray(array.T if leaf.transposed else array)
        values[leaf.path] = values[leaf.path].replace(value)
    nnx.update(model, nnx.from_flat_state(values))


def _match(
    model: PretrainedModel, stored: Mapping[str, Stored], folder: Path, new_head: bool
) -> tuple[dict[str, _Leaf], dict[str, Stored]]:
    """The leaves of a model, or of its shapes, that are read, and the tensors found, by name.

    Raises ``WeightsMismatchError`` that lists all that does not fit.
    """
    expected = _expected_tensors(model)
    found, problems = _canonical(model, stored, expected)
    names, prefix = model.tensor_names, _encoder_prefix(model)

    def is_new(name: str) -> bool:
        in_head = not name.startswith(prefix)
        return in_head or (name not in found and names.is_head(name.removeprefix(prefix)))

    wanted = {name: leaf for name, leaf in expected.items() if not (new_head and is_new(name))}
    unmapped = [
        name
        for name in found
        if name not in expected
        and not names.is_extra(name.removeprefix(prefix))
        and not (
            names.is_head(name.removeprefix(prefix))
            and (new_head or not prefix or name.startswith(prefix))
        )
    ]
    missing = [name for name in wanted if name not in found]
    reshaped = [
        name for name in wanted if name in found and found[name].shape != wanted[name].shape
    ]
    problems += [f"not in the model: {name} {found[name].shape}" for name in unmapped]
    problems += [f"not in the file: {name} {wanted[name].shape}" for name in missing]
    problems += [
        f"shape of {name}: {found[name].shape} in the file, {wanted[name].shape} in the model"
        for name in reshaped
    ]
    problems += [
        f"type of {name}: {found[name].dtype} in the file, expected floating-point numbers"
        for name in wanted
        if name in found and not found[name].is_float
    ]
    others = [] if new_head else _wrong_head(model, folder, expected, found)
    problems += others
    if problems:
        advice = _advice(model, prefix, missing, reshaped)
        advice += _said(model.config, [(found[n].shape, wanted[n].shape) for n in reshaped])
        error = WeightsMismatchError(
            f"{folder} does not fit {type(model).__name__}:\n  " + "\n  ".join([*problems, *advice])
        )
        is_headless = bool(missing) and not any(name.startswith(prefix) for name in missing)
        error.lacks_head = not reshaped and (is_headless or (not missing and bool(others)))
        raise error
    return wanted, found


def _check_leaves(model: PretrainedModel) -> None:
    """Refuses a model with parameters that Hugging Face's folders have no place for."""
    paths = (path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    others = [".".join(map(str, path)) for path in paths if str(path[-1]) not in _LEAF_NAMES]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{type(model).__name__} holds {', '.join(others[:3])}{more}, for which a Hugging Face "
            "folder has no place. Put back the layers that it was made with: what LoRA has trained is "
            "merged into their kernels first, as docs/any_model.md shows it"
        )


def _encoder_prefix(model: PretrainedModel) -> str:
    """What names of the encoder begin with in this model's files."""
    return "" if model.base_model is model else f"{model.tensor_names.prefix}."


def _expected_tensors(model: PretrainedModel) -> dict[str, _Leaf]:
    """Every tensor a file of this model holds, by Hugging Face's name."""
    names, prefix = model.tensor_names, _encoder_prefix(model)
    expected = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        ours, kind = ".".join(module), _LEAF_NAMES[leaf]
        if not prefix:
            theirs = names.theirs(ours, kind)
        elif ours.startswith(prefix):
            theirs = prefix + names.theirs(ours.removeprefix(prefix), kind)
        else:
            theirs = names.of_head(f"{ours}.{kind}")
        shape = tuple(variable.shape)
        is_kernel = leaf == "kernel"
        expected[theirs] = _Leaf(path, shape[::-1] if is_kernel else shape, is_kernel)
    return expected


def _canonical(
    model: PretrainedModel, stored: Mapping[str, Stored], expected: Mapping[str, _Leaf]
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors found, under the names this model expects, and names that came out twice.

    Files written by a model with a head carry the encoder's prefix, files of a bare encoder do
    not; either fits either.
    """
    written, prefix = f"{model.tensor_names.prefix}.", _encoder_prefix(model)
    found: dict[str, Stored] = {}
    problems = []
    for original, tensor in stored.items():
        name = original
        for pattern, replacement in _OTHER_NAMES:
            name = pattern.sub(replacement, name)
        if not prefix:
            name = name.removeprefix(written)
        elif name not in expected and prefix + name in expected:
            name = prefix + name
        if name in found:
            problems.append(f"twice in the file: {found[name].name} and {original}")
        found[name] = tensor
    for name in list(found):
        counts = model.tensor_names.alias(name)
        if counts != name and counts in expected:
            tensor = found.pop(name)
            found.setdefault(counts, tensor)
    return found, problems


def _wrong_head(
    model: PretrainedModel,
    folder: Path,
    expected: Mapping[str, _Leaf],
    found: Mapping[str, Stored],
) -> list[str]:
    """A problem where the file's head has this head's name but belongs to another task.

    Where the config names a class without a head for a task, it is of the model that was
    fine-tuned, and the head can only be what that has learned.
    """
    prefix = _encoder_prefix(model)
    config = config_file(folder)
    if not prefix or not config.is_file():
        return []
    architectures = architectures_of(read_json_object(config), config)
    shared = [name for name in expected if name in found and not name.startswith(prefix)]
    others = [name for name in architectures if name.endswith(_HEADED)]
    if not shared or not others or model.architecture in architectures:
        return []
    return [
        f"head: {', '.join(shared)} belong to a {others[0]}: read it with that class, or start a new "
        "head with new_head=True"
    ]


def _advice(
    model: PretrainedModel, prefix: str, missing: list[str], reshaped: list[str]
) -> list[str]:
    """What to do about the problems, where it is known."""
    advice = []
    in_head = [name for name in missing if not name.startswith(prefix)]
    bodies = [name.removeprefix(prefix) for name in missing if name.startswith(prefix)]
    if in_head:
        advice.append("to start a new head on this encoder, pass new_head=True")
    elif bodies and all(map(model.tensor_names.is_head, bodies)):
        advice.append(
            "to start a new pooler, pass new_head=True; to do without, add_pooling_layer=False"
        )
    if any(not name.startswith(prefix) for name in reshaped):
        advice.append(
            f"the config says num_labels={model.config.num_labels}: leave num_labels at the "
            "file's number, or pass new_head=True for a new head"
        )
    return advice


def _said(config: ModelConfig, shapes: Iterable[tuple[tuple[int, ...], ...]]) -> list[str]:
    """Which field of the config says the sizes that the file has otherwise, where one alone does."""
    said = {}
    for there, wanted in shapes:
        for has, says in zip(there, wanted, strict=False):
            names = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == says]
            if has != says and len(there) == len(wanted) and len(names) == 1:
                said[names[0]] = f"the config says {names[0]}={says}, the file has {has}"
    said.pop("num_labels", None)
    return list(said.values())


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder; raises ``ValueError``, with the way to get one, if there is none."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"no folder {str(path)!r}: give the path of a local folder with config.json and "
            f"{WEIGHTS} (to fetch a model: hf download NAME --local-dir FOLDER)"
        )
    return path
