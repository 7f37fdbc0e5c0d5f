"""What the Trainer is told at the beginning of a run and between its steps."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers.trainer_callback import TrainerCallback

from mage_tune.backbone import causal_lm, output_head


class OwnIntervals(TrainerCallback):
    """Has a run that goes on log and save as its recipe says now, not as the checkpoint's did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has taken its state from the checkpoint by now."""
        state.compute_steps(args, state.max_steps)


class HoldHead(TrainerCallback):
    """Under DeepSpeed ZeRO-3, leaves the output head whole: the loss runs it outside the model's own forward."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine has taken over the weights by now."""
        for weight in output_head(kwargs["model"]).parameters():
            if hasattr(weight, "ds_id"):
                split: Any = weight
                split.ds_persist = split.is_external_param = True


class PrefetchLayers(TrainerCallback):
    """Under FSDP2, has the weights of a layer gathered while the one after it is in its backward pass.

    FSDP2 does so by itself, but forgets the order of the layers at the end of any backward pass, and the loss has one
    of its own, from the logits, inside the forward pass.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine has taken over the weights by now."""
        layers: Any = causal_lm(kwargs["model"]).model.layers
        for before, layer in pairwise(layers):
            if isinstance(layer, FSDPModule):
                layer.set_modules_to_backward_prefetch([before])


class SparedCollections(TrainerCallback):
    """After the first steps, has Python's garbage collector pass over what is there: modules, compiled code, data.

    A full collection of half a million objects takes as long as one or two steps of a small model, and the device
    waits for it.
    """

    WARM_UP = 2
    """Steps, in which most code is compiled."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is garbage now is collected before."""
        self.steps += 1
        if self.steps == self.WARM_UP:
            gc.collect()
            gc.freeze()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the process as it was."""
        gc.unfreeze()
