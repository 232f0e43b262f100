"""Checks of the exercises on images, and on images with words."""

import math
from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor
from torch import Tensor

# --- CLIP ----------------------------------------------------------------------------------------------------------


def check_symmetric_loss(symmetric_loss: Callable[..., Any]) -> None:
    cross_entropy, unit = torch.nn.functional.cross_entropy, torch.nn.functional.normalize
    torch.manual_seed(0)
    for pairs, tau in ((1, 1.0), (5, 0.0), (7, 2.0)):
        images = torch.randn(pairs, 3) * torch.rand(pairs, 1)
        texts = images + torch.randn(pairs, 3)
        given = tensor("the loss", symmetric_loss(images.clone(), texts.clone(), tau), ())
        right = torch.arange(pairs)
        s = unit(images, dim=1) @ unit(texts, dim=1).T
        one, other = (cross_entropy(math.exp(tau) * each, right) for each in (s, s.T))
        if near(given, (one + other) / 2):
            continue
        if near(given, one) or near(given, other):
            raise NotYetError("one side alone chooses: take the softmax along the other axis too")
        if near(given, one + other):
            raise NotYetError("it is twice the loss: take the mean of the two sides")
        if near(given, (one + other) / 2 * pairs):
            raise NotYetError("it grows with the number of pairs: take the mean over them")
        plain = images @ texts.T * math.exp(tau)
        if near(given, (cross_entropy(plain, right) + cross_entropy(plain.T, right)) / 2):
            raise NotYetError("these are not cosines: scale every vector to length 1 first")
        if near(given, (cross_entropy(tau * s, right) + cross_entropy(tau * s.T, right)) / 2):
            raise NotYetError("the similarities are multiplied by τ itself: take its exponential")
        raise NotYetError(f"of {pairs} pairs with τ = {tau} it should be {(one + other) / 2:.4f}, and is {given:.4f}")


def check_class_weights(class_weights: Callable[..., Any]) -> None:
    unit = torch.nn.functional.normalize
    torch.manual_seed(0)
    prompts = [torch.randn(count, 4) * torch.rand(count, 1) * 9 for count in (3, 1, 5)]
    given = tensor("the weight", class_weights([each.clone() for each in prompts]), (3, 4))
    means = torch.stack([unit(each, dim=1).mean(0) for each in prompts])
    if near(given, unit(means, dim=1)):
        return
    if near(given, means):
        raise NotYetError("the mean of unit vectors is shorter than 1: scale it to length 1 again")
    if near(given, torch.stack([unit(each.mean(0), dim=0) for each in prompts])):
        raise NotYetError("a prompt with a long vector counts for more: scale each to length 1 before the mean")
    if near(given, torch.stack([each.mean(0) for each in prompts])):
        raise NotYetError("this is the mean of the vectors as they came: scale before it and after it")
    if near(given, torch.stack([unit(each[0], dim=0) for each in prompts])):
        raise NotYetError("the first prompt alone is read: take the mean of all")
    row = int((given - unit(means, dim=1)).abs().amax(1).argmax())
    raise NotYetError(f"the vector of class {row}, which has {len(prompts[row])} prompts, is another")


# --- Flamingo and LLaVA ----------------------------------------------------------------------------------------------


def check_may_attend(may_attend: Callable[..., Any]) -> None:
    for places, n in (((1, 4), 7), ((0, 1, 5), 6), ((3,), 4), ((), 3)):
        marked = torch.zeros(n, dtype=torch.bool)
        marked[list(places)] = True
        given = tensor("the mask", may_attend(marked.clone(), len(places)), (n, len(places))).bool()
        count, number = marked.cumsum(0)[:, None], torch.arange(1, len(places) + 1)
        right = count == number
        if torch.equal(given, right):
            continue
        if torch.equal(given, count >= number):
            raise NotYetError("a token sees every image before it: leave it the last one alone")
        if torch.equal(given, count - marked[:, None].long() == number):
            raise NotYetError("a mark does not see its own image: count it in")
        if torch.equal(given, count.clamp(min=1) == number):
            raise NotYetError("the text before the first image sees it: it may attend to none")
        if torch.equal(given, count == number - 1):
            raise NotYetError("a token sees the image after it: images are numbered from the first one before it")
        row = int((given != right).any(1).nonzero()[0])
        raise NotYetError(f"with images at {list(places)}, token {row} sees another image than it may")


