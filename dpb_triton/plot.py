# SPDX-License-Identifier: MIT
"""Pictures of a learned bias. Needs matplotlib (`pip install 'dpb_triton[plot]'`), imported on first use."""

from typing import TYPE_CHECKING

import torch

from .checks import check_flag, check_int
from .module import DynamicPositionBias

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_bias(
    module: DynamicPositionBias, i: int, j: int | None = None, *, head: int = 0, log_x: bool = False
) -> "Figure":
    """The curve of every head over the distance, and the (i, j) map of one head.

    Args:
        module: a `DynamicPositionBias`.
        i, j: numbers of queries and keys; j is i by default.
        head: the head to map.
        log_x: draw the distance on a logarithmic axis (symmetric around 0 for a signed module).

    Returns:
        A `matplotlib.figure.Figure` of its own, outside pyplot's list: `.savefig(path)` writes it.

    Raises:
        TypeError, ValueError: as the module; a head outside 0 .. heads - 1; nothing to draw (i or j is 0).
        ImportError: matplotlib is not installed.
    """
    if not isinstance(module, DynamicPositionBias):
        raise TypeError(f"module must be a DynamicPositionBias, got {type(module).__name__}")
    if module.device.type == "meta":
        raise ValueError("module must have numbers to draw, got one whose parameters are on the meta device")
    i = check_int("i", i, 1)
    j = i if j is None else check_int("j", j, 1)
    check_flag("log_x", log_x)
    if not 0 <= check_int("head", head) < module.heads:
        raise ValueError(f"head must be in 0 .. {module.heads - 1}, got {head}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_bias needs matplotlib: pip install 'dpb_triton[plot]'") from error

    with torch.no_grad():
        curves = module.table(j).tolist()
        bias = module(i, j, dtype=torch.float32)[head].tolist()
    first = 1 - j if module.signed else 0

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, curve in enumerate(curves):
        left.plot(range(first, j), curve, label=f"head {number}", linewidth=2 if number == head else 1)
    if log_x:
        left.set_xscale("symlog", linthresh=1)
    left.set(
        xlabel="distance in positions" + (", > 0: key in the past" if module.signed else ""),
        ylabel="bias",
        title="bias of each head by distance",
    )
    if module.heads <= 16:
        left.legend(fontsize="small", ncols=2)
    image = right.imshow(bias, aspect="auto", extent=(0, j, i, 0), interpolation="nearest")
    right.set(xlabel="key y", ylabel="query x", title=f"bias[{head}, x, y]")
    figure.colorbar(image, ax=right)
    return figure
