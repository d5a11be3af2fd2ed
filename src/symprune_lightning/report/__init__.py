"""Reports: what a run did, on one page."""

from symprune_lightning.report.callback import Report

__all__ = ["Report"]
