"""Launch target of a training run; does what `mage-tune train RECIPE` does.

    accelerate launch mage_tune/train.py recipes/7b.yaml [--set train.steps=100 ...]
    accelerate launch -m mage_tune.train recipes/7b.yaml

It defines no class: launched by path this file is `__main__`, and a second copy imported as mage_tune.train would make
two of everything and break pickles.
"""

import os
import sys

_launcher = os.getppid()  # before anything takes time: it may end while we start
_here = os.path.dirname(os.path.abspath(__file__))
if _here in sys.path:  # launched by path: offer the checkout, not the inside of the package
    sys.path[sys.path.index(_here)] = os.path.dirname(_here)

from mage_tune.cli import main
from mage_tune.launcher import stop_with_launcher

if __name__ == "__main__":
    stop_with_launcher(_launcher)
    main(["train", *sys.argv[1:]])
