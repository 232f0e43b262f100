"""The grading of the exercises: a right answer passes, and each of the usual mistakes gets its own sentence."""

import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, pstdev, stdev

import pytest
import torch
from grading import CHECKS, grade, verdict

from nondual.analysis import attention_distance
from nondual.efficient_attention.sparse_attention import blocks, fixed, local, strided
from nondual.multimodal.contrastive import softmax_loss, unit_vectors
from nondual.ops import masks
from nondual.ops.selective_scan import selective_scan

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "tests" / "exercises" / "grading.py"


# --- what readers write --------------------------------------------------------------------------------------------


def largest(q=1000.0, keys=lambda v: v):
    return lambda v: (torch.full((1, 1, 1, 1), q), keys(v))


def joined(share):
    def join(o1, l1, o2, l2):
        first = share(l1, l2)[..., None]
        return first * o1 + (1 - first) * o2

    return join


def stepping(at, elsewhere):
    return lambda marked: torch.where(marked == 1, at, elsewhere)


def pieces(which, last=True):
    """Scan piece after piece; `which` chooses the state to start from among those so far."""

    def in_pieces(u, delta, A, B, C, lengths):
        out, states = [], [None]
        for parts in zip(*(x.split(lengths, 1) for x in (u, delta, B, C))):
            y, state = selective_scan(parts[0], parts[1], A, parts[2], parts[3], state=which(states))
            out.append(y)
            states.append(state)
        return torch.cat(out, 1), states[-1 if last else 1]

    return in_pieces


def parted(cut, together=False):
    """Each head times its part of w_o; `cut` says how the parts are found, (E, H, D)."""

    def added(outputs, w_o):
        each = torch.einsum("nhd,ehd->nhe", outputs, cut(w_o, *outputs.shape[1:]))
        return each.sum(1) if together else each

    return added


def by_head(w_o, h, d):
    return w_o.unflatten(1, (h, d))


def turning(sign=1, exponent=1.0):
    """Turn pair i by sign · k / 10000^(exponent · 2i/E)."""

    def onward(code, k):
        e = len(code)
        angle = sign * k / 10000 ** (exponent * torch.arange(0, e, 2) / e)
        sin, cos = code[0::2], code[1::2]
        return torch.stack([sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()], -1).flatten()

    return onward


def added(code, k):
    angle = k / 10000 ** (torch.arange(0, len(code), 2) / len(code))
    return code + torch.stack([angle.sin(), angle.cos()], -1).flatten()


def reading(scores=None, weigh=None):
    """Additive attention, with another score or another way from scores to weights."""

    def read(s, h, real, w_s, w_h, v):
        pairs = (s @ w_s.T)[:, None] + h @ w_h.T
        e = torch.tanh(pairs) @ v if scores is None else scores(pairs, v)
        e = e.masked_fill(~real, -torch.inf).softmax(-1) if weigh is None else weigh(e, real)
        return e @ h

    return read


def logit(gate):
    return math.log(gate / (1 - gate))


def matched(length=1.0, scale=math.exp, sides=(True, False), total=torch.mean, share=None):
    """The symmetric loss, or one with a mistake in it."""

    def loss(images, texts, log_scale):
        if length:
            images, texts = (length * x / x.norm(dim=1, keepdim=True) for x in (images, texts))
        s = scale(log_scale) * images @ texts.T
        each = [total(-(s if side else s.T).log_softmax(1).diag()) for side in sides]
        return sum(each) / (share or len(each))

    return loss


def averaged(before=True, after=True, first=False):
    """A weight for each class, or one with a mistake in it."""

    def scaled(x):
        return x / x.norm(dim=-1, keepdim=True)

    def weights(prompts):
        rows = [(scaled(p) if before else p)[: 1 if first else None].mean(0) for p in prompts]
        return torch.stack([scaled(row) if after else row for row in rows])

    return weights


def attending(sees):
    """A mask of tokens and images; `sees` compares the number of images up to a token with an image's number from 1."""

    def mask(marked, n_images):
        return sees(marked.cumsum(0)[:, None], torch.arange(1, n_images + 1), marked[:, None].long())

    return mask


def splicing(kept=False, order=lambda images: images, first=False):
    """Words and images joined, or with a mistake in it."""

    def spliced(ids, embeddings, images, mark):
        parts, rest = [], iter(order(images))
        for token, word in zip(ids.tolist(), embeddings):
            parts += [word[None]] if token != mark else [word[None][: int(kept)], next(rest)]
        return torch.cat([*images, embeddings[ids != mark]] if first else parts)

    return spliced


def labelling(ignored=-100, words=None):
    """The labels of words and images, or with a mistake in it."""

    def labels_of(ids, labels, mark, n):
        rows = [
            [ignored if ignored is not None else label] * n if token == mark else [label if words is None else words]
            for token, label in zip(ids.tolist(), labels.tolist())
        ]
        return torch.tensor([label for row in rows for label in row])

    return labels_of


