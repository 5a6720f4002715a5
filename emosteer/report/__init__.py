"""`emosteer report`: the artefacts of one model -> one self-contained HTML page. Loads no model and needs no network."""

from __future__ import annotations

from emosteer.report.page import Built, build_report

__all__ = ["Built", "build_report"]
