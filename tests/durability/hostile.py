"""Folders made to harm, or odd by mistake, from a good one by a seed, and what reading says of them.

As a program, ``python -m tests.durability.hostile 100`` prints a table by kind.
"""

import collections
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxbrewer import zoo
from jaxbrewer.__main__ import main as command

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TENSOR = "bert.encoder.layer.1.output.dense.weight"
TINY = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def write_good(folder):
    """A sequence classifier with tiny sizes."""
    config = zoo.BertConfig(**TINY, num_labels=2, label_names=("no", "yes"))
    zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(folder)


def pick(rng, *values):
    return values[rng.integers(len(values))]


def text_of(name, *contents):
    """Another content of a file."""

    def apply(rng, folder):
        content = pick(rng, *contents)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return (name,)

    return apply


def field(named=True, /, **values):
    """One of these fields of the config becomes one of its values."""

    def apply(rng, folder):
        name = pick(rng, *values)
        config = json.loads((folder / CONFIG).read_text())
        if name == "num_labels":
            del config["id2label"], config["label2id"]
        value = pick(rng, *values[name])
        text = json.dumps(config | {name: "VALUE"})
        shown = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / CONFIG).write_bytes(text.encode().replace(b'"VALUE"', shown))
        return ("config", name) if named else (CONFIG,)

    return apply


def sharded(weight_map, *named):
    """The weights in a shard, and an index in which one tensor is said to be elsewhere."""

    def apply(rng, folder):
        os.rename(folder / WEIGHTS, folder / "a.safetensors")
        names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        changed = weight_map(rng, folder, names)
        value = {"weight_map": names | changed} if isinstance(changed, dict) else changed
        (folder / INDEX).write_text(json.dumps(value))
        return INDEX, *named

    return apply


def elsewhere(rng, folder, names):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "a.safetensors", outside)
    (folder / "below").mkdir()
    place = pick(rng, "../outside.safetensors", str(outside), f"../{folder.name}/../outside.safetensors",
                 "below/../../outside.safetensors", "/etc/passwd", "../../../../etc/passwd")  # fmt: skip
    return {TENSOR: place}


def linked(rng, folder, names):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "a.safetensors", outside)
    if rng.integers(2):
        (folder / "b.safetensors").symlink_to(outside)
        return {TENSOR: "b.safetensors"}
    (folder / "sub").symlink_to(folder.parent)
    return {TENSOR: "sub/outside.safetensors"}


def no_names(rng, folder, names):
    return {TENSOR: pick(rng, 3, None, ["a.safetensors"], {}, True, "")}


def no_map(rng, folder, names):
    return pick(rng, [], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}, "x", None)


def absent(rng, folder, names):
    return pick(rng, {TENSOR: "b.safetensors"}, {"more": "a.safetensors"}, {TENSOR: "x\0y"},
                {TENSOR: "x" * 5000}, {TENSOR: "."})  # fmt: skip


def tensors(change, named=TENSOR):
    def apply(rng, folder):
        values = load_file(folder / WEIGHTS)
        values[named] = change(rng, values[named].copy())
        save_file(values, folder / WEIGHTS)
        return (named,)

    return apply


def one(rng, array, value):
    array.flat[rng.integers(array.size)] = value
    return array


def not_weights(rng, folder):
    whole = (folder / WEIGHTS).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    nested = b'{"a":' * 5000
    content = pick(
        rng, b"", whole[:7], whole[:1000], whole[:-1], whole + b"x", b"\xff" * 64,
        struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", 10**9) + whole[8:],
        whole[:8] + b"[" * header + whole[8 + header :],
        struct.pack("<Q", len(nested)) + nested,
        pickle.dumps({"a": 1}),
    )  # fmt: skip
    (folder / WEIGHTS).write_bytes(content)
    return (WEIGHTS,)


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(rng, folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(folder.parent / "harm")))
    return ("pytorch_model.bin",)


def no_file(rng, folder):
    name = pick(rng, CONFIG, WEIGHTS)
    (folder / name).unlink()
    kind = pick(rng, "pipe", "folder", "device", "dangling", "circle")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        target = {"device": "/dev/zero", "dangling": folder / "nothing", "circle": folder / name}
        (folder / name).symlink_to(target[kind])
    return (name,)


def unknown_keys(rng, folder):
    config = json.loads((folder / CONFIG).read_text())
    more = {f"hidden_sizes_{i}": i for i in range(int(10 ** rng.integers(0, 5)))}
    (folder / CONFIG).write_text(json.dumps(config | more))
    return CONFIG, "hidden_sizes_0"


