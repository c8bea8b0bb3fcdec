"""The figures of runs and benchmarks, by name."""

from __future__ import annotations

from benchmarks.report_figures import development_figure, kept_figure, over_time_figure
from infra.report.matrix import accuracy_heatmap, accuracy_over_versions
from infra.report.result import result_figure
from infra.report.training import fill_bars, loss_curve

__all__ = ["accuracy_heatmap", "accuracy_over_versions", "development_figure", "fill_bars", "kept_figure",
           "loss_curve", "over_time_figure", "result_figure"]  # fmt: skip
