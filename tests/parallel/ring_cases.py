"""Attention over ranks and on one device, on the same numbers: what the tests of the ring and of windows share."""

import torch

from nondual.ops.attention import attention
from nondual.parallel import Layout, contiguous, of_lengths, ring_attention, traffic, zigzag

B, D, DV = 2, 5, 3


def layouts(size):
    """Even and uneven pieces, ranks without a row, pieces in any order, and nothing at all."""
    backwards = Layout(tuple((range(4 * r + 3, 4 * r + 4), range(4 * r, 4 * r + 3)) for r in reversed(range(size))))
    return {
        "zigzag": zigzag(4 * size, size),
        "uneven zigzag": zigzag(13, size),
        "contiguous": contiguous(11, size),
        "one has all": of_lengths([0] * (size - 1) + [7]),
        "an empty one": of_lengths([5, 0, 2, 4][:size]),
        "backwards": backwards,
        "single": zigzag(1, size),
        "nothing": contiguous(0, size),
    }


def packed(length):
    """Lengths of documents that cut pieces in their middle, one of them empty."""
    return (length // 3, 0, length // 2 - length // 3, length - length // 2)


def drawn(heads, kv_heads, length, seed, dtype=torch.float64):
    """The same q, k, v and gradient of the output on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, heads, length, D), (B, kv_heads, length, D), (B, kv_heads, length, DV), (B, heads, length, DV)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def one_device(q, k, v, causal=False, window=None, documents=None, scale=None):
    """Attention with its weights formed, under the mask that the options mean."""
    n = q.shape[2]
    behind = torch.arange(n)[:, None] - torch.arange(n)  # by how much a key lies before the query
    mask = behind >= 0 if causal else torch.ones(n, n, dtype=torch.bool)
    if window is not None:
        mask &= behind < window
    if documents is not None:
        of = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
        mask &= of[:, None] == of
    return attention(q, k, v, mask=mask, scale=scale, impl="reference")


def with_gradients(call, q, k, v, d_out):
    """The output, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def farthest(ours, theirs) -> float:
    """The largest difference of two lists of tensors of the same shapes."""
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((float((x - y).abs().max()) for x, y in zip(ours, theirs) if x.numel()), default=0.0)


def against_one_device(layout, rank, kv_heads, seed, gaps=False, **options):
    """How far this rank's rows of ring_attention are from one device's, and the bytes sent, forward and backward."""
    given = drawn(6, kv_heads, layout.length, seed)
    expected = with_gradients(lambda q, k, v: one_device(q, k, v, **options), *given)
    rows = [layout.shard(x, rank) for x in given]
    if gaps:  # rows with gaps between them
        rows = [x.mT.contiguous().mT for x in rows]
    q, k, v = (x.detach().requires_grad_() for x in rows[:3])
    with traffic() as forward:
        out = ring_attention(q, k, v, layout, **options)
    with traffic() as backward:
        grads = torch.autograd.grad(out, (q, k, v), rows[3])
    difference = farthest([out.detach(), *grads], [layout.shard(x, rank) for x in expected])
    return difference, forward.bytes, backward.bytes
