"""CUDA graphs of the engine's steps: captured at first use, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from mage_kernels.overlap import overlapping


class Graphs:
    """Runs steps: as they are, or as CUDA graphs.

    A step reads and writes tensors that outlive it, `state` among them, and returns nothing; so all graphs can share
    one pool of scratch memory. What is not in `state` may be written by a rehearsal without harm.
    """

    def __init__(self, is_used: bool, state: Sequence[Tensor]) -> None:
        self.is_used = is_used
        self.state = state
        self._graphs: dict[str, tuple[Hashable, torch.cuda.CUDAGraph]] = {}
        self._pool = torch.cuda.graph_pool_handle() if is_used else None

    def run(self, name: str, depends_on: Hashable, step: Callable[[], None]) -> None:
        """Do a step; its graph is captured anew when what it depends on has changed."""
        if not self.is_used:
            step()
            return
        if name not in self._graphs or self._graphs[name][0] != depends_on:
            self._graphs[name] = depends_on, self._capture(step)
        self._graphs[name][1].replay()

    def __len__(self) -> int:
        return len(self._graphs)

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        saved = [tensor.clone() for tensor in self.state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with overlapping(), torch.cuda.stream(stream):  # compiles and tunes what has to be, outside of the graph
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(self.state, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with overlapping(), torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph
