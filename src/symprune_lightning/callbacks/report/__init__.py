"""A report of a run on one HTML page."""
