"""The losses of pairs: by hand, against the formulas, against transformers' own, in chunks, and on several devices."""

import math

import pytest
import torch
import torch.nn.functional as F

from nondual.multimodal.contrastive import sigmoid_loss, similarities, softmax_loss, unit_vectors

B, D = 7, 5


def pairs(batch=B, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, batch, D, generator=draw, dtype=dtype)
    return F.normalize(images, dim=-1).requires_grad_(), F.normalize(texts + images, dim=-1).detach().requires_grad_()


def numbers(*values):
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# --- unit vectors ----------------------------------------------------------------------------------------------------


def test_unit_vectors_by_hand_and_of_any_length():
    torch.testing.assert_close(unit_vectors(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    for length in (1e-38, 1e-25, 1.0, 1e25, 2e38):  # the squares of all but one leave the range of float32
        found = unit_vectors(length * torch.tensor([[0.6, -0.8], [1.0, 0.0]]))
        torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [1.0, 0.0]]))


def test_unit_vectors_and_their_gradients_are_torchs():
    x = torch.randn(3, B, D, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_vectors(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(unit_vectors, x) and torch.autograd.gradgradcheck(unit_vectors, x)


def test_a_vector_of_zeros_stays_0_and_its_gradient_is_0():
    x = torch.randn(B, D)
    x[2] = 0
    x.requires_grad_()
    found = unit_vectors(x)
    (gradient,) = gradients((found * torch.randn(B, D)).sum(), x)
    assert (found[2] == 0).all() and (gradient[2] == 0).all()
    assert gradient.isfinite().all() and (gradient[0] != 0).any()


def test_half_precision_comes_out_in_float32_and_nan_stays():
    x = torch.randn(B, D).half()
    torch.testing.assert_close(unit_vectors(x), F.normalize(x.float(), dim=-1))
    x[1, 2] = math.nan
    found = unit_vectors(x)
    assert found.dtype == torch.float32 and found[1].isnan().all() and found[0].isfinite().all()
    assert unit_vectors(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "x, error, says",
    [
        ([1.0], TypeError, r"x must be a Tensor, got list"),
        (
            torch.ones(3, 0),
            ValueError,
            r"x must be floating point \(\.\.\., D\) with D of 1 or more, got torch.float32",
        ),
        (torch.ones(3, dtype=torch.int64), ValueError, r"x must be floating point .*, got torch.int64 \(3,\)"),
        (torch.tensor(1.0), ValueError, r"x must be floating point \(\.\.\., D\)"),
    ],
)
def test_what_has_no_direction_is_refused(x, error, says):
    with pytest.raises(error, match=says):
        unit_vectors(x)


# --- similarities ----------------------------------------------------------------------------------------------------


def test_similarities_are_scaled_cosines_and_a_bias():
    images, texts = pairs()
    more = texts[:3]
    scale, bias = numbers(13.0, -4.0)
    torch.testing.assert_close(similarities(images, more, scale), 13 * images @ more.T)
    torch.testing.assert_close(similarities(images, more, scale, bias), 13 * images @ more.T - 4)
    assert torch.autograd.gradcheck(similarities, (images, more, scale, bias))


def test_they_are_in_float32_under_autocast_and_for_halves():
    images, texts = (x.detach().float() for x in pairs())
    right = 13 * images @ texts.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarities(images, texts, 13.0), right)
    halves = similarities(images.half(), texts.half(), torch.tensor(13.0).half())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, 13 * images.half().float() @ texts.half().float().T)


# --- softmax ---------------------------------------------------------------------------------------------------------


def test_softmax_by_hand():
    """Two pairs, all four vectors on the axes: each choice is between e^s and 1."""
    axes = torch.eye(2)
    for scale in (0.0, 1.0, 3.0):
        each = math.log(math.exp(scale) + 1) - scale
        assert math.isclose(softmax_loss(axes, axes, scale), each, abs_tol=1e-6)
        assert math.isclose(softmax_loss(axes, axes.flip(0), scale), each + scale, abs_tol=1e-6)


