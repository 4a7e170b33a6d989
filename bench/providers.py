# SPDX-License-Identifier: MIT
"""The providers of the position bias: the eager formula, the same compiled, and each backend of this library."""

from dataclasses import dataclass

import torch
import torch._functorch.config
from einops import rearrange

from dpb_triton import DynamicPositionBias, expand_bias, reference
from dpb_triton.dispatch import why_not

PEERS = ("eager", "compiled eager")


def eager_expand(rows, n):
    """As zeta's class expands: index the rows (n, heads) of the MLP by an (n, n) matrix of distances."""
    return rearrange(rows[reference.distance(n, n, 0, rows.device).abs()], "i j h -> h i j")


@dataclass(frozen=True)
class Provider:
    """`expand(table (heads, n), n) -> (heads, n, n)`, and the forward of the module."""

    name: str
    expand: object
    forward: object  # forward(module, n)
    backend: str | None = None  # None: not of this library


EAGER = Provider("eager", lambda table, n: eager_expand(table.mT, n), lambda module, n: module(n, n))


def why_not_measured(backend, device):
    """None if this backend's times mean something on the device, else the reason why not."""
    reason = why_not(backend, device)
    if reason is None and backend == "triton" and device == "cpu":
        reason = "on a CPU only its interpreter runs, which is for tests"
    return reason


def default_backends(device):
    """Those that `backend=None` may take for attention. "torch" is only the fallback for an extension not built."""
    if device == "cuda":
        return ("triton",)
    return ("cpp",) if why_not("cpp", device) is None else ("cpp", "torch")


def providers(device, peers, backends):
    """([Provider] that can run here, {name: reason} of the others)."""
    found, absent = [], {}
    if "eager" in peers:
        found.append(EAGER)
    if "compiled eager" in peers:
        torch._functorch.config.donated_buffer = False  # many backwards run on one autograd graph
        compiled = torch.compile(eager_expand, dynamic=True)
        module = torch.compile(lambda module, n: module(n, n), dynamic=True)
        provider = Provider("compiled eager", lambda table, n: compiled(table.mT, n), module)
        reason = _why_not_compiled(provider, device)
        if reason:
            absent["compiled eager"] = reason
        else:
            found.append(provider)
    for backend in backends:
        reason = why_not_measured(backend, device)
        if reason:
            absent[backend] = reason
            continue
        found.append(
            Provider(
                f"dpb {backend}",
                lambda table, n, backend=backend: expand_bias(table, n, n, backend=backend),
                lambda module, n, backend=backend: module(n, n, backend=backend),
                backend,
            )
        )
    return found, absent


def _why_not_compiled(provider, device):
    table = torch.zeros((1, 4), device=device, requires_grad=True)
    try:
        provider.expand(table, 4).sum().backward()
    except Exception as error:  # no compiler, no headers, …: the report shows the error
        return f"torch.compile failed: {str(error).strip().splitlines()[0][:100]}"
    return None


def modules(heads, dim, device):
    """{is_ours: module} with the same weights."""
    eager = reference.EagerDynamicPositionBias(dim, heads).to(device)
    ours = DynamicPositionBias(dim, heads).to(device)
    ours.load_state_dict(eager.state_dict())
    return {True: ours, False: eager}
