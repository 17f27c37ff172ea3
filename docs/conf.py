from importlib.metadata import version as installed_version

project = "neuronsurgery"
author = "The neuronsurgery developers"
version = release = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # so that pages can link to each other's sections as they can on a code host

exclude_patterns = ["_build"]

autodoc_member_order = "bysource"  # the order in which the code reads
autodoc_typehints = "signature"

html_theme = "furo"
html_title = f"{project} {release}"
