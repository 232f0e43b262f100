"""Images and words in one model.

clip           CLIP and SigLIP: two towers, one space; a classifier made of texts
contrastive    their losses, on one device or several
towers         the image and text towers of the released models
retrieval      how often the right one is among the first k
"""