def check_spliced(spliced: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for ids, s in (([7, 0, 8], 3), ([0, 7, 8, 0], 2), ([7, 8], 2), ([0, 0], 1)):
        words, images = torch.randn(len(ids), 5), torch.randn(ids.count(0), s, 5)

        def joined(vectors: Tensor, kept: int = 0, ids: list[int] = ids, words: Tensor = words) -> Tensor:
            parts, numbers = [], iter(range(len(vectors)))
            for i, token in enumerate(ids):
                parts += [words[i : i + 1]] if token else [words[i : i + kept], vectors[next(numbers)]]
            return torch.cat(parts)

        right = joined(images)
        given = spliced(torch.tensor(ids), words.clone(), images.clone(), 0)
        if isinstance(given, Tensor) and len(images) and tuple(given.shape) == tuple(joined(images, 1).shape):
            raise NotYetError("it is longer by one for each image: the mark's own embedding is to be left out")
        given = tensor("what is read", given, tuple(right.shape))
        if near(given, right):
            continue
        if near(given, joined(images.flip(0))):
            raise NotYetError("the images stand in reverse: the first belongs to the first mark")
        if near(given, joined(images[:1].expand_as(images))):
            raise NotYetError("the first image stands at every mark: each has its own")
        if near(given, torch.cat([*images, *(words[i : i + 1] for i, token in enumerate(ids) if token)])):
            raise NotYetError("the images stand before the words: each goes where its mark stands")
        raise NotYetError(f"of the ids {ids} with the mark 0 something else should be read")


def check_expanded_labels(expanded_labels: Callable[..., Any]) -> None:
    for ids, s in (([7, 0, 8], 3), ([0, 7, 8, 0], 2), ([7, 8], 2), ([0, 0], 1)):
        labels = [-100 if i == 0 and token else token for i, token in enumerate(ids)]

        def repeated(ignored: bool, ids: list[int] = ids, labels: list[int] = labels, s: int = s) -> Tensor:
            each = ([label] if token else [-100 if ignored else label] * s for token, label in zip(ids, labels))
            return torch.tensor([label for group in each for label in group])

        right = repeated(True)
        given = tensor("the labels", expanded_labels(torch.tensor(ids), torch.tensor(labels), 0, s), tuple(right.shape))
        if torch.equal(given, right):
            continue
        if torch.equal(given, repeated(False)):
            raise NotYetError("the mark is predicted within the image: put -100 there")
        if torch.equal(given, torch.full_like(right, -100)):
            raise NotYetError("nothing is predicted at all: the labels of words stay")
        raise NotYetError(f"of the ids {ids} with the mark 0 they should be {right.tolist()}, and are {given.tolist()}")


# --- the Vision Transformer ------------------------------------------------------------------------------------------


def check_cut(cut: Callable[..., Any]) -> None:
    for b, c, p, rows, columns in ((1, 1, 2, 2, 3), (2, 3, 3, 4, 2), (2, 2, 1, 2, 2), (1, 3, 4, 1, 3)):
        images = torch.arange(b * c * p * p * rows * columns).float().view(b, c, rows * p, columns * p)
        apart = images.view(b, c, rows, p, columns, p)
        given = tensor("the patches", cut(images.clone(), p), (b, rows * columns, c * p * p))
        flat = (b, rows * columns, c * p * p)
        if torch.equal(given, apart.permute(0, 2, 4, 1, 3, 5).reshape(flat)):
            continue
        if torch.equal(given, images.reshape(flat)):
            raise NotYetError("this only gives the numbers another shape: a patch has p pixels of each of p rows")
        if torch.equal(given, apart.permute(0, 4, 2, 1, 3, 5).reshape(flat)):
            raise NotYetError("the patches come column by column: they should come row by row")
        if torch.equal(given, apart.permute(0, 2, 4, 3, 5, 1).reshape(flat)):
            raise NotYetError("within a patch the channels come last: the order is channel, row, column")
        if torch.equal(given, apart.permute(0, 2, 4, 1, 5, 3).reshape(flat)):
            raise NotYetError("each patch is turned on its side: the order is channel, row, column")
        raise NotYetError(f"of {rows} x {columns} patches with side {p} the numbers are not where they should be")


def check_mean_distance(mean_distance: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for heads, rows, columns, p in ((1, 1, 3, 1), (2, 3, 4, 1), (3, 2, 5, 7)):
        weights = torch.randn(heads, rows * columns, rows * columns).mul(2).softmax(-1)
        given = tensor("the distance", mean_distance(weights.clone(), columns, p), (heads,))
        i = torch.arange(rows * columns)
        down, across = ((x[:, None] - x).float() for x in (i // columns, i % columns))
        straight = (down**2 + across**2).sqrt()

        def of(distance: Tensor, weights: Tensor = weights) -> Tensor:
            return (weights * distance).sum(-1).mean(-1)

        if near(given, of(p * straight)):
            continue
        if near(given, of(p * straight) * rows * columns):
            raise NotYetError("it is the sum over the patches: take the mean")
        if near(given, of(p * (i[:, None] - i).abs().float())):
            raise NotYetError("it counts along the sequence: patches have a row and a column")
        if near(given, of(straight)):
            raise NotYetError("it is counted in patches: a patch is p pixels wide")
        if near(given, of(p * (down.abs() + across.abs()))):
            raise NotYetError("rows and columns are added: the distance is straight across")
        if near(given, of((p * straight) ** 2)):
            raise NotYetError("it is the square of the distance: take the root before the mean")
        if near(given, (p * straight).mean().expand(heads)):
            raise NotYetError("the weights do not count: every patch counts alike")
        worst = int((given - of(p * straight)).abs().argmax())
        raise NotYetError(
            f"head {worst} looks {float(of(p * straight)[worst]):.3f} pixels away over {rows} x {columns} patches of "
            f"{p}, not {float(given[worst]):.3f}"
        )
