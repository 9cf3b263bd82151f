"""A model as an ONNX file, by way of its class in transformers and torch's exporter.

An offline tool: torch, transformers and onnx are imported when a file is written, and not before.
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbrewer.files import replacing
from jaxbrewer.zoo.hf import PretrainedModel
from jaxbrewer.zoo.stablehlo import GIVEN

OPSET = 17
_LARGEST = 2**31 - 2**20  # bytes of weights that one file holds
_TOLERANCE = 1e-3  # of the largest value of an output,
_LEAST = 0.01  # which counts as this much at least
_TRACED = (2, 8)  # rows and length
_COMPARED = ((3, 5), (1, 64))
_LABELLED = ("sequence-classification", "token-classification")


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        inputs: name → shape, of int64.
        outputs: name → shape, of float32.
        compared: the batches and lengths that were compared; none without onnxruntime.
        difference: the largest between the file's outputs and the model's, None likewise.
    """

    inputs: Mapping[str, tuple[Any, ...]]
    outputs: Mapping[str, tuple[Any, ...]]
    compared: tuple[tuple[int, int], ...]
    difference: float | None


def export_onnx(model: nnx.Module, file: str | os.PathLike[str]) -> OnnxFile:
    """Writes a model of the zoo, its weights in it, as one ONNX file of opset 17.

    It takes int64 arrays ``input_ids`` and ``attention_mask`` (and ``token_type_ids``, where the
    model has several), ``[batch, length]`` of any size that there are positions for, and gives in
    float32 those of ``logits``, ``start_logits``, ``end_logits``, ``embedding``,
    ``last_hidden_state`` and ``pooler_output`` that the model gives. Its ``metadata_props`` have
    ``architecture``, ``task`` and, of classes, ``id2label`` as JSON.

    The graph is that of the class of transformers, as torch's tracing exporter writes it. Where onnxruntime
    is installed, the file is run on random batches of two sizes and two lengths, other than those
    that were traced, and compared with the model.

    Args:
        model: a model of the zoo with a class in transformers, or a `SentenceEncoder`; in
            evaluation mode whatever mode it is in.
        file: where to; it appears whole or not at all.

    Raises:
        ImportError: torch, transformers or onnx is not installed.
        ValueError: another model, weights of 2 GiB or more, or a file that gives other numbers than the
            model: above a thousandth of an output's largest.
    """
    if not isinstance(model, PretrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of a folder: give the encoder or the classifier in it"
        )
    _check_installed()
    from jaxbrewer.zoo.onnx.twins import class_of

    class_of(model.base_model if model.task == "sentence-embedding" else model)
    twin: Any = nnx.merge(*nnx.split(model))
    twin.eval()
    size = sum(leaf[...].size for _, leaf in nnx.to_flat_state(nnx.state(twin, nnx.Param))) * 4
    if size > _LARGEST:
        raise ValueError(
            f"the weights of {type(model).__name__} are {size / 2**30:.1f} GiB in float32, and an "
            "ONNX file holds less than 2"
        )
    batches = [_batch(twin, *_within(twin, rows, length)) for rows, length in _COMPARED]
    expected = [_outputs(twin, batch) for batch in batches]
    exported, shapes = _exported(twin, list(expected[0]))
    difference = None
    if importlib.util.find_spec("onnxruntime") is not None:
        found = [_run(exported, batch) for batch in batches]
        difference = max(map(_difference, found, expected))
    with replacing(Path(file)) as new:
        new.write_bytes(exported)
    compared = tuple(batch["input_ids"].shape for batch in batches)
    return OnnxFile(*shapes, () if difference is None else compared, difference)


def _check_installed() -> None:
    names = ("torch", "transformers", "onnx")
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"writing ONNX needs {', '.join(absent)}, which is not installed: pip install 'jaxbrewer[onnx]'"
        )


# ------------------------------------------------------------------------------------ the model


def _within(model: Any, rows: int, length: int) -> tuple[int, int]:
    """A shape with no more positions than the model has."""
    longest = getattr(model.base_model, "longest", lambda: None)()
    return rows, min(length, longest or length)


