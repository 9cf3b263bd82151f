"""The parts of a step that users bring, each traced alone, and what two of them give on made-up numbers.

Functions do not compare by value; traces do, see `traces`, as long as the versions of the libraries
are the same. Across versions `probe_loss` and `probe_optimizer` tell more than nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.batches import Batch, sides
from ...machine.placement import has_rows
from ...objective.loss import Loss, Weights
from ...objective.monitor import unmonitored
from ...step import memory
from ...step.program import Program
from ..digests import json_digest, kind_of, named
from .traces import trace

# For the compiler, where a program runs once.
_QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_SCALAR = jax.ShapeDtypeStruct((), np.float32)


def traces(program: Program, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Traces teacher, student and loss on a batch, given by shape.

    Returns:
        ``{'teacher': …, 'student': …, 'loss': …}``, and what the loss is of, by shape. The loss has a
        further entry ``inputs``, the digest of these shapes.
    """
    state = jax.eval_shape(lambda: program.init(0))
    teacher, results_T = _teacher(program, batch)
    student, results_S = _student(program, state, batch)
    row = jax.ShapeDtypeStruct(program.row.shape, np.float32)
    weights = jax.eval_shape(program.objective.scheduled.read, row)
    inputs = {
        "params": state.params["projections"],
        "state": state.model_state["projections"],
        "key": state.key,
        "results_S": results_S,
        "results_T": results_T,
        "weights": weights._replace(state=memory.value_of(state.objective)),
    }
    loss, _ = trace(lambda **inputs: _with_gradient(program, **inputs), **inputs)
    loss["inputs"] = json_digest({name: kind_of(x) for name, x in named(inputs).items()})
    return {"teacher": teacher, "student": student, "loss": loss}, inputs


def _teacher(program: Program, batch: Batch) -> tuple[dict[str, Any], Any]:
    teacher_batch, _, cache = sides(batch)
    return trace(
        lambda variables, batch, cache: program.teacher(variables, batch, cache),
        variables=jax.eval_shape(lambda: program.teacher.variables),
        batch=teacher_batch,
        cache=cache,
    )


def _student(program: Program, state: Any, batch: Batch) -> tuple[dict[str, Any], Any]:
    """The student with its adaptor, forwards and back."""
    parting = program.parting

    def run(params: Any, state: Any, key: Any, batch: Batch, pull: Any) -> dict[str, Any]:
        trained, frozen = (params, {}) if parting is None else parting.part(params)

        def forward(trained: Any) -> Any:
            params = trained if parting is None else parting.join(trained, frozen)
            results, new = program.student(params, state, key, batch, program.train)
            return _floats(results)[0], (results, new)

        floats, back, (results, new) = jax.vjp(forward, trained, has_aux=True)
        pulls = [jnp.broadcast_to(pull.astype(x.dtype), x.shape) for x in floats]
        return {"results": results, "state": new, "gradient": back(pulls)}

    found, shapes = trace(
        run,
        params=state.params["student"],
        state=state.model_state["student"],
        key=state.key,
        batch=sides(batch)[1],
        pull=_SCALAR,
    )
    return found, shapes["results"]


def _loss(
    program: Program,
    params: Any,
    state: Any,
    key: Any,
    results_S: Any,
    results_T: Any,
    weights: Weights,
) -> tuple[Loss, Any]:
    """The loss of results that are there, and the projections' new state."""
    given: Any = lambda params, state, key, batch, train: (batch, state)  # noqa: E731
    model_state = {"student": (), "projections": state}
    params = {"student": (), "projections": params}
    alone = replace(program, student=given, objective=unmonitored(program.objective))
    _, (loss, new) = alone.loss(params, model_state, key, results_S, results_T, weights)
    return loss, new["projections"]


