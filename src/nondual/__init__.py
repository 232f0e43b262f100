"""nondual: the history of attention as a library that runs.

Each module is one chapter of the site and one file of tests, under the same name:

    nondual.attention_mechanism   additive and multiplicative scores, softmax, context (Bahdanau 2014)
    nondual.self_attention        one X, three projections; many heads; the key/value cache (Vaswani 2017)
    nondual.positional_encoding   where a token stands
    nondual.transformer           the block, the stack, a text encoder
    nondual.pretrained            real weights, checked and loaded into the classes above
    nondual.ops                   the mathematics and its engines

Nothing is imported here, so `import nondual` costs what Python costs; importing a module costs what torch costs.
"""

__version__ = "0.1.0"
