"""The recording is the one that the benchmark made, and can be read."""

import torch

from nondual.data import SPOKEN, speech


def test_the_recording_is_six_seconds_between_minus_one_and_one():
    sound = speech()
    assert sound.shape == (96012,) and sound.dtype == torch.float32
    assert sound.abs().max() == 127 / 128
    assert abs(sound.mean()) < 0.01
    loud = sound[:96000].view(-1, 1600).square().mean(1).sqrt() > 0.01  # tenths of a second
    assert not loud[29:32].any() and not loud[57:].any()  # between the two sentences, and at the end
    assert loud[[*range(14), *range(15, 29), *range(32, 57)]].all()
    assert SPOKEN.count(".") + SPOKEN.count("?") == 2


def test_every_call_gives_a_sound_of_its_own():
    speech().zero_()
    assert speech().any()
