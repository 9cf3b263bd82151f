"""Any function's products run on half-precision inputs, from outside: its jaxpr is rewritten.

A model need not know of it, nor have a dtype to set. The rewriting comes after differentiation, so
the products of the backward pass are caught as those of the forward pass are, and a function's own
gradient rules (`jax.custom_vjp`, `jax.checkpoint`) are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.tree_util import Partial

from ..errors import PrecisionError

Half: TypeAlias = Any
"""``jnp.bfloat16`` or ``jnp.float16``."""

products_half = jax.make_user_context(None)
"""The half type's name where a function is traced whose products will be in it (`in_half`), else None.

It is for functions that choose a kernel by the type of their inputs. What JAX keeps of a traced
function is kept apart by it.
"""


class _How(NamedTuple):
    """The half type, and whether products get its values in float32."""

    half: Half
    emulated: bool


_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
_SUMS = ("reduce_sum", "cumsum", "scatter-add", "scatter_add")
# A jaxpr within these is evaluated in their place, for they are differentiated by now.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
}
_STATIC = (bool, int, float, complex, str, bytes, type(None))


def is_float(x: Any) -> bool:
    """Whether an array (or its shape) is of a floating type."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def is_wide(x: Any) -> bool:
    """Whether an array (or its shape) is floating, of 32 bits or more."""
    return is_float(x) and jnp.finfo(x.dtype).bits >= 32


def is_half(x: Any) -> bool:
    """Whether an array (or its shape) is bfloat16 or float16."""
    return is_float(x) and jnp.finfo(x.dtype).bits == 16


def in_half(
    function: Callable[..., Any], half: Half, *, emulated: bool = False
) -> Callable[..., Any]:
    """Returns `function` with its products on half inputs and its half sums in float32.

    Every matrix product and convolution gets its floating inputs in `half` and gives its result
    in the type it had, accumulated in float32; so do those of its gradient. The result of a
    convolution is rounded to `half` before. Sums of half values (of a bias's gradient, of rows of a
    table) are made in float32 and rounded once. All else stays as it is.

    Args:
        function: takes pytrees of arrays; returns a pytree of arrays and of plain numbers, text
            and None. Reverse-mode differentiation only.
        half: ``jnp.bfloat16`` or ``jnp.float16``.
        emulated: whether inputs are rounded to `half` and then multiplied as float32, which gives
            the same numbers. For CPUs: XLA makes their products so in any case, and fails on some
            that have half inputs and a float32 result.

    Raises:
        PrecisionError: when called on a function whose products cannot be reached.
    """

    how = _How(half, emulated)

    def run(*trees: Any) -> Any:
        leaves, structure = jax.tree.flatten(trees)
        outline: list[Any] = []

        def plain(*leaves: Any) -> list[Any]:
            with products_half(jnp.dtype(half).name):
                arrays, shape = _part(function(*jax.tree.unflatten(structure, leaves)))
            outline[:] = [shape]
            return arrays

        @jax.custom_vjp
        def flat(*leaves: Any) -> list[Any]:
            return _rewritten(plain, how)(*leaves)

        def forward(*primals: Any) -> tuple[Any, Any]:
            moved = [primal.perturbed for primal in primals]
            values = [primal.value for primal in primals]
            return _rewritten(partial(_differentiated, plain, moved), how)(*values)

        def backward(pull: Any, cotangents: Any) -> Any:
            return pull(how, cotangents)

        flat.defvjp(forward, backward, symbolic_zeros=True)
        return _join(flat(*leaves), outline[0])

    return run


def _differentiated(
    plain: Callable[..., list[Any]], moved: Sequence[bool], *values: Any
) -> tuple[list[Any], Any]:
    """The outputs, and a pytree that can be called with their cotangents.

    Differentiates with respect to those arguments only that move, for a function may have no
    derivative by the others.
    """
    floats: list[bool] = []

    def by_moved(*those: Any) -> tuple[list[Any], list[Any]]:
        given = iter(those)
        outputs = plain(*(next(given) if m else v for m, v in zip(moved, values, strict=True)))
        floats[:] = [is_float(x) for x in outputs]
        chosen = [x for x, is_one in zip(outputs, floats, strict=True) if is_one]
        return chosen, [x for x, is_one in zip(outputs, floats, strict=True) if not is_one]

    those = (value for m, value in zip(moved, values, strict=True) if m)
    chosen, pullback, others = jax.vjp(by_moved, *those, has_aux=True)
    pools = iter(chosen), iter(others)
    outputs = [next(pools[0] if is_one else pools[1]) for is_one in floats]
    return outputs, Partial(partial(_pull, tuple(moved), tuple(floats)), pullback)


