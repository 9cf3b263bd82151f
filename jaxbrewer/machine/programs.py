"""Compiled programs are kept between runs, in JAX's persistent cache, so that training starts sooner."""

import logging
import os
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

SWITCH = "JAXBREWER_COMPILATION_CACHE"
MOST_BYTES = 2 * 2**30

_ENABLED, _FOLDER, _SECONDS, _BYTES = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
_DEFAULTS = {_SECONDS: 1.0, _BYTES: 0}  # JAX's own
_WANTED = {_SECONDS: 0.05, _BYTES: -1}


def keep_programs() -> Path | None:
    """Gives JAX a folder to keep compiled programs in, unless the user has chosen.

    That is ``jaxbrewer/xla`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``. Only its owner can open
    it, since whoever can write there decides what runs here. What was not read for longest is
    deleted when the folder holds more than 2 GiB.

    Left as it is: a folder set by ``JAX_COMPILATION_CACHE_DIR`` or ``jax_compilation_cache_dir``,
    an empty one too, and ``jax_enable_compilation_cache=False``. ``JAXBREWER_COMPILATION_CACHE=off``
    in the environment turns this off.

    Returns:
        The folder, or None if the user has chosen or it cannot be written, which is logged.

    Raises:
        ValueError: the environment variable is neither ``on`` nor ``off``.
    """
    switch = os.environ.get(SWITCH, "on").strip().lower()
    if switch not in ("on", "off", ""):
        raise ValueError(
            f"{SWITCH}={switch!r}: expected 'on' or 'off'. For a folder of your own, set JAX's "
            "JAX_COMPILATION_CACHE_DIR"
        )
    chosen = getattr(jax.config, _FOLDER) is not None
    if switch == "off" or chosen or not getattr(jax.config, _ENABLED):
        return None
    try:
        folder = _prepared(_place())
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder is known
        logger.info("Compiled programs are not kept for the next run: %s", error)
        return None
    for option, default in _DEFAULTS.items():
        if getattr(jax.config, option) == default:
            jax.config.update(option, _WANTED[option])
    jax.config.update(_FOLDER, str(folder))
    return folder


def _place() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "jaxbrewer" / "xla"


def _prepared(folder: Path) -> Path:
    """Makes the folder, and room in it.

    Raises:
        OSError: it cannot be written, or it is someone else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    files = [(path, path.stat()) for path in folder.glob("*-cache")]
    used = sum(status.st_size for _, status in files)
    for path, status in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
        if used <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)  # another run may have been quicker
        used -= status.st_size
    return folder
