"""Sphinx builds the pages of this folder; `make docs` runs it, and warnings are errors."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate

import ist_jax

project = "ist_jax"
version = release = ist_jax.__version__
copyright = "the authors of ist_jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generated/*.md"]  # the latter are parts of pages
default_role = "code"  # `names` of docstrings
smartquotes_action = "D"  # dashes alone: 'names' of settings stay as they are typed

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they are stored

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar, napoleon_attr_annotations = True, False  # fields without their annotations
# other projects' objects, which only a network could look up; type variables; what is not for users
_INTERNAL = r"ist_jax\.(runtime|exchange\.wire|costs\.(sockets|traffic|compiled))\..*"
nitpick_ignore_regex = [("py:.*", r"(?!ist_jax).*|.*\.[A-Z]"), ("py:.*", _INTERNAL)]

html_theme = "furo"
html_title = "ist_jax"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_show_sphinx = html_copy_source = False


def _escape(line):
    line = re.sub(r"(\*\w+\*)|\*", lambda found: found[1] or r"\*", line)  # *emphasis* alone
    line = re.sub(r": ([A-Z]\.)$", r": \\\1", line)  # 'S.' would begin a list
    return re.sub(r"(`[^`]+`)(?=\w)", r"\1\ ", line)


def to_rst(app, what, name, obj, options, lines):
    """Makes reStructuredText of a docstring; what is indented, and commands, are shown as they stand."""
    text, section, literal = [], False, False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            section = line.endswith(":") and line[:-1].isalpha()  # such as Args: and References:
        shown = what in ("module", "data") and line.startswith((" ", "python -m ")) and not section
        if shown and not literal:
            text += ["", "::", ""]
        if literal and line.strip() and not shown:
            text.append("")
        literal = shown or (literal and not line.strip())
        text.append(f"  {line}" if shown else _escape(line))
    lines[:] = text


def skips(app, what, name, obj, skip, options):
    """Leaves out the fields of tuples that have no docstring of their own; those of the class name them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def shorten(app, what, name, obj, options, signature, returns):
    """Arrays by the name that users know, instead of that in a private module."""
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (signature, returns))


def setup(app):
    app.connect("builder-inited", lambda _: generate.write(HERE / "generated"))
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skips)
