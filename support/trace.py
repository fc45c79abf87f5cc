"""The iterative process of a sampler, as a strip and as a GIF, at any size of the image and any number of steps."""
import os

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from images.files import save_image
from images.pictures import grid, strip, titled


class Frames(list):
    """A trace, see ode_int.solve, of at most 64 frames, evenly spread over the steps; all but the newest small."""

    def __init__(self, sides, largest=256):
        self.sides, self.shrink, self.every, self.seen = sides, -(-max(sides) // largest), 1, 0

    def append(self, frame):
        if self.seen % self.every == 0:
            self[-1:] = map(self.small, self[-1:])
            super().append(frame)
        self.seen += 1
        if len(self) > 64:
            del self[1::2]
            self.every *= 2

    def until(self, sample: Tensor) -> list:
        """All of them small, and the sample itself at the end."""
        return [*self[:-1], self.small(self[-1]), self.small((1.0, sample, sample))]

    def small(self, frame):
        t, *pictures = frame
        pictures = (p[:, :, :self.sides[0], :self.sides[1]].float() for p in pictures)
        return t, *(F.avg_pool2d(p, self.shrink, ceil_mode=True).cpu() for p in pictures)


def save_trace(path: str, frames: list, rows: slice):
    """Beside the picture `path`: NAME_trace.png, the strip, and NAME_trace.gif, state | clean estimate over time."""
    base, frames = os.path.splitext(path)[0], [(t, state[rows], clean[rows]) for t, state, clean in frames]
    save_image(base + "_trace.png", Image.fromarray(strip(frames)))
    titles = ["state", "clean estimate"]
    first, *others = [Image.fromarray(titled(titles, [grid(state), grid(clean)])) for _, state, clean in frames]
    duration = [100] * len(others) + [2000]  # ms
    save_image(base + "_trace.gif", first, save_all=True, append_images=others, loop=0, duration=duration)
