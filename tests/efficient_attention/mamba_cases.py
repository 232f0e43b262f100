"""The blocks of Mamba and Mamba-2 that their tests share, with inputs, gradients and judges.

What test_mamba.py, test_mamba2.py and test_mamba_laws.py share; pyproject.toml's `pythonpath` lets them import it.
"""

import torch

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2

KINDS = ("mamba", "mamba2")
B, N, S, K, P = 2, 11, 5, 4, 3  # batch, positions, states, the convolution's width, the width of a head in Mamba-2
WIDTH = {"mamba": 7, "mamba2": 6}  # E; three times as many inner channels, in Mamba-2 6 heads of width 3


def block(kind, dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    if kind == "mamba":
        return Mamba(WIDTH[kind], **(dict(d_state=S, d_conv=K, expand=3, dt_rank=2) | more)).to(dtype)
    made = Mamba2(WIDTH[kind], **(dict(d_state=S, d_conv=K, expand=3, d_head=P, n_groups=2, chunk=4) | more))
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5), made.D.uniform_(-1, 1)  # no weight whose place could not be told
    return made.to(dtype)


def sequence(kind, length=N, dtype=torch.float64, batch=B, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, length, WIDTH[kind], dtype=dtype, requires_grad=True)


def gradients(module, x, y, g):
    """The gradients of x and of every parameter, by name."""
    named = dict(module.named_parameters())
    return dict(zip(["x", *named], torch.autograd.grad(y, [x, *named.values()], g)))


def run(module, x, g, dtype):
    """The output "y" and each gradient, by name, for x in this dtype."""
    given = x.detach().to(dtype).requires_grad_()
    y = module(given)
    return {"y": y, **gradients(module, given, y, g.to(y.dtype))}


def assert_close(ours, theirs, tolerance=1e-12):
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


# --- judges, with the weights of ours --------------------------------------------------------------------------------


def mambapys_block(ours: Mamba):
    from mambapy.mamba import MambaBlock, MambaConfig

    config = MambaConfig(
        d_model=ours.d_model,
        n_layers=1,
        dt_rank=ours.dt_rank,
        d_state=ours.d_state,
        expand_factor=ours.d_inner // ours.d_model,
        d_conv=ours.d_conv,
        bias=ours.in_proj.bias is not None,
        conv_bias=ours.conv1d.bias is not None,
        pscan=False,
    )
    theirs = MambaBlock(config).to(ours.D.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def transformers_mixer(ours: Mamba2):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=ours.d_model,
        num_heads=ours.n_heads,
        head_dim=ours.d_head,
        expand=ours.d_inner // ours.d_model,
        state_size=ours.d_state,
        conv_kernel=ours.d_conv,
        n_groups=ours.n_groups,
        use_bias=ours.in_proj.bias is not None,
        use_conv_bias=ours.conv1d.bias is not None,
        layer_norm_epsilon=ours.norm.eps,
        time_step_limit=ours.dt_limit,
        chunk_size=ours.chunk or 256,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(config, layer_idx=0).to(ours.D.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs
