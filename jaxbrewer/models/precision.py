"""Apex's levels: from a config and a device to what is kept and computed in which type.

===== ============== ================== ================ ==============
level trained arrays the forward pass   inputs of        norms
                     sees them          products
===== ============== ================== ================ ==============
O0    as given       as given           as given         as given
O1    float32        in float32         half             float32
O2    float32        rounded to half    half             float32
O3    half           in half            half             half
===== ============== ================== ================ ==============

A model at a level is a `HalfModel`, which stands in for the model itself: the step, the preflight
and the teachers see no difference. What it returns is float32 at every level, and so are losses.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from ..configurations.configs import TrainingConfig
from ..errors import PrecisionError
from .half_products import Half, in_half, is_float, is_half, is_wide
from .handle import Model, leaf_names
from .linen_model import LinenModel
from .nnx_model import NNXModel, change_outputs

_NORM_NAME = re.compile(r"(norm|normalization|(^|_)(ln|bn|gn))(_\w{1,3}|_?\d+)?$", re.IGNORECASE)
_NORM_CLASS = re.compile(r"(?<!weight)(?<!spectral)(norm|normalization)(\dd)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Precision:
    """What a level means on a device.

    Attributes:
        level: ``'O0'`` to ``'O3'``.
        half: ``'bfloat16'`` or ``'float16'``; '' at O0.
        emulated: whether the device is a CPU; see `half_products.in_half`.
    """

    level: str = "O0"
    half: str = ""
    emulated: bool = False

    @property
    def dtype(self) -> Half:
        """The half type."""
        return jnp.dtype(self.half)

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, since gradients would underflow otherwise."""
        return self.half == "float16"

    def __str__(self) -> str:
        if self.level == "O0":
            return "O0, float32"
        kept, products, norms = {
            "O1": ("float32 parameters", "products", "all else in float32"),
            "O2": ("float32 master parameters", "the forward pass", "norms in float32"),
            "O3": ("half parameters, no masters", "everything", "the losses in float32"),
        }[self.level]
        scaled = "; dynamic loss scale" if self.is_scaled else ""
        return f"{self.level}: {kept}, {products} in {self.half}, {norms}{scaled}"


FLOAT32 = Precision()
"""Nothing in half."""


def resolve(config: TrainingConfig, device: jax.Device | None = None) -> Precision:
    """Returns what a config's level means on a device.

    ``'auto'`` is bfloat16 on TPUs, on CPUs and on GPUs of compute capability 8.0 or more, and
    float16 on others.

    Args:
        config: its ``fp16``, ``fp16_opt_level`` and ``half_dtype`` are read.
        device: where training runs; None: JAX's default device, which is looked up only if half
            precision is asked for.

    Raises:
        PrecisionError: the device lacks the half type.
    """
    if not config.fp16 or config.fp16_opt_level == "O0":
        return FLOAT32
    if device is None:
        device = jax.devices()[0]
    lacks = _lacks(device)
    if config.half_dtype == "auto":
        half = "float16" if "bfloat16" in lacks else "bfloat16"
    else:
        half = config.half_dtype
    if half in lacks:
        other = "float16" if half == "bfloat16" else "bfloat16"
        raise PrecisionError(
            f"half_dtype={half!r} on {device}: {lacks[half]}. Set half_dtype={other!r}, or 'auto'"
        )
    return Precision(config.fp16_opt_level, half, device.platform == "cpu")


def _lacks(device: jax.Device) -> dict[str, str]:
    """The half types a device does not compute in, and why."""
    if device.platform == "tpu":
        return {"float16": "TPUs compute in bfloat16"}
    if device.platform != "gpu":
        return {}
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+(\.\d+)?", capability) or float(capability) >= 8:
        return {}
    return {
        "bfloat16": f"its compute capability is {capability}, and bfloat16 begins with 8.0 (Ampere)"
    }


def at_level(
    model: Model,
    precision: Precision,
    *,
    frozen: bool = False,
    trained: frozenset[str] | None = None,
) -> Model:
    """Returns a model as it is at a level.

    Args:
        model: the model.
        precision: the level.
        frozen: it is not trained, so what the forward pass would round is stored rounded.
        trained: the names of the parameters that are trained; None: all. The others stay as they are.
    """
    if precision.level == "O0":
        return model
    return HalfModel(model, precision, frozen=frozen, trained=trained)


