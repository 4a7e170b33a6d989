# SPDX-License-Identifier: MIT
"""plot_bias draws what the module computes."""

import pytest
import torch

from dpb_triton import DynamicPositionBias, plot_bias

figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed (extra: plot)")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("log_x", [False, True])
def test_curves_and_map(signed, log_x, tmp_path):
    module = DynamicPositionBias(8, 3, signed=signed).bfloat16()
    figure = plot_bias(module, 6, 9, head=1, log_x=log_x)
    assert isinstance(figure, figure_module.Figure)
    curves, image = figure.axes[:2]
    assert curves.get_xscale() == ("symlog" if log_x else "linear")
    assert len(curves.lines) == 3
    for line, expected in zip(curves.lines, module.table(9).detach(), strict=True):
        assert list(line.get_xdata()) == list(range(-8 if signed else 0, 9))
        torch.testing.assert_close(torch.tensor(list(line.get_ydata())).float(), expected)
    drawn = torch.tensor(image.images[0].get_array().tolist())
    torch.testing.assert_close(drawn, module(6, 9, dtype=torch.float32)[1].detach())
    figure.savefig(tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 10_000


def test_pyplot_is_left_alone():
    from matplotlib import pyplot

    plot_bias(DynamicPositionBias(8, 20), 4)
    assert pyplot.get_fignums() == []
