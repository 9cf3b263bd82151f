"""What decides which batches come next: random generators, and the states that loaders show.

A generator of torch is looked at only where something else has imported torch. States are kept as
JSON, for checkpoints: bytes, arrays and what else JSON does not know are told apart by a tag.
"""

import base64
import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

# ---------------------------------------------------------------------- the generators of all


def host_random() -> Any:
    """The states of the global generators of Python, numpy and, if it is imported, torch.

    Loaders and postprocessors draw on them.
    """
    torch = _torch()
    return np.random.get_state(), random.getstate(), torch and torch.get_rng_state()


def as_json(state: Any) -> Any:
    """What `host_random` gave, as JSON; what is JSON already is returned."""
    if state is None or isinstance(state, Mapping):
        return state
    (kind, keys, position, has_gauss, gauss), (version, internal, gauss_next), torch = state
    return {
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
        **({} if torch is None else {"torch": _text(torch.numpy().tobytes())}),
    }


def is_host_random(state: Any) -> bool:
    """Whether `restore_host_random` can take what a file holds: None, or what `as_json` gave."""
    if state is None:
        return True
    try:
        np.random.RandomState(0).set_state(tuple(state["numpy"]))
        version, internal, gauss_next = state["python"]
        random.Random(0).setstate((version, tuple(internal), gauss_next))
        if (torch := _torch()) and "torch" in state:
            torch.Generator().set_state(_tensor(torch, state["torch"]))
    except (TypeError, ValueError, KeyError, OverflowError, IndexError, RuntimeError):
        return False
    return gauss_next is None or isinstance(gauss_next, float)


def restore_host_random(state: Any) -> None:
    """Sets the global generators to what `host_random` or `as_json` gave; None changes nothing."""
    state = as_json(state)
    if state is None:
        return
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if (torch := _torch()) and "torch" in state:
        torch.set_rng_state(_tensor(torch, state["torch"]))


def _torch() -> Any:
    """Torch, if it is imported (and not in the midst of it)."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "get_rng_state") else None


def _tensor(torch: Any, text: str) -> Any:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)


# ---------------------------------------------------------------------- those of a loader


def _generators(loader: Any) -> dict[str, Any]:
    """The generators that a loader shows where torch's loaders have them: place → generator."""
    found = {}
    for place in ("", "sampler", "batch_sampler.sampler"):
        owner = loader
        for name in filter(None, place.split(".")):
            owner = getattr(owner, name, None)
        generator = getattr(owner, "generator", None)
        if hasattr(generator, "get_state") and hasattr(generator, "set_state"):
            found[place] = generator
    return found


def random_state(loader: Any) -> dict[str, Any]:
    """The states of the global generators, and of those that the loader shows."""
    state = {"host": host_random()}
    with contextlib.suppress(TypeError):  # a generator of another kind: it is not known
        own = {place: encoded(each.get_state()) for place, each in _generators(loader).items()}
        state |= {"generators": own} if own else {}
    return state


def put_back(state: Mapping[str, Any], loader: Any) -> None:
    """Sets the generators to what `random_state` gave."""
    restore_host_random(state["host"])
    there = _generators(loader)
    for place, kept in state.get("generators", {}).items():
        if place in there:  # of another kind now? then the batches will show it
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                there[place].set_state(decoded(kept))


@contextlib.contextmanager
def undisturbed(loaders: Iterable[Any]) -> Iterator[None]:
    """Whatever is drawn inside, the global generators and those of loaders are then as before."""
    host = host_random()
    own = [(each, each.get_state()) for x in loaders for each in _generators(x).values()]
    try:
        yield
    finally:
        restore_host_random(host)
        for generator, state in own:
            generator.set_state(state)


