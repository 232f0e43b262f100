"""Exercises of the chapter on LLaVA. Write what each function asks for, then: nox -s exercises -- llava"""

from torch import Tensor


def spliced(ids: Tensor, embeddings: Tensor, images: Tensor, mark: int) -> Tensor:
    """What the language model reads: each image's vectors in the place of its mark.

    Args:
        ids: (N,) integers; mark where an image stands.
        embeddings: (N, E), the embedding of each id. That of a mark is to be left out.
        images: (I, S, E), already projected to the width of the embeddings, in the order of their marks.
        mark: the id that stands for an image.

    Returns:
        (N + I (S - 1), E).
    """
    raise NotImplementedError("walk along the ids, and collect an embedding for a word, S vectors for an image")


def expanded_labels(ids: Tensor, labels: Tensor, mark: int, n_vectors: int) -> Tensor:
    """The labels that go with what `spliced` gives: those of words stay, and nothing is predicted within an image.

    Args:
        ids: (N,) integers; mark where an image stands.
        labels: (N,) integers, -100 where nothing is predicted. At a mark it may be anything.
        mark: the id that stands for an image.
        n_vectors: S, how many vectors each image becomes.

    Returns:
        (N + I (S - 1),) integers.
    """
    raise NotImplementedError("a word's label once, and -100 S times for an image")
