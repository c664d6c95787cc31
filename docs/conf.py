"""Configuration of Sphinx: https://www.sphinx-doc.org/en/master/usage/configuration.html"""

from sb3_reinforce import __version__

project = "sb3_reinforce"
author = copyright = "The sb3_reinforce maintainers"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# MyST and notebooks
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 600  # Seconds for a cell
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"

# API
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Pages of the source are made for the modules that are documented themselves
viewcode_follow_imported_members = False
# References to what is documented here are checked, those to other packages and type variables are not
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!sb3_reinforce).*"), ("py:class", r".*\.(T|Init|Self\w+)")]

# Look
html_theme = "furo"
html_title = "sb3_reinforce"
