"""Checks of the exercises on sequences: attention, positions, recurrence, scans."""

import math
from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, pair, tensor
from torch import Tensor

from nondual.attention_mechanism import additive_scores, attend
from nondual.efficient_attention.sparse_attention import reach
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.flash_attention import flash_attention
from nondual.ops.selective_scan import selective_scan
from nondual.positional_encoding import Sinusoidal

# --- self-attention ------------------------------------------------------------------------------------------------


def check_largest(largest: Callable[..., Any]) -> None:
    lists = [[3.0, -1.0, 2.0, 0.5], [-4.0, 1.0, 2.0], [-5.0, -2.0, -3.0], [0.25], [0.1 * i for i in range(-30, 31)]]
    for numbers in lists:
        v = torch.tensor(numbers)[None, None, :, None]
        q, k = pair(largest(v.clone()), "q and k")
        q, k = tensor("q", q, (1, 1, 1, 1)), tensor("k", k, tuple(v.shape))
        out, best = attention(q, k, v).item(), max(numbers)
        if abs(out - best) < 1e-3:
            continue
        case = f"for {', '.join(f'{x:g}' for x in numbers[:4])}{', …' if len(numbers) > 4 else ''}: "
        if abs(out - sum(numbers) / len(numbers)) < 1e-4:
            raise NotYetError(
                case + "every number gets the same weight, and their mean comes out: let the scores differ"
            )
        if abs(out - min(numbers)) < 1e-3:
            farthest = abs(min(numbers)) == max(map(abs, numbers)) and numbers is not lists[0]
            if farthest and best > 0:
                raise NotYetError(case + "the number farthest from 0 comes out: let the keys keep their signs")
            raise NotYetError(case + "the smallest comes out: turn the sign of the query or of the keys")
        weight = (q @ k.mT).softmax(-1)[0, 0, 0, numbers.index(best)].item()
        raise NotYetError(
            case
            + f"{out:.3f} comes out, since the largest has a share of {weight:.0%}. "
            + "Make the differences of the scores larger"
        )


# --- flash attention -----------------------------------------------------------------------------------------------


