"""``jaxbrewer export``: a model's folder as a file that runs without jaxbrewer."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxbrewer.commands import FINE, CommandError, say, say_line
from jaxbrewer.zoo import export_stablehlo, from_pretrained


def export(
    folder: str, out: str, *, task: str | None, length: int | None, platforms: Sequence[str]
) -> int:
    """Exports a folder; see the command's help.

    Raises:
        CommandError: no model can be read there, it cannot be exported so, or not be written.
    """
    if Path(out).is_dir():
        raise CommandError(f"--out {out} is a folder, expected a file")
    try:
        model = from_pretrained(folder, task)
        exported = export_stablehlo(model, out, platforms=platforms, length=length)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    say_line(f"{out}: {Path(out).stat().st_size / 1e6:,.1f} MB, {type(model).__name__}")
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
