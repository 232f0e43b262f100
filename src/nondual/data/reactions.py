"""Reactions from textbooks of organic chemistry, with the reactants' atom that each atom of the product came from.

Source: written for this project; the mechanisms are in any textbook (that an ester keeps the alcohol's oxygen: Roberts
and Urey 1938, doi 10.1021/ja01276a024). Licence: CC BY 4.0.

Each is SMILES without hydrogens, and its map: for the atoms of the product in the order of writing, the number of the
atom among the reactants, or the numbers of those that are alike by symmetry.
"""

REACTIONS: dict[str, tuple[str, tuple[int | tuple[int, ...], ...]]] = {
    "esterification": (
        "O=C(O)c1ccccc1.CO>>COC(=O)c1ccccc1",
        (9, 10, 1, 0, 3, (4, 8), (5, 7), 6, (5, 7), (4, 8)),
    ),
    "amide from an acid chloride": (
        "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1",
        (0, 1, 2, 4, 5, (6, 10), (7, 9), 8, (7, 9), (6, 10)),
    ),
    "Williamson ether synthesis": (
        "BrCc1ccccc1.CCO>>CCOCc1ccccc1",
        (8, 9, 10, 1, 2, (3, 7), (4, 6), 5, (4, 6), (3, 7)),
    ),
    "substitution by an amine": (
        "CCCCBr.C1CCNCC1>>CCCCN1CCCCC1",
        (0, 1, 2, 3, 8, (7, 9), (6, 10), 5, (6, 10), (7, 9)),
    ),
    "reduction of a ketone": (
        "CC(=O)c1ccccc1>>OC(C)c1ccccc1",
        (2, 1, 0, 3, (4, 8), (5, 7), 6, (5, 7), (4, 8)),
    ),
    "Suzuki coupling": (
        "Brc1ccccc1.OB(O)c1ccncc1>>c1ccc(-c2ccncc2)cc1",
        (4, (3, 5), (2, 6), 1, 10, (11, 15), (12, 14), 13, (12, 14), (11, 15), (2, 6), (3, 5)),
    ),
    "removal of a Boc group": (
        "CC(C)(C)OC(=O)NCc1ccccc1>>NCc1ccccc1",
        (7, 8, 9, (10, 14), (11, 13), 12, (11, 13), (10, 14)),
    ),
    "reductive amination": (
        "O=Cc1ccccc1.CN>>CNCc1ccccc1",
        (8, 9, 1, 2, (3, 7), (4, 6), 5, (4, 6), (3, 7)),
    ),
    "Diels-Alder": (
        "C=CC=C.O=CC=C>>O=CC1CC=CCC1",
        (4, 5, 6, (0, 3), (1, 2), (1, 2), (0, 3), 7),
    ),
    "reduction of a nitro group": (
        "O=[N+]([O-])c1ccc(Cl)cc1>>Nc1ccc(Cl)cc1",
        (1, 3, (4, 9), (5, 8), 6, 7, (5, 8), (4, 9)),
    ),
    "Friedel-Crafts acylation": (
        "CC(=O)Cl.COc1ccccc1>>COc1ccc(C(C)=O)cc1",
        (4, 5, 6, (7, 11), (8, 10), 9, 1, 0, 2, (8, 10), (7, 11)),
    ),
}
"""Eleven reactions: by their name, SMILES and the map of their atoms."""
