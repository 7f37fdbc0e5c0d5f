"""Two results against each other, sample by sample: `mage-tune eval --compare A B`.

Results of different settings, prompts or precision are refused: the difference would say as much about the settings as
about the models. `--force` compares what can be paired all the same, and says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mage_tune.evals.report import MARKS, make_row, number, plain_table, signed
from mage_tune.evals.results import FORMAT, difference


def compare_files(a: str, b: str, *, force: bool = False) -> dict[str, Any]:
    """Print the comparison of two results.

    Args:
        a, b: results.json, or folders that hold one; b is read against a.
        force: compare results whose settings differ.

    Raises:
        ValueError: as `read_result` and `compare` do.
    """
    found = compare(read_result(a), read_result(b), force=force)
    console = Console(highlight=False)
    for line in found["differing"]:
        console.print(f"differs: {line}", style="yellow")
    console.print(f"A: {a} ({found['sides'][0]})   B: {b} ({found['sides'][1]})")
    rows = []
    for key in found["metrics"]:
        row = make_row(found, key)
        assert row.difference is not None and row.verdict is not None
        change = row.difference
        name = f"{key} {row.direction}"
        values = [number(estimate.mean) for estimate in row.arms.values()]
        rows.append([name, *values, signed(change.mean), row.interval, row.score, MARKS[row.verdict]])
    console.print(plain_table(["number", "A", "B", "B - A", "95 % interval", "won/tied/lost", ""], rows))
    return found


def read_result(path: str | Path) -> dict[str, Any]:
    """results.json, given as the file or as a folder that holds it.

    Raises:
        ValueError: not there, damaged, or of an older version.
    """
    given = Path(path)
    places = [given] if given.suffix == ".json" else [given / "results.json", given / "eval" / "results.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{given}: no results there (looked for {' and '.join(map(str, places))})")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged ({error}); evaluate again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file}: written by another version of mage_tune; evaluate again")
    return found


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps two results from being compared, a line each: tasks whose settings, decoding or prompts differ."""
    lines = []
    for name in one["tasks"]:
        if name not in other["tasks"]:
            continue
        a, b = one["tasks"][name], other["tasks"][name]
        for part in ("settings", "decoding"):
            lines += [f"{name}: {part}.{key}: {x!r} against {y!r}" for key, x, y in _differing(a[part], b[part])]
        if a["prompts"] != b["prompts"] and not any(line.startswith(f"{name}:") for line in lines):
            lines.append(f"{name}: the prompts differ (another text, tokenizer or version of the task)")
        for reading in a["arms"].keys() & b["arms"].keys():
            lines += [
                f"{name}: {reading}: {key}: {x!r} against {y!r}"
                for key, x, y in _differing(a["arms"][reading], b["arms"][reading])
            ]
    if one["settings"].get("dtype") != other["settings"].get("dtype"):
        lines.append(f"dtype: {one['settings'].get('dtype')} against {other['settings'].get('dtype')}")
    return lines


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)]


def compare(
    one: Mapping[str, Any], other: Mapping[str, Any], *, sides: tuple[str, str] | None = None, force: bool = False
) -> dict[str, Any]:
    """`other` against `one`, paired sample by sample.

    Args:
        sides: which side of each to take; the adapter where there is one.
        force: compare what can be paired although settings differ.

    Returns:
        {"sides", "metrics": key -> description, "arms": {"A", "B"}, "paired": key -> difference, "differing": lines}.

    Raises:
        ValueError: settings differ, a side is missing, or nothing can be paired.
    """
    differing = differing_settings(one, other)
    if differing and not force:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ValueError(
            f"not comparable: {differing[0]}{more}; evaluate both with the same settings, or compare all the same "
            "with --force"
        )
    usual = tuple("adapter" if "adapter" in result["arms"] else "base" for result in (one, other))
    first, second = sides or usual
    for side, result in ((first, one), (second, other)):
        if side not in result["arms"]:
            raise ValueError(f"no side {side!r} in this result; there are {', '.join(result['arms'])}")
    keys = [
        key
        for key in one["metrics"]
        if key in other["metrics"] and len(one["values"][first][key]) == len(other["values"][second][key])
    ]
    if not keys:
        raise ValueError("not comparable: the two results have no number in common, sample by sample")
    before, after = one["values"][first], other["values"][second]
    return {
        "sides": [first, second],
        "metrics": {key: one["metrics"][key] for key in keys},
        "arms": {
            "A": {key: one["arms"][first][key] for key in keys},
            "B": {key: other["arms"][second][key] for key in keys},
        },
        "paired": {key: difference(after[key], before[key], one["metrics"][key]) for key in keys},
        "differing": differing,
    }
