"""The shapes in the signatures are true: every public call runs once with jaxtyping and beartype looking on.

In a process of its own, since the check must be there before the package is imported; at run time it is not.
"""

import subprocess
import sys

CALLS = """
from jaxtyping import install_import_hook

with install_import_hook("nondual", "beartype.beartype"):
    import torch
    from nondual import attention_mechanism, positional_encoding, relative_positions, self_attention, tasks, transformer
    from nondual import encoder_decoder, recurrent, search
    from nondual.decoder import Decoder
    from nondual.pretrained import SentenceEncoder, load_mamba, minilm as load_minilm  # lazy, so named here
    from nondual.ops import masks
    from nondual.efficient_attention.flash_attention import FlashAttention
    from nondual.efficient_attention.mamba import Mamba
    from nondual.efficient_attention.mamba2 import Mamba2
    from nondual.efficient_attention.mamba_parts import step_bias
    from nondual.language_models.mamba import MambaLM
    from nondual.ops.attention import attention, masked_softmax
    from nondual.ops.causal_conv1d import causal_conv1d
    from nondual.efficient_attention import hippo, s4d, state_space
    from nondual.analysis import modality_gap
    from nondual.language_models.gpt import GPT
    from nondual.multimodal import clip, contrastive, flamingo, image_marks, llava, perceiver, retrieval, towers
    from nondual.ops.flash_attention import flash_attention
    from nondual.ops.linear_recurrence import linear_recurrence
    from nondual.ops.selective_scan import selective_scan, selective_scan_matrix, selective_scan_step
    from nondual.ops.ssd import ssd, ssd_matrix, ssd_step

q, k, v = torch.randn(2, 6, 5, 7), torch.randn(2, 3, 11, 7), torch.randn(2, 3, 11, 13)
attention(q, k, v, causal=True)
attention(q, k, v, mask=masks.padding(torch.tensor([11, 4]), 11), return_weights=True)
attention(q, k, v, mask=torch.randn(1, 6, 5, 11))
for impl in ("auto", "reference"):
    flash_attention(q, k, v, causal=True, impl=impl)
    flash_attention(q, k, v, window=3, return_lse=True, impl="auto")
masked_softmax(torch.randn(3, 5), masks.causal(3, 5))
masks.sliding_window(5, 11, window=3)

s, h = torch.randn(2, 3, 7), torch.randn(2, 5, 11)
attention_mechanism.AdditiveAttention(7, 11, 13)(s, h, torch.ones(2, 1, 5, dtype=torch.bool))
attention_mechanism.scaled_dot_scores(s, torch.randn(2, 5, 7))
attention_mechanism.AttentionDecoder(17, 7, 11, 13)(torch.randn(2, 3, 17), torch.randn(2, 7), h)
padding, memory = torch.tensor([[[True] * 5], [[True] * 3 + [False] * 2]]), torch.randn(2, 5, 12)
for reader in (
    attention_mechanism.ConcatAttention(7, 12, 13),
    attention_mechanism.GeneralAttention(7, 12),
    attention_mechanism.LocalAttention(7, 12, 2),
    attention_mechanism.LocationAttention(7, 12, 13, 3, 5, window=2, weigh=attention_mechanism.smooth),
    attention_mechanism.CoverageAttention(7, 12, 13),
    attention_mechanism.UniformAttention(7, 12),
    attention_mechanism.LastState(7, 12),
):
    for decoder in (attention_mechanism.BahdanauDecoder, attention_mechanism.LuongDecoder):
        _, weights = decoder(17, reader, 3)(torch.randn(2, 3, 17), memory, padding)
attention_mechanism.coverage_loss(weights)
words, lengths = torch.randint(7, (2, 5)), torch.tensor([5, 2])
speller = attention_mechanism.Seq2Seq(7, 9, 8)
speller.loss(words, words, source_lengths=lengths, target_lengths=lengths)
speller.generate(words, 4, bos=1, eos=2, source_lengths=lengths, beams=2)

x, memory = torch.randn(2, 5, 12), torch.randn(2, 11, 17)
self_attention.SelfAttention(12, 3, 5)(x, return_weights=True)
self_attention.MultiHeadAttention(12, 4, n_kv_heads=2)(x, causal=True, return_weights=True)
self_attention.MultiHeadAttention(12, 4, d_memory=17)(x, memory)
self_attention.MultiHeadAttention(12, 4, n_kv_heads=2, op=FlashAttention(window=3))(x)
cache = self_attention.KVCache(2, 4, 8, 3)
with torch.no_grad():
    self_attention.MultiHeadAttention(12, 4)(x, cache=cache, causal=True)

first = torch.zeros(2, 5, dtype=torch.bool)
causal_conv1d(x, torch.randn(12, 4), torch.randn(12), torch.randn(2, 3, 12), reset=first)
step_bias(7, 0.001, 0.1)
for kind in (recurrent.RNN, recurrent.LSTM, recurrent.GRU):
    kind(12, 7, 2, bidirectional=True)(x, lengths=torch.tensor([5, 2]))
    mixer = recurrent.Recurrent(12, kind(12, 7))
    memory = mixer.new_cache(2)
    mixer(x, cache=memory, reset=first), memory.select(torch.tensor([1, 0]))
recurrent.GRU(12, 7, reset_after=False)(x)
for mixer in (Mamba(12, d_state=7), Mamba2(12, d_state=7, d_head=3, n_groups=2)):
    memory = mixer.new_cache(2)
    mixer(x, cache=memory, reset=first), mixer.step(x[:, 0], memory)
    lm = MambaLM(31, 12, 2, mixer=lambda _, mixer=mixer: mixer)
    ids = torch.zeros(2, 5, dtype=torch.long)
    lm(ids, cache=lm.new_cache(2), reset=first), lm.loss(ids, reset=first)
    lm.generate(ids, 2), lm.generate(ids, 2, temperature=1.0, top_k=3, eos=4, reset=first)

ids = torch.zeros(2, 5, dtype=torch.long)
for added in (positional_encoding.LearnedPositions(9, 12), positional_encoding.Sinusoidal(12)):
    added(4, start=2), added.of_sequences(ids), added.of_sequences(ids, cache=added.new_cache(), reset=first)
positional_encoding.Sinusoidal(12).wavelengths
rotary = relative_positions.Rotary(3, n_turned=2, scaling="yarn", factor=2.0, trained_length=9)
for inside in (rotary, relative_positions.ALiBi(4), relative_positions.RelativeBias(4)):
    inside.turn(torch.randn(2, 4, 5, 3), 2), inside.bias(2, 5)
    self_attention.MultiHeadAttention(12, 4, positions=inside)(x, causal=True)
rotary.frequencies(), relative_positions.reorder_pairs(torch.randn(12, 7), 4, "half", n_turned=2)
transformer.Encoder(12, 4, 48, n_layers=2, norm_first=True)(x, return_weights=True)
encoder = transformer.TextEncoder(31, 9, 12, 4, 48, n_layers=2)
encoder(torch.zeros(2, 5, dtype=torch.long), mask=masks.padding(torch.tensor([5, 2]), 5), return_weights=True)
tasks.relation(tasks.RING, 4)
stack = Decoder(12, 4, 48, n_layers=2, n_kv_heads=2)
stack(x, stack.project(x), memory_mask=masks.padding(torch.tensor([5, 2]), 5), return_weights=True)
whole, lengths = encoder_decoder.EncoderDecoder(31, 12, 4, 48, 2), torch.tensor([5, 2])
whole(ids, ids[:, :3], source_lengths=lengths, return_weights=True)
whole.loss(ids, ids, source_lengths=lengths, target_lengths=lengths, label_smoothing=0.1)
for options in ({"beams": 3, "length_penalty": 0.6}, {"temperature": 1.0, "top_p": 0.9}):
    for cached in (True, False):
        found = whole.generate(ids, 4, bos=1, eos=2, source_lengths=lengths, cached=cached, **options)
search.length_penalty(found.lengths, 0.6), search.select_rows({"x": x}, torch.tensor([1, 1, 0]))
search.greedy(whole.step, torch.tensor([1, 1]), whole.start(ids, 3), max_len=3)
encoder_decoder.from_torch(torch.nn.Transformer(12, 4, 1, 1, 48))

pixels, ids = torch.randn(2, 3, 10, 10), torch.randint(30, (2, 5))
seen = towers.VisionTower(10, 5, 12, 3, 19, 1, class_token=False, pool=towers.AttentionPool(12, 3, 19))
for place in (towers.at_highest_id, towers.at_last, lambda given: towers.FirstOf(int(given[0, 0]))(given[:1])):
    read = towers.TextTower(31, 5, 12, 3, 19, 1, place=place)
    read(ids[:1]), read.features(ids), seen.features(pixels), seen.positions(3, 4)
for kind in (clip.CLIP, clip.SigLIP):
    both = kind(seen, towers.TextTower(31, 5, 12, 3, 19, 1), 7, d_image=12, d_text=12)
    both(pixels, ids[:1]), both.loss(pixels, ids), both.scale, both.shift
    clip.zero_shot_weights(both, [ids, ids[:1]]), clip.zero_shot_classifier(both, [ids])
marks = torch.tensor([[1, 3, 1, 5], [2, 1, 4, 6]])
resampler = perceiver.PerceiverResampler(10, 3, n_layers=1, n_heads=2, d_head=4, n_frames=2)
with_images = flamingo.Flamingo(
    torch.nn.Identity(), GPT(31, 12, 2, 3, max_len=20), resampler, mark=1, d_vision=10, n_heads=2, d_head=4
)
projected = llava.Llava(
    torch.nn.Identity(), GPT(31, 12, 2, 3, max_len=20), llava.Projector(10, 12), mark=1, d_vision=10
)
for model, shown in ((with_images, torch.randn(3, 2, 7, 10)), (projected, torch.randn(3, 4, 10))):
    model(marks, shown), model.loss(marks, shown, reset=marks == 5), model.generate(marks, 2, shown, reset=marks == 2)
    with torch.no_grad():
        model(marks, shown, cache=model.new_cache(2))
    model.tokens(shown), model.language_model.loss_at(torch.randn(2, 4, 12), marks)
with_images.gated_layers[0].openness(), flamingo.last_image(marks == 1, marks == 5)
llava.PatchFeatures(towers.VisionTower(10, 5, 12, 3, 19, 2))(torch.randn(2, 3, 10, 10))

z, t = contrastive.unit_vectors(torch.randn(5, 7)), contrastive.unit_vectors(torch.randn(5, 7))
contrastive.softmax_loss(z, t, 9.0), contrastive.sigmoid_loss(z, t, 9.0, -1.0, chunk=2)
retrieval.recall(z @ t.T), retrieval.found(z @ t[:3].T, 2, relevant=torch.ones(5, 3, dtype=torch.bool))
modality_gap(z, t)

a, b = torch.rand(2, 5, 3), torch.randn(2, 5, 3)
linear_recurrence(a, b), linear_recurrence(a[:, :1], b + 0j, torch.zeros(2, 3), impl="parallel")
A, B = hippo.legt(6, 2.0)
state_space.run(torch.randn(2, 5, 1).double(), *state_space.discretize(0.1, A, B), torch.zeros(2, 6).double())
for states in (hippo.legt_states(torch.randn(2, 3, 7), 4, 5.0), hippo.legs_states(torch.randn(7), 4)):
    hippo.reconstruct(states, torch.linspace(0, 1, 9))
hippo.project(torch.randn(2, 3, 7), 4)
for op in (s4d.recurrence, s4d.convolution, s4d.scan):
    layer = s4d.S4D(5, 8, init=s4d.s4d_lin, op=op)
    y, state = layer(torch.randn(2, 7, 5), return_state=True)
    layer.step(torch.randn(2, 5), state), layer(torch.randn(2, 7, 5), state)

u, delta, A, D = torch.randn(2, 5, 6), torch.rand(2, 5, 6), -torch.rand(6, 3), torch.randn(6)
first = torch.zeros(2, 5, dtype=torch.bool)
for B in (torch.randn(2, 5, 3), torch.randn(2, 5, 2, 3), torch.randn(6, 3)):
    for impl in ("reference", "auto"):
        y, state = selective_scan(u, delta, A, B, B, D, u, D, True, reset=first, impl=impl)
    selective_scan_matrix(delta, A, B, B, D, D, True, reset=first)
selective_scan_step(u[:, 0], delta[:, 0], A, torch.randn(2, 3), torch.randn(2, 2, 3), D, u[:, 0], D, True, state)
x, delta, A, B = torch.randn(2, 5, 6, 7), torch.rand(2, 5, 6), -torch.rand(6), torch.randn(2, 5, 3, 4)
for impl in ("reference", "auto"):
    y, state = ssd(x, delta, A, B, B, D, x, D, True, reset=first, impl=impl)
ssd_step(x[:, 0], delta[:, 0], A, B[:, 0], B[:, 0], D, x[:, 0], D, True, state)
ssd_matrix(delta, A, B, B)
tasks.selective_copying(4, 9), tasks.copying(4, 9, gap=2), tasks.recall(4, 9)
x = torch.randn(2, 5, 12)

minilm = load_minilm()
minilm.encode(["two", "sentences here"]), minilm.layers(["one"]), minilm.attention("one")

try:
    self_attention.SelfAttention(12)(x[0])
except Exception as error:
    print("refused:", type(error).__name__)
"""


def test_every_public_call_has_the_shapes_that_its_signature_states():
    ran = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == "refused: TypeCheckError\n"  # so the check was really on
