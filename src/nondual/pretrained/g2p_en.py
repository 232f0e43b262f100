"""g2p-en: a real network that spells words aloud without attention, through one vector of 256 numbers.

Source: the package g2p-en 2.1.0 (Kyubyong Park and Jongseok Kim, https://github.com/Kyubyong/g2p), its network for
words that its dictionary lacks: the encoder-decoder of Cho et al. 2014 (1406.1078) in its plain form of Sutskever et
al. 2014 (1409.3215), section 2. A GRU reads the letters; its last state is all that the GRU that writes the phonemes is
given of the word. 0.83 million parameters, float32. Licence: Apache-2.0.

    x_j = embedding[letter_j]                              (M + 1, 256)   the last letter is </s>
    s   = GRU(x), its last state            encoder        (256,)         all that is handed on
    y   = decoder_embedding[phoneme]                       (256,)         at first <s>
    s   = GRU(y, s)                         decoder        (256,)
    scores = output.weight s + output.bias                 (74,)          the greatest is next; </s> ends the word

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

import io
from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch

    from nondual.pretrained.g2p_en_network import LastStateSpeller

G2P_EN = Package(
    name="g2p-en",
    version="2.1.0",
    sha256="2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
    size=3_117_464,
    root="",
    files={
        "g2p_en/checkpoint20.npz": "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
        "g2p_en-2.1.0.dist-info/LICENSE.txt": "b40930bbcf80744c86c46a12bc9da056641d722716c378f5659b9e555ef833e1",
    },
)

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
"""What the rows of its embedding stand for."""

# The package's order. A vowel has three entries, without stress (0), with the main stress (1), with a weaker one (2).
PHONEMES: tuple[str, ...] = (
    *("<pad>", "<unk>", "<s>", "</s>"),
    *(f"{vowel}{stress}" for vowel in ("AA", "AE", "AH", "AO", "AW", "AY") for stress in range(3)),
    *("B", "CH", "D", "DH"),
    *(f"{vowel}{stress}" for vowel in ("EH", "ER", "EY") for stress in range(3)),
    *("F", "G", "HH"),
    *(f"{vowel}{stress}" for vowel in ("IH", "IY") for stress in range(3)),
    *("JH", "K", "L", "M", "N", "NG"),
    *(f"{vowel}{stress}" for vowel in ("OW", "OY") for stress in range(3)),
    *("P", "R", "S", "SH", "T", "TH", "UH0", "UH1", "UH2", "UW", "UW0", "UW1", "UW2", "V", "W", "Y", "Z", "ZH"),
)
"""What the numbers that it writes stand for, in ARPAbet."""

NAMES = {"enc_emb": "embedding.weight", "dec_emb": "decoder_embedding.weight", "fc_w": "output.weight"}
NAMES |= {"fc_b": "output.bias"}
NAMES |= {
    f"{theirs}_{part}": f"{ours}.{name}_l0"
    for theirs, ours in (("enc", "encoder"), ("dec", "decoder"))
    for part, name in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("b_ih", "bias_ih"), ("b_hh", "bias_hh"))
}


def g2p_en(device: "torch.device | str | None" = None) -> "LastStateSpeller":
    """The speller of g2p-en 2.1.0, in float32: `g2p_en().spell("knight")` gives phonemes.

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: a file is not the one that was pinned.
    """
    import numpy as np
    import torch

    from nondual.pretrained.g2p_en_network import G2PNetwork, LastStateSpeller

    model = G2PNetwork(len(LETTERS), len(PHONEMES))
    with np.load(io.BytesIO(read(G2P_EN, "g2p_en/checkpoint20.npz")), allow_pickle=False) as stored:
        model.load_state_dict({ours: torch.from_numpy(stored[theirs]) for theirs, ours in NAMES.items()})
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    return LastStateSpeller(model.to(device).eval(), letters, list(PHONEMES))
