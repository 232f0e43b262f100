"""RXNMapper: an ALBERT that reads chemical reactions, in the class that transformers has for it.

Source: Schwaller et al. 2021, "Extraction of organic chemistry grammar from unsupervised learning of chemical
reactions", Science Advances 7 (4), doi 10.1126/sciadv.abe4166: 12 layers that share one set of weights, 8 heads, width
256, trained to fill in masked parts of reactions, as packaged in rxnmapper. Its authors found that one head, number 5
of layer 10, goes from each atom of the product to the atom of the reactants that it came from. Licence: MIT.

Only numbers and text are read of the package: none of its code runs, and its weights are unpickled as tensors alone.
torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

import io
import re
from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import AlbertModel

RXNMAPPER = Package(
    name="rxnmapper",
    version="0.4.3",
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    size=3_007_424,
    root="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/",
    files={
        "config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
        "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        "vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
    },
)

# The authors' expression: a bracketed atom, an atom of one or two letters, a bond, a ring number, ...
TOKEN = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)


class ReactionEncoder:
    """The model, and its way to cut a reaction into tokens.

    Attributes:
        model: transformers' AlbertModel, in evaluation mode.
        vocabulary: the number of each token.
    """

    model: "AlbertModel"
    vocabulary: dict[str, int]

    def __init__(self, model: "AlbertModel", vocabulary: dict[str, int]):
        self.model, self.vocabulary = model, vocabulary

    def tokens(self, reaction: str) -> list[str]:
        """The tokens of a reaction in SMILES, "CC(=O)O.CO>>COC(C)=O", between [CLS] and [SEP].

        Raises:
            ValueError: it has not one ">>", or a part that is no SMILES.
        """
        tokens = TOKEN.findall(reaction)
        if "".join(tokens) != reaction or tokens.count(">>") != 1:
            raise ValueError(f"reaction must be SMILES with one '>>' between reactants and products, got {reaction!r}")
        return ["[CLS]", *tokens, "[SEP]"]

    def ids(self, reaction: str) -> "Tensor":
        """The numbers of a reaction's tokens, (1, N); a token that the vocabulary lacks is [UNK]."""
        import torch

        unknown = self.vocabulary["[UNK]"]
        ids = [self.vocabulary.get(token, unknown) for token in self.tokens(reaction)]
        return torch.tensor([ids], device=self.model.device)

    def attention(self, reaction: str) -> "tuple[list[str], Tensor]":
        """The tokens of a reaction, and the weights of all heads (layers, H, N, N).

        Raises:
            ValueError: as `tokens`.
        """
        import torch

        with torch.no_grad():
            out = self.model(self.ids(reaction), output_attentions=True)
        return self.tokens(reaction), torch.stack(out.attentions)[:, 0]

    @staticmethod
    def atoms(tokens: list[str]) -> tuple[list[int], list[int]]:
        """Where the atoms are among the tokens: those of the reactants, and those of the products."""
        arrow = tokens.index(">>")
        atoms = [i for i, token in enumerate(tokens) if re.match(r"[A-Za-z]|\[(?!CLS|SEP|UNK)", token)]
        return [i for i in atoms if i < arrow], [i for i in atoms if i > arrow]


def rxnmapper(device: "torch.device | str | None" = None) -> ReactionEncoder:
    """The RXNMapper model with its tokens: 12 layers, 8 heads, width 256, at most 512 tokens, float32.

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
        ImportError: transformers is not installed.
    """
    import json

    import torch

    try:
        from transformers import AlbertConfig, AlbertModel
    except ImportError:
        raise ImportError("transformers 5 or later is needed: pip install 'nondual[transformers]'") from None
    config = AlbertConfig(**json.loads(read(RXNMAPPER, "config.json")))
    config._attn_implementation = "eager"  # the one that returns weights
    state = torch.load(io.BytesIO(read(RXNMAPPER, "pytorch_model.bin")), map_location="cpu", weights_only=True)
    model = AlbertModel(config)
    model.load_state_dict({n.removeprefix("albert."): t for n, t in state.items() if n.startswith("albert.")})
    model.eval().to(device)  # pyright: ignore[reportArgumentType] transformers' decorator hides the signature
    vocabulary = {token: i for i, token in enumerate(read(RXNMAPPER, "vocab.txt").decode().splitlines())}
    return ReactionEncoder(model, vocabulary)
