"""LLaVA in our own classes against transformers' own, random weights: scores, loss, gradients, generation, files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nondual.pretrained import from_llava, load_llava
from nondual.pretrained.llava import one_mark_each

V, MARK, SIDE, PATCH = 53, 52, 12, 4
SETTINGS = {
    "as released": {},
    "the class token too": dict(vision_feature_select_strategy="full"),
    "the last layer": dict(vision_feature_layer=-1),
    "two layers": dict(vision_feature_layer=[-2, 1]),
    "no bias": dict(multimodal_projector_bias=False),
    "tied": dict(tie_word_embeddings=True),
}


def llava(seed=0, vision=None, **more):
    """transformers' LLaVA with random weights, each at a value of its own."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    images = dict(image_size=SIDE, patch_size=PATCH, hidden_size=20, num_attention_heads=5, intermediate_size=31)
    texts = dict(vocab_size=V, hidden_size=24, intermediate_size=29, num_hidden_layers=2, num_attention_heads=4)
    texts |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
    if more.get("tie_word_embeddings"):
        texts["tie_word_embeddings"] = True
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**(images | dict(num_hidden_layers=3) | (vision or {}))),
        text_config=LlamaConfig(**texts),
        image_token_index=MARK,
        **more,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model


def inputs(n_vectors, seed=1):
    """Two rows of one image each, in transformers' way: as many marks as vectors; and the images."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for before, after in ((2, 4), (5, 1)):
        parts = [torch.randint(V - 2, (n,), generator=draw) for n in (before, after)]
        rows.append(torch.cat([parts[0], torch.full((n_vectors,), MARK), parts[1]]))
    return torch.stack(rows), torch.randn(2, 3, SIDE, SIDE, generator=draw)


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_loss_gradients_and_generation_are_transformers(setting):
    theirs = llava(**SETTINGS[setting])
    ours = from_llava(theirs)
    n = (SIDE // PATCH) ** 2 + (setting == "the class token too")
    their_ids, images = inputs(n)
    ids = one_mark_each(their_ids, MARK, n)
    assert ids.shape == (2, 7) and (ids == MARK).sum(1).tolist() == [1, 1]

    labels = their_ids.masked_fill(their_ids == MARK, -100)
    out = theirs(input_ids=their_ids, pixel_values=images, labels=labels)
    kept = (their_ids != MARK) | ((their_ids == MARK).cumsum(1) == n)
    torch.testing.assert_close(ours(ids, images), out.logits[kept].view(2, 7, V), atol=1e-4, rtol=1e-4)
    loss = ours.loss(ids, images)
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    out.loss.backward()
    for i in (1, 2):
        mine, its = getattr(ours.projector, f"linear{i}"), getattr(theirs.model.multi_modal_projector, f"linear_{i}")
        torch.testing.assert_close(mine.weight.grad, its.weight.grad, atol=1e-5, rtol=1e-4)
        if mine.bias is not None:
            torch.testing.assert_close(mine.bias.grad, its.bias.grad, atol=1e-5, rtol=1e-4)

    right = theirs.generate(
        input_ids=their_ids, pixel_values=images, max_new_tokens=6, do_sample=False, bad_words_ids=[[MARK]]
    )
    found = ours.generate(ids, 6, images)
    assert torch.equal(found[:, 7:], right[:, their_ids.shape[1] :])
    assert torch.equal(found, ours.generate(ids, 6, images, cached=False))


def test_several_images_and_padding_on_the_left_are_transformers():
    theirs = llava()
    ours, n = from_llava(theirs), (SIDE // PATCH) ** 2
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(V - 2, (9,), generator=draw)
    image = torch.full((n,), MARK)
    long = torch.cat([words[:2], image, words[2:4], image, words[4:5]])  # two images
    short = torch.cat([words[5:7], image, words[7:9]])
    padding = len(long) - len(short)
    their_ids = torch.stack([long, torch.cat([torch.zeros(padding, dtype=torch.int64), short])])
    shown = torch.ones_like(their_ids)
    shown[1, :padding] = 0
    images = torch.randn(3, 3, SIDE, SIDE, generator=draw)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    ids[0], ids[1, 2:] = one_mark_each(long[None], MARK, n)[0], one_mark_each(short[None], MARK, n)[0]
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 2] = True
    with torch.no_grad():
        right = theirs(input_ids=their_ids, pixel_values=images, attention_mask=shown).logits
        found = ours(ids, images, reset=reset)
    torch.testing.assert_close(found[:, -1], right[:, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1, 2:4], right[1, padding : padding + 2], atol=1e-4, rtol=1e-4)
    generated = theirs.generate(
        input_ids=their_ids, pixel_values=images, attention_mask=shown, max_new_tokens=5, do_sample=False,
        bad_words_ids=[[MARK]], pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours.generate(ids, 5, images, reset=reset)[:, 7:], generated[:, their_ids.shape[1] :])


@torch.no_grad()
def test_a_folder_in_the_names_of_transformers_5_and_4(tmp_path):
    theirs = llava()
    right = from_llava(theirs)
    theirs.save_pretrained(tmp_path)
    n = (SIDE // PATCH) ** 2
    their_ids, images = inputs(n)
    ids = one_mark_each(their_ids, MARK, n)
    ours = load_llava(tmp_path)
    assert not ours.training and ours.frozen == ("vision", "language_model")
    torch.testing.assert_close(ours(ids, images), right(ids, images), atol=1e-6, rtol=1e-6)
    assert load_llava(tmp_path, dtype=torch.bfloat16).projector.linear1.weight.dtype == torch.bfloat16

    inside = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}  # as transformers 5 has them
    before = {  # as transformers 4 saved them
        "model.language_model.": "language_model.model.",
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }

    def renamed(name):
        start = next(new for new in before if name.startswith(new))
        return before[start] + name.removeprefix(start)

    old = {renamed(name): tensor for name, tensor in inside.items()}
    assert old.keys() != inside.keys()
    for state in (old, inside):
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.testing.assert_close(load_llava(tmp_path)(ids, images), right(ids, images), atol=1e-6, rtol=1e-6)


def test_one_mark_each_by_hand():
    ids = torch.tensor([[1, 9, 9, 2, 9, 9], [9, 9, 9, 9, 3, 4]])
    assert one_mark_each(ids, 9, 2).tolist() == [[1, 9, 2, 9], [9, 9, 3, 4]]
    assert one_mark_each(ids, 8, 2).tolist() == ids.tolist()
    with pytest.raises(ValueError, match=r"as many marks \(id 9\) in each row, a multiple of 3, got \[4, 4\]"):
        one_mark_each(ids, 9, 3)
    with pytest.raises(ValueError, match=r"ids must be \(B, N\) and n_vectors 1 or more, got \(6,\) and 2"):
        one_mark_each(ids[0], 9, 2)


def test_what_is_no_llava_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a LlavaForConditionalGeneration of transformers, got Linear"):
        from_llava(torch.nn.Linear(2, 2))
    theirs = llava()
    theirs.config.projector_hidden_act = "tanh"
    with pytest.raises(ValueError, match=r"projector_hidden_act must be one of .*, got 'tanh'"):
        from_llava(theirs)
    with pytest.raises(FileNotFoundError, match=r"there is no folder org/name.*hf download org/name"):
        load_llava("org/name")
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got str"):
        load_llava(tmp_path, dtype="float32")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        load_llava(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match=r"model_type must be 'llava' in .*config.json, got 'clip'"):
        load_llava(tmp_path)
    theirs = llava()
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there are no safetensors in"):
        load_llava(tmp_path)
