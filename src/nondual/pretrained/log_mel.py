"""Sound as a picture that a network reads: the log-mel spectrogram of Whisper.

Every 10 ms a window of 25 ms is taken, and the power of its frequencies is summed in 80 bands that are evenly spaced on
the mel scale, on which equal steps sound about equal to us; then the logarithm. Source: Radford et al. 2022
(2212.04356), section 2.2; the scale is that of Slaney's Auditory Toolbox (1998). Symbols: N samples, T frames.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors

RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples: 25 ms and 10 ms
SECONDS = 30  # that the model reads at once
N_MELS = 80


def log_mel(sound: Float[Tensor, "b n"], *, seconds: float = SECONDS) -> Float[Tensor, "b mels t"]:
    """The spectrogram of a sound of 16,000 samples a second, between about -1 and 1: (B, 80, T), T = 100 · seconds.

        log10 of each band's power, nothing below 8 under the greatest;   then (log + 4) / 4

    Args:
        sound: (B, N), samples between -1 and 1. What is shorter than `seconds` is continued by silence, what is longer
            is cut.
        seconds: how much of it is looked at.

    Returns:
        (B, 80, T), in float32, or in float64 where the sound is.

    Raises:
        TypeError: sound is not a tensor.
        ValueError: a sound that is not floating (B, N), or less than one window of 25 ms asked for.
    """
    check_tensors({"sound": sound})
    if sound.ndim != 2 or not sound.is_floating_point():
        raise ValueError(f"sound must be floating (B, N), got {sound.dtype} {tuple(sound.shape)}")
    length = round(seconds * RATE)
    if length < WINDOW:
        raise ValueError(f"seconds must be {WINDOW / RATE} or more, one window, got {seconds}")
    sound = sound.to(torch.promote_types(sound.dtype, torch.float32))[:, :length]
    sound = F.pad(sound, (0, length - sound.shape[1]))
    # --8<-- [start:spectrogram]
    window = torch.hann_window(WINDOW, dtype=sound.dtype, device=sound.device)
    waves = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)  # (B, 201, T + 1)
    power = waves[..., :-1].abs() ** 2
    bands = mel_bands(N_MELS, WINDOW, RATE).to(sound)  # (80, 201)
    with autocast_off(power.device.type):  # it would multiply in half precision
        log = (bands @ power).clamp(min=1e-10).log10()
    log = log.maximum(log.amax((1, 2), keepdim=True) - 8)
    # --8<-- [end:spectrogram]
    return (log + 4) / 4


def mel_bands(n_mels: int, window: int, rate: int) -> Float[Tensor, "mels frequencies"]:
    """What each of n_mels bands takes of each frequency of a window: triangles, each of area 1 over frequency in hertz.

    A band rises from the centre of the one below and falls to the centre of the one above. Centres are even steps from
    0 to rate / 2 on the mel scale: 3 mel for each 200 Hz up to 1000 Hz, above that 27 for each factor of 6.4.

    Args:
        n_mels: how many bands.
        window: samples in a window; it has window / 2 + 1 frequencies.
        rate: samples a second.

    Returns:
        (n_mels, window / 2 + 1), float64.
    """
    knee, step = 15.0, math.log(6.4) / 27  # mel of 1000 Hz; from there on, a mel in natural logarithms
    top = knee + math.log(rate / 2 / 1000) / step if rate > 2000 else 3 * rate / 2 / 200
    mel = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hertz = torch.where(mel < knee, 200 / 3 * mel, 1000 * ((mel - knee) * step).exp())
    low, centre, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    at = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((at - low) / (centre - low), (high - at) / (high - centre)).clamp(min=0)
    return triangles * 2 / (high - low)