class HalfModel:
    """A model at a level of half precision; stands in for it as a `handle.Model`.

    - O1: the model as it is, its products on half inputs.
    - O2: its parameters and floating inputs in half. In an NNX model every module with a ``dtype``
      computes in half. Norms are exempt: their parameters stay float32, and so do they compute;
      what they return is brought to half, in NNX and Linen models. Norms are the modules whose class
      is called so (``LayerNorm``, ``MyRMSNorm``); the parameters of norms are those below one, in
      NNX models, and in every kind of model those with a part in their path that ends so, or in
      ``ln``, ``bn``, ``gn`` (``layer_norm``, ``norm1``, ``ln_f``).
      A table whose module says ``rounds_rows`` (the zoo's) is left to it: it rounds the rows that are
      looked up, the same numbers for less.
    - O3: as O2, without an exemption. Flax's norms still take their statistics in float32.
    - State (batch statistics) stays as it is at every level.

    Outputs in half are returned in float32. Captured submodules' outputs are as the module gave
    them.

    Args:
        model: the model; not changed, until `write`.
        precision: its level, O1 to O3.
        frozen: see `at_level`.
        trained: the same.

    Attributes:
        params: what is trained: float32 at O1 and O2 (also where the model's own are half), half
            at O3. Frozen at O2, those that the forward pass would round are half. Those that are not
            among the `trained` ones are the model's own, in the types they have; the forward pass
            sees them in half all the same.
        state: the model's own, at every level.
    """

    def __init__(
        self,
        model: Model,
        precision: Precision,
        *,
        frozen: bool = False,
        trained: frozenset[str] | None = None,
    ):
        self.model = model
        self._is_whole = trained is None
        self.precision = precision
        self._runs: Any = model
        self._norms: Callable[[tuple], bool] = _is_norm_path
        self._tables: frozenset[tuple[str, ...]] = frozenset()
        if isinstance(model, NNXModel):
            self._norms = _norm_finder(model.module)
            self._tables = _tables(model.module)
            if precision.level != "O1":
                self._runs = NNXModel(_with_dtype(model.module, precision))
        self.id_limits: Mapping[str, int] = model.id_limits
        if precision.level == "O3":
            self.params = self._halved(model.params)
        elif not frozen:
            self.params = jax.tree.map(_widened, model.params)
        else:
            rounds = precision.level == "O2"
            self.params = self._rounded(model.params) if rounds else model.params
        if trained is not None:
            names = zip(leaf_names(model.params), jax.tree.leaves(model.params), strict=True)
            pairs = zip(names, jax.tree.leaves(self.params), strict=True)
            kept = [mine if name in trained else own for (name, own), mine in pairs]
            self.params = jax.tree.unflatten(jax.tree.structure(model.params), kept)
        self.state = model.state

    def __getattr__(self, name: str) -> Any:
        # What only some models offer (path_of, module_paths) is the model's own.
        if name in ("model", "_runs"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def apply(
        self,
        params: Any,
        state: Any,
        key: jax.Array,
        args: tuple,
        kwargs: dict,
        train: bool,
        capture: Sequence[str] = (),
    ) -> tuple[Any, Any]:
        """See `Model.apply`; floating outputs are float32 at least."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        # Flags and the like among the inputs are the model's to branch on: they are not traced.
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        options: dict[str, Any] = {"capture": capture} if capture else {}

        def run(params: Any, state: Any, key: jax.Array, arrays: list[Any]) -> Any:
            if self.precision.level == "O2":
                params = self._rounded(params, self._tables)
            elif self.precision.level == "O3" and not self._is_whole:
                params = self._halved(params)
            given = iter(arrays)
            inputs = [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
            if self.precision.level != "O1":
                inputs = self._halved(inputs)
            args, kwargs = jax.tree.unflatten(structure, inputs)
            with self._linen_norms_in_half():
                outputs, new = self._runs.apply(params, state, key, args, kwargs, train, **options)
            return outputs, jax.tree.map(_like, new, state)

        half, emulated = self.precision.dtype, self.precision.emulated
        outputs, state = in_half(run, half, emulated=emulated)(params, state, key, arrays)
        if not capture:
            return jax.tree.map(_widened, outputs), state
        outputs, captured = outputs
        return (jax.tree.map(_widened, outputs), captured), state

    def _linen_norms_in_half(self) -> contextlib.AbstractContextManager[None]:
        """Brings what Linen's norms return to half; with float32 parameters it would be float32."""
        if self.precision.level == "O1" or not isinstance(self.model, LinenModel):
            return contextlib.nullcontext()

        def narrow(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            outputs = method(*args, **kwargs)
            is_norm = context.method_name == "__call__" and _is_norm(context.module)
            return self._halved(outputs) if is_norm else outputs

        return linen.intercept_methods(narrow)

    def _halved(self, tree: Any) -> Any:
        return _all_narrowed(self.precision.dtype, tree)

    def _rounded(self, params: Any, late: frozenset[tuple[str, ...]] = frozenset()) -> Any:
        """Parameters as O2's forward pass sees them; those `late` are rounded by their module."""

        def one(path: tuple, x: Any) -> Any:
            names = _names(path)
            if self._norms(names):
                return x
            if names in late and is_wide(x):
                return _with_rounded_gradient(x, self.precision.dtype)
            return _narrowed(x, self.precision.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def used_as(self, params: Any) -> Any:
        """The type of each parameter once the forward pass has rounded it, in the form of `params`."""
        rounded = self._rounded if self.precision.level == "O2" else lambda params: params
        return jax.tree.map(lambda x: x.dtype, jax.eval_shape(rounded, params))

    def write(self, params: Any, state: Any) -> None:
        """See `handle.Model.write`; every array gets back the type it had."""
        like = (self.model.params, self.model.state)
        self.model.write(*jax.tree.map(_like, (params, state), like))

    def signature(self) -> Any:
        """See `handle.Model.signature`."""
        return self.model.signature()


def used_as(model: Model, params: Any) -> Any:
    """The type in which a model's forward pass uses each of its parameters, in their form."""
    if isinstance(model, HalfModel):
        return model.used_as(params)
    return jax.tree.map(lambda x: x.dtype, params)


def _narrowed(x: Any, half: Half) -> Any:
    if not (is_wide(x) or is_half(x)):
        return x
    return _cast(x, half)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_rounded_gradient(x: jax.Array, half: Half) -> jax.Array:
    """An array as it is, whose gradient is rounded as if the array had been."""
    return x


def _and_nothing(x: jax.Array, half: Half) -> tuple[jax.Array, None]:
    return x, None


def _rounded_gradient(half: Half, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient.astype(half).astype(gradient.dtype),)


_with_rounded_gradient.defvjp(_and_nothing, _rounded_gradient)


def _all_narrowed(half: Half, tree: Any) -> Any:
    return jax.tree.map(lambda x: _narrowed(x, half), tree)


def _like(x: Any, other: Any) -> Any:
    return _cast(x, other.dtype) if is_float(other) else x


def _widened(x: Any) -> Any:
    return _cast(x, jnp.float32) if is_half(x) else x


def _cast(x: Any, dtype: Any) -> Any:
    """An array in another type, where it lies: a model may be more than the default device holds."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or len(x.devices()) > 1:
        return x.astype(dtype) if hasattr(x, "astype") else jnp.asarray(x, dtype)
    with jax.default_device(*x.devices()):
        return x.astype(dtype)


def _names(path: tuple) -> tuple[str, ...]:
    """The parts of a leaf's path; a dotted key is many parts."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator=".").split("."))


def _is_norm_path(names: tuple[str, ...]) -> bool:
    return any(_NORM_NAME.search(name) for name in names)


def _is_norm(module: Any) -> bool:
    return _NORM_CLASS.search(type(module).__name__) is not None


def _norm_finder(module: nnx.Module) -> Callable[[tuple], bool]:
    """Tells the paths of a module's parameters that belong to norms."""
    found = {tuple(map(str, path)) for path, part in nnx.iter_modules(module) if _is_norm(part)}

    def is_norm(names: tuple[str, ...]) -> bool:
        below = any(names[: len(path)] == path for path in found)
        return below or _is_norm_path(names)

    return is_norm


def _tables(module: nnx.Module) -> frozenset[tuple[str, ...]]:
    """The paths of the tables whose module rounds the rows that it is asked for (``rounds_rows``)."""
    return frozenset(
        (*map(str, path), "embedding")
        for path, part in nnx.iter_modules(module)
        if getattr(part, "rounds_rows", False)
    )


def _with_dtype(module: nnx.Module, precision: Precision) -> nnx.Module:
    """The same module over the same arrays, its parts computing in half as `HalfModel` says."""
    twin = nnx.merge(*nnx.split(module))
    part: Any
    for _, part in nnx.iter_modules(twin):
        if precision.level == "O2" and _is_norm(part):
            change_outputs(part, functools.partial(_all_narrowed, precision.dtype))
        elif "dtype" in vars(part) and _is_wide_dtype(part.dtype):
            part.dtype = precision.dtype
    return twin


def _is_wide_dtype(dtype: Any) -> bool:
    if dtype is None:
        return True
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # a user's own attribute of that name
        return False
