"""The ``symprune`` command."""
