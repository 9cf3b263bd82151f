"""The page of some runs: what is read, what is drawn, and what is said to be missing."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from jaxbrewer import CallbackResult
from jaxbrewer.__main__ import main
from jaxbrewer.commands.report import drawing, reading
from jaxbrewer.training import read_scalars
from jaxbrewer.training.position import sealed

from .. import nnx_job

EMPTY = {"meta"}
TERMS = ("total_loss", "unweighted_kd_loss", "unweighted_hard_label_loss")


class Page(html.parser.HTMLParser):
    """Checks that every tag is closed; keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href") or k.startswith("on")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += f" {data} "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a short run, and of one that says it had another seed."""
    folder = tmp_path_factory.mktemp("trained")
    distiller = nnx_job.distiller(folder / "first", dropout=0.0)
    with distiller:
        distiller.train(
            nnx_job.SGD,
            nnx_job.loader(3),
            num_epochs=2,
            callback=lambda model, step: CallbackResult(score=1 / step),
        )
    second = shutil.copytree(folder / "first", folder / "second")
    changes = {"seed": 3, "log_dir": str(second / "log")}
    for step in (3, 6):
        rewrite(second / "out" / f"gs{step}", train_config=lambda config: config | changes)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy, to be damaged, whose configs still name the first place; the working folder."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def report(runs, capsys):
    def call(*folders):
        code = main(["report", *map(str, folders), "--out", "page.html"])
        printed = capsys.readouterr()
        told = printed.out + printed.err
        return code, told, Page((runs / "page.html").read_text()) if code < 2 else None

    return call


def rewrite(checkpoint, **changes):
    file = checkpoint / "position" / "metadata"
    position = json.loads(file.read_text())
    del position["digest"]
    for name, values in changes.items():
        position[name] = values(position[name]) if callable(values) else values
    file.write_text(json.dumps(sealed(position)))


def test_a_page_holds_all_of_a_run_and_nothing_from_outside(report):
    code, told, page = report("first/out")
    assert code == 0 and "page.html: " in told and "1 run, 5 tags" in told
    assert not page.links and "script" not in page.tags
    assert page.tags.count("polyline") == 6  # five tags and the speed
    count = sum(w.size for w in nnx_job.weights(nnx_job.Encoder(2, 4)).values())
    for text in (
        *TERMS,
        "first/out GeneralDistiller 6 2 0.3333",
        f"all {count:,} 100.0%",
        "gs3 3 1",
        "the best",
        "hidden_mse × 1.0, linear 4 → 6",
        "nst × 1.0",
        "1 × hidden T0 → S0 by hidden_mse",
        "gradient_accumulation_steps 1",
        "temperature 4",
        "intermediate_matches 2 matches, as above",
        "jaxbrewer inspect",
    ):
        assert text in page.text, text
    assert "Not there" not in page.text


def test_several_runs_share_the_pictures(report, runs):
    code, told, page = report("first/out", "second/out", "first/out")
    assert code == 0 and "2 runs, 5 tags" in told
    assert page.tags.count("polyline") == 12
    assert "Fields that differ are marked." in page.text
    ends = [read_scalars(runs / name / "log")["scalar/total_loss"] for name in ("first", "second")]
    first, second = (drawing.number(curve[max(curve)]) for curve in ends)
    assert f"scalar/total_loss {first} {second}" in page.text
    assert page.text.count("The loss is made of:") == 1  # they share it


def test_text_from_files_stays_text(report, runs):
    evil = "<script>alert(1)</script>\x1b[2J\"'&"
    for step in (3, 6):
        rewrite(
            runs / "first" / "out" / f"gs{step}",
            **{"class": evil},
            train_config=lambda c: c | {evil: evil},
            distill_config=lambda c: (
                c
                | {
                    "intermediate_matches": [
                        {"layer_T": 1, "layer_S": 1, "feature": evil, "loss": evil, "weight": evil}
                        | {"proj": [evil, evil, evil]}
                    ]
                }
            ),
        )
    code, _, page = report("first/out")
    assert code == 0 and "script" not in page.tags
    assert page.text.count(r"alert(1)</script>\x1b[2J") >= 6
    assert "\x1b" not in page.text