def test_softmax_is_the_formula_and_every_gradient_follows():
    images, texts = pairs()
    (scale,) = numbers(13.0)
    loss = softmax_loss(images, texts, scale)
    p = (scale * images @ texts.T).exp()
    formula = -(p.diag() / p.sum(1)).log().mean() / 2 - (p.diag() / p.sum(0)).log().mean() / 2
    torch.testing.assert_close(loss, formula)
    inputs = images, texts, scale
    for mine, its in zip(gradients(loss, *inputs), gradients(formula, *inputs)):
        torch.testing.assert_close(mine, its)


def test_where_nothing_is_told_apart_softmax_is_the_logarithm_of_the_batch():
    same = torch.ones(B, D) / math.sqrt(D)
    assert math.isclose(softmax_loss(same, same, 50.0), math.log(B), rel_tol=1e-6)
    assert float(softmax_loss(same[:1], same[:1], 50.0)) == 0.0  # of one pair there is nothing to choose


def test_softmax_is_symmetric_and_the_order_of_the_pairs_is_nothing():
    images, texts = pairs()
    loss, order = softmax_loss(images, texts, 13.0), torch.randperm(B)
    torch.testing.assert_close(softmax_loss(texts, images, 13.0), loss)
    torch.testing.assert_close(softmax_loss(images[order], texts[order], 13.0), loss)


def test_the_losses_are_transformers_own():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = pairs()
    theirs = image_text_contrastive_loss(13.0 * texts @ images.T)
    torch.testing.assert_close(softmax_loss(images, texts, 13.0), theirs)


# --- sigmoid ---------------------------------------------------------------------------------------------------------


def test_sigmoid_by_hand():
    """Two pairs on the axes: two right answers at s + b, two at -b, over two pairs."""
    axes = torch.eye(2)
    for scale, bias in ((0.0, 0.0), (2.0, -1.0), (10.0, -10.0)):
        each = math.log(1 + math.exp(-scale - bias)) + math.log(1 + math.exp(bias))
        assert math.isclose(sigmoid_loss(axes, axes, scale, bias), each, rel_tol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, B, 100])
def test_sigmoid_is_the_formula_in_chunks_of_any_size_and_every_gradient_follows(chunk):
    images, texts = pairs()
    scale, bias = numbers(10.0, -3.0)
    loss = sigmoid_loss(images, texts, scale, bias, chunk=chunk)
    t = 2 * torch.eye(B, dtype=torch.float64) - 1
    formula = (1 + (-t * (scale * images @ texts.T + bias)).exp()).log().sum() / B
    torch.testing.assert_close(loss, formula)
    inputs = images, texts, scale, bias
    for mine, its in zip(gradients(loss, *inputs), gradients(formula, *inputs)):
        torch.testing.assert_close(mine, its)


def test_chunks_keep_no_matrix_of_all_pairs(largest):
    """Forward and backward: 200 x 16 similarities are the largest tensor, where 200 x 200 were."""
    images, texts = pairs(200)

    def run(chunk):
        return lambda: sigmoid_loss(images, texts, 10.0, -10.0, chunk=chunk).backward()

    assert largest(run(16)) == 200 * 16 and largest(run(None)) == 200 * 200

    def kept(chunk):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            sigmoid_loss(images, texts, 10.0, -10.0, chunk=chunk)
        return max(sizes, default=0)

    assert kept(None) == 200 * 200 and kept(16) < 200 * 16  # nothing of a chunk waits for the backward pass


def test_at_very_large_scales_neither_loss_overflows():
    images, texts = (x.detach().float() for x in pairs())
    for scale in (1e4, -1e4):
        assert softmax_loss(images, texts, scale).isfinite() and sigmoid_loss(images, texts, scale, 0.0).isfinite()


def test_nan_in_one_vector_is_seen_in_the_loss():
    images, texts = (x.detach() for x in pairs())
    images[3, 1] = math.nan
    assert softmax_loss(images, texts, 13.0).isnan() and sigmoid_loss(images, texts, 13.0, -1.0).isnan()
    assert sigmoid_loss(images, texts, 13.0, -1.0, chunk=2).isnan()


# --- what is refused -------------------------------------------------------------------------------------------------

