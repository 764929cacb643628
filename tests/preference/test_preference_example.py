"""The shipped example runs as it stands and shows what it promises; the whole proof is `tests.benchmarks.preference_on_mini`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "preference_loop.py"


@pytest.mark.thorough
def test_from_simulated_ratings_to_an_adapter_that_unseen_prompts_gain_from(tmp_path):
    """With wrong answers in 15 of 100, so at most 0.85 of them can be foreseen."""
    result = subprocess.run([sys.executable, str(EXAMPLE), "--out", str(tmp_path), "--methods", "dpo"], cwd=EXAMPLE.parents[1], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])})
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["reward"]["accuracy"] >= 0.8
    assert found["best_of_8"]["low"] > 0
    assert found["dpo"]["low"] > 0 and found["dpo"]["kl"] <= 30 and Path(found["dpo"]["sheet"]).is_file()
