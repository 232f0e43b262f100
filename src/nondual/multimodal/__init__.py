"""Images and words in one model.

clip           CLIP and SigLIP: two towers, one space; a classifier made of texts
contrastive    their losses, on one device or several
towers         the image and text towers of the released models
retrieval      how often the right one is among the first k
flamingo       gated cross-attention between a frozen language model's layers, to tokens of a Perceiver Resampler
llava          image vectors in the place of tokens, through a projector
perceiver      the Perceiver Resampler
image_text     scores, loss and generation over ids with marks for images: what the two share
image_marks    the marks, checked; frozen: parts that are not trained
"""
