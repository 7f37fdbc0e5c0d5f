"""What the data tests share: the byte tokenizer, a family that fits it, SmolLM2's tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from mage_tune.data.tokenizer import MASK_ID, PAD_ID, STOP_ID, byte_tokenizer
from mage_tune.families import CONVERTED

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def family():
    return CONVERTED.with_overrides(block_size=4, mask_id=MASK_ID, stop_ids=(STOP_ID,), pad_id=PAD_ID)


@pytest.fixture(scope="session")
def smollm2():
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip("models/smollm2-135m is not there (python scripts/get_smollm2.py makes it)")
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_family():
    return CONVERTED.with_overrides(mask_id=15, stop_ids=(2,), pad_id=0)


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """write("a.jsonl", records) or ("a.parquet", records) or ("a.txt", text) -> path."""

    def to_file(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl" and not isinstance(content, str | bytes):
            content = "".join(json.dumps(record) + "\n" for record in content)
        if path.suffix == ".parquet" and not isinstance(content, bytes):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".npy":
            np.save(path, content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return to_file