def putting(where, copy=True):
    """Vectors written where an index says, which is made of the arguments."""

    def put(x, at, vectors):
        x = x.clone() if copy else x
        index = where(x, at, vectors)
        x[index] = vectors[:, None].expand(-1, len(at), -1) if isinstance(index[0], slice) else vectors
        return x

    return put


def recalling(prior=torch.log, pick=None, power=2):
    """The mean of the stored tasks given examples, or with a mistake in it."""

    def recall(x, y, tasks, shares, noise):
        scores = prior(shares) - (y[:, None] - x @ tasks.T).square().sum(0) / (2 * noise**power)
        return scores.softmax(-1) @ tasks if pick is None else tasks[pick(scores)]

    return recall


def descending(start=1, rate=1.0, sign=-1, wide=False, y_in_scores=False, divided=1.0):
    """The four matrices of one step of descent, or with a mistake in them."""

    def matrices(w0, eta):
        d = len(w0)
        x = torch.eye(d + 1) if y_in_scores else torch.diag(torch.tensor([1.0] * d + [0.0]))
        v, o = torch.zeros(d + 1, d + 1), torch.zeros(d + 1, d + 1)
        v[d] = torch.cat([-start * w0, torch.ones(1)])
        o[: None if wide else d, d] = float(wide)
        o[d, d] = sign * (eta if rate else 1.0) / divided
        return x, x, v, o

    return matrices