ONES = torch.ones(3, D)
REFUSED = [
    ((ONES.numpy(), ONES), TypeError, r"images must be a Tensor, got ndarray"),
    ((ONES, None), TypeError, r"texts must be a Tensor, got NoneType"),
    ((ONES, ONES[:2]), ValueError, r"texts must be as many as images, one for each, got 2 for 3"),
    ((ONES[:0], ONES[:0]), ValueError, r"a batch must have 1 pair or more, got none"),
    ((ONES, ONES[:, :2]), ValueError, r"texts must have the width of images, D=5, got 2"),
    ((ONES[0], ONES), ValueError, r"images must be vectors, floating point \(B, D\), got torch.float32 \(5,\)"),
    ((ONES, ONES.long()), ValueError, r"texts must be vectors, floating point \(B, D\), got torch.int64 \(3, 5\)"),
]


@pytest.mark.parametrize("inputs, error, says", REFUSED, ids=[says[:40] for _, _, says in REFUSED])
def test_what_is_no_batch_of_pairs_is_refused_by_both(inputs, error, says):
    with pytest.raises(error, match=says):
        softmax_loss(*inputs, 1.0)
    with pytest.raises(error, match=says):
        sigmoid_loss(*inputs, 1.0, 0.0)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True])
def test_a_chunk_that_is_no_number_of_texts_is_refused(chunk):
    with pytest.raises(ValueError, match=rf"chunk must be an integer of 1 or more, or None .* got {chunk}"):
        sigmoid_loss(ONES, ONES, 1.0, 0.0, chunk=chunk)


# --- several devices -------------------------------------------------------------------------------------------------

DEVICES = """
    import gc
    import sys

    import torch
    import torch.distributed as dist
    import torch.multiprocessing
    from torch import nn

    from nondual.multimodal.clip import CLIP, SigLIP
    from nondual.multimodal.contrastive import gathered, softmax_loss

    RANKS, EACH = 3, 2
    LOSSES = {
        "softmax": (CLIP, {}),
        "sigmoid": (SigLIP, {}),
        "sigmoid in chunks": (SigLIP, {"chunk": 4}),
    }


    def model(kind):
        torch.manual_seed(1)
        return kind(nn.Linear(7, 6), nn.Linear(5, 4), 3, d_image=6, d_text=4).double()


    def train(rank, store):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        compare(rank)
        gc.collect()  # graphs hold the group: with the last of them gone, its threads end here and not as Python does
        dist.barrier()
        dist.destroy_process_group()


    def compare(rank):
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(RANKS * EACH, 7, generator=draw, dtype=torch.float64)
        texts = torch.randn(RANKS * EACH, 5, generator=draw, dtype=torch.float64)
        own = slice(rank * EACH, (rank + 1) * EACH)
        group = dist.group.WORLD
        for name, (kind, options) in LOSSES.items():
            alone, shared = model(kind), model(kind)
            whole = alone.loss(images, texts)
            whole.backward()

            part = shared.loss(images[own], texts[own], group=group, **options)
            part.backward()
            mean = part.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / RANKS, whole.detach())
            for (which, parameter), right in zip(shared.named_parameters(), alone.parameters()):
                gradient = parameter.grad.clone()  # averaged as DistributedDataParallel averages it
                dist.all_reduce(gradient)
                torch.testing.assert_close(gradient / RANKS, right.grad, msg=lambda m: f"{name}, {which}: {m}")
            sys.stdout.write(f"rank {rank}, {name}: right\\n")

        rows = gathered(images[own], group)
        assert torch.equal(rows, images)
        try:  # one device has a pair less: all of them say so, and none waits for the others
            softmax_loss(images[own][rank // 2 :], images[own][rank // 2 :], 1.0, group=group)
        except ValueError as refused:
            sys.stdout.write(f"rank {rank}, refused: {refused}\\n")


    if __name__ == "__main__":
        torch.multiprocessing.spawn(train, sys.argv[1:], nprocs=RANKS)
"""


def test_over_three_devices_loss_and_gradients_are_those_of_one(tmp_path, in_a_process_of_its_own):
    ran = in_a_process_of_its_own(DEVICES, tmp_path / "store", timeout=150, env={"OMP_NUM_THREADS": "1"})
    refused = "every device of a group must have as many images and texts, got [(2, 2), (2, 2), (1, 1)]"
    expected = [f"rank {r}, {name}: right" for r in range(3) for name in ("softmax", "sigmoid", "sigmoid in chunks")]
    expected += [f"rank {r}, refused: {refused}" for r in range(3)]
    assert sorted(ran.stdout.splitlines()) == sorted(expected)
