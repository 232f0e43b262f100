"""The log-mel spectrogram against transformers' own, the bands by their definition, and what the door refuses."""

import pytest
import torch

from nondual.data import speech
from nondual.pretrained.log_mel import log_mel, mel_bands


@pytest.fixture(scope="module")
def theirs():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80)


def noise(n, scale=0.1):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(n))


SOUNDS = {
    "speech": speech(),
    "noise": noise(50_000),
    "loud": noise(20_000, 3.0),
    "a click": noise(1),
    "silence": torch.zeros(1000),
}
SOUNDS["30 s and more"] = noise(490_000)


@pytest.mark.parametrize("name", SOUNDS)
def test_it_equals_that_of_transformers(theirs, name):
    sound = SOUNDS[name]
    expected = theirs(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    found = log_mel(sound[None])
    assert found.shape == (1, 80, 3000)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_mel(sound[None].double()).float(), expected, atol=1e-4, rtol=0)


def test_each_sound_of_a_batch_has_its_own_loudest_band():
    both = torch.stack([noise(5000, 0.001), noise(5001, 0.5)[1:]])
    together = log_mel(both, seconds=1.0)
    assert together.shape == (2, 80, 100)
    for row, sound in zip(together, both):
        torch.testing.assert_close(row, log_mel(sound[None], seconds=1.0)[0])


def test_the_bands_equal_those_of_transformers():
    from transformers.audio_utils import mel_filter_bank

    for n_mels, window, rate in ((80, 400, 16_000), (128, 400, 16_000), (13, 64, 2000), (40, 512, 22_050)):
        judge = mel_filter_bank(window // 2 + 1, n_mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
        torch.testing.assert_close(
            mel_bands(n_mels, window, rate), torch.from_numpy(judge).T.double(), atol=1e-9, rtol=0
        )


def test_a_tone_is_in_the_band_of_its_frequency():
    time = torch.arange(16_000, dtype=torch.float64) / 16_000
    for hertz in (300.0, 1000.0, 3000.0):
        loudest = log_mel(torch.sin(2 * torch.pi * hertz * time)[None], seconds=1.0)[0, :, 50].argmax()
        at = torch.linspace(0, 8000, 201, dtype=torch.float64)
        centre = at[mel_bands(80, 400, 16_000)[loudest].argmax()]
        assert abs(centre - hertz) <= 80  # two of the window's frequencies


def test_gradients_reach_the_sound():
    sound = noise(2000).double()[None].requires_grad_()
    log_mel(sound, seconds=0.1).sum().backward()
    assert sound.grad is not None and sound.grad.isfinite().all() and sound.grad[0, :1600].any()


def test_what_is_no_sound_is_refused():
    with pytest.raises(TypeError, match="sound must be a Tensor, got list"):
        log_mel([0.0])
    for wrong in (torch.zeros(5), torch.zeros(1, 5, dtype=torch.int16), torch.zeros(1, 5, 1)):
        with pytest.raises(ValueError, match=r"sound must be floating \(B, N\), got"):
            log_mel(wrong)
    with pytest.raises(ValueError, match=r"seconds must be 0.025 or more, one window, got 0.02"):
        log_mel(torch.zeros(1, 5), seconds=0.02)


def test_autocast_changes_nothing():
    sound = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    plain = log_mel(sound, seconds=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        within = log_mel(sound, seconds=0.25)
    assert within.dtype == torch.float32 and torch.equal(within, plain)
