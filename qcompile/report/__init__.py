"""What a compile did: data first (`model.py`), then a table for the terminal and a page for people."""

from qcompile.report.model import LayerRecord, Refusal, Report

__all__ = ["LayerRecord", "Refusal", "Report"]