def cutting(*order):
    """Patches by reshaping, their axes in an order."""

    def cut(x, p):
        b, c, h, w = x.shape
        return x.view(b, c, h // p, p, w // p, p).permute(order).reshape(b, h * w // p**2, c * p**2)

    return cut


def looking(away, total=torch.mean, weigh=True):
    """The mean distance, `away` made of rows down, columns across, the side and the places."""

    def distance(weights, columns, p):
        i = torch.arange(weights.shape[-1])
        down, across = ((x[:, None] - x).float() for x in (i // columns, i % columns))
        far = away(down, across, p, i)
        return total((weights * far).sum(-1) if weigh else far.mean(-1).expand(len(weights), -1), -1)

    return distance


def decoding(first=False, itself=True, divide=True, keep=True, weigh=lambda s: s.softmax(0)):
    """One step with a cache, or with a mistake in it."""

    def step(q, k, v, keys, values):
        joined = [torch.cat([x[None], old] if first else [old, x[None]]) for x, old in ((k, keys), (v, values))]
        scores = (joined[0] if itself or not len(keys) else keys) @ q / (math.sqrt(len(q)) if divide else 1)
        out = weigh(scores) @ (joined[1] if itself or not len(keys) else values)
        return (out, *joined) if keep else (out, keys, values)

    return step


def prefixed(allowed):
    """A mask of n tokens, `allowed` made of queries, keys and the prefix."""
    return lambda n, prefix: allowed(torch.arange(n)[:, None], torch.arange(n)[None], prefix)


def ticking(old=True, new=False, weights=True, divide=lambda a, b: a / b.sqrt()):
    """One tick of a synchronisation, or with a mistake in it."""

    def tick(alpha, beta, left, right, r):
        kept = torch.exp(-r)
        alpha = alpha * (kept if old else 1) + left * right * (kept if new else 1)
        beta = beta * (kept if weights else 1) + 1
        return divide(alpha, beta), alpha, beta

    return tick


def halting(unsure=True, first=1, enough=torch.ge):
    """The first tick that is sure enough, or with a mistake in it."""

    def halt(certainties, threshold):
        found = enough(certainties, threshold)
        ticks = found.int().argmax(1) + first
        return torch.where(found.any(1), ticks, certainties.shape[1] - 1 + first) if unsure else ticks

    return halt


def leaving(last=1.0, at=-1.0, before=1.0, shift=0):
    """The weights that leave a layer's part out, or with a mistake in them."""

    def without(i, j):
        weights = torch.zeros(i + 1)
        weights[i] += last
        weights[min(j + shift, i)] += at
        weights[j - 1 + shift if j + shift <= i else i] += before
        return weights

    return without


def over_depth(key=lambda x: x / x.square().mean(-1, keepdim=True).sqrt(), weigh=lambda s: s.softmax(0), summed=None):
    """An average over depth, or with a mistake in it."""

    def average(query, vectors):
        x = torch.stack(vectors)
        return (weigh(key(x) @ query)[..., None] * (summed or (lambda x: x))(x)).sum(0)

    return average


def learning(scores=lambda q, k: (q @ k.T).tril(), errors=lambda k, v, w: k @ w - v, sign=-1, start=1, by_row=False):
    """A mini-batch of test-time training in matrices."""

    def dual(q, k, v, rate, w):
        read = (
            rate[:, None] * (scores(q, k) @ errors(k, v, w))
            if by_row
            else scores(q, k) @ (rate[:, None] * errors(k, v, w))
        )
        return start * q @ w + sign * read

    return dual


def online(q, k, v, rate, w):
    """Each gradient at the weights after the step before it."""
    outs = []
    for i in range(len(q)):
        w = w - rate[i] * torch.outer(k[i], k[i] @ w - v[i])
        outs.append(q[i] @ w)
    return torch.stack(outs)


def spreading(smoothed=lambda z, p, cut: mixed(z, p[cut]), back=lambda cut: cut.cumsum(0) - 1):
    return lambda z, p, cut: smoothed(z, p, cut)[back(cut)]


def mixed(z, share):
    """Each piece with its share, and the rest from the one before it."""
    out = [z[0]]
    for piece, new in zip(z[1:], share[1:]):
        out.append(new * piece + (1 - new) * out[-1])
    return torch.stack(out)


def sharing(part=lambda m: (m - m.T) / 2, power=2):
    """The antisymmetric share, or with a mistake in it."""
    return lambda w_q, w_k: float((part(w_q @ w_k.T).norm() / (w_q @ w_k.T).norm()) ** power)


def going_down(sign=1, asks=1, asked=lambda p: p.T, whole=True, scale=lambda d: 1.0):
    """A step down the energy, or with a mistake in it."""

    def step(g, w_q, w_k, size):
        q, k = g @ w_q, g @ w_k
        p = (q @ k.T / k.shape[1] ** 0.5).softmax(-1)
        way = asks * p @ k @ w_q.T + (0 if asked is None else asked(p) @ q @ w_k.T)
        return (g if whole else 0) + sign * size * scale(k.shape[1]) * way

    return step


def fusing(scale=True, own=-torch.inf, dim=-1, turned=False, add=True, squash=math.tanh, outer=torch.tanh, taken=None):
    """Heads that take from one another, or with a mistake in it."""

    def fused(o, w_a, w_b, w_c, gate):
        scores = (o @ w_a) @ (o @ w_b).T / (o.shape[-1] ** 0.5 if scale else 1)
        scores = scores + torch.where(torch.eye(len(o)) > 0, own, 0.0)
        weights = (scores.T if turned else scores).softmax(dim)
        return o * add + squash(gate) * outer(weights @ (o @ w_c if taken is None else taken(o)))

    return fused


def fading(scale=2.0, summed=True, begin=1, count=lambda steps, gone: steps - gone, dtype=torch.int64):
    """How many keys are kept, or with a mistake in it."""

    def kept(log_forget, bound, epsilon):
        n = len(log_forget)
        decay = torch.tensor(
            [
                [float(log_forget[j + begin : i + 1].sum()) if j <= i else float("inf") for j in range(n)]
                for i in range(n)
            ]
        ).double()
        bounds = (scale * bound + decay).exp()
        gone = ((bounds.cumsum(1) if summed else bounds) <= epsilon).sum(1)
        return count(torch.arange(1, n + 1), gone.minimum(torch.arange(n))).to(dtype)

    return kept


def paired(spread=stdev, root=0.5, sign=1, apart=False, t_sign=1):
    """The interval of paired differences, or with a mistake in it."""

    def interval(ours, others, t):
        each, n = [sign * (a - b) for a, b in zip(ours, others)], len(ours)
        error = ((stdev(ours) ** 2 + stdev(others) ** 2) / n) ** 0.5 if apart else spread(each) / n**root
        return mean(each) - t_sign * t * error, mean(each) + t_sign * t * error

    return interval


RIGHT = [
    ("proposals", "interval", paired()),
    ("self_liberating", "kept", fading()),
    ("head_fusion", "fused", fusing()),
    ("continuous", "antisymmetric_share", sharing()),
    ("continuous", "step", going_down()),
    ("bytes", "spread", spreading()),
    ("ttt", "dual", learning()),
    ("denseformer", "without", leaving()),
    ("denseformer", "without", lambda i, j: torch.eye(i + 1)[i] - torch.eye(i + 1)[j] + torch.eye(i + 1)[j - 1]),
    ("denseformer", "average", over_depth()),
    ("denseformer", "average", over_depth(lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:]))),
    ("gpt_family", "step", decoding()),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j <= i) | (j < p))),
    ("gpt_family", "prefix_mask", masks.prefix),
    ("ctm", "one_tick", ticking()),
    ("ctm", "when_to_stop", halting()),
    ("ctm", "when_to_stop", lambda c, t: ((c >= t).cumsum(1) == 0).sum(1).clamp(max=c.shape[1] - 1) + 1),
    ("vit", "cut", cutting(0, 2, 4, 1, 3, 5)),
    ("vit", "cut", lambda x, p: torch.nn.functional.unfold(x, p, stride=p).mT),
    ("vit", "mean_distance", looking(lambda down, across, p, i: p * torch.hypot(down, across))),
    ("vit", "mean_distance", lambda w, c, p: attention_distance(w, (w.shape[-1] // c, c), p, n_special=0)),
    ("flamingo", "may_attend", attending(lambda count, number, _: count == number)),
    ("llava", "spliced", splicing()),
    ("llava", "expanded_labels", labelling()),
    ("clip", "symmetric_loss", matched()),
    ("clip", "symmetric_loss", lambda i, t, tau: softmax_loss(unit_vectors(i), unit_vectors(t), math.exp(tau))),
    ("clip", "class_weights", averaged()),
    ("self_attention", "largest", largest()),
    ("self_attention", "largest", lambda v: (torch.full((1, 1, 1, 1), -100.0), -10 * v)),
    ("flash_attention", "join", joined(lambda a, b: torch.sigmoid(a - b))),
    ("flash_attention", "join", joined(lambda a, b: (a - torch.logaddexp(a, b)).exp())),
    ("mamba", "steps", stepping(30.0, 0.0)),
    ("mamba", "in_pieces", pieces(lambda states: states[-1])),
    ("positional_encoding", "onward", turning()),
    ("heads", "added", parted(by_head)),
    ("attention_mechanism", "read", reading()),
    ("recurrent", "forget_bias", lambda share, steps: logit(share ** (1 / steps))),
    ("recurrent", "forget_bias", lambda share, steps: -math.log(math.expm1(-math.log(share) / steps))),
    ("attention_mechanism", "read", lambda s, h, real, *w: reading()(s, h[real], real[real], *w)),
    ("heads", "added", lambda o, w: torch.stack([o[:, h] @ p.mT for h, p in enumerate(w.chunk(o.shape[1], 1))], 1)),
    ("evolution", "effective_keys", lambda a: torch.special.entr(a).sum(-1).exp()),
    ("evolution", "effective_keys", lambda a: (1 / a**a).prod(-1)),
    ("in_context_learning", "matrices", descending()),
    ("in_context_real", "put", putting(lambda x, at, v: (torch.arange(len(x)), at))),
    ("recognition_aim", "recall", recalling()),
    ("linear_attention", "overwrite", lambda s, k, v, b: s + torch.outer(k, b * (v - k @ s)) / (k @ k)),
    ("linear_attention", "overwrite", lambda s, k, v, b: s + b * k[:, None] * (v - k @ s) / k.norm() ** 2),
    ("sparse_attention", "two_layers", lambda n: strided(math.isqrt(n)).mask(n)),
    ("sparse_attention", "two_layers", lambda n: fixed(math.isqrt(n)).mask(n)),
]
WRONG = [
    ("bytes", "spread", spreading(lambda z, p, cut: z), "the pieces are not smoothed"),
    ("bytes", "spread", spreading(lambda z, p, cut: mixed(z, 1 - p[cut])), "the shares are swapped"),
    ("bytes", "spread", spreading(lambda z, p, cut: mixed(z, p)), "P is p at the cuts"),
    ("bytes", "spread", spreading(back=lambda cut: (cut.cumsum(0) - 2).clamp(min=0)), "the piece before its own"),
    ("bytes", "spread", spreading(lambda z, p, cut: -z), "some read something else"),
    ("continuous", "antisymmetric_share", sharing(lambda m: (m + m.T) / 2), "share of the symmetric part"),
    ("continuous", "antisymmetric_share", sharing(power=1), "square them"),
    ("continuous", "antisymmetric_share", sharing(lambda m: m - m.T), "half of M less its transpose"),
    ("continuous", "antisymmetric_share", lambda w_q, w_k: None, "should be a number"),
    ("proposals", "interval", paired(sign=-1), "ours less others"),
    ("proposals", "interval", paired(pstdev), "by n - 1, not by n"),
    ("proposals", "interval", paired(root=0), "of a mean is s / √n"),
    ("proposals", "interval", paired(root=1), "s / √n, not s / n"),
    ("proposals", "interval", paired(apart=True), "the runs are paired"),
    ("proposals", "interval", paired(t_sign=-1), "the lower end comes first"),
    ("proposals", "interval", lambda ours, others, t: 0.1, "must be two numbers"),
    ("head_fusion", "fused", fusing(own=0.0), "looks at itself too"),
    ("head_fusion", "fused", fusing(dim=0), "runs over the columns"),
    ("head_fusion", "fused", fusing(turned=True), "belongs to the head that asks"),
    ("head_fusion", "fused", fusing(scale=False), "divided by √D"),
    ("head_fusion", "fused", fusing(add=False), "add it to O"),
    ("head_fusion", "fused", fusing(squash=float), "the gate goes through tanh"),
    ("head_fusion", "fused", fusing(outer=lambda x: x), "through tanh before the gate"),
    ("head_fusion", "fused", fusing(taken=lambda o: o), "O W_C from one another"),
    ("self_liberating", "kept", fading(scale=1.0), "one bound for its score, one for the query's own"),
    ("self_liberating", "kept", fading(summed=False), "it is their sum that may not exceed it"),
    ("self_liberating", "kept", fading(begin=0), "the sum begins at j + 1"),
    ("self_liberating", "kept", fading(count=lambda steps, gone: gone), "count those that stay"),
    (
        "self_liberating",
        "kept",
        fading(count=lambda steps, gone: steps - gone - 1),
        "the query's own key is not counted",
    ),
    ("self_liberating", "kept", fading(dtype=torch.float32), "should be of int64"),
    ("continuous", "step", going_down(sign=-1), "go against the gradient"),
    ("continuous", "step", going_down(asked=None), "it is a key, too"),
    ("continuous", "step", going_down(asks=0), "it asks, too"),
    ("continuous", "step", going_down(asked=lambda p: p), "not by its row"),
    ("continuous", "step", going_down(whole=False), "add it to g"),
    ("continuous", "step", going_down(scale=lambda d: d**-0.5), "has no √D left"),
    ("ttt", "dual", learning(lambda q, k: q @ k.T), "reads the steps of later ones too"),
    ("ttt", "dual", learning(lambda q, k: (q @ k.T).tril(-1)), "read before its own step"),
    ("ttt", "dual", learning(sign=1), "the steps go uphill"),
    ("ttt", "dual", lambda q, k, v, rate, w: learning()(q, k, v, torch.ones_like(rate), w), "all rates are taken as 1"),
    ("ttt", "dual", learning(by_row=True), "rate s belongs to the error of token s"),
    ("ttt", "dual", learning(start=0), "q w is missing"),
    ("ttt", "dual", learning(errors=lambda k, v, w: -v), "this is linear attention"),
    ("ttt", "dual", learning(lambda q, k: (k @ k.T).tril()), "it is q that reads"),
    ("ttt", "dual", online, "in a mini-batch all are taken at w"),
    ("ttt", "dual", learning(errors=lambda k, v, w: 2 * (k @ w - v)), "row 0 is the first that differs"),
    ("denseformer", "without", leaving(at=0.0, before=0.0), "nothing is left out"),
    ("denseformer", "without", leaving(before=0.0), "all that was there after layer j is taken out"),
    ("denseformer", "without", leaving(at=1.0, before=-1.0), "turn the signs"),
    ("denseformer", "without", leaving(shift=1), "what layer 3 added is left out"),
    ("denseformer", "without", lambda i, j: torch.zeros(i), "the result should have the shape (6,)"),
    ("denseformer", "average", over_depth(lambda x: x), "long vectors get more weight"),
    ("denseformer", "average", over_depth(lambda x: x / x.norm(dim=-1, keepdim=True)), "keys have length 1"),
    ("denseformer", "average", over_depth(weigh=lambda s: s.softmax(-1)), "the softmax is over positions"),
    ("denseformer", "average", over_depth(weigh=lambda s: s), "take their softmax over layers"),
    ("denseformer", "average", lambda q, v: torch.stack(v).mean(0), "all layers count alike"),
    ("denseformer", "average", lambda q, v: sum(v), "this is the plain sum"),
    (
        "denseformer",
        "average",
        over_depth(summed=lambda x: x / x.square().mean(-1, keepdim=True).sqrt()),
        "the keys are summed",
    ),
    ("gpt_family", "step", decoding(keep=False), "the new key and value are not kept"),
    ("gpt_family", "step", decoding(first=True), "the new key comes first"),
    ("gpt_family", "step", decoding(itself=False), "the token does not see itself"),
    ("gpt_family", "step", decoding(divide=False), "not divided by the root of D"),
    ("gpt_family", "step", decoding(weigh=lambda s: s), "take their softmax"),
    ("gpt_family", "step", lambda q, *_: q, "three things should come back"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: j <= i), "it is only causal"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j > i) & (j >= p)), "the wrong way round"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j < i) | (j < p)), "no token sees itself"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j <= i) | (j <= p)), "one token too long"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j <= i) | (i < p)), "see what comes after it"),
    ("gpt_family", "prefix_mask", prefixed(lambda i, j, p: (j <= i).int()), "the mask should be of bool"),
    ("ctm", "one_tick", ticking(old=False), "nothing decays"),
    ("ctm", "one_tick", ticking(new=True), "the new product has decayed too"),
    ("ctm", "one_tick", ticking(weights=False), "beta counts ticks"),
    ("ctm", "one_tick", ticking(divide=lambda a, b: a / b), "S is divided by beta: divide by its root"),
    ("ctm", "one_tick", ticking(divide=lambda a, b: a), "S is alpha itself"),
    ("ctm", "one_tick", lambda a, b, left, right, r: a, "it should return S, alpha and beta, and returns Tensor"),
    ("ctm", "when_to_stop", halting(first=0), "ticks are counted from 0"),
    ("ctm", "when_to_stop", halting(unsure=False), "one that is never sure takes 1, and should take 4"),
    ("ctm", "when_to_stop", halting(enough=torch.gt), "reaches the threshold exactly takes 4, and should take 3"),
    ("ctm", "when_to_stop", lambda c, t: c.argmax(1) + 1, "sure at tick 2, and then less takes 4, and should take 2"),
    ("in_context_real", "put", putting(lambda x, at, v: (slice(None), at)), "other positions change too"),
    (
        "in_context_real",
        "put",
        putting(lambda x, at, v: (torch.arange(len(x)), at), copy=False),
        "x itself has changed",
    ),
    ("in_context_real", "put", lambda x, at, v: x.clone(), "nothing has changed"),
    (
        "in_context_real",
        "put",
        lambda x, at, v: putting(lambda x, at, v: (torch.arange(len(x)), at))(x, at, v.roll(1, 0)),
        "another vector there",
    ),
    ("recognition_aim", "recall", recalling(torch.zeros_like), "the shares do not count"),
    ("recognition_aim", "recall", recalling(lambda shares: shares), "it is their logarithm"),
    ("recognition_aim", "recall", recalling(pick=torch.argmax), "this is the likeliest task"),
    ("recognition_aim", "recall", recalling(power=1), "it should be twice its square"),
    ("recognition_aim", "recall", recalling(lambda shares: -shares.log()), "is not by Bayes' rule"),
    ("vit", "cut", lambda x, p: x.reshape(len(x), -1, x.shape[1] * p * p), "only gives the numbers another shape"),
    ("vit", "cut", cutting(0, 4, 2, 1, 3, 5), "the patches come column by column"),
    ("vit", "cut", cutting(0, 2, 4, 3, 5, 1), "within a patch the channels come last"),
    ("vit", "cut", cutting(0, 2, 4, 1, 5, 3), "each patch is turned on its side"),
    ("vit", "cut", lambda x, p: cutting(0, 2, 4, 1, 3, 5)(x, p).flip(1), "not where they should be"),
    ("vit", "cut", lambda x, p: x, "the patches should have the shape (1, 6, 4)"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: torch.hypot(d, a)), "it is counted in patches"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: p * (d.abs() + a.abs())), "straight across"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: p * (i[:, None] - i).abs().float()), "along the sequence"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: p * torch.hypot(d, a), torch.sum), "take the mean"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: (p * torch.hypot(d, a)) ** 2), "take the root"),
    ("vit", "mean_distance", looking(lambda d, a, p, i: p * torch.hypot(d, a), weigh=False), "weights do not count"),
    ("vit", "mean_distance", lambda w, c, p: w.sum((1, 2)), "pixels away over 1 x 3 patches of 1, not 3.000"),
    ("clip", "symmetric_loss", matched(sides=[True]), "one side alone chooses"),
    ("clip", "symmetric_loss", matched(sides=[False]), "one side alone chooses"),
    ("clip", "symmetric_loss", matched(share=1), "it is twice the loss"),
    ("clip", "symmetric_loss", matched(total=torch.sum), "it grows with the number of pairs"),
    ("clip", "symmetric_loss", matched(length=None), "these are not cosines"),
    ("clip", "symmetric_loss", matched(scale=float), "multiplied by τ itself: take its exponential"),
    ("clip", "symmetric_loss", matched(length=2.0), "of 5 pairs with τ = 0.0 it should be"),
    ("clip", "symmetric_loss", lambda i, t, tau: i @ t.T, "the loss should have the shape (), and has (1, 1)"),
    ("clip", "class_weights", averaged(after=False), "the mean of unit vectors is shorter than 1"),
    ("clip", "class_weights", averaged(before=False), "a prompt with a long vector counts for more"),
    ("clip", "class_weights", averaged(before=False, after=False), "as they came: scale before it and after it"),
    ("clip", "class_weights", averaged(first=True), "the first prompt alone is read"),
    ("clip", "class_weights", lambda p: averaged()(p).flip(0), "is another"),
    ("flamingo", "may_attend", attending(lambda c, i, _: c >= i), "sees every image before it: leave it the last one"),
    ("flamingo", "may_attend", attending(lambda c, i, m: c - m == i), "a mark does not see its own image"),
    ("flamingo", "may_attend", attending(lambda c, i, _: c.clamp(min=1) == i), "before the first image sees it"),
    ("flamingo", "may_attend", attending(lambda c, i, _: c == i - 1), "a token sees the image after it"),
    ("flamingo", "may_attend", attending(lambda c, i, _: c * 0 == i), "token 1 sees another image than it may"),
    ("llava", "spliced", splicing(kept=True), "the mark's own embedding is to be left out"),
    ("llava", "spliced", splicing(order=lambda images: images.flip(0)), "the images stand in reverse"),
    (
        "llava",
        "spliced",
        splicing(order=lambda images: images[:1].expand_as(images)),
        "the first image stands at every",
    ),
    ("llava", "spliced", splicing(first=True), "the images stand before the words"),
    ("llava", "spliced", splicing(order=lambda images: images * 2), "something else should be read"),
    ("llava", "expanded_labels", labelling(ignored=None), "the mark is predicted within the image"),
    ("llava", "expanded_labels", labelling(words=-100), "nothing is predicted at all"),
    ("llava", "expanded_labels", labelling(words=1), "they should be [-100, -100, -100, -100, 8], and are"),
    ("in_context_learning", "matrices", descending(start=0), "this is the step from 0"),
    ("in_context_learning", "matrices", descending(start=-1), "what w0 still misses"),
    ("in_context_learning", "matrices", descending(sign=1), "the sign is turned"),
    ("in_context_learning", "matrices", descending(rate=0), "the size of the step is missing"),
    ("in_context_learning", "matrices", descending(divided=7.0), "divided by the number of examples"),
    ("in_context_learning", "matrices", descending(wide=True), "the first D numbers change"),
    ("in_context_learning", "matrices", descending(y_in_scores=True), "its y should not enter the scores"),
    ("in_context_learning", "matrices", descending(sign=2), "the last number changes by"),
    ("in_context_learning", "matrices", lambda w0, rate: w0, "it should return four matrices, and returns Tensor"),
    ("linear_attention", "overwrite", lambda s, k, v, b: s + torch.outer(k, v), "the value is added to what is there"),
    ("linear_attention", "overwrite", lambda s, k, v, b: s + torch.outer(k, b * (v - k @ s)), "one of length 3.0"),
    ("linear_attention", "overwrite", lambda s, k, v, b: s - torch.outer(k, b * (v - k @ s)) / (k @ k), "the sign is"),
    (
        "linear_attention",
        "overwrite",
        lambda s, k, v, b: torch.outer(k, b * v + (1 - b) * k @ s) / (k @ k),
        "keys at right angles to it read something else",
    ),
    ("linear_attention", "overwrite", lambda s, k, v, b: s, "the key should read"),
    ("self_attention", "largest", largest(q=0.0), "every number gets the same weight"),
    ("self_attention", "largest", largest(q=-1000.0), "the smallest comes out: turn the sign"),
    ("self_attention", "largest", largest(q=1.0), "2.560 comes out, since the largest has a share of 68%"),
    ("self_attention", "largest", largest(keys=torch.abs), "the number farthest from 0 comes out"),
    ("self_attention", "largest", largest(keys=lambda v: v[0]), "k should have the shape (1, 1, 4, 1)"),
    ("self_attention", "largest", lambda v: v, "it should return q and k, and returns Tensor"),
    ("flash_attention", "join", joined(lambda a, b: torch.full_like(a, 0.5)), "both parts get half"),
    ("flash_attention", "join", joined(lambda a, b: torch.sigmoid(b - a)), "the shares are swapped"),
    ("flash_attention", "join", joined(lambda a, b: a / (a + b)), "they are logarithms, so exponentiate them"),
    ("flash_attention", "join", joined(lambda a, b: a.exp() / (a.exp() + b.exp())), "large scores overflow in exp"),
    ("flash_attention", "join", lambda o1, l1, o2, l2: o1 + o2, "each needs its share"),
    ("flash_attention", "join", lambda o1, l1, o2, l2: o1, "with 25 and 15 keys it is off by up to"),
    ("mamba", "steps", stepping(30.0, 30.0), "all steps are the same"),
    ("mamba", "steps", stepping(30.0, 1.0), "other inputs enter the state too"),
    ("mamba", "steps", stepping(1.0, 0.0), "the marked input replaces 63% of the state"),
    ("mamba", "steps", stepping(30.0, -1.0), "a step is below 0"),
    ("mamba", "steps", stepping(float("inf"), 0.0), "infinite or not a number"),
    ("mamba", "in_pieces", pieces(lambda states: None), "the second piece differs"),
    ("mamba", "in_pieces", pieces(lambda states: states[min(1, len(states) - 1)]), "piece 3 differs"),
    ("mamba", "in_pieces", pieces(lambda states: states[-1], last=False), "y is right, and the state is not"),
    ("mamba", "in_pieces", lambda *given: None, "it should return y and the state, and returns NoneType"),
    ("positional_encoding", "onward", turning(sign=-1), "it goes k steps back"),
    ("positional_encoding", "onward", added, "it adds the code of k"),
    ("positional_encoding", "onward", turning(exponent=0.0), "every pair turns by the same angle"),
    ("positional_encoding", "onward", turning(exponent=0.5), "from position 3 by 5, 1 of 8 pairs are right"),
    ("positional_encoding", "onward", lambda code, k: code[:2], "the result should have the shape (16,)"),
    ("heads", "added", parted(by_head, together=True), "this is the sum of all heads"),
    ("heads", "added", parted(lambda w, h, d: w.unflatten(1, (d, h)).mT), "the first D belong to head 0"),
    ("heads", "added", lambda o, w: (o.flatten(1) @ w.mT)[:, None].repeat(1, o.shape[1], 1) / o.shape[1], "even share"),
    (
        "heads",
        "added",
        parted(lambda w, h, d: w.unflatten(1, (h, d)).flip(1)),
        "the sum over the heads is off by up to",
    ),
    ("heads", "added", lambda o, w: o, "the result should have the shape (5, 3, 12)"),
    ("attention_mechanism", "read", reading(weigh=lambda e, real: e.softmax(-1)), "padding is read"),
    ("attention_mechanism", "read", reading(weigh=lambda e, real: e.softmax(-1) * real), "mask before the softmax"),
    (
        "attention_mechanism",
        "read",
        reading(weigh=lambda e, real: e.masked_fill(~real, -torch.inf).softmax(0).nan_to_num()),
        "the softmax runs over the questions",
    ),
    ("attention_mechanism", "read", reading(weigh=lambda e, real: (real / real.sum()).expand_as(e)), "the same weight"),
    ("attention_mechanism", "read", reading(scores=lambda pairs, v: pairs @ v), "without tanh every question"),
    ("attention_mechanism", "read", reading(scores=lambda pairs, v: pairs.sum(-1)), "with 7 real states and 0 of"),
    ("attention_mechanism", "read", lambda *given: given[1], "the result should have the shape (3, 4)"),
    ("recurrent", "forget_bias", lambda share, steps: share ** (1 / steps), "this is the gate f"),
    ("recurrent", "forget_bias", lambda share, steps: -logit(share ** (1 / steps)), "the sign is turned"),
    ("recurrent", "forget_bias", lambda share, steps: logit(share), "this keeps 0.5 after one step"),
    ("recurrent", "forget_bias", lambda share, steps: logit(1 - (1 - share) / steps), "the gates multiply"),
    ("recurrent", "forget_bias", lambda share, steps: 1.0, "a bias of 1 keeps 0.0436 after 10 steps, where 0.5 is"),
    ("sparse_attention", "two_layers", lambda n: local(math.isqrt(n) + 1).mask(n), "pairs are not reached, as 15 from"),
    ("sparse_attention", "two_layers", lambda n: masks.causal(n), "position 15 sees 16 keys, and 10 are allowed"),
    ("sparse_attention", "two_layers", lambda n: strided(math.isqrt(n), causal=False).mask(n), "which comes after it"),
    ("sparse_attention", "two_layers", lambda n: strided(math.isqrt(n)).mask(n).int(), "the mask should be boolean"),
    ("sparse_attention", "two_layers", lambda n: blocks(max(2, math.isqrt(n))).mask(n), "pairs are not reached"),
    ("evolution", "effective_keys", lambda a: (-a * a.log()).sum(-1).exp(), "a weight of 0 gives NaN"),
    ("evolution", "effective_keys", lambda a: torch.special.entr(a).sum(-1), "this is the entropy H itself"),
    ("evolution", "effective_keys", lambda a: (torch.special.entr(a) / math.log(2)).sum(-1).exp(), "H is in bits"),
    ("evolution", "effective_keys", lambda a: (-torch.special.entr(a)).sum(-1).exp(), "the sign is turned"),
    ("evolution", "effective_keys", lambda a: 1 / a.square().sum(-1), "another count of keys"),
    ("evolution", "effective_keys", lambda a: (a > 0).sum(-1).float(), "over 6 keys, of which 0 have no weight"),
]


