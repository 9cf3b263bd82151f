"""``jaxbrewer port``: what becomes of TextBrewer's files."""
