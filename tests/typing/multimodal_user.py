"""A user's script on models of images and texts, for type checkers alone: what each call returns, and what it takes."""

from typing import assert_type

import torch
from torch import Tensor, nn

from nondual import CLIP, CausalLM, Flamingo, Llava, SigLIP
from nondual.analysis import ModalityGap, close_gap, modality_gap, probe_modality
from nondual.multimodal.clip import SentenceTower, zero_shot_classifier, zero_shot_weights
from nondual.multimodal.contrastive import sigmoid_loss, similarities, softmax_loss, unit_vectors
from nondual.multimodal.llava import PatchFeatures, Projector
from nondual.multimodal.perceiver import PerceiverResampler
from nondual.multimodal.retrieval import Recall, found, recall
from nondual.multimodal.towers import AttentionPool, FirstOf, TextTower, VisionTower, at_highest_id
from nondual.pretrained import load_clip, load_llava, load_siglip, minilm


def models(x: Tensor, ids: Tensor) -> None:
    texts = TextTower(100, 16, 64, 4, 256, 2, place=at_highest_id)
    model = CLIP(VisionTower(32, 8, 64, 4, 256, 2), texts, 32, d_image=64, d_text=64)
    assert_type(model(x, ids), Tensor)
    assert_type(model.encode_texts(ids), Tensor)
    assert_type(model.loss(x, ids, group=torch.distributed.group.WORLD), Tensor)
    assert_type(model.scale, Tensor)
    assert_type(model.shift, Tensor | None)
    adam = torch.optim.AdamW(model.parameters())

    def limit(*_: object) -> None:
        model.clamp_scale()

    adam.register_step_post_hook(limit)
    other = SigLIP(nn.Identity(), SentenceTower(minilm()), None, d_image=384, d_text=384, bias=-10)
    assert_type(other.loss(x, ["a cat", "a dog"], chunk=3), Tensor)
    assert_type(other.shift, Tensor)


def towers(x: Tensor, ids: Tensor) -> None:
    pool = AttentionPool(64, 4, 256)
    assert_type(VisionTower(32, 8, 64, 4, 256, 2, class_token=False, pool=pool).features(x), Tensor)
    assert_type(pool(x), Tensor)
    assert_type(TextTower(100, 16, 64, 4, 256, 2, place=FirstOf(99), head=nn.Linear(64, 32))(ids), Tensor)


def classifiers(model: CLIP, prompts: list[Tensor]) -> None:
    assert_type(zero_shot_weights(model, prompts), Tensor)
    assert_type(zero_shot_classifier(model, [["a cat", "one cat"], ["a dog"]]), nn.Linear)


def measures(x: Tensor, y: Tensor, model: CLIP) -> None:
    assert_type(unit_vectors(similarities(x, y, 1.0)), Tensor)
    assert_type(softmax_loss(x, y, model.scale), Tensor)
    assert_type(sigmoid_loss(x, y, model.scale, -10.0, chunk=8), Tensor)
    assert_type(recall(x, k=(1, 5)), Recall)
    assert_type(recall(x).image_to_text, dict[int, float])
    assert_type(found(x, 1, relevant=x > 0), Tensor)
    assert_type(modality_gap(x, y), ModalityGap)
    assert_type(modality_gap(x, y).vector, Tensor)
    assert_type(close_gap(x, y, 0.5), tuple[Tensor, Tensor])
    assert_type(probe_modality(x, y, folds=10), float)


def checkpoints() -> None:
    assert_type(load_clip("folder", dtype=torch.float32), CLIP)
    assert_type(load_siglip("folder"), SigLIP)
    assert_type(load_llava("folder", dtype=torch.float32), Llava)


def images_in_texts(language_model: CausalLM, tower: VisionTower, ids: Tensor, images: Tensor) -> None:
    resampler = PerceiverResampler(64, 4, n_frames=8)
    flamingo = Flamingo(tower, language_model, resampler, mark=0, d_vision=64, before=[0, 4], gated=False)
    llava = Llava(
        PatchFeatures(tower, [-2, -1], select="full"), language_model, Projector(128, 64), mark=0, d_vision=128
    )
    assert_type(llava.freeze("vision").train(), Llava)
    assert_type(flamingo.freeze(), Flamingo)
    assert_type(flamingo(ids, images, cache=flamingo.new_cache(2, 9)), Tensor)
    assert_type(flamingo.loss(ids, images, ids, reset=ids == 0), Tensor)
    assert_type(llava.generate(ids, 5, images, temperature=0.7, eos=1), Tensor)
    assert_type(llava.trained_state_dict(), dict[str, Tensor])
    hidden = language_model.hidden(language_model.embeddings(ids), before=lambda i, x: x * i)
    assert_type(language_model.loss_at(hidden, ids), Tensor)
    assert_type(language_model.scores(hidden), Tensor)