@pytest.mark.parametrize("chapter, name, answer", RIGHT)
def test_a_right_answer_is_done(chapter, name, answer):
    assert verdict(CHECKS[chapter][name], answer) == "done"


@pytest.mark.parametrize("chapter, name, answer, sentence", WRONG)
def test_a_mistake_gets_its_sentence(chapter, name, answer, sentence):
    said = verdict(CHECKS[chapter][name], answer)
    assert said.startswith("not yet: ") and sentence in said


def test_every_exercise_has_three_mistakes_with_sentences_of_their_own():
    for chapter, checks in CHECKS.items():
        for name in checks:
            assert len({sentence for c, n, _, sentence in WRONG if (c, n) == (chapter, name)}) >= 3
            assert any((c, n) == (chapter, name) for c, n, _ in RIGHT)


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_stub_is_graded_and_says_what_to_write():
    assert {file.stem for file in (ROOT / "exercises").glob("*.py")} == set(CHECKS)
    lines = grade(list(CHECKS))
    assert len(lines) == sum(map(len, CHECKS.values()))
    for line in lines:
        assert re.fullmatch(r"\w+, \w+: not yet begun: \w.{20,}", line), line


def test_an_error_in_the_reader_s_code_is_told_with_its_line(tmp_path):
    folder = tmp_path / "exercises"
    folder.mkdir()
    (folder / "mamba.py").write_text("def steps(marked):\n    return marked + missing\n", encoding="utf-8")
    (folder / "self_attention.py").write_text("def largest(v:\n", encoding="utf-8")
    assert grade(["mamba"], folder) == [
        "mamba, steps: not yet: it stops at line 2 with NameError: name 'missing' is not defined",
        "mamba, in_pieces: not yet: the function is not in the file any more; git can bring it back",
    ]
    (said,) = grade(["self_attention"], folder)
    assert said.startswith("self_attention: not yet: the file does not run: SyntaxError")


def test_the_session_grades_one_chapter_or_all_and_names_those_there_are():
    def graded(*chapters):
        return subprocess.run([sys.executable, str(FILE), *chapters], capture_output=True, text=True, timeout=150)

    assert [line.split(",")[0] for line in graded("mamba").stdout.splitlines()] == ["mamba", "mamba"]
    unknown = graded("mamab")
    assert unknown.returncode == 2 and "self_attention, flash_attention, mamba" in unknown.stdout
    assert "tests/exercises/grading.py" in (ROOT / "noxfile.py").read_text(encoding="utf-8")
