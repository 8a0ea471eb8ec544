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
    "sphinx_design",
    "sphinxext.opengraph",
    "blocks",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "docstrings",
    "executed",
    "formulas",
    "public_names",
    "signatures",
]
# Inventories of other projects need a network, which builders of the site have.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest/", None),
    "flax": ("https://flax.readthedocs.io/en/latest/", None),
    "optax": ("https://optax.readthedocs.io/en/latest/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
}
exclude_patterns = ["_ext", "notebooks", "recipes/tables"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = [
    "dollarmath",
    "amsmath",
    "deflist",
    "colon_fence",
    "attrs_block",
]
myst_heading_anchors = 4
myst_all_links_external = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_attr_annotations = False
strip_signature_backslash = True  # Napoleon then keeps the underscore of `moments_`.
maximum_signature_line_length = 72
python_use_unqualified_type_names = True

html_theme = "furo"
html_favicon = "_static/favicon.svg"
REPOSITORY = "https://github.com/jaxbn/jaxbn"
html_theme_options = {
    "light_logo": "logo.svg",
    "dark_logo": "logo_dark.svg",
    "sidebar_hide_name": True,
    # Furo then shows a link to edit the page.
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [
        {"name": "GitHub", "url": REPOSITORY, "html": "GitHub", "class": ""},
    ],
}
ogp_site_url = "https://jaxbn.readthedocs.io/"
ogp_image = "_static/social.png"
ogp_enable_meta_description = True
html_title = f"jaxbn {version}"
html_static_path = ["_static"]
html_css_files = ["jaxbn.css"]
html_js_files = ["jaxbn.js"]
html_copy_source = html_show_sourcelink = False

# Prompts and outputs are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
