"""Models with parts that are not trained: those have no gradients, and stay in evaluation mode, dropout and all.

model.freeze("vision", "language_model")     # these are frozen, and whatever else the model has is trained
model.train()                                # the frozen parts stay in evaluation mode
optimiser(model, 1e-3)                       # nondual.training: of what requires a gradient alone
"""

from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound="FrozenParts")


class FrozenParts(nn.Module):
    """A module some of whose children may be frozen.

    Attributes:
        frozen: the names of the children that are.
    """

    frozen: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.frozen = ()

    def freeze(self: Model, *names: str) -> Model:
        """Freeze the children of these names, and no others: what is not named is trained.

        Whatever is part of a frozen child is frozen, even where it is part of another child too.

        Args:
            names: of children, as `model.named_children()` has them; none for a model that is trained whole.

        Raises:
            ValueError: a name that no child has.
        """
        children = dict(self.named_children())
        if unknown := [name for name in names if name not in children]:
            raise ValueError(f"names must be among {', '.join(children)}, got {unknown[0]!r:.100}")
        self.frozen = names
        self.requires_grad_(True)
        for name in names:
            children[name].requires_grad_(False)
        return self.train(self.training)

    # --8<-- [start:train]
    def train(self: Model, mode: bool = True) -> Model:
        """Training mode, or evaluation mode, for all but the frozen parts.

        Those are in evaluation mode always.
        """
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    # --8<-- [end:train]

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name: all that a checkpoint needs beside the frozen parts' own.

        model.load_state_dict(state, strict=False)
        """
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
