"""The documentation: links lead somewhere, and Sphinx builds the pages without a warning."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jaxbrewer import presets
from jaxbrewer.errors import PreflightWarning
from jaxbrewer.machine.devices import DeviceWarning

from . import doc_pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *DOCS.glob("*.md"),
        *DOCS.glob("*.ipynb"),
        *ROOT.glob("examples/**/README.md"),
        ROOT / "benchmarks" / "README.md",
    ]
)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """A page's text without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")
    return FENCE.sub("", text)


def slug(heading):
    """The anchor that GitHub and MyST make of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(page):
    """All anchors of a page; a heading that stands there twice has a number at its second."""
    found = {}
    for heading in HEADING.findall(prose(page)):
        name = slug(heading)
        found[name] = found.get(name, -1) + 1
    return {f"{name}-{i}" if i else name for name, last in found.items() for i in range(last + 1)}


def broken(page):
    """The links of a page within the repository that lead nowhere."""
    wrong = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    assert not broken(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `thing`: [a](b.md)\n## Twice\n## Twice\n```\n[x](not-seen.md)\n```\n"
        "[1](#one-thing-a) [2](#twice-1) [3](page.md#twice) [4](https://x.org/y.md)\n"
        "[5](#twice-2) [6](gone.md) [7](page.md#gone)\n"
    )
    assert broken(page) == ["b.md", "#twice-2", "gone.md", "page.md#gone"]


def test_the_index_names_every_page():
    index = DOCS / "index.md"
    linked = {link.partition("#")[0] for link in LINK.findall(prose(index))}
    pages = {page.name for page in PAGES if page.parent == DOCS}
    assert pages - linked == {"index.md"}


def test_sphinx_builds_the_pages_without_a_warning(tmp_path):
    missing = [name for name in ("sphinx", "myst_nb", "furo") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"the documentation is not built: no {', '.join(missing)} (extra docs)")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs"]
    run = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "repository" / "README.html").is_file()
    assert "assert_invariant" in (tmp_path / "api" / "testing.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ the snippets

BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TORCH = pytest.mark.torch
# Page, what makes what its code finds there, how many snippets say why they are not run, and marks.
RUN = [
    ("adaptor.md", dict, 0, ()),
    ("any_model.md", doc_pages.any_model, 0, TORCH),
    ("caching.md", dict, 0, ()),
    ("concepts.md", dict, 0, ()),
    ("devices.md", doc_pages.job, 2, ()),
    ("evaluation.md", doc_pages.evaluation, 0, ()),
    ("export.md", doc_pages.export, 0, TORCH),
    ("extending.md", dict, 0, ()),
    ("from_an_api.md", dict, 0, ()),
    ("from_sentence_transformers.md", doc_pages.sentence_folder, 0, ()),
    ("matches.md", dict, 0, ()),
    ("metric_writers.md", doc_pages.metric_writers, 0, ()),
    ("objective.md", doc_pages.job, 0, ()),
    ("precision.md", doc_pages.job, 0, ()),
    ("sentence_encoders.md", doc_pages.sentence_encoders, 0, TORCH),
    ("task_agnostic.md", doc_pages.task_agnostic, 0, TORCH),
    ("temperature.md", dict, 0, ()),
    ("using.md", doc_pages.using, 0, ()),
]


def snippets(page):
    """The Python of a page: its mark, its code, and the mark and the text of a block behind it."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    for (mark, language, code), after in zip(blocks, [*blocks, ("", "", "")][1:], strict=True):
        if language == "python":
            is_outcome = after[0] in ("raises", "warns", "prints")
            yield mark, code, *((after[0], after[2]) if is_outcome else ("", ""))


def outcome(code, page, names):
    """Runs a snippet; returns what it has raised (a warning too) and printed, each in one line."""
    raised, printed = "", io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("error", PreflightWarning)
        warnings.simplefilter("ignore", DeviceWarning)  # of pages that name no device
        try:
            exec(compile(code, page.name, "exec"), names)
        except Exception as error:  # noqa: BLE001  it is what the page shows
            raised = f"{type(error).__name__}: {error}"
    return " ".join(raised.split()), " ".join(printed.getvalue().split())


@pytest.fixture
def tables():
    """The tables of names as they were, once the test is over: pages add their own."""
    found = [*presets.MAPS.values()]
    before = [dict(table) for table in found]
    yield
    for table, entries in zip(found, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("name", "prepared", "not_run"),
    [pytest.param(*row[:3], marks=row[3], id=row[0]) for row in RUN],
)
def test_the_snippets_of_a_page_run_and_do_what_it_says(
    name, prepared, not_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    page, names, left_out = DOCS / name, prepared(), 0
    for mark, code, how, shown in snippets(page):
        if mark.startswith("not run"):
            left_out += 1
            continue
        raised, printed = outcome(code, page, names)
        wanted = " ".join(shown.split())
        assert raised == (wanted if how in ("raises", "warns") else ""), code
        assert how != "prints" or printed == wanted, code
    assert left_out == not_run


def test_the_code_of_every_page_is_run():
    pages = {page.name for page in DOCS.glob("*.md") if any(True for _ in snippets(page))}
    assert pages == {name for name, *_ in RUN}
