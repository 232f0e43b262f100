"""The whole encoder and decoder: loss, padding, search against brute force, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.attention_mechanism import (
    AdditiveAttention,
    CoverageAttention,
    GeneralAttention,
    LastState,
    LocationAttention,
    LuongDecoder,
    Seq2Seq,
    UniformAttention,
)

B, M, N, V, START, EOS = 3, 6, 5, 5, 3, 4
LENGTHS, TARGETS = torch.tensor([6, 4, 1]), torch.tensor([5, 2, 4])
KINDS = {
    "RNNsearch": {},
    "fixed vector": {"attention": LastState},
    "equal weights": {"attention": UniformAttention},
    "Luong": {"attention": GeneralAttention, "decoder": LuongDecoder},
    "location": {"attention": lambda s, h: LocationAttention(s, h, 5, 2, 3)},
    "coverage": {"attention": lambda s, h: CoverageAttention(s, h, 5), "decoder": LuongDecoder},
}


def make(kind="RNNsearch", **more):
    torch.manual_seed(0)
    return Seq2Seq(7, V, 8, d_embedding=6, **(KINDS[kind] | more)).double()


def given(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, (B, M), generator=draw), torch.randint(V, (B, N), generator=draw)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_a_padded_batch_against_each_row_alone(kind):
    model = make(kind)
    source, target = given()
    scores, weights = model(source, target, source_lengths=LENGTHS)
    losses = []
    for b in range(B):
        m, n = int(LENGTHS[b]), int(TARGETS[b])
        alone, rows = model(source[b : b + 1, :m], target[b : b + 1, : n - 1])
        torch.testing.assert_close(scores[b : b + 1, : n - 1], alone)
        torch.testing.assert_close(weights[b : b + 1, : n - 1, :m], rows)
        losses.append(F.cross_entropy(alone[0], target[b, 1:n], reduction="sum", label_smoothing=0.1))
    loss = model.loss(source, target, source_lengths=LENGTHS, target_lengths=TARGETS, label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.stack(losses).sum() / (TARGETS - 1).sum())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    beyond = torch.arange(M) >= LENGTHS[:, None]
    torch.testing.assert_close(model(source.masked_fill(beyond, 2), target, source_lengths=LENGTHS)[0], scores)


def test_the_encoder_is_torchs_gru_and_the_twins_differ_in_what_they_read():
    model = make()
    source, target = given()
    theirs = nn.GRU(6, 8, batch_first=True, bidirectional=True).double()
    theirs.load_state_dict(model.encoder.state_dict())
    h, _ = theirs(model.source_embeddings(source))
    torch.testing.assert_close(model.encode(source).h, h)
    twin = make("equal weights")
    shared = {name: p for name, p in model.state_dict().items() if not name.startswith("decoder.attention")}
    assert shared.keys() == twin.state_dict().keys()
    twin.load_state_dict(shared)
    model.decoder.attention.v.data.zero_()  # all scores 0: the same weights as the twin's
    torch.testing.assert_close(model(source, target)[0], twin(source, target)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_finds_the_best_sequence_of_all(kind):
    """With as many beams as there are sequences, the search is exhaustive: its best is that of a loop over all."""
    model = make(kind)
    source, _ = given()
    longest = 3
    finished = [[*body, EOS] for n in range(longest) for body in itertools.product(range(V - 1), repeat=n)]
    cut_off = [list(body) for body in itertools.product(range(V - 1), repeat=longest)]
    found = model.generate(source, longest, bos=START, eos=EOS, source_lengths=LENGTHS, beams=V**longest)
    for b in range(B):
        best, score = None, -torch.inf
        for sequence in finished + cut_off:
            target = torch.tensor([[START, *sequence]])
            scores, _ = model(source[b : b + 1, : int(LENGTHS[b])], target[:, :-1])
            here = scores.log_softmax(-1)[0].gather(-1, target[0, 1:, None]).sum().item()
            if here > score:
                best, score = sequence, here
        assert found.tokens[b, 0, : int(found.lengths[b, 0])].tolist() == best
        assert found.scores[b, 0].item() == pytest.approx(score)


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_the_likeliest_token_each_time(kind):
    model = make(kind)
    source, _ = given()
    found = model.generate(source, 6, bos=START, eos=EOS, source_lengths=LENGTHS)
    for b in range(B):
        target = torch.tensor([[START]])
        for _ in range(6):
            scores, _ = model(source[b : b + 1, : int(LENGTHS[b])], target)
            target = torch.cat([target, scores[:, -1:].argmax(-1)], 1)
            if target[0, -1] == EOS:
                break
        assert found.tokens[b, 0, : int(found.lengths[b, 0])].tolist() == target[0, 1:].tolist()
    more = model.generate(source, 6, bos=START, eos=EOS, source_lengths=LENGTHS, beams=4, length_penalty=0.7)
    assert more.tokens.shape[:2] == (B, 4)


def test_drawn_tokens_are_those_of_its_probabilities():
    """One source many times, one token each: the shares drawn are the softmax of the scores, cut off by top_k."""
    model = make()
    source = given()[0][:1].expand(4000, M)
    draw = torch.Generator().manual_seed(0)
    found = model.generate(source, 1, bos=START, temperature=0.5, top_k=3, generator=draw)
    scores = model(source[:1], torch.tensor([[START]]))[0][0, 0] / 0.5
    kept = scores.masked_fill(scores < scores.topk(3).values[-1], -torch.inf).softmax(-1)
    shares = torch.bincount(found.tokens[:, 0, 0], minlength=V) / 4000
    torch.testing.assert_close(shares.double(), kept.detach(), atol=0.03, rtol=0)


def test_it_learns_to_reverse():
    """Small steps on all strings of three letters: right on each of them in the end."""
    torch.manual_seed(0)
    model = Seq2Seq(4, 6, 24)
    source = torch.tensor(list(itertools.product(range(4), repeat=3)))
    target = torch.cat([torch.full((64, 1), 4), source.flip(1), torch.full((64, 1), 5)], 1)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimiser.zero_grad()
        model.loss(source, target).backward()
        optimiser.step()
    found = model.generate(source, 4, bos=4, eos=5)
    assert torch.equal(found.tokens[:, 0], target[:, 1:])


def test_dropout_is_off_while_it_writes():
    model = make(dropout=0.5)
    source, target = given()
    once, twice = (model.generate(source, 4, bos=START, eos=EOS).scores for _ in range(2))
    assert torch.equal(once, twice) and model.training
    assert not torch.equal(model(source, target)[0], model(source, target)[0])


def test_autocast_and_compile_for_two_lengths():
    model = make().float()
    source, target = given()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(source, target, source_lengths=LENGTHS)
    torch.testing.assert_close(loss, model.loss(source, target, source_lengths=LENGTHS), atol=0.1, rtol=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for m, n in ((6, 5), (3, 2)):
        for a, b in zip(compiled(source[:, :m], target[:, :n]), model(source[:, :m], target[:, :n])):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m, s, t: m(s + 7, t), "source must lie in 0 to 6, got 7 to 13"),
        (lambda m, s, t: m(s, t - 9), "target must lie in 0 to 4, got"),
        (lambda m, s, t: m(s.float(), t), r"source must be integers \(B, N\)"),
        (lambda m, s, t: m(s[:2], t), "source and target must have one batch, got 2 and 3"),
        (lambda m, s, t: m(s[:, :0], t), "source must hold 1 tokens or more a row, got 0"),
        (
            lambda m, s, t: m(s, t, source_lengths=torch.tensor([6, 0, 1])),
            "source_lengths must lie in 1 to 6, got 0 to 6",
        ),
        (
            lambda m, s, t: m(s, t, source_lengths=torch.tensor([7, 1, 1])),
            "source_lengths must lie in 1 to 6, got 1 to 7",
        ),
        (lambda m, s, t: m(s, t, source_lengths=torch.tensor([1.0, 1, 1])), "source_lengths must be integers"),
        (lambda m, s, t: m.loss(s, t, target_lengths=torch.tensor([1, 2, 2])), "target_lengths must lie in 2 to 5"),
        (lambda m, s, t: m.loss(s, t[:, :1]), "target must hold 2 tokens or more a row, got 1"),
        (lambda m, s, t: m.loss(s, t, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda m, s, t: m.generate(s, 4, bos=START, eos=EOS, beams=0), "beams must be 1 or more, got 0"),
        (lambda m, s, t: m.generate(s, 0, bos=START, eos=EOS), "max_len must be 1 or more, got 0"),
        (
            lambda m, s, t: m.generate(s, 4, bos=START, beams=2, temperature=1.0),
            "beams must be 1 where tokens are drawn",
        ),
        (lambda m, s, t: m.generate(s, 4, bos=START, top_k=2), "top_k and top_p must go with a temperature"),
        (lambda m, s, t: m.generate(s, 4, bos=START, eos=5), "eos must lie in 0 to 4, got 5"),
        (lambda m, s, t: m.generate(s, 4, bos=-1, eos=4), "bos must lie in 0 to 4, got -1"),
        (lambda m, s, t: Seq2Seq(7, 5, 0), "d_model must be 1 or more, got 0"),
        (
            lambda m, s, t: Seq2Seq(7, 5, 8, attention=lambda s, h: AdditiveAttention(s, h + 2, 3)),
            r"h must be \(B, length",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        made = call(model, *given())
        made(*given())
