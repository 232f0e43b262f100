"""Exercise of the chapter on Flamingo. Write what the function asks for, then: nox -s exercises -- flamingo"""

from torch import Tensor


def may_attend(marked: Tensor, n_images: int) -> Tensor:
    """Which image each token of a text may attend to: the last one up to it, and no other.

    An image stands where its mark stands, and the mark itself may attend to it already. A token before the first image
    may attend to none.

    Args:
        marked: (N,) boolean, True where an image stands; the first True is image 0, the next image 1.
        n_images: how many there are, J.

    Returns:
        (N, J) boolean, True where the token may attend to the image.
    """
    raise NotImplementedError("count the images up to each token, and compare the count with each image's number")
