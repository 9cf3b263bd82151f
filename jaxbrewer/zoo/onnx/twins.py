"""A model of the zoo as a module of torch, by its class in transformers. Importing this needs both."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from jaxbrewer.zoo.hf import PretrainedModel
from jaxbrewer.zoo.sentence import Dense, SentenceEncoder

_ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


class Twin(torch.nn.Module):
    """Takes the inputs of some names in order, and gives a tuple of the outputs of some names."""

    def __init__(self, model: PretrainedModel, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        sentence = model if isinstance(model, SentenceEncoder) else None
        self.model = _of_transformers(model if sentence is None else sentence.encoder)
        self.after = None if sentence is None else _Embedding(sentence)
        self.eval()

    def forward(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        given = dict(zip(self.inputs, arrays, strict=True))
        outputs = dict(self.model(**given, return_dict=True))
        if self.after is not None:
            hidden, mask = outputs["last_hidden_state"], given["attention_mask"]
            outputs["embedding"] = self.after(hidden, mask)
        return tuple(outputs[name] for name in self.outputs)


class _Embedding(torch.nn.Module):
    """What a `SentenceEncoder` makes of the hidden states."""

    def __init__(self, model: SentenceEncoder):
        super().__init__()
        self.pooling, self.normalize = model.sentence.pooling, model.sentence.normalize
        self.layers = torch.nn.ModuleList(map(_linear, model.dense))
        self.activations = [_ACTIVATIONS[dense.activation] for dense in model.dense]

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embeddings."""
        x = self._pooled(hidden, (mask != 0).to(hidden.dtype))
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
        return torch.nn.functional.normalize(x, dim=-1) if self.normalize else x

    def _pooled(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """As `zoo.sentence.pooled`."""
        if self.pooling == "cls":
            first = torch.argmax(seen, dim=1)[:, None, None]
            return torch.gather(hidden, 1, first.expand(-1, 1, hidden.shape[2]))[:, 0]
        count = seen.sum(dim=1, keepdim=True)
        if self.pooling == "mean":
            return (hidden * seen[..., None]).sum(dim=1) / count.clamp(min=1e-9)
        lowest = torch.finfo(hidden.dtype).min
        highest = torch.where(seen[..., None] > 0, hidden, lowest).amax(dim=1)
        return torch.where(count > 0, highest, 0.0)


def _linear(dense: Dense) -> torch.nn.Linear:
    kernel, bias = np.asarray(dense.linear.kernel[...], np.float32), dense.linear.bias
    linear = torch.nn.Linear(kernel.shape[0], kernel.shape[1], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(kernel.T))
        if bias is not None:
            linear.bias.copy_(torch.tensor(np.asarray(bias[...], np.float32)))
    return linear


def class_of(model: PretrainedModel) -> Any:
    """The class of transformers; raises ``ValueError`` where there is none."""
    cls = getattr(transformers, model.architecture, None)
    if cls is None:
        raise ValueError(
            f"transformers has no {model.architecture}, and ONNX is written by way of its classes"
        )
    return cls


def _of_transformers(model: PretrainedModel) -> Any:
    """The model of transformers with the same weights, in float32.

    Raises ``ValueError`` where transformers has no such class, or does not read all weights.
    """
    cls = class_of(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        model.save_pretrained(folder)
        twin, told = cls.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    has_pooler = getattr(model.base_model, "pooler", None) is not None
    absent = [name for name in told["missing_keys"] if has_pooler or "pooler." not in name]
    if absent or told["mismatched_keys"] or told["unexpected_keys"]:
        raise ValueError(
            f"transformers reads {model.architecture} otherwise than jaxbrewer: {told}"
        )
    return twin


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from telling what it reads."""
    logging = transformers.utils.logging
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
