"""The bar of sample.py."""
import time

from tqdm import tqdm

from support.trained_model import Model


class Progress:
    """A bar that also moves while a large image is made, and what an image took."""

    def __init__(self, model: Model, total: int, traced: bool):
        self.model, self.traced, self.clock = model, traced, time.perf_counter()
        self.bar = tqdm(total=total, disable=None, dynamic_ncols=True, unit="image", miniters=0)

        def tick(*_):
            self.bar.update(0)

        model.net.register_forward_pre_hook(tick)

    def cost(self) -> str:
        """--trace's own evaluations included. An evaluation in tiles counts as one."""
        self.bar.close()
        n, seconds = max(self.model.images, 1), time.perf_counter() - self.clock
        trace = " with the trace" if self.traced else ""
        return f"{self.model.rows / n:.0f} NFE{trace}, {seconds / n:.3g} s an image"