def _batch(model: Any, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random inputs; of several sentences the last is padded."""
    rng = np.random.default_rng(rows)
    mask = np.ones((rows, length), np.int64)
    mask[1:][-1:, length // 2 :] = 0
    limits = model.id_limits
    batch = {"input_ids": rng.integers(0, limits["input_ids"], mask.shape), "attention_mask": mask}
    if (types := limits.get("token_type_ids", 0)) > 1:
        batch["token_type_ids"] = rng.integers(0, types, mask.shape)
    return batch


def _outputs(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's outputs, of those that are exported."""
    inputs = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    outputs = model(**inputs, return_dict=True)
    return {name: np.asarray(outputs[name]) for name in GIVEN if name in outputs}


# ------------------------------------------------------------------------------------- the file


def _exported(model: Any, names: list[str]) -> tuple[bytes, tuple[dict[str, Any], dict[str, Any]]]:
    """The file, and the shapes of its inputs and outputs."""
    import onnx
    import torch

    from jaxbrewer.zoo.onnx.twins import Twin

    inputs = _batch(model, *_within(model, *_TRACED))
    twin = Twin(model, list(inputs), names)
    stream: Any = io.BytesIO()  # torch's types speak of files alone
    with warnings.catch_warnings():
        # Of the exporter's age, and of values that it takes for constants: the comparison sees to that.
        warnings.simplefilter("ignore")
        arrays = tuple(torch.tensor(value) for value in inputs.values())
        shapes = [tuple(output.shape) for output in twin(*arrays)]
        axes = {name: {0: "batch", 1: "length"} for name in inputs}
        for name in names:
            axes[name] = {0: "batch", **({1: "length"} if _is_by_token(name, model) else {})}
        torch.onnx.export(
            twin,
            arrays,
            stream,
            dynamo=False,
            input_names=list(inputs),
            output_names=names,
            dynamic_axes=axes,
            opset_version=OPSET,
        )
    proto = onnx.load_model_from_string(stream.getvalue())
    onnx.helper.set_model_props(proto, _told(model))
    onnx.checker.check_model(proto)
    described = tuple(
        {name: _named(shape, axes[name]) for name, shape in zip(of, their, strict=True)}
        for of, their in ((inputs, [a.shape for a in arrays]), (names, shapes))
    )
    return proto.SerializeToString(), described  # type: ignore[return-value]


def _is_by_token(name: str, model: Any) -> bool:
    """Whether the second axis of an output is the length."""
    by_sentence = name in ("embedding", "pooler_output")
    return not (by_sentence or (name == "logits" and model.task == "sequence-classification"))


def _named(shape: tuple[int, ...], axes: Mapping[int, str]) -> tuple[Any, ...]:
    return tuple(axes.get(i, n) for i, n in enumerate(shape))


def _told(model: Any) -> dict[str, str]:
    """What the file says of itself."""
    architecture = getattr(model, "architecture", model.base_model.architecture)
    told = {"architecture": architecture, "task": model.task or "none"}
    if model.task in _LABELLED:
        told["id2label"] = json.dumps(model.config.id2label, ensure_ascii=False)
    return told


# ------------------------------------------------------------------------------ the comparison


def _run(exported: bytes, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of the file."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {given.name for given in session.get_inputs()}
    found = session.run(names, {name: x for name, x in batch.items() if name in taken})
    return dict(zip(names, found, strict=True))


def _difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two sides' outputs.

    Raises ``ValueError`` where it is too large, or they have other shapes.
    """
    largest = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{name} of the ONNX file is {list(found[name].shape)}, of the model {list(value.shape)}"
            )
        apart = float(np.abs(found[name] - value).max())
        scale = max(_LEAST, float(np.abs(value).max()))
        if not apart <= _TOLERANCE * scale:
            raise ValueError(
                f"{name} of the ONNX file differs from the model's by {apart:g}, where {scale:g} is "
                "the largest: nothing was written"
            )
        largest = max(largest, apart)
    return largest
