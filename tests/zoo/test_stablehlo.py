"""Models as files that JAX alone runs."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.__main__ import main
from jaxbrewer.zoo import export_stablehlo
from tests.zoo.conftest import FAMILIES

FIXED = ("MPNet", "ModernBert", "DebertaV2", "Deberta")  # their programs depend on the length


def made(name, **changes):
    family = next(family for family in FAMILIES if name.startswith(family))
    cls = getattr(zoo, name)
    sizes = FAMILIES[family] | {("n_layers" if family == "DistilBert" else "num_hidden_layers"): 1}
    return cls(cls.config_class(**sizes | changes), rngs=nnx.Rngs(0))


def batch(model, rows=3, length=9):
    ids = np.random.default_rng(rows).integers(4, 50, (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    typed = model.id_limits.get("token_type_ids", 0) > 1
    return given | ({"token_type_ids": ids % 2} if typed else {})


def read(file):
    return jax.export.deserialize(bytearray(Path(file).read_bytes()))


def check_same(exported, model, given):
    model.eval()
    got, expected = exported.call(**given), model(**given)
    assert got
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=name)
    return sorted(got)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model, file = made(f"{family}ForSequenceClassification"), tmp_path / "model.stablehlo"
    if family in FIXED:
        with pytest.raises(ValueError, match="depends on the length: give one, such as length=128"):
            export_stablehlo(model, file)
        assert list(tmp_path.iterdir()) == []
        export_stablehlo(model, file, length=9)
        assert check_same(read(file), model, batch(model)) == ["logits"]
        return
    export_stablehlo(model, file)
    exported = read(file)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert check_same(exported, model, batch(model)) == ["logits"]
    check_same(exported, model, batch(model, rows=1, length=6))


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("BertModel", ["last_hidden_state", "pooler_output"]),
        ("BertForTokenClassification", ["logits"]),
        ("BertForQuestionAnswering", ["end_logits", "start_logits"]),
        ("BertForMaskedLM", ["logits"]),
    ],
)
def test_every_head(name, outputs, tmp_path):
    model, file = made(name), tmp_path / "model.stablehlo"
    model.train()  # dropout is off in what is written
    export_stablehlo(model, file, platforms=["cpu"])
    assert check_same(read(file), model, batch(model)) == outputs


def test_a_sentence_encoder_and_layers_asked_for(tmp_path):
    encoder = zoo.SentenceEncoder(made("BertModel", output_hidden_states=True))
    export_stablehlo(encoder, tmp_path / "m", platforms=["cpu"])
    assert "embedding" in check_same(read(tmp_path / "m"), encoder, batch(encoder))


def test_a_longer_sequence_than_there_are_positions_is_refused(tmp_path):
    model = made("BertModel")
    export_stablehlo(model, tmp_path / "m", platforms=["cpu"])
    with pytest.raises(ValueError, match="refining shapes"):
        read(tmp_path / "m").call(**batch(model, length=21))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ["gpu"]}, r"platforms=\['gpu'\]: expected some of cpu, cuda, tpu, rocm"),
        ({"platforms": "cpu"}, "platforms='cpu': expected some of"),
        ({"length": 21}, "length=21: the model has positions for 1 to 20"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_stablehlo(made("BertModel"), tmp_path / "m", **options)
    with pytest.raises(ValueError, match="Linear is no transformer of the zoo"):
        export_stablehlo(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "m")


ALONE = """
import sys, jax, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
given = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **exported.call(**given))
assert not any(name.startswith(('jaxbrewer', 'flax')) for name in sys.modules)
"""


def test_the_command_and_a_process_without_jaxbrewer(tmp_path, capsys):
    model = made("BertForSequenceClassification")
    model.save_pretrained(tmp_path / "student")
    out = tmp_path / "model.stablehlo"
    given = [
        str(tmp_path / "student"),
        "--to",
        "stablehlo",
        "--out",
        str(out),
        "--platforms",
        "cpu",
    ]
    assert main(["export", *given]) == 0
    told = capsys.readouterr().out
    assert "BertForSequenceClassification" in told
    assert "takes" in told
    assert "input_ids int32[batch,length]" in told
    assert "gives logits float32[batch,2]" in told
    np.savez(tmp_path / "in.npz", **batch(model))
    files = [str(out), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    model.eval()
    logits = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_allclose(logits, model(**batch(model)).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "nowhere"}, "nowhere"),
        ({"--out": "."}, "--out . is a folder, expected a file"),
        ({"--length": "500"}, "length=500: the model has positions for 1 to 20"),
        ({"--platforms": "gpu"}, "expected some of cpu, cuda, tpu, rocm"),
    ],
)
def test_the_commands_mistakes(change, message, tmp_path, capsys):
    made("BertModel").save_pretrained(tmp_path / "student")
    given = {"--to": "stablehlo", "--out": str(tmp_path / "m")} | change
    folder = given.pop("folder", str(tmp_path / "student"))
    flags = [word for pair in given.items() for word in pair]
    assert main(["export", folder, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
