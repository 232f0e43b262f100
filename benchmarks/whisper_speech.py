"""English sentences in a computer's voice: what `benchmarks/whisper.py` lets Whisper hear.

It needs the program espeak-ng (Debian's package espeak-ng; here version 1.51).
"""

import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from nondual import data
from nondual.data import SPOKEN

RATE = 16_000
RECORDING = Path(data.__file__).parent / "speech.wav"

# Each with the voice that speaks it and its words a minute.
CHOICE = (
    ("A boat left the harbour before the sun came up.", "en-us", 150),
    ("She counted the coins twice and put them back.", "en-us+m3", 140),
    ("Rain fell on the roof all night long.", "en-us", 160),
    ("My brother paints small birds on old plates.", "en-us+m3", 150),
    ("The teacher asked a question that no one answered.", "en-us", 140),
    ("We walked slowly home along the river.", "en-us+m3", 160),
)
HELD_OUT = (
    ("He opened the window because the room was hot.", "en-us", 150),
    ("Two dogs slept under the kitchen table.", "en-us+m3", 140),
    ("The letter arrived three days too late.", "en-us", 160),
    ("Nobody knew where the music came from.", "en-us+m3", 150),
    ("They planted an apple tree behind the school.", "en-us", 140),
    ("What you hear is not what was said.", "en-us+m3", 160),
)


def say(text: str, voice: str = "en-us", speed: int = 150) -> Tensor:
    """What espeak-ng says: (N,) samples, 16,000 a second, the loudest at 0.99.

    Args:
        text: what to say.
        voice: one of espeak-ng's.
        speed: words a minute.
    """
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is needed to speak the sentences: install Debian's package espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/said.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", file, text], check=True, timeout=60)
        with wave.open(file) as sound:
            samples, rate = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768, sound.getframerate()
    if rate != 22_050:
        raise SystemExit(f"espeak-ng must give 22050 samples a second, got {rate}")
    x = torch.from_numpy(resample_poly(samples, 320, 441)).float()  # 22050 · 320 / 441 = 16000
    return 0.99 * x / x.abs().max()


def record(file: Path = RECORDING) -> None:
    """Write the recording of nondual.data.speech: SPOKEN, in 8 bits."""
    samples = (say(SPOKEN) * 128).round().clamp(-128, 127).add(128).to(torch.uint8)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(RATE)
        sound.writeframes(samples.numpy().tobytes())
