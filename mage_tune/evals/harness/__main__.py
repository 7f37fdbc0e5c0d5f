"""lm-evaluation-harness's own command line with our model in it.

    python -m mage_tune.evals.harness run --model mage_tune --model_args pretrained=PATH --tasks gsm8k

The released lm-eval finds no models outside itself, so something has to import ours first.
"""

from lm_eval.__main__ import cli_evaluate

from mage_tune.evals.harness import model  # noqa: F401 - registers "mage_tune"

if __name__ == "__main__":
    cli_evaluate()
