"""From what the user passes as `optimizer` to one transformation over all that is trained.

The trained arrays stand in groups: the student, and each projection. Every group has an optimizer
state of its own, made on its own tree. The student's gradients may be clipped; all groups are
scaled by the learning-rate factor; `optax.MultiSteps` goes around all of it and hands on the mean
of a window's gradients.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import suggest
from .guard import keep

Optimizer: TypeAlias = optax.GradientTransformation | Callable[..., optax.GradientTransformation]

STUDENT = "student"

_TORCH_NAMES = {"lr": "learning_rate", "alpha": "decay"}


def build(
    optimizer: Optimizer,
    projections: Mapping[str, Mapping[str, Any] | None],
    *,
    max_grad_norm: float = -1.0,
    accumulation: int = 1,
    clips_projections: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation for parameters ``{'student': …, 'projections': {name: …}}``.

    Its ``update`` takes the keyword ``factor``, by which every group's update is scaled.

    Args:
        optimizer: an `optax.GradientTransformation`, or a factory of one, such as
            ``functools.partial(optax.adamw, learning_rate=1e-4)``.
        projections: name → the options its optimizer gets over the factory's own
            (``{'lr': 1e-3}``; torch's names are understood), or None.
        max_grad_norm: clips the norm of the student's gradient to this, if positive, as
            ``torch.nn.utils.clip_grad_norm_`` does.
        accumulation: micro-batches whose gradients are averaged into one update.
        clips_projections: whether the projections' gradients are clipped with the student's, by
            one norm of them all; if not, they are not clipped.

    Raises:
        TypeError: if `optimizer` is neither, or cannot take a projection's options; if
            `max_grad_norm` is no number.
    """
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, int | float | np.number):
        raise TypeError(
            f"max_grad_norm is {max_grad_norm!r}; expected a number, below 0 for no clipping"
        )
    student = make_optimizer(optimizer)
    groups = {name: make_optimizer(optimizer, options) for name, options in projections.items()}

    def init(params: Any) -> Any:
        return {
            STUDENT: student.init(params[STUDENT]),
            "projections": {k: opt.init(params["projections"][k]) for k, opt in groups.items()},
        }

    def update(updates: Any, state: Any, params: Any = None, *, factor: Any, **extra: Any) -> Any:
        if max_grad_norm > 0 and clips_projections:
            updates = clip_by_norm(updates, max_grad_norm)
        elif max_grad_norm > 0:
            updates = {**updates, STUDENT: clip_by_norm(updates[STUDENT], max_grad_norm)}
        new: Any = {"projections": {}}
        new_state: Any = {"projections": {}}
        new[STUDENT], new_state[STUDENT] = student.update(
            updates[STUDENT], state[STUDENT], params[STUDENT]
        )
        for k, opt in groups.items():
            new["projections"][k], new_state["projections"][k] = opt.update(
                updates["projections"][k], state["projections"][k], params["projections"][k]
            )
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), new), new_state

    combined = optax.GradientTransformationExtraArgs(init, update)
    if accumulation == 1:
        return combined
    steps = optax.MultiSteps(combined, accumulation)
    # MultiSteps.gradient_transformation() would drop the factor.
    return optax.GradientTransformationExtraArgs(steps.init, cast(Any, steps.update))


def clip_by_norm(grads: Any, max_norm: float) -> Any:
    """Scales gradients so that their global norm is at most `max_norm`.

    Torch's formula, ``max_norm / (norm + 1e-6)``; Optax's own has no 1e-6.
    """
    norm = optax.tree.norm(
        jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, "float32")), grads)
    )
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def drop_window(opt_state: Any) -> Any:
    """Forgets the gradients of an incomplete accumulation window."""
    return opt_state._replace(
        mini_step=jnp.zeros_like(opt_state.mini_step),
        acc_grads=jax.tree.map(jnp.zeros_like, opt_state.acc_grads),
    )


