# SPDX-License-Identifier: MIT
"""plot_bias draws what the module computes."""

import sys

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
    if log_x:  # linear up to the nearest neighbours only
        assert curves.xaxis.get_transform().linthresh == 1
    assert len(curves.lines) == 3
    for line, expected in zip(curves.lines, module.table(9).detach(), strict=True):
        assert list(line.get_xdata()) == list(range(-8 if signed else 0, 9))
        torch.testing.assert_close(torch.tensor(list(line.get_ydata())).float(), expected)
    drawn = torch.tensor(image.images[0].get_array().tolist())
    torch.testing.assert_close(drawn, module(6, 9, dtype=torch.float32)[1].detach())
    figure.savefig(tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 10_000


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot_bias needs matplotlib: pip install 'dpb_triton\[plot\]'"):
        plot_bias(DynamicPositionBias(8, 3), 4)


@pytest.mark.parametrize("signed", [False, True])
def test_what_it_says(signed):
    """Labels, the chosen head, the map's axes and colours; what is drawn by default; many heads get no legend."""
    figure = plot_bias(DynamicPositionBias(8, 3, signed=signed), 4, 7, head=2)
    curves, image = figure.axes[:2]
    assert [line.get_label() for line in curves.lines] == ["head 0", "head 1", "head 2"]
    assert [line.get_linewidth() for line in curves.lines] == [1, 1, 2]
    assert (curves.get_ylabel(), curves.get_title()) == ("bias", "bias of each head by distance")
    assert ("key in the past" in curves.get_xlabel()) == signed
    assert (image.get_xlabel(), image.get_ylabel(), image.get_title()) == ("key y", "query x", "bias[2, x, y]")
    assert image.images[0].get_extent() == [0, 7, 4, 0]
    for heads, has_legend in ((16, True), (17, False)):
        curves, image, colours = plot_bias(DynamicPositionBias(8, heads), 5).axes
        assert colours.get_label() == "<colorbar>"
        assert curves.get_xscale() == "linear" and image.get_title() == "bias[0, x, y]"
        assert (curves.get_legend() is not None) == has_legend
        assert image.images[0].get_array().shape == (5, 5)


def test_pyplot_is_left_alone():
    from matplotlib import pyplot

    plot_bias(DynamicPositionBias(8, 20), 4)
    assert pyplot.get_fignums() == []
