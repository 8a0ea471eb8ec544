"""How the site is built: `make docs`, or `sphinx-build -W docs out/docs`."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import jaxbn  # noqa: E402

project = "jaxbn"
version = release = jaxbn.__version__
copyright = "the authors of jaxbn"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "blocks",
    "docstrings",
    "formulas",
    "public_names",
]
exclude_patterns = ["_ext"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
myst_all_links_external = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_attr_annotations = False
maximum_signature_line_length = 72
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"jaxbn {version}"
html_static_path = ["_static"]
html_css_files = ["jaxbn.css"]
html_copy_source = html_show_sourcelink = False

# Prompts and outputs are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
