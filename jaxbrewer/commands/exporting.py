"""``jaxbrewer export``: a model's folder as a file that runs without jaxbrewer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxbrewer.commands import FINE, CommandError, say, say_line
from jaxbrewer.zoo import OnnxFile, export_onnx, export_stablehlo, from_pretrained

FORMATS = ("stablehlo", "onnx")
_PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    folder: str,
    out: str,
    to: str,
    *,
    task: str | None,
    length: int | None,
    platforms: Sequence[str] | None,
) -> int:
    """Exports a folder; see the command's help.

    Raises:
        CommandError: no model can be read there, it cannot be exported so, or not be written.
    """
    if Path(out).is_dir():
        raise CommandError(f"--out {out} is a folder, expected a file")
    for option, value in (("--length", length), ("--platforms", platforms)):
        if to == "onnx" and value is not None:
            raise CommandError(
                f"{option} is for --to stablehlo: an ONNX file takes any: leave it out"
            )
    try:
        model = from_pretrained(folder, task)
        if to == "onnx":
            return _tell_onnx(model, out, export_onnx(model, out))
        exported = export_stablehlo(model, out, platforms=platforms or _PLATFORMS, length=length)
    except (ImportError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    return _tell_stablehlo(model, out, exported)


def _tell_stablehlo(model: Any, out: str, exported: Any) -> int:
    _tell_size(model, out)
    say(
        f"  for {', '.join(exported.platforms)}; written by JAX {jax.__version__}, read for six months"
    )
    inputs, outputs = (
        jax.tree.unflatten(tree, avals)
        for tree, avals in (
            (exported.in_tree, exported.in_avals),
            (exported.out_tree, exported.out_avals),
        )
    )
    for what, shapes in (("takes", inputs[1]), ("gives", outputs)):
        listed = ", ".join(
            f"{name} {aval.str_short(short_dtypes=False)}" for name, aval in shapes.items()
        )
        say(f"  {what} {listed}")
    names = ", ".join(f"{name}={name}" for name in inputs[1])
    say(
        f"run it: exported = jax.export.deserialize(bytearray(open({str(out)!r}, 'rb').read())); "
        f"exported.call({names})"
    )
    return FINE


def _tell_onnx(model: Any, out: str, written: OnnxFile) -> int:
    _tell_size(model, out)
    kinds = (("takes", "int64", written.inputs), ("gives", "float32", written.outputs))
    for what, dtype, shapes in kinds:
        listed = [f"{name} {dtype}[{','.join(map(str, s))}]" for name, s in shapes.items()]
        say(f"  {what} {', '.join(listed)}")
    if written.difference is None:
        say(
            "  ! not compared with the model: onnxruntime is not installed (pip install 'jaxbrewer[onnx]')"
        )
    else:
        sizes = " and ".join(f"{rows} × {length}" for rows, length in written.compared)
        say(
            f"  compared with the model on random batches of {sizes} (rows × length): the largest "
            f"difference is {written.difference:.2g}"
        )
    names = ", ".join(f"{name!r}: {name}" for name in written.inputs)
    say(f"run it: onnxruntime.InferenceSession({str(out)!r}).run(None, {{{names}}})")
    return FINE


def _tell_size(model: Any, out: str) -> None:
    say_line(f"{out}: {Path(out).stat().st_size / 1e6:,.1f} MB, {type(model).__name__}")
