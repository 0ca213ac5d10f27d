"""Mounts composefs images without privileges and verifies every block; builds, inspects and checks them."""

# A literal, which pyproject.toml reads: asking importlib.metadata would delay every start of the command.
__version__ = "0.1.0"
