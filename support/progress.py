"""The bar of sample.py."""
import time

from tqdm import tqdm

from support.trained_model import Model

FORMAT = "{percentage:3.0f}%|{bar}| {n:.4g} of {total} images [{elapsed}, {remaining} left]"


class Progress:
    """A bar in images, which also moves while one is made, by the network's evaluations of its tiles."""

    def __init__(self, model: Model, total: int, traced: bool):
        self.model, self.traced, self.done, self.clock = model, traced, 0, time.perf_counter()
        self.bar = tqdm(total=total, disable=None, dynamic_ncols=True, bar_format=FORMAT, miniters=0)
        if not self.bar.disable:
            model.net.register_forward_hook(self.tick)

    def tick(self, net, inputs, output):
        share = len(output) / (self.model.passes * self.model.evaluations)  # of an image
        self.bar.update(min(share, self.bar.total - self.bar.n))

    def finished(self, images: int):
        """They are made, or can't be."""
        self.done += images
        self.bar.update(self.done - self.bar.n)

    def cost(self) -> str:
        """--trace's own evaluations included. An evaluation in tiles counts as one."""
        self.bar.close()
        n, seconds = max(self.model.images, 1), time.perf_counter() - self.clock
        trace = " with the trace" if self.traced else ""
        return f"{self.model.rows / n:.0f} NFE{trace}, {seconds / n:.3g} s an image"