def _with_gradient(program: Program, params: Any, results_S: Any, **others: Any) -> dict[str, Any]:
    """The loss, and its gradient by projections and the student's results."""
    floats, whole = _floats(results_S)

    def value(params: Any, floats: Any) -> Any:
        loss, state = _loss(program, params=params, results_S=whole(floats), **others)
        terms = {name: jnp.asarray(x) for name, x in loss.terms.items()}
        return jnp.asarray(loss.total), {
            "terms": terms,
            "surplus": jnp.asarray(loss.surplus),
            "state": state,
        }

    total, back, found = jax.vjp(value, params, floats, has_aux=True)
    return {"total": total, "gradient": back(jnp.ones_like(total)), **found}


def _floats(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The floats among the leaves of a tree, and the tree made of others for them."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def whole(floats: list[Any]) -> Any:
        others = dict(zip(places, floats, strict=True))
        return jax.tree.unflatten(structure, [others.get(i, x) for i, x in enumerate(leaves)])

    return [leaves[i] for i in places], whole


def trace_optimizer(optimizer: Any, params: Any) -> dict[str, Any]:
    """The trace of an optimizer's start and of one update."""
    params = jax.eval_shape(lambda: params)

    def run(params: Any, grads: Any, state: Any, factor: Any) -> Any:
        return optimizer.init(params), optimizer.update(grads, state, params, factor=factor)

    state = jax.eval_shape(optimizer.init, params)
    return trace(run, params=params, grads=params, state=state, factor=_SCALAR)[0]


def probe_optimizer(optimizer: Any, params: Any) -> dict[str, float | None] | None:
    """A number of each array's second update; the arrays are named as `params`, and small."""

    def run(small: Any) -> Any:
        state = optimizer.init(small)
        for _ in range(2):
            updates, state = optimizer.update(small, state, small, factor=jnp.ones(()))
        return named(updates)

    small = _made_up(jax.eval_shape(lambda: params), lambda x: [min(n, 2) for n in x.shape])
    found = _on_host(run, small)
    return None if found is None else {name: _number(x) for name, x in found.items()}


def probe_loss(
    program: Program, inputs: Mapping[str, Any], rows: int
) -> dict[str, float | None] | None:
    """The terms of the loss on made-up results of two examples.

    Args:
        program: the program.
        inputs: what the loss is of, by shape, see `traces`.
        rows: of the batch that `inputs` are of.
    """

    def shape(x: Any) -> Sequence[int]:
        return (2, *x.shape[1:]) if has_rows(x, rows) else x.shape

    def run(results: Any, projections: Any) -> Any:
        loss, _ = _loss(program, **results, **projections)
        return {"total": loss.total} | loss.terms

    results = {k: inputs[k] for k in ("results_S", "results_T", "weights")}
    projections = {k: inputs[k] for k in ("params", "state", "key")}
    found = _on_host(run, _made_up(results, shape), _made_up(projections, lambda x: x.shape))
    return None if found is None else {name: _number(x) for name, x in found.items()}


def _made_up(tree: Any, shape: Callable[[Any], Sequence[int]]) -> Any:
    """Arrays of numbers that are always the same, in other shapes; whole numbers are 0 and 1."""
    leaves, structure = jax.tree.flatten(tree)
    made = [_numbers(i, shape(x), x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, made)


def _numbers(seed: int, shape: Sequence[int], dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    places = np.arange(int(np.prod(shape))).reshape(shape)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return (np.sin(1.0 + seed + places) if is_float else places % 2).astype(dtype)


def _number(x: Any) -> float | None:
    """One number that depends on all of an array's; None where it is not finite."""
    array = np.asarray(x, np.float64).ravel()
    found = float(np.sum(array * np.cos(np.arange(array.size))))
    return found if np.isfinite(found) else None


def _on_host(run: Callable[..., Any], *arrays: Any) -> Any:
    """What a function gives on the CPU; None where it cannot do with what is made up."""
    try:
        here = jax.device_put(arrays, jax.local_devices(backend="cpu")[0])
        return jax.jit(run).lower(*here).compile(_QUICKLY)(*here)
    except Exception:  # noqa: BLE001  the user's losses and optimizers may raise anything
        return None