# ---------------------------------------------------------------------- states of loaders


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands, and what is known of how it came there.

    Attributes:
        epoch: its passes finished.
        batch: batches taken in the current one.
        taken: batches taken in all.
        checksum: of the batches taken in the current pass; see `checksums`.
        length: batches in a pass, where the loader says it.
        begun: the random states when that pass began, before ``iter``; see `random_state`.
        shown: the state that the loader (``state_dict``) or its iterator (``get_state``) showed
            after the last batch, encoded, by the name of that method; empty if none.
    """

    epoch: int
    batch: int
    taken: int
    checksum: int
    length: int | None
    begun: Mapping[str, Any]
    shown: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return kept | {"begun": {**self.begun, "host": as_json(self.begun["host"])}}


def loader_state_problem(value: Any) -> str | None:
    """What is wrong with what a file holds for a `LoaderState`, or None."""
    names = {field.name for field in fields(LoaderState)}
    if not isinstance(value, Mapping) or value.keys() != names:
        return f"expected an object with {', '.join(sorted(names))}"
    counts = {name: value[name] for name in ("epoch", "batch", "taken", "checksum")}
    for name, count in (counts | {"length": value["length"] or 0}).items():
        if type(count) is not int or not 0 <= count < 2**53:
            return f"{name} is no whole number of 0 or more"
    begun, shown = value["begun"], value["shown"]
    if not isinstance(begun, Mapping) or not is_host_random(begun.get("host")):
        return "begun.host is no state of Python's and numpy's generators"
    if not isinstance(begun.get("generators", {}), Mapping):
        return "begun.generators is no object"
    if not isinstance(shown, Mapping) or not shown.keys() <= _SETTERS.keys():
        return f"shown names something else than {' and '.join(_SETTERS)}"
    try:
        decoded([*begun.get("generators", {}).values(), *shown.values()])
    except (TypeError, ValueError, KeyError, RecursionError):
        return "it holds what cannot be decoded"
    return None


_SETTERS = {"get_state": "set_state", "state_dict": "load_state_dict"}


def shown_state(loader: Any, iterator: Any) -> dict[str, Any]:
    """The state of an iterator (``get_state``) or its loader (``state_dict``), as JSON.

    Returns:
        The method's name → the state, encoded; empty where neither has such a method.

    Raises:
        TypeError: the state holds what cannot be encoded.
    """
    for owner, getter in ((iterator, "get_state"), (loader, "state_dict")):
        if hasattr(owner, getter) and hasattr(owner, _SETTERS[getter]):
            return {getter: encoded(getattr(owner, getter)())}
    return {}


def iterator_from(loader: Any, shown: Mapping[str, Any]) -> Iterator | None:
    """An iterator that goes on from a state of `shown_state`; None if the loader takes no such."""
    for getter, state in shown.items():
        setter = _SETTERS[getter]
        if getter == "state_dict" and hasattr(loader, setter):
            loader.load_state_dict(decoded(state))
            return iter(loader)
        iterator = iter(loader) if getter == "get_state" else None
        if hasattr(iterator, setter):
            iterator.set_state(decoded(state))  # type: ignore[union-attr]
            return iterator
    return None


# ---------------------------------------------------------------------- as JSON


def encoded(value: Any) -> Any:
    """A copy of a value as JSON, from which `decoded` makes it again.

    Raises:
        TypeError: it holds something else than None, flags, numbers, text, bytes, arrays (of numpy
            or torch), lists, tuples and dicts.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encoded(x) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [encoded(x) for x in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encoded(k), encoded(v)] for k, v in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": _text(value)}
    is_tensor = hasattr(value, "detach")
    array = value.detach().cpu().numpy() if is_tensor else value
    if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind not in "biufc":
        raise TypeError(f"a {type(value).__name__} cannot be kept as JSON")
    kind = "tensor" if is_tensor else "array"
    return {kind: [array.dtype.str, list(array.shape), _text(array.tobytes())]}


def decoded(value: Any) -> Any:
    """What `encoded` was given.

    Raises:
        TypeError, ValueError, KeyError: it is not what `encoded` gives.
    """
    if isinstance(value, list):
        return [decoded(x) for x in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, kept),) = value.items()
    if kind == "tuple":
        return tuple(decoded(kept))
    if kind == "dict":
        return {decoded(k): decoded(v) for k, v in kept}
    if kind == "bytes":
        return _bytes(kept)
    if kind not in ("array", "tensor"):
        raise KeyError(kind)
    dtype, shape, text = kept
    array = np.frombuffer(bytearray(_bytes(text)), np.dtype(dtype)).reshape(shape)
    torch = _torch()
    return torch.from_numpy(array) if kind == "tensor" and torch else array


def _text(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