def _pull(
    moved: tuple[bool, ...],
    floats: tuple[bool, ...],
    pullback: Any,
    how: _How,
    cotangents: Sequence[Any],
) -> tuple[Any, ...]:
    """Cotangents of the outputs → those of the arguments; None where an argument does not move."""
    needed = [
        jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c
        for c, is_one in zip(cotangents, floats, strict=True)
        if is_one
    ]
    gradients = iter(_rewritten(lambda pullback, needed: pullback(needed), how)(pullback, needed))
    return tuple(next(gradients) if m else None for m in moved)


def _part(outputs: Any) -> tuple[list[Any], tuple[Any, list[Any]]]:
    """The arrays among the leaves of outputs, and all else that it takes to put them together."""
    leaves, structure = jax.tree.flatten(outputs)
    fixed = []
    for leaf in leaves:
        if not (isinstance(leaf, _STATIC) or hasattr(leaf, "dtype")):
            raise PrecisionError(
                f"the model returns a {type(leaf).__name__}, into which JAX cannot look. Return a "
                "dict, a tuple, or a dataclass registered with jax.tree_util.register_dataclass"
            )
        fixed.append(leaf if isinstance(leaf, _STATIC) else Ellipsis)
    return [leaf for leaf in leaves if hasattr(leaf, "dtype")], (structure, fixed)


def _join(arrays: Sequence[Any], outline: tuple[Any, list[Any]]) -> Any:
    structure, fixed = outline
    given = iter(arrays)
    return jax.tree.unflatten(structure, [next(given) if x is Ellipsis else x for x in fixed])


# --- The rewriting --------------------------------------------------------------------------------


def _rewritten(function: Callable[..., Any], how: _How) -> Callable[..., Any]:
    """`function` as its rewritten jaxpr; it is not differentiated any more."""

    def run(*trees: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*trees)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(trees), how)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], how: _How) -> list[Any]:
    """Runs a jaxpr, its products in half."""
    known: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True)
    )

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        outputs = _run(eqn, [read(atom) for atom in eqn.invars], how)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(eqn: Any, values: list[Any], how: _How) -> Sequence[Any]:
    """Runs one equation."""
    name = eqn.primitive.name
    if _is_product(eqn, how):
        return [_product(eqn, values, how)]
    if _is_half_sum(eqn):
        return [_sum(eqn, values)]
    if not any(_concerns(inner, how) for inner in _inside(eqn)):
        outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return outputs if eqn.primitive.multiple_results else [outputs]
    if name in _INLINED:
        return _evaluate(*_open(eqn.params[_INLINED[name]]), values, how)
    if name in _REBUILT:
        return _REBUILT[name](eqn, values, how)
    raise PrecisionError(
        f"the model has a matrix product inside {name!r}, where it cannot be brought to half "
        "precision from outside. Give that part half-precision inputs in the model itself, or train "
        "with fp16=False"
    )


def _is_product(eqn: Any, how: _How) -> bool:
    """Whether it is a product to change."""
    if eqn.primitive.name not in _PRODUCTS:
        return False
    operands = [atom.aval for atom in eqn.invars[:2]]
    return all(map(is_float, operands)) and (how.emulated or any(map(is_wide, operands)))


def _is_half_sum(eqn: Any) -> bool:
    return eqn.primitive.name in _SUMS and is_half(eqn.invars[0].aval)


def _product(eqn: Any, values: Sequence[Any], how: _How) -> Any:
    out = eqn.outvars[0].aval.dtype
    rounded = [jnp.asarray(x, how.half) if is_wide(x) else x for x in values[:2]]
    if rounded[0].dtype != rounded[1].dtype:
        rounded = [jnp.asarray(x, how.half) for x in rounded]
    # XLA has no convolutions on GPUs whose result is wider than their inputs.
    is_convolution = eqn.primitive.name == "conv_general_dilated"
    result = rounded[0].dtype if is_convolution else out
    params = {**eqn.params, "precision": None, "preferred_element_type": result}
    if how.emulated:
        params["preferred_element_type"] = jnp.dtype(jnp.float32)
        rounded = [jnp.asarray(x, jnp.float32) for x in rounded]
    product = eqn.primitive.bind(*rounded, *values[2:], **params)
    return jnp.asarray(jnp.asarray(product, result), out)


