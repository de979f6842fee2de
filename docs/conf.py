"""Sphinx configuration. ``make docs`` builds into ``docs/_build/html``."""

import shutil
from pathlib import Path

import pyro_seq

project = "pyro_seq"
author = copyright = "the pyro_seq authors"
version = release = pyro_seq.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "pyro_seq"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90

# Notebooks are shown as they were last saved; tests run them.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
suppress_warnings = ["myst-nb.lexer"]  # A notebook that does not name its language.

TUTORIALS = """\
Tutorials
=========

Notebooks, from the folder ``tutorials`` of the repository, shown as they were last saved.
"""


def setup(app):
    """Bring the notebooks in, since Sphinx reads only what lies below ``docs``. It builds without them, too."""
    here = Path(__file__).parent
    shutil.rmtree(here / "tutorials", ignore_errors=True)
    (here / "tutorials").mkdir()
    notebooks = sorted((here.parent / "tutorials").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, here / "tutorials")
    listed = "\n.. toctree::\n\n" + "".join(f"    {notebook.stem}\n" for notebook in notebooks)
    (here / "tutorials" / "index.rst").write_text(TUTORIALS + (listed if notebooks else ""))
