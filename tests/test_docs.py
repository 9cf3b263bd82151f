"""The documentation: links lead somewhere, and Sphinx builds the pages without a warning."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *DOCS.glob("*.md"),
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
    return FENCE.sub("", page.read_text(encoding="utf-8"))


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
    assert {page.name for page in DOCS.glob("*.md")} - linked == {"index.md"}


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
