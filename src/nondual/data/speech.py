"""A short recording: six seconds of English in a computer's voice, two sentences.

Source: the sentences were written for this project, and spoken by eSpeak NG 1.51 (voice en-us, 150 words a minute);
`nox -s bench -- whisper --record` made the file speech.wav beside this one: 16,000 samples a second, 8 bits each.
Four wordings were tried at three speeds; this is the one of them that Whisper tiny.en hears rightly, so it says nothing
of how often the model hears such a voice rightly. Licence: CC BY 4.0.
"""

import wave
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SPOKEN = "The cat sat on the mat because it was warm. Who hears the words before they are spoken?"
"""What is said in it."""


def speech() -> "Tensor":
    """The recording: (96012,) samples between -1 and 1, 16,000 a second, float32."""
    import torch

    with files("nondual.data").joinpath("speech.wav").open("rb") as file, wave.open(file) as sound:
        samples = bytearray(sound.readframes(sound.getnframes()))
    return (torch.frombuffer(samples, dtype=torch.uint8).float() - 128) / 128
