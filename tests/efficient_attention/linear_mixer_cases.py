"""A mixer of linear attention taken apart: what its tests share."""

import torch
import torch.nn.functional as F

B, N, E, H, D = 2, 11, 12, 3, 4
X = torch.randn(B, N, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(kind, **options):
    torch.manual_seed(0)
    return kind(E, H, **options).double()


def qkv(mixer):
    """Queries, keys and values as the convolution leaves them, and what goes to the gate."""
    mixed, z = mixer.in_proj(X).split([mixer.d_mixed, mixer.d_gate], -1)
    if mixer.conv1d is not None:
        mixed = F.silu(F.conv1d(F.pad(mixed.mT, (3, 0)), mixer.conv1d.weight, groups=mixer.d_mixed).mT)
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in mixed.chunk(3, -1))
    return q, k, v, z


def ended(mixer, out, z):
    out = out.transpose(1, 2)
    if mixer.norm is not None:
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    out = out.flatten(2) * (1 if mixer.norm is None else mixer.norm.weight)
    return mixer.out_proj(out * F.silu(z) if mixer.d_gate else out)
