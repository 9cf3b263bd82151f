"""How Sphinx builds these pages: ``python -m sphinx -W --keep-going -b html docs docs/_build``.

Pages link to files of the repository as GitHub wants it, by paths relative to themselves. Markdown
outside of this folder becomes pages of its own, in ``repository/``; other files are downloads. Nothing is
fetched and no notebook is run.
"""

import os
import re
from pathlib import Path

import jaxbrewer

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COPIES = DOCS / "repository"

project = "jaxbrewer"
author = "the authors of jaxbrewer"
project_copyright = "the authors of jaxbrewer. Licence: Apache 2.0"
version = release = jaxbrewer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute", "runs"]
html_theme = "furo"
html_title = f"jaxbrewer {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
pygments_style = "default"
highlight_language = "text"

nb_execution_mode = "off"
myst_heading_anchors = 6

default_role = "py:obj"  # `name` in a docstring links to the name where it has a page
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"no-value": True}
autodoc_typehints_format = "short"
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")  # the path in [text](path#anchor)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def markdown_outside() -> list[Path]:
    """The repository's Markdown that becomes pages, beside what lies in this folder."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("examples/**/README.md"))]


PLACES = {file: COPIES / file.relative_to(ROOT) for file in markdown_outside()}


def relinked(text: str, home: Path, here: Path) -> str:
    """A page's text with its links as they must be here.

    Args:
        text: Markdown.
        home: the file it is in the repository, which its links are relative to.
        here: the file it is for Sphinx.
    """

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(home.parent / found[1]))
        return os.path.relpath(PLACES.get(target, target), here.parent)

    fences = FENCE.findall(text)
    prose = [LINK.sub(link, part) for part in FENCE.split(text)]
    return "".join(a + b for a, b in zip(prose, [*fences, ""], strict=True))


def copy_outside() -> None:
    """Writes the pages in ``repository/``, those that have changed, and clears away old ones."""
    for old in set(COPIES.rglob("*.md")) - set(PLACES.values()):
        old.unlink()
    for home, here in PLACES.items():
        text = relinked(home.read_text(encoding="utf-8"), home, here)
        if not here.exists() or here.read_text(encoding="utf-8") != text:
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_text(text, encoding="utf-8")


def setup(app) -> None:
    """Called by Sphinx."""
    copy_outside()

    def read(app, docname: str, source: list[str]) -> None:
        page = Path(app.env.doc2path(docname))
        if page.suffix in (".md", ".ipynb") and COPIES not in page.parents:
            source[0] = relinked(source[0], page, page)

    app.connect("source-read", read)
