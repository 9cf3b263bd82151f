"""Half precision on eight devices: the numbers of one, and one loss scale for all."""

import numpy as np
import pytest

from jaxbrewer.metrics import read_scalars

from .. import tiny
from . import jobs


def run(folder, loader, level, half, **options):
    distiller = jobs.JOBS["general"](
        jobs.config(folder, fp16=True, fp16_opt_level=level, half_dtype=half, **options)
    )
    jobs.train(distiller, loader)
    return tiny.weights(distiller.model_S), read_scalars(folder / "log")


def test_sharded_equals_one_device(tmp_path):
    """To the rounding of sums in another order, which may round a product's input the other way."""
    loader, bound = jobs.batches(4), 2e-4
    weights, curves = run(tmp_path / "one", loader, "O2", "float16")
    sharded = {"data_parallel": True, "sharding": "all"}
    found, found_curves = run(tmp_path / "eight", loader, "O2", "float16", **sharded)
    assert curves.keys() == found_curves.keys()
    for tag, points in curves.items():
        np.testing.assert_allclose(
            list(found_curves[tag].values()), list(points.values()), rtol=bound, err_msg=tag
        )
    for name, weight in weights.items():
        np.testing.assert_allclose(found[name], weight, atol=bound, err_msg=name)


@pytest.mark.parametrize("mapping", ["sharded", "pmap"])
def test_an_overflow_on_one_device_drops_the_window_of_all(tmp_path, mapping):
    """Under pmap each device has rows of its own; the scale is one."""
    loader = jobs.batches(6)
    for i, batch in enumerate(loader):
        noise = np.zeros((16, 1), np.float32)
        noise[3] = np.inf if i == 2 else 0  # the second device's
        batch["noise"] = noise
    options = {"data_parallel": True, "mapping": mapping, "gradient_accumulation_steps": 2}
    weights, curves = run(tmp_path, loader, "O1", "float16", **options)
    assert list(curves["scalar/loss_scale"].values()) == [65536] * 3 + [32768] * 3
    assert list(curves["scalar/skipped_windows"].values()) == [0, 0, 0, 1, 1, 1]
    assert all(np.isfinite(weight).all() for weight in weights.values())
