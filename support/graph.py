"""A training step as one CUDA graph: the host launches its two thousand kernels as one.

A fast GPU runs them sooner than the host can launch them one by one. A graph holds addresses, not values: it reads the
batch, the learning rate and the random state where they lay when it was captured. So each batch is copied to that
place, and the streams that the step draws from are registered with the graph.
"""
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from images import one_line
from images.corruptions import Batch

EAGER = 3  # steps before the capture, in which libraries choose their kernels and optimizers make their state


class Graphed:
    """update(pieces of a batch), eager in its first steps and then by a graph, with the same numbers.

    update works in place on the device, never waits for it, and draws from torch's own stream and that of each piece.
    What can't be captured stays eager, and a warning says why.
    """

    def __init__(self, update: Callable[[list[Batch]], None]):
        self.update, self.steps, self.graph = update, 0, None
        self.stream = torch.cuda.Stream()  # a capture needs a stream of its own, and what the first steps leave on it

    def __call__(self, pieces: list[Batch]):
        if self.steps == EAGER:
            self.capture(pieces)
        self.steps += 1
        if self.graph:
            torch._foreach_copy_(tensors(self.pieces), tensors(pieces))
            return self.graph.replay()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.update(pieces)
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, pieces: list[Batch]):
        """Runs a step's Python code once more, while the GPU notes its kernels down and runs none of them."""
        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < "2.14":  # newer ones find the streams themselves
            for piece in pieces:
                graph.register_generator_state(piece.draws.generator)
        try:
            self.pieces = [replace(piece, **{name: x.clone() for name, x in vars(piece).items() if torch.is_tensor(x)})
                           for piece in pieces]
            with torch.cuda.graph(graph, stream=self.stream):
                self.update(self.pieces)
            self.graph = graph
        except RuntimeError as failure:
            warnings.warn(f"training goes on without a CUDA graph, slower on a fast GPU: {one_line(failure)[:200]}")


def tensors(pieces: list[Batch]) -> list[Tensor]:
    return [x for piece in pieces for x in vars(piece).values() if torch.is_tensor(x)]