def closes_window(opt_state: Any) -> Any:
    """Whether the update that gave this state was the last of its accumulation window."""
    if not accumulates(opt_state):
        return jnp.bool_(True)
    return opt_state.mini_step == 0


def without_update(before: Any, after: Any, dropped: Any, stopped: Any = False) -> Any:
    """The state `after` an update; where `dropped`, with all that it learnt as it was `before`.

    An accumulation window that ends is over all the same; but where `stopped`, all is as `before`.
    """
    if not isinstance(after, optax.MultiStepsState):
        return keep(before, after, dropped | stopped)
    inner = without_update(before.inner_opt_state, after.inner_opt_state, dropped, stopped)
    window = keep(before._replace(inner_opt_state=()), after._replace(inner_opt_state=()), stopped)
    return window._replace(inner_opt_state=inner)


def accumulates(opt_state: Any) -> bool:
    """Whether a window has several micro-batches."""
    return isinstance(opt_state, optax.MultiStepsState)


def make_optimizer(
    optimizer: Optimizer, options: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """Makes one group's optimizer. See `build` for the arguments and errors."""
    if isinstance(optimizer, optax.GradientTransformation):
        if options:
            raise TypeError(
                f"a projection asks for optimizer options {dict(options)}, but the optimizer is "
                "already built. Pass a factory, which can be called again with them: "
                "functools.partial(optax.adamw, learning_rate=1e-4)"
            )
        return optimizer
    if not callable(optimizer) or hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}; pass an "
            "optax.GradientTransformation, or a factory of one such as "
            "functools.partial(optax.adamw, learning_rate=1e-4)"
        )
    optimizer = _by_name(optimizer)
    own = _translate(optimizer, options or {})
    _check_no_text({**getattr(optimizer, "keywords", {}), **own})
    try:
        made = optimizer(**own)
    except TypeError as error:
        raise TypeError(
            f"the optimizer factory {_name(optimizer)} cannot be called with {own}: {error}. Give "
            "it every argument it needs: functools.partial(optax.adamw, learning_rate=1e-4)"
        ) from error
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            f"the optimizer factory {_name(optimizer)} returned a {type(made).__name__}, not an "
            "optax.GradientTransformation"
        )
    return made


def _check_no_text(arguments: Mapping[str, Any]) -> None:
    """Refuses a number that is text, as it comes from a command line or a YAML file."""
    for name, value in arguments.items():
        with contextlib.suppress(ValueError):
            if isinstance(value, str):
                number = float(value)
                raise TypeError(
                    f"the optimizer's {name}={value!r} is text, expected a number: {name}={number:g}"
                )


def _translate(factory: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Gives torch's option names their Optax ones, and checks the factory takes them."""
    own: dict[str, Any] = {}
    for name, value in options.items():
        if name != "betas":
            own[_TORCH_NAMES.get(name, name)] = value
        elif isinstance(value, Sequence) and len(value) == 2:
            own["b1"], own["b2"] = value
        else:
            raise TypeError(f"a projection asks for betas={value!r}; expected two numbers")
    if not own:
        return own
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return own
    for name in own:
        if name not in parameters:
            raise TypeError(
                f"a projection asks for the optimizer option {name!r}, which {_name(factory)} does "
                f"not take: {suggest(name, parameters)}"
            )
    return own


def _by_name(factory: Callable) -> Callable:
    """Names the arguments that a partial holds by position, so that options can override them."""
    if not isinstance(factory, functools.partial) or not factory.args:
        return factory
    parameters = list(inspect.signature(factory.func).parameters.values())[: len(factory.args)]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return factory
    named = {p.name: value for p, value in zip(parameters, factory.args, strict=True)}
    return functools.partial(factory.func, **named, **factory.keywords)


def _name(factory: Callable) -> str:
    inner = factory.func if isinstance(factory, functools.partial) else factory
    return getattr(inner, "__qualname__", repr(inner))
