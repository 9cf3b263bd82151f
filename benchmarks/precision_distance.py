"""How far half precision moves a real checkpoint's outputs from float32's.

    python benchmarks/precision_distance.py FOLDER            # a Hugging Face folder with a tokenizer
    python benchmarks/precision_distance.py FOLDER --json distances.json

Runs an encoder over a few sentences in float32 and at each level and half type, and prints, over all
positions that are not padding: the largest and the mean absolute difference of the last hidden states,
their largest difference relative to the largest float32 value, and the smallest cosine between the
sentences' mean vectors at the level and in float32. A minute on two CPU cores for six layers of width
384; nothing is downloaded. On a CPU products take their rounded inputs in float32, which gives the
numbers a GPU accumulates in float32 too.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxbrewer.models.precision import FLOAT32, Precision, at_level
from jaxbrewer.models.wrap import as_model
from jaxbrewer.zoo import from_pretrained

SENTENCES = [
    "The committee will meet again on Thursday to discuss the new budget.",
    "Knowledge distillation trains a small model to imitate a large one.",
    "It rained.",
    "Although the bridge had been closed for repairs since the spring, a few cyclists still crossed "
    "it every morning, lifting their bicycles over the barrier and waving to the workers below.",
    "¿Dónde está la biblioteca? 42 × 17 = 714.",
    "Prices rose by 3.5 percent in March, the steepest monthly increase in more than a decade.",
]


def batch_of(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask = ([getattr(e, name) for e in encoded] for name in ("ids", "attention_mask"))
    return {"input_ids": np.array(ids, np.int32), "attention_mask": np.array(mask, np.int32)}


def outputs(model, batch, precision):
    """The last hidden states, and each sentence's mean vector."""
    handle = at_level(as_model(model), precision, frozen=True)

    @jax.jit
    def run(params, state, batch):
        out, _ = handle.apply(params, state, jax.random.key(0), (), batch, False)
        hidden, mask = out.last_hidden_state, batch["attention_mask"][..., None]
        return hidden, (hidden * mask).sum(1) / mask.sum(1)

    return map(np.asarray, run(handle.params, handle.state, batch))


def distances(model, batch, emulated):
    keep = batch["attention_mask"] == 1
    exact, exact_mean = outputs(model, batch, FLOAT32)
    for level in ("O1", "O2", "O3"):
        for half in ("bfloat16", "float16"):
            hidden, mean = outputs(model, batch, Precision(level, half, emulated))
            far = np.abs(hidden - exact)[keep]
            norms = np.linalg.norm(mean, axis=1) * np.linalg.norm(exact_mean, axis=1)
            yield {
                "level": level,
                "half": half,
                "max": float(far.max()),
                "mean": float(far.mean()),
                "relative": float(far.max() / np.abs(exact[keep]).max()),
                "cosine": float(((mean * exact_mean).sum(1) / norms).min()),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of an encoder")
    parser.add_argument("--json", type=Path, help="where to write the numbers too")
    options = parser.parse_args()
    start = time.perf_counter()
    model = from_pretrained(options.folder)
    batch = batch_of(options.folder)
    device = jax.devices()[0]
    rows = list(distances(model, batch, device.platform == "cpu"))
    print(f"{'':16}{'max':>10}{'mean':>10}{'relative':>10}{'1 − cosine':>12}")
    for row in rows:
        print(
            f"{row['level']} {row['half']:13}{row['max']:>10.5f}{row['mean']:>10.6f}"
            f"{row['relative']:>10.5f}{1 - row['cosine']:>12.1e}"
        )
    print(f"\n{device.device_kind}, {time.perf_counter() - start:.0f} s")
    if options.json:
        about = {
            "folder": options.folder.name,
            "device": device.device_kind,
            "machine": platform.machine(),
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
