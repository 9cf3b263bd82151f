"""The class for a folder or a config, by its ``model_type`` and the task."""

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxbrewer.files import read_json_object
from jaxbrewer.zoo.bert import BertConfig
from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.folders import architectures_of, config_file
from jaxbrewer.zoo.hf import PretrainedModel, existing_folder, model_class, tasks_of
from jaxbrewer.zoo.masked_lm import MaskedLM, holds_masked_lm
from jaxbrewer.zoo.sentence import SentenceEncoder
from jaxbrewer.zoo.sentence_files import is_sentence_encoder

logger = logging.getLogger(__name__)


def read_config(path: str | os.PathLike[str], **changes: Any) -> ModelConfig:
    """Reads a config, from its file or from a folder with ``config.json``, into its own class.

    A file that does not say its ``model_type``, as TextBrewer's do not, is a BERT's. ``changes``
    are fields to set on top, and ``ignore`` names keys that the model does not depend on.

    Raises ``ValueError`` for a type that is not known, and as `ModelConfig.from_json_file` does.
    """
    file = config_file(path) if Path(path).is_dir() else Path(path)
    model_type = read_json_object(file).get("model_type", BertConfig.model_type)
    try:
        cls = model_class(model_type).config_class
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if Path(path).is_dir():
        return cls.from_pretrained(path, **changes)
    return cls.from_json_file(file, **changes)


def from_config(
    config: ModelConfig,
    task: str | None = None,
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> Any:
    """A new model of a config for a task, or its encoder without a head for ``None``.

    The tasks are those of `from_pretrained`. Computes in ``dtype`` (``param_dtype`` unless given);
    parameters are ``param_dtype``.

    Raises ``ValueError`` as `model_class` does.
    """
    cls: Any = model_class(config.model_type, task)
    return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def from_pretrained(folder: str | os.PathLike[str], task: str | None = None, **options: Any) -> Any:
    """Reads a model from a folder in Hugging Face's format, in the class its config asks for.

    ``model_type`` in ``config.json`` gives the architecture. ``task`` is one of
    ``'sequence-classification'``, ``'token-classification'``, ``'question-answering'`` and
    ``'masked-lm'``; ``None`` takes the class that ``architectures`` names there, or the encoder
    without a head where it names none of ours, and where it names that of masked words but the
    weights hold no such head: the name of pretraining often stays. A line in the log says so. A
    folder of sentence-transformers, with ``modules.json``, becomes a `SentenceEncoder`. ``options``
    are those of `PretrainedModel.from_pretrained`, such as ``new_head=True`` or ``num_labels=3``.

    Raises ``ValueError`` for a type or a task that is not known, with those that are, and as
    `PretrainedModel.from_pretrained` does.
    """
    folder = existing_folder(folder)
    if task is None and is_sentence_encoder(folder):
        return SentenceEncoder.from_pretrained(folder, **options)
    file = config_file(folder)
    values = read_json_object(file)
    model_type = values.get("model_type", BertConfig.model_type)
    try:
        if task is None:
            cls = _saved_class(model_type, architectures_of(values, file))
        else:
            cls = model_class(model_type, task)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if task is None and issubclass(cls, MaskedLM) and not holds_masked_lm(cls, folder):
        encoder = model_class(model_type)
        logger.info(
            "%s names %s, but the weights hold no head of it: read as %s, the encoder alone",
            file, cls.architecture, encoder.architecture,
        )  # fmt: skip
        cls = encoder
    return cls.from_pretrained(folder, **options)


def _saved_class(model_type: str, named: Collection[str]) -> type[PretrainedModel]:
    """The class that ``architectures`` names, or the encoder."""
    tasks = tasks_of(model_type)
    return next((cls for cls in tasks.values() if cls.architecture in named), tasks[None])