LARGE = (10**7, 10**9, 2**31 - 1, 10**30)
NOT_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", 1e300, "x", None, True, [1], {}, -1)
HOSTILE = {
    "an index that leaves the folder": sharded(elsewhere, "outside of the folder"),
    "a link that leaves the folder": sharded(linked, "outside of the folder"),
    "an index of other types": sharded(no_names),
    "an index without a map": sharded(no_map),
    "an index of what is not there": sharded(absent),
    "sizes far beyond the file": field(vocab_size=LARGE, hidden_size=LARGE, intermediate_size=LARGE,
                                       max_position_embeddings=LARGE, type_vocab_size=LARGE),
    "layers without end": field(num_hidden_layers=LARGE),
    "classes without end": field(num_labels=LARGE),
    "sizes a little beyond the file": field(vocab_size=(51, 1000), intermediate_size=(17,)),
    "weights that are not finite": tensors(lambda rng, x: one(rng, x, pick(rng, np.nan, np.inf, -np.inf))),
    "float64 beyond float32": tensors(lambda rng, x: one(rng, x.astype(np.float64), pick(rng, 1e39, -1e300))),
    "weights of another type": tensors(lambda rng, x: x.astype(pick(rng, "i1", "i4", "i8", "?", "u1"))),
    "weights of another shape": tensors(lambda rng, x: pick(rng, x[:4].copy(), x.ravel(), x[:0])),
    "layer_norm_eps that is none": field(layer_norm_eps=NOT_NUMBERS),
    "rates that are none": field(hidden_dropout_prob=NOT_NUMBERS, initializer_range=NOT_NUMBERS),
    "integers that are none": field(hidden_size=(8.0, "8", None, [8], b"NaN", 0, -8, True),
                                    num_attention_heads=(0, 3, 2.0, {}, "2")),
    "a config of another type": text_of(CONFIG, "[]", "[{}]", '"x"', "null", "3", "true", "NaN"),
    "a config that is not JSON": text_of(CONFIG, "", "{", "{'a': 1}", "\0", "{}{}", '{"a": 1, "a": 2}'),
    "a config that is not UTF-8": text_of(CONFIG, b"\xff\xfe{}", b'{"a": "\xe9"}', b"\x80"),
    "a config nested without end": text_of(CONFIG, "[" * 10**5, '{"a":' * 10**5, "[" * 10**6),
    "a config without end": text_of(CONFIG, b" " * (17 << 20), b'{"a": "' + b"x" * (20 << 20) + b'"}'),
    "a number without end": field(False, vocab_size=(b"9" * 5000, b"9" * 4000)),
    "id2label that is none": field(id2label=(["a", "b"], 3, "x", {"a": "b"}, {"0": None}, {"1": "x"},
                                             {"0": "a", "00": "b"}, {"0": ["a"]})),
    "architectures that are none": field(architectures=(3, "BertModel", {"a": 1}, [3], [None], True)),
    "model_type that is none": field(model_type=(3, None, ["bert"], {}, "gpt", "Bert", "")),
    "unknown keys": unknown_keys,
    "weights that are none": not_weights,
    "a pickle": pickled,
    "no file": no_file,
}  # fmt: skip
# What the command shows without reading weights' values or building the model; the rest it refuses.
SHOWN = {"sizes a little beyond the file", "weights that are not finite", "float64 beyond float32",
         "weights of another type", "weights of another shape",
         "architectures that are none"}  # fmt: skip


def spoil(kind, seed, good, folder):
    """Makes a hostile folder; returns what its error must name."""
    shutil.copytree(good, folder)
    return HOSTILE[kind](np.random.default_rng(seed), folder)


def verdict(folder, names, read=zoo.from_pretrained):
    """'named', or what should not be: 'unnamed', 'raw', 'silent', with the message."""
    try:
        read(folder)
    except ValueError as error:
        message = str(error)
        is_ours = "jaxbrewer" in _raised_in(error)
        if not is_ours or isinstance(error, UnicodeError | json.JSONDecodeError):
            return "raw", f"{type(error).__name__}: {message}"
        there = str(folder) in message and all(name in message for name in names)
        return ("named" if there and len(message) < 5000 else "unnamed"), message
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return "raw", f"{type(error).__name__}: {error}"
    return "silent", ""


def _raised_in(error):
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename


def exit_code(*arguments):
    """The command's exit code, or the error that came through it, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = command(list(map(str, arguments)))
        except Exception as error:  # noqa: BLE001  a traceback, which no user should see
            code = repr(error)
    return code, out.getvalue()


def tally(count):
    """Kind → what came of it → how often, MiB and seconds; what should not be is printed."""
    table = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        write_good(good)
        zoo.from_pretrained(good)
        for seed in range(count):
            kind = list(HOSTILE)[seed % len(HOSTILE)]
            folder = Path(place) / str(seed) / "model"
            names = spoil(kind, seed, good, folder)
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            result, message = verdict(folder, names)
            code, printed = exit_code("inspect", folder)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            table[kind]["s"] = max(table[kind]["s"], time.process_time() - start)
            table[kind]["MiB"] = max(table[kind]["MiB"], (after - before) / 1024)
            table[kind][result] += 1
            table[kind]["exit"] += code in ((0, 1, 2) if kind in SHOWN else (1, 2))
            if result != "named" or code not in ((0, 1, 2) if kind in SHOWN else (1, 2)):
                print(
                    f"seed {seed}, {kind}: {result}: {message[:300]}; inspect: {code} {printed[-200:]}"
                )
            if (folder.parent / "harm").exists():
                table[kind]["silent"] += 1
                print(f"seed {seed}, {kind}: the pickle was run")
    return table


def main(count):
    table = tally(count)
    columns = ("named", "unnamed", "raw", "silent", "exit")
    print(f"| {'kind':31} | {' | '.join(columns)} | MiB more | s |")
    for kind in HOSTILE:
        cells = " | ".join(f"{table[kind][c]:{len(c)}}" for c in columns)
        print(f"| {kind:31} | {cells} | {table[kind]['MiB']:8.0f} | {table[kind]['s']:.1f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]))
