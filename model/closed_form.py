"""Closed-form start of the index branch from the model's own q and k; no peer has it.

The rotary embedding turns a channel pair f as one complex number z = x_f + i x_f', and a score is
Re sum_f conj(q_f) k_f, so only mixing within a frequency commutes with it. Per layer and frequency, over
calibration tokens n, with kappa[n, r] the unrotated keys of the G groups and eta[n, r] the groups' mean
queries:

    w[r] = rms of |eta[., r]|            C[r, s] = mean of conj(w kappa)_r (w kappa)_s
    U = the m eigenvectors of C with the largest eigenvalues, (G, m)
    index key, component j:              sum over r of w[r] kappa[., r] U[r, j]
    index query of group r, j:           eta[., r] U[r, j] / w[r]

Re sum_j conj(q_idx[r, j]) k_idx[j] is then the best rank-m estimate of group r's mean logit. kappa and eta
are fitted as linear functions of the layer's input by least squares over the calibration tokens: exact
where the family's projections are linear, whatever they are called, and the nearest linear form where
a QK-norm follows. D_idx = m D, and every copy of width D uses the main rotary table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .geometry import Geometry
from .probe import Observation, Transforms, rotary_planes, unrotate

RIDGE = 1e-7
"""Share of the mean input power added to the normal equations, for fewer tokens than input channels."""


@dataclass
class LayerMoments:
    """Sums over calibration tokens of one layer, in float64."""

    transforms: Transforms
    attention: nn.Module
    planes: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Observation) -> None:
        """Take in one observed batch of rows."""
        groups, width = seen.k.shape[1], seen.k.shape[-1]
        q, k = seen.q, seen.k
        if self.transforms.rotary:
            q, k = unrotate(seen, q), unrotate(seen, k)
        if not self.planes:
            rotary_width = seen.positions[0].shape[-1]
            self.planes = rotary_planes(self.attention, self.transforms.rotary, width, rotary_width)
        eta = q.unflatten(1, (groups, -1)).mean(dim=2)
        eta, kappa = (part.transpose(1, 2).flatten(0, 1).double() for part in (eta, k))
        x = seen.hidden.flatten(0, 1).double()
        if self.transforms.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        eta_f, kappa_f = (_to_planes(part, self.planes) for part in (eta, kappa))
        new = {
            "xx": x.T @ x,
            "x_eta": x.T @ eta.flatten(1),
            "x_kappa": x.T @ kappa.flatten(1),
            "eta_power": eta_f.abs().square().sum(0),
            "kappa_kappa": torch.einsum("nrf,nsf->frs", kappa_f.conj(), kappa_f),
        }
        self.num_tokens += len(x)
        self.sums = {name: self.sums.get(name, 0) + value.cpu() for name, value in new.items()}


@torch.no_grad()
def fit(moments: LayerMoments, geometry: Geometry) -> dict[str, Tensor]:
    """Weights of the index branch, by child and parameter name, in float64.

    Returns:
        `index_q_proj.weight` (G D_idx, hidden), `index_k_proj.weight` (D_idx, hidden), biases where the
        geometry has them, norm weights where it has those.
    """
    mix_q, mix_k = _mixing(moments, geometry)
    gram = moments.sums["xx"]
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    both = torch.cat([moments.sums["x_eta"], moments.sums["x_kappa"]], dim=1)
    of_eta, of_kappa = torch.linalg.solve(gram + ridge, both).chunk(2, dim=1)
    groups = geometry.num_index_heads
    of_eta = of_eta.unflatten(1, (groups, -1))
    index_q = torch.einsum("rio,xro->rix", mix_q, of_eta).flatten(0, 1)
    index_k = mix_k.flatten(1) @ of_kappa.T
    weights = {}
    for name, matrix in (("index_q", index_q), ("index_k", index_k)):
        if geometry.index_norm:
            # The norm divides by the length of each vector; its weight puts the typical length back.
            power = torch.einsum("ix,xy,iy->i", matrix, gram, matrix).mean() / moments.num_tokens
            weights[f"{name}_norm.weight"] = power.sqrt().expand(geometry.index_dim) - 1.0
        bias = matrix.new_zeros(len(matrix))
        if moments.transforms.bias:
            matrix, bias = matrix[:, :-1], matrix[:, -1]
        weights[f"{name}_proj.weight"] = matrix
        if geometry.index_bias:
            weights[f"{name}_proj.bias"] = bias
    return weights


def _mixing(moments: LayerMoments, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Real mixing matrices: queries (G, D_idx, D) from eta, keys (D_idx, G, D) from kappa."""
    groups, width = (
        geometry.num_index_heads,
        moments.sums["x_kappa"].shape[1] // geometry.num_index_heads,
    )
    copies = geometry.index_dim // width
    w = (moments.sums["eta_power"] / moments.num_tokens).sqrt()
    w = w.clamp(min=1e-6 * float(w.max()) + 1e-30).T
    covariance = w[:, :, None] * moments.sums["kappa_kappa"] * w[:, None, :]
    vectors = torch.linalg.eigh(covariance).eigenvectors
    u = vectors[..., -copies:].flip(-1)
    of_key, of_query = w[..., None] * u, u / w[..., None]
    mix_q = torch.zeros(groups, copies, width, width, dtype=torch.float64)
    mix_k = torch.zeros(copies, width, groups, width, dtype=torch.float64)
    for f, plane in enumerate(moments.planes):
        for out, phase in zip(plane, (1.0, -1.0j), strict=False):
            for into, unit in zip(plane, (1.0, 1.0j), strict=False):
                # Output channel `out` is the real (phase 1) or imaginary part (Re of -i z) of z.
                mix_q[:, :, out, into] = (phase * unit * of_query[f]).real
                mix_k[:, out, :, into] = (phase * unit * of_key[f]).real.T
    return mix_q.flatten(1, 2), mix_k.flatten(0, 1)


def _to_planes(x: Tensor, planes: list[list[int]]) -> Tensor:
    """(n, G, D) real to (n, G, F) complex, one number for each plane."""
    real = x[..., [plane[0] for plane in planes]]
    imaginary = torch.zeros_like(real)
    for f, plane in enumerate(planes):
        if len(plane) == 2:
            imaginary[..., f] = x[..., plane[1]]
    return torch.complex(real, imaginary)
