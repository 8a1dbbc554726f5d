"""The example of SWS, on digits of a made-up wheel: every phase, one epoch each."""

from __future__ import annotations

import gzip
import json
import zipfile

import torch

from examples.sws.run import main


def test_every_phase_and_the_report(tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 17, (525, 65), generator=generator)
    table[:, 64] = table[:, 0] % 10
    lines = "\n".join(",".join(map(str, row)) for row in table.tolist())
    with zipfile.ZipFile(tmp_path / "digits.whl", "w") as wheel:
        packed = gzip.compress(lines.encode())
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", packed)
    arguments = ["--wheel", str(tmp_path / "digits.whl"), "--work", str(tmp_path)]
    out = tmp_path / "digits.md"
    arguments += ["--out", str(out), "--quick", "--seeds", "3,4"]
    assert main(arguments) == out
    first = out.read_text()
    rows = json.loads(out.with_suffix(".json").read_text())
    kinds = [row["kind"] for row in rows if row["seed"] == 3]
    assert kinds == ["teacher", "auxiliary"] + ["descendant", "scratch", "scratch"] * 3
    assert all(0.0 <= row["accuracy"] <= 1.0 for row in rows)
    assert "stages of [2, 2, 2, 2] layers" in first
    assert "4 layers: after 1 epoch(s)" in first
    main(arguments)  # nothing is trained again
    assert out.read_text() == first
