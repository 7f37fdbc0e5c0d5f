"""Make the small, publishable copy of a run's adapter: bfloat16 weights, the base's Hub id, no machine paths.

    python scripts/ship_adapter.py runs/smollm2-135m-convert adapters/smollm2-135m-diffusion \
        --base-id HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COPIED = ("mage_tune.json", "metrics.jsonl", "versions.json")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--base-id", required=True, help="Hub id of the base model, recorded in the adapter's config")
    arguments = parser.parse_args()
    if not (arguments.run / WEIGHTS).is_file():
        print(f"error: {arguments.run}: no {WEIGHTS}; is the run finished?", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(arguments.run / WEIGHTS).items()}
    save_file(weights, arguments.out / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((arguments.run / CONFIG).read_text()) | {"base_model_name_or_path": arguments.base_id}
    (arguments.out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in COPIED:
        shutil.copy(arguments.run / name, arguments.out / name)
    size = (arguments.out / WEIGHTS).stat().st_size
    print(f"wrote {arguments.out}: {len(weights)} tensors, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
