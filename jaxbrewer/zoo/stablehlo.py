"""A model as one file that needs nothing but JAX to run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from jaxbrewer.files import replacing

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
GIVEN = ("logits", "start_logits", "end_logits", "embedding", "last_hidden_state", "pooler_output")


# What JAX raises where a program asks for the length, and it is any.
_DEPENDS = (jax.errors.InconclusiveDimensionOperation, jax.errors.TracerBoolConversionError)


def export_stablehlo(
    model: nnx.Module,
    file: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    length: int | None = None,
) -> export.Exported:
    """Writes a model of the zoo, its weights in it, as serialized StableHLO.

    It is read, without jaxbrewer, by ``jax.export.deserialize(bytearray(file.read_bytes()))``, and
    called as ``exported.call(input_ids=…, attention_mask=…)`` with int32 arrays ``[batch, length]``
    (and ``token_type_ids``, where the model has several). It returns a dict of those of ``logits``,
    ``start_logits``, ``end_logits``, ``embedding``, ``last_hidden_state`` and ``pooler_output`` that
    the model gives. JAX promises to read such a file for six months after the release that wrote
    it: keep the model's folder too.

    Args:
        model: a model of the zoo, in evaluation mode whatever mode it is in.
        file: where to; it appears whole or not at all.
        platforms: what it is lowered for, of ``'cpu'``, ``'cuda'``, ``'tpu'``, ``'rocm'``.
        length: of all sequences; None: any length. The batch may have any size.

    Returns:
        What was written.

    Raises:
        ValueError: another platform, a length that the model has no positions for, or a model whose
            program depends on the length.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms or isinstance(platforms, str):
        raise ValueError(f"platforms={platforms!r}: expected some of {', '.join(PLATFORMS)}")
    twin: Any = nnx.merge(*nnx.split(model))
    twin.eval()
    base = getattr(twin, "base_model", None)
    if base is None or not hasattr(base, "longest"):
        raise ValueError(
            f"{type(model).__name__} is no transformer of the zoo: it has no base_model"
        )
    longest = base.longest()
    if length is not None and not 0 < length <= (longest or length):
        raise ValueError(f"length={length}: the model has positions for 1 to {longest}")
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if twin.id_limits.get("token_type_ids", 0) > 1 else []
    graph, state = nnx.split(twin)

    def run(**inputs: jax.Array) -> dict[str, jax.Array]:
        outputs = nnx.merge(graph, state)(**inputs, return_dict=True)
        return {name: outputs[name] for name in GIVEN if name in outputs}

    shape = _shape(length, longest)
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    try:
        exported = export.export(jax.jit(run), platforms=platforms)(**inputs)
    except _DEPENDS as error:
        raise ValueError(
            f"the program of {type(model).__name__} depends on the length: give one, such as length=128"
        ) from error
    with replacing(Path(file)) as new:
        new.write_bytes(exported.serialize())
    return exported


def _shape(length: int | None, longest: int | None) -> tuple[Any, Any]:
    """The shape of the inputs: any batch, and any length that there are positions for."""
    if length is not None:
        return export.symbolic_shape("batch")[0], length
    bounds = [] if longest is None else [f"length <= {longest}"]
    batch, any_length = export.symbolic_shape("batch, length", constraints=bounds)
    return batch, any_length