def check_join(join: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n1, n2, size in ((25, 15, 1.0), (3, 40, 1.0), (16, 16, 60.0)):
        q, k, v = (torch.randn(1, 2, n, 16) for n in (5, n1 + n2, n1 + n2))
        q = size * q
        (k1, k2), (v1, v2) = k.split((n1, n2), 2), v.split((n1, n2), 2)
        o1, l1 = flash_attention(q, k1, v1, return_lse=True)
        o2, l2 = flash_attention(q, k2, v2, return_lse=True)
        given = join(o1.clone(), l1.clone(), o2.clone(), l2.clone())
        if isinstance(given, Tensor) and not given.isfinite().all() and size > 1:
            raise NotYetError(
                "large scores overflow in exp: take the larger log-sum-exp from both before the exponential"
            )
        out, whole = tensor("the result", given, tuple(o1.shape)), flash_attention(q, k, v)
        if near(out, whole):
            continue
        share = torch.sigmoid(l1 - l2)[..., None]
        linear = (l1 / (l1 + l2))[..., None]
        if near(out, (o1 + o2) / 2):
            raise NotYetError("both parts get half: the part whose scores sum to more should get more")
        if near(out, o1 + o2):
            raise NotYetError("the two outputs are added as they are: each needs its share, and the shares sum to 1")
        if near(out, (1 - share) * o1 + share * o2):
            raise NotYetError("the shares are swapped: the first part gets that of the second")
        if near(out, linear * o1 + (1 - linear) * o2):
            raise NotYetError(
                "the shares are taken of the log-sum-exps: they are logarithms, so exponentiate them first"
            )
        off = (out - whole).abs().max().item()
        raise NotYetError(f"with {n1} and {n2} keys it is off by up to {off:.2g} from attention over all of them")


# --- mamba ---------------------------------------------------------------------------------------------------------


def check_steps(steps: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    one = torch.ones(1, 1)
    for length, at in ((200, 70), (12, 0), (50, 49)):
        x, marked = torch.randn(1, length, 1), torch.zeros(1, length, 1)
        marked[0, at] = 1
        delta = tensor("the result", steps(marked.clone()), (1, length, 1))
        if (delta < 0).any():
            raise NotYetError("a step is below 0: each should be 0 or more")
        h, _ = selective_scan(x, delta, -one, one, one, discretization="zoh")
        if near(h[0, -1], x[0, at]):
            continue
        if near(delta, delta[:, :1].expand_as(delta)):
            raise NotYetError("all steps are the same: the marked input needs another one than the rest")
        others = delta[marked == 0]
        if (others > 1e-3).any():
            raise NotYetError("other inputs enter the state too: a step of 0 leaves it as it is")
        replaced = 1 - torch.exp(-delta[0, at]).item()
        raise NotYetError(f"the marked input replaces {replaced:.0%} of the state: make its step longer")


def check_in_pieces(in_pieces: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for lengths in ([31, 1, 58], [40], [1, 1, 1, 7]):
        L = sum(lengths)
        u, delta = torch.randn(1, L, 6), torch.rand(1, L, 6)
        A, B, C = -torch.rand(6, 4), torch.randn(1, L, 4), torch.randn(1, L, 4)
        whole, last = selective_scan(u, delta, A, B, C)
        y, state = pair(in_pieces(u.clone(), delta.clone(), A, B, C, list(lengths)), "y and the state")
        y = tensor("y", y, tuple(whole.shape))
        pieces = [near(a, b) for a, b in zip(y.split(lengths, 1), whole.split(lengths, 1))]
        if not all(pieces):
            number = pieces.index(False) + 1
            if number == 1:
                raise NotYetError(
                    "already the first piece differs: it starts from no state, and reads the first inputs"
                )
            if number == 2:
                raise NotYetError("the second piece differs: let it start from the state in which the first one ended")
            raise NotYetError(
                f"piece {number} differs: let each start from the newest state, not from that of the first"
            )
        if not near(tensor("the state", state, tuple(last.shape)), last):
            raise NotYetError("y is right, and the state is not the one after the last step")


# --- positional encoding -------------------------------------------------------------------------------------------


def check_onward(onward: Callable[..., Any]) -> None:
    for width, p, k in ((16, 3, 5), (8, 40, -7), (16, 0, 0), (32, 200, 100)):
        code = Sinusoidal(width).double()

        def at(position: int, code: Sinusoidal = code) -> Tensor:
            return code.at(torch.tensor(position))

        given = tensor("the result", onward(at(p), k), (width,)).double()
        if near(given, at(p + k)):
            continue
        if near(given, at(p - k)):
            raise NotYetError("it goes k steps back: turn the other way")
        if near(given, at(p) + at(k)):
            raise NotYetError("it adds the code of k: turn each pair by an angle instead")
        first = at(1)[0].asin()  # the angle of the fastest pair, for one step
        if near(given, at(p).unflatten(0, (-1, 2)).matmul(turned_by(k * first)).flatten()):
            raise NotYetError("every pair turns by the same angle: pair i turns by k / 10000^(2i/E)")
        pairs = zip(given.unflatten(0, (-1, 2)), at(p + k).unflatten(0, (-1, 2)))
        right = sum(near(a, b) for a, b in pairs)
        raise NotYetError(f"from position {p} by {k}, {right} of {width // 2} pairs are right")


def turned_by(angle: Tensor) -> Tensor:
    """The matrix by which a row (sin, cos) is multiplied to add `angle` to what it is the sine and cosine of."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)


# --- recurrence ----------------------------------------------------------------------------------------------------


def check_forget_bias(forget_bias: Callable[..., Any]) -> None:
    for share, steps in ((0.5, 10), (0.9, 100), (0.5, 1000), (0.3, 2)):
        given = float(forget_bias(share, steps))
        gate = share ** (1 / steps)
        right = math.log(gate / (1 - gate))
        added = 1 - (1 - share) / steps
        if math.isclose(given, right, rel_tol=1e-4):
            continue
        if math.isclose(given, gate, rel_tol=1e-4):
            raise NotYetError("this is the gate f: find the b with σ(b) = f")
        if math.isclose(given, -right, rel_tol=1e-4):
            raise NotYetError("the sign is turned: a larger bias keeps more")
        if math.isclose(given, math.log(share / (1 - share)), rel_tol=1e-4, abs_tol=1e-9):
            raise NotYetError(f"this keeps {share:g} after one step: after {steps} it is the gate to the power {steps}")
        if math.isclose(given, math.log(added / (1 - added)), rel_tol=1e-4):
            raise NotYetError("the losses of the steps do not add up: the gates multiply")
        kept = (1 / (1 + math.exp(-given))) ** steps
        raise NotYetError(f"a bias of {given:.4g} keeps {kept:.3g} after {steps} steps, where {share:g} is asked for")


# --- the grading ---------------------------------------------------------------------------------------------------

# --- heads ---------------------------------------------------------------------------------------------------------


def check_added(added: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, h, d, e in ((5, 3, 4, 12), (7, 4, 4, 4), (3, 2, 8, 6)):
        outputs, w_o = torch.randn(n, h, d), torch.randn(e, h * d)
        given = added(outputs.clone(), w_o.clone())
        whole = outputs.flatten(1) @ w_o.mT
        if isinstance(given, Tensor) and given.shape == whole.shape and near(given, whole):
            raise NotYetError("this is the sum of all heads: leave them apart, (N, H, E)")
        each = tensor("the result", given, (n, h, e))
        if near(each, torch.einsum("nhd,ehd->nhe", outputs, w_o.unflatten(1, (h, d)))):
            continue
        if near(each, torch.einsum("nhd,edh->nhe", outputs, w_o.unflatten(1, (d, h)))):
            raise NotYetError("the columns of w_o are cut wrongly: the first D belong to head 0, the next D to head 1")
        if near(each, (whole / h)[:, None].expand_as(each)):
            raise NotYetError("every head gets an even share of the sum: each has columns of w_o of its own")
        if near(each.sum(1), whole):
            raise NotYetError("the sum is right, and the parts are not those of the heads")
        off = (each.sum(1) - whole).abs().max().item()
        raise NotYetError(f"the sum over the heads is off by up to {off:.2g} from flat @ w_o.T")


# --- additive attention --------------------------------------------------------------------------------------------


def check_read(read: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, m, padded in ((3, 7, 0), (4, 6, 2), (1, 5, 4)):
        s, h, w_s, w_h, v = (torch.randn(size) for size in ((n, 5), (m, 4), (8, 5), (8, 4), (8,)))
        real = torch.arange(m) < m - padded
        given = tensor("the result", read(s.clone(), h.clone(), real.clone(), w_s, w_h, v), (n, 4))
        scores = additive_scores(s[None], h[None], w_s, w_h, v)[0]
        if near(given, attend(scores[None], h[None], real[None, None])[0][0]):
            continue
        if near(given, scores.softmax(-1) @ h):
            raise NotYetError("padding is read: set its scores to -inf before the softmax")
        if near(given, scores.softmax(-1) * real @ h):
            raise NotYetError("the weights of padding are 0, but the others do not sum to 1: mask before the softmax")
        if near(given, scores.masked_fill(~real, -torch.inf).softmax(0).nan_to_num() @ h):
            raise NotYetError("the softmax runs over the questions: each question's weights should sum to 1")
        if near(given, h[real].mean(0).expand(n, -1)):
            raise NotYetError("every state gets the same weight: let the scores decide")
        plain = (s @ w_s.T)[:, None] + h @ w_h.T
        if near(given, (plain @ v).masked_fill(~real, -torch.inf).softmax(-1) @ h):
            raise NotYetError("without tanh every question gets the same weights: bend the sum before v")
        off = (given - attend(scores[None], h[None], real[None, None])[0][0]).abs().max().item()
        raise NotYetError(f"with {m - padded} real states and {padded} of padding it is off by up to {off:.2g}")


# --- the evolution -------------------------------------------------------------------------------------------------


def check_effective_keys(effective_keys: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for rows, m, zeros in ((3, 6, 0), (4, 9, 3), (2, 5, 4)):
        weights = torch.randn(rows, m).masked_fill(torch.arange(m) < zeros, -torch.inf).softmax(-1)
        given = effective_keys(weights.clone())
        if isinstance(given, Tensor) and zeros and given.isnan().any():
            raise NotYetError("a weight of 0 gives NaN, since ln 0 is not a number: 0 ln 0 counts as 0 here")
        given = tensor("the result", given, (rows,))
        entropy = torch.special.entr(weights).sum(-1)
        if near(given, entropy.exp()):
            continue
        if near(given, entropy):
            raise NotYetError("this is the entropy H itself: raise e to it")
        if near(given, (entropy / math.log(2)).exp()):
            raise NotYetError("H is in bits, and e is raised to it: take natural logarithms, or raise 2 to it")
        if near(given, (-entropy).exp()):
            raise NotYetError("the sign is turned: H = -Σ a ln a is 0 or more")
        if near(given, 1 / weights.square().sum(-1)):
            raise NotYetError("this is 1 / Σ a², another count of keys: here it is e^H")
        off = (given - entropy.exp()).abs().max().item()
        raise NotYetError(f"over {m} keys, of which {zeros} have no weight, it is off by up to {off:.2g}")


# --- sparse attention ----------------------------------------------------------------------------------------------


def check_two_layers(two_layers: Callable[..., Any]) -> None:
    for n in (1, 2, 16, 50, 121):
        mask, most = two_layers(n), math.isqrt(4 * n) + 2
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise NotYetError(f"the mask should be boolean, and is {mask.dtype}: compare, or use .bool()")
        mask = tensor("the mask", mask, (n, n))
        if mask.triu(1).any():
            row, column = mask.triu(1).nonzero()[0].tolist()
            raise NotYetError(f"of {n} positions, position {row} sees position {column}, which comes after it")
        row = int(mask.sum(1).argmax())
        if int(mask[row].sum()) > most:
            raise NotYetError(
                f"of {n} positions, position {row} sees {int(mask[row].sum())} keys, and {most} are allowed"
            )
        missed = masks.causal(n) & ~reach(mask, 2)
        if missed.any():
            row, column = missed.nonzero()[-1].tolist()
            raise NotYetError(f"of {n} positions, {int(missed.sum())} pairs are not reached, as {row} from {column}")


# --- linear attention ----------------------------------------------------------------------------------------------


def check_overwrite(overwrite: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for length, beta in ((1.0, 1.0), (1.0, 0.5), (3.0, 1.0), (0.5, 0.25)):
        state, value = torch.randn(5, 3), torch.randn(3)
        key = length * torch.nn.functional.normalize(torch.randn(5), dim=0)
        given = tensor("the result", overwrite(state.clone(), key.clone(), value.clone(), beta), (5, 3))
        read = key @ state
        right = state + torch.outer(key, beta * (value - read)) / key.square().sum()
        if near(given, right):
            continue
        if near(given, state + torch.outer(key, value)) or near(given, state + beta * torch.outer(key, value)):
            raise NotYetError("the value is added to what is there: write its difference from what the key reads")
        if near(given, state + torch.outer(key, beta * (value - read))):
            raise NotYetError(f"right for keys of length 1; with one of length {length} the key reads something else")
        if near(given, right - 2 * (right - state)):
            raise NotYetError("the sign is turned: the new value less what is read")
        if near(key @ given, key @ right):
            raise NotYetError("the key reads what it should, but keys at right angles to it read something else")
        off = (key @ given - key @ right).abs().max().item()
        raise NotYetError(f"with beta {beta} the key should read {(key @ right).tolist()}, and is off by {off:.2g}")
