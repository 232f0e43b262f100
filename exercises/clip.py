"""Exercises of the chapter on CLIP. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def symmetric_loss(images: Tensor, texts: Tensor, log_scale: float) -> Tensor:
    """CLIP's loss: each image has to choose its text among all texts, and each text its image among all images.

    The similarity of an image and a text is the cosine between their vectors times the exponential of log_scale. The
    choice is a softmax, and what is counted is -log of the probability of the right one, the mean over images and
    texts alike.

    Args:
        images: (B, D), of any length; row i belongs to row i of texts.
        texts: (B, D), of any length.
        log_scale: the τ of the chapter.

    Returns:
        A tensor with one number.
    """
    raise NotImplementedError("scale the vectors to length 1, make the B x B similarities, and choose along both axes")


def class_weights(prompts: list[Tensor]) -> Tensor:
    """The weight of a linear classifier, made of texts: a unit vector for each class from several prompts for it.

    Every prompt counts alike, however long its vector is. What comes out is the direction of their mean.

    Args:
        prompts: for each of C classes (P, D), vectors of any length; P may differ from class to class.

    Returns:
        (C, D).
    """
    raise NotImplementedError("scale each prompt's vector to length 1, take their mean, and scale that to length 1")
