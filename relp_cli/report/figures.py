"""The paper's three kinds of figure: heatmaps (Figure 2), bars of agreement (Figure 1), circuit curves (Figure 3).

Each `*_figure` function returns a matplotlib `Figure`; its twin writes one to a PNG, SVG or PDF file. The same data
gives the same bytes.
"""

from relp_cli.report.bars import agreement_bars, agreement_figure
from relp_cli.report.curve_plot import curves_figure, faithfulness_curves
from relp_cli.report.heatmap import heatmap_figure, heatmaps

__all__ = ["agreement_bars", "agreement_figure", "curves_figure", "faithfulness_curves", "heatmap_figure", "heatmaps"]