@pytest.mark.parametrize(
    ("log_dir", "said"),
    [
        (None, "the run had no log_dir: there are no curves"),
        ("nowhere", "log_dir='nowhere' is not there"),
        ("out", "holds no points: there are no curves"),
    ],
)
def test_a_missing_log_is_said(report, runs, log_dir, said):
    (runs / "out").mkdir()
    for step in (3, 6):
        rewrite(
            runs / "first" / "out" / f"gs{step}",
            train_config=lambda config: config | {"log_dir": log_dir},
        )
    code, told, page = report("first/out")
    assert code == 1
    assert said in told and said in page.text
    assert "Curves There are none." in page.text and "polyline" not in page.tags


def test_a_relative_log_dir_is_found_from_where_the_run_was(report, runs, monkeypatch):
    for step in (3, 6):
        rewrite(
            runs / "first" / "out" / f"gs{step}",
            train_config=lambda config: config | {"log_dir": "log", "output_dir": "out"},
        )
    assert report("first/out")[0] == 0


def test_damaged_checkpoints_are_said_and_the_others_shown(report, runs):
    (runs / "first" / "out" / "gs9").mkdir()
    file = runs / "first" / "out" / "gs6" / "position" / "metadata"
    file.write_text(file.read_text().replace('"epoch":', '"epoch" :').replace("1", "2"))
    code, told, page = report("first/out")
    assert code == 1
    assert "gs9 is unfinished" in told and "gs6 is damaged" in told
    assert "gs9 is unfinished" in page.text and "gs6 is damaged" in page.text
    assert "first/out GeneralDistiller 3 1" in page.text
    for step in (3, 6):
        shutil.rmtree(runs / "first" / "out" / f"gs{step}" / "position")
    (runs / "first" / "out" / "scores.json").write_text("[]")
    code, told, page = report("first/out")
    assert code == 1 and "no checkpoint can be read" in told and "scores.json" in told
    assert "They cannot be told." in page.text


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere is not there, expected an output_dir"),
        ("first", "first holds no checkpoint gs{step}"),
        ("first/out/gs6", "is one checkpoint, expected the output_dir that it lies in"),
    ],
)
def test_what_is_no_run_is_2(report, folder, message):
    code, told, _ = report(folder)
    assert code == 2 and message in told


def test_a_folder_to_write_to_is_2(runs, capsys):
    assert main(["report", "first/out", "--out", "first"]) == 2
    assert "--out first is a folder" in capsys.readouterr().err


def test_long_curves_are_thinned_to_means():
    points = {step: float(step % 4) for step in range(2000)}
    curve = reading.thinned(points)
    assert len(curve.steps) == 500 and curve.each == 4
    np.testing.assert_array_equal(curve.values, 1.5)
    np.testing.assert_array_equal(curve.steps[:2], [1.5, 5.5])
    short = reading.thinned({3: 1.0, 1: 2.0, 2: np.nan})
    np.testing.assert_array_equal((short.steps, short.values), [[1, 3], [2, 1]])
    assert short.left_out == 1
    odd = reading.thinned({step: 1.0 for step in range(501)})
    assert len(odd.steps) == 251 and odd.steps[-1] == 500


def test_the_speed_is_of_the_clock():
    speed = reading._speed({step: step / 8 for step in range(100)})
    np.testing.assert_allclose(speed.values, 8)
    assert reading._speed({1: 5.0}) is None and reading._speed({}) is None
    assert reading._speed({1: 5.0, 2: 5.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0, 720, [0, 200, 400, 600]), (-3e-5, 3e-5, [-2e-5, 0, 2e-5])],
)
def test_ticks_are_round(low, high, expected):
    assert drawing.ticks(low, high) == pytest.approx(expected)


def test_curves_of_one_value_or_none_are_drawn():
    flat = reading.thinned({1: 2.0, 2: 2.0})
    assert "NaN" not in (picture := drawing.chart("x", [("a", flat)])) and "polyline" in picture
    assert "no finite points" in drawing.chart("x", [("a", reading.thinned({1: np.inf}))])


def test_layers_are_drawn_where_they_are():
    found = [
        {"layer_T": [0, 4], "layer_S": [0, 2], "loss": "nst", "weight": 1},
        {"layer_T": -1, "layer_S": -1, "loss": "cos", "weight": 0.5},
        {"layer_T": "x", "layer_S": 1, "loss": "odd", "weight": 1},
    ]
    assert [drawing.pairs_of(match) for match in found] == [[(0, 0), (4, 2)], [(-1, -1)], []]
    picture = drawing.matches(found)
    assert picture.count('class="match"') == 3
    assert picture.count("<circle") == 6 + 4  # 0 to 4 and -1; 0 to 2 and -1
    assert "cos × 0.5" in picture and "odd" not in picture
    assert drawing.matches(found[2:]) == ""
