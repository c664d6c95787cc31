"""Programs that can be run: ``python -m examples.salesman``."""