def _sum(eqn: Any, values: Sequence[Any]) -> Any:
    out = values[0].dtype
    wide = [jnp.asarray(x, jnp.float32) if is_float(x) else x for x in values]
    if "scatter" not in eqn.primitive.name:
        return eqn.primitive.bind(*wide, **eqn.params).astype(out)
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    operand, indices, updates = wide
    options = {name: eqn.params[name] for name in names}
    return jax.lax.scatter_add(operand, indices, updates, **options).astype(out)


def _scan(eqn: Any, values: list[Any], how: _How) -> Sequence[Any]:
    p = eqn.params
    if "ft_in" in p:  # JAX 0.11 and later: a tree of (consts, carry, xs)
        num_consts, num_carry, _ = map(len, p["ft_in"].unpack())
    else:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _evaluate(*_open(p["jaxpr"]), [*consts, *carry, *x], how)
        return outputs[:num_carry], outputs[num_carry:]

    carry, ys = jax.lax.scan(body, carry, xs, p["length"], p["reverse"], p["unroll"])
    return [*carry, *ys]


def _while(eqn: Any, values: list[Any], how: _How) -> Sequence[Any]:
    p = eqn.params
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    of_cond, of_body, carry = values[:first], values[first:last], values[last:]

    def cond(carry: list[Any]) -> Any:
        return _evaluate(*_open(p["cond_jaxpr"]), [*of_cond, *carry], how)[0]

    def body(carry: list[Any]) -> list[Any]:
        return _evaluate(*_open(p["body_jaxpr"]), [*of_body, *carry], how)

    return jax.lax.while_loop(cond, body, carry)


def _cond(eqn: Any, values: list[Any], how: _How) -> Sequence[Any]:
    index, *operands = values
    branches = [
        lambda *operands, branch=branch: _evaluate(*_open(branch), operands, how)
        for branch in eqn.params["branches"]
    ]
    if eqn.params.get("branches_platforms") is None:
        return jax.lax.switch(index, branches, *operands)
    # The branches are for different platforms (jax.lax.platform_dependent), which must stay said.
    closed = tuple(jax.make_jaxpr(branch)(*operands) for branch in branches)
    return eqn.primitive.bind(index, *operands, **{**eqn.params, "branches": closed})


def _checkpoint(eqn: Any, values: list[Any], how: _How) -> Sequence[Any]:
    """Keeps the equation as it is, for it says what is to be computed again."""
    inner = partial(_evaluate, *_open(eqn.params["jaxpr"]))
    closed = jax.make_jaxpr(lambda *values: inner(values, how))(*values)
    jaxpr = closed.jaxpr.replace(
        constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars]
    )
    params = {**eqn.params, "jaxpr": jaxpr}
    return eqn.primitive.bind(*closed.consts, *values, **params)


_REBUILT: dict[str, Callable[[Any, list[Any], Half], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
}


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _inside(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield _open(item)[0]


def _concerns(jaxpr: Any, how: _How) -> bool:
    """Whether a jaxpr holds anything to rewrite."""
    return any(
        _is_product(eqn, how)
        or _is_half_sum(eqn)
        or any(_concerns(inner, how) for inner in _inside(eqn))
        for eqn in jaxpr.eqns
    )


def wide_products(jaxpr: Any) -> list[str]:
    """The products in a jaxpr, nested ones included, whose floating inputs are not all half values.

    Half values turned to float32 just before a product are half values still.
    """
    jaxpr = _open(jaxpr)[0]
    turned = {
        eqn.outvars[0]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "convert_element_type" and is_half(eqn.invars[0].aval)
    }
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PRODUCTS:
            operands = eqn.invars[:2]
            if any(is_wide(x.aval) and x not in turned for x in operands):
                shapes = " × ".join(x.aval.str_short() for x in operands)
                found.append(f"{eqn.primitive.name} {shapes}")
        for inner in _inside(eqn):
            found.extend(wide_products(inner))
    return found
