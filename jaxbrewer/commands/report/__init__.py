"""``jaxbrewer report``: what one or several runs have left, as one page."""
