"""Images read by a transformer.

patches   an image as a sequence of patches, and positions for another grid than the one that was learned
vit       the Vision Transformer
"""

from nondual.vision_transformers.patches import PatchEmbedding, grid_code, patchify, resampled, unpatchify
from nondual.vision_transformers.vit import VisionTransformer

__all__ = ["PatchEmbedding", "VisionTransformer", "grid_code", "patchify", "resampled", "unpatchify"]
