"""A model and its adaptor run by shape on a batch: what fails is gathered, with its fix."""

import inspect as _inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from ..data.batches import Batch, check_ids, plain, signature_of
from ..errors import AdaptorError, BatchError, Findings, explained, suggest
from ..models.adaptors import Results, Side, adaptor_name, model_name
from ..models.precision import HalfModel


def inspect(
    side: Side, batch: Batch, train: bool, found: Findings, keywords: Sequence[str] = ()
) -> Results | None:
    """Traces a side by shape.

    Args:
        side: the model and its adaptor.
        batch: the batch it would get.
        train: the mode it would run in.
        found: gets what is wrong.
        keywords: the keywords of ``train`` itself, to suggest for one the model does not know.

    Returns:
        The adaptor's results as `jax.ShapeDtypeStruct`, or None if it could not be run.
    """
    name = model_name(side.role)
    args, kwargs = side.call(batch)
    signature = side.model.signature()
    if not _fits(signature, args, kwargs, name, found, (side.args, keywords)):
        return None
    _check_arguments(side, plain(batch), signature, keywords, found)
    try:
        check_ids(batch, signature, side.model.id_limits, name)
    except BatchError as error:
        found.problems.append(str(error))
        return None

    def run(params: Any, state: Any, inputs: Any) -> Results:
        outputs, captured, _ = side.forward(params, state, jax.random.key(0), inputs, train)
        return _Adapted(side, inputs, outputs, captured).results | side.matched(captured)

    try:
        return jax.eval_shape(run, side.model.params, side.model.state, batch)
    except AdaptorError as error:
        found.problems.extend(str(error).splitlines())  # one line for each thing to mend
    except _AdaptorError as error:
        found.problems.append(str(error))
    except Exception as error:  # noqa: BLE001  the user's model may raise anything
        found.problems.append(
            f"{name} failed on the batch ({signature_of(batch)}): {explained(error)}"
            + _level_hint(side, batch, train)
        )
    return None


def _level_hint(side: Side, batch: Batch, train: bool) -> str:
    """The end of a message about a model that fails at its level, and in float32 does not."""
    model = side.model
    if not isinstance(model, HalfModel) or model.precision.level == "O1":
        return ""
    plain, found = replace(side, model=model.model), Findings()
    if inspect(plain, batch, train, found) is None:
        return ""
    return (
        f". In float32 it runs: something in it does not go with values in {model.precision.half}. "
        "Use fp16_opt_level='O1', which keeps all but products in float32"
    )


def check_trainable(params: Any, name: str, found: Findings) -> None:
    """Gradients need floating point, which a pytree of parameters may lack."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} ({dtype})"
        for path, leaf in leaves
        if not jax.numpy.issubdtype(dtype := jax.numpy.result_type(leaf), jax.numpy.floating)
    ]
    if wrong:
        shown = ", ".join(wrong[:6]) + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        found.problems.append(
            f"{name} cannot be trained: {shown} among its parameters is not floating point. Keep "
            "such values out of them (a FunctionModel's state, an nnx.Variable that is no Param)"
        )


def _check_arguments(
    side: Side,
    batch: Batch,
    signature: _inspect.Signature,
    keywords: Sequence[str],
    found: Findings,
) -> None:
    """Looks at what ``train(…, **args)`` passes on to a model that takes it."""
    for keyword in side.args:
        if isinstance(batch, dict) and keyword in batch:
            found.problems.append(
                f"{model_name(side.role)} gets {keyword!r} twice: from the batch and from "
                f"train(…, {keyword}=…). Drop one of them"
            )
        elif keyword not in signature.parameters:  # it goes into the model's **kwargs
            hint = suggest(keyword, keywords)
            if hint.startswith("did you mean"):
                found.warnings.append(
                    f"train(…, {keyword}=…) is passed on to {model_name(side.role)}; {hint}"
                )


class _AdaptorError(Exception):
    """An adaptor failed, not its model."""


class _Adapted:
    """Runs an adaptor and tells its failures from the model's."""

    def __init__(self, side: Side, batch: Batch, outputs: Any, captured: Any):
        try:
            self.results = side.adapt(batch, outputs, captured)
        except AdaptorError:
            raise
        except ValueError as error:
            raise _AdaptorError(str(error)) from error
        except Exception as error:
            inputs = (
                f"keys {', '.join(map(str, batch))}"
                if isinstance(batch, dict)
                else f"{len(batch)} items"
            )
            raise _AdaptorError(
                f"{adaptor_name(side.role)} failed: {explained(error)}. It got a batch with {inputs}, "
                f"and the model's outputs, {_outline(outputs)}"
            ) from error


def _outline(outputs: Any) -> str:
    if hasattr(outputs, "shape"):
        return f"one array {list(outputs.shape)}"
    if isinstance(outputs, Mapping):
        return f"a {type(outputs).__name__} with keys {', '.join(map(str, outputs))}"
    if isinstance(outputs, tuple | list):
        return f"a {type(outputs).__name__} of {len(outputs)}"
    fields = (
        [name for name in vars(outputs) if not name.startswith("_")]
        if hasattr(outputs, "__dict__")
        else []
    )
    return f"a {type(outputs).__name__}" + (f" with {', '.join(fields)}" if fields else "")


def _fits(
    signature: _inspect.Signature, args: tuple, kwargs: dict, name: str, found: Findings, extra: Any
) -> bool:
    """Checks a batch against a model's call signature."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    ours, keywords = extra
    good = True
    for keyword in kwargs if not takes_any else ():
        if keyword in signature.parameters:
            continue
        good = False
        if keyword in ours:
            choices = [*keywords, *signature.parameters]
            where = f"train(…, {keyword}=…) is passed on to {name}, which does not take it"
        else:
            choices = list(signature.parameters)
            where = f"the batch has {keyword!r}, which {name} does not take"
        found.problems.append(
            f"{where}: {suggest(keyword, choices)}"
            + ("" if keyword in ours else "; or drop it with train(…, batch_postprocessor=…)")
        )
    if good:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            found.problems.append(
                f"the batch does not fit {name}{signature}: {error}. A dict is passed by name, a "
                "tuple by position"
            )
            return False
    return good
