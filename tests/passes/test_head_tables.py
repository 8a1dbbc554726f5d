"""Heads tables as MInference and DuoAttention publish them, and graphopt's own."""

from __future__ import annotations

import functools
import json

import pytest

from graphopt.config import load_config
from graphopt.errors import ConfigError, PassError
from graphopt.ir.match import op_name
from graphopt.passes.attention.head_tables import read_table
from graphopt.pipeline import PipelineOptions, run_passes
from tests.models import TINY, capture, copy_graph, token_ids

HEADS = {
    "0": ["vertical_and_slash", 40, 130, 0.9],
    "1": ["stream_llm", 4, 8, 0.5],
    "2": ["vertical_and_slash", 30, 50, 0.9],
    "3": ["vertical_and_slash", 35, 100, 0.9],
}


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


@functools.cache
def captured():
    return capture(TINY["llama"](), input_ids=token_ids(1, 200))[0]


def llama():
    return copy_graph(captured())


def rewritten(config, strict=True):
    gm = llama()
    records = run_passes(gm, config.pipeline, PipelineOptions(strict=strict))
    names = ("graphopt.attention", "graphopt.select_vertical_slash")
    return records, [n for n in gm.graph.nodes if op_name(n) in names]


def test_minference(tmp_path):
    path = write(tmp_path, "table.json", json.dumps([HEADS, HEADS]))
    text = f'sparse-attention{{force=true,table="{path}"}}'
    _, nodes = rewritten(load_config(text))
    tables = ([30, 4, 30, 30], [100, 8, 100, 100], [10, 0, 0, 5], [30, 0, 0, 0])
    assert [n.args[3:7] for n in nodes] == [tables, tables]


def test_duo_attention(tmp_path):
    path = write(tmp_path, "gates.tsv", "0.9\t0.1\n0.2\t1.5\n")
    text = f'sparse-attention{{force=true,table="{path}"}}'
    _, nodes = rewritten(load_config(text))
    wide = (2**31 - 1) // 64 * 64
    assert [n.args[4:7] for n in nodes] == [
        ("streaming", [0, 0, 64, 64], [wide, wide, 256, 256]),
        ("streaming", [64, 64, 0, 0], [256, 256, wide, wide]),
    ]


@pytest.mark.parametrize(("share", "streaming"), [(0.0, 0), (0.5, 2), (0.75, 3)])
def test_the_quantile_of_gates_breaks_ties_by_place(tmp_path, share, streaming):
    path = write(tmp_path, f"{share}.tsv", "0.5\t0.5\n0.5\t0.5\n")
    layers = read_table(str(path), share).layers
    patterns = [head.pattern for row in layers for head in row]
    assert patterns == ["streaming"] * streaming + ["dense"] * (4 - streaming)


def test_own_table_beside_the_config(tmp_path):
    write(tmp_path, "heads.toml", '[[heads]]\nheads = [1]\npattern = "dense"\n')
    config = write(
        tmp_path,
        "config.toml",
        '[[pass]]\nname = "sparse-attention"\nforce = true\nwindow = 8\nsink = 2\n'
        'table = "heads.toml"\n',
    )
    _, nodes = rewritten(load_config(config))
    assert [n.args[5] for n in nodes] == [[2, 0, 2, 2]] * 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([HEADS], "holds 1 layers, the model 2"),
        ([HEADS, {"0": HEADS["0"]}], "holds 1 heads in layer 1, the model 4"),
    ],
)
def test_a_table_of_another_model_says_both_numbers(tmp_path, layers, message):
    path = write(tmp_path, "table.json", json.dumps(layers))
    config = load_config(f'sparse-attention{{table="{path}"}}')
    records, nodes = rewritten(config, strict=False)
    assert not nodes
    assert [(r.kind, r.code) for r in records[0].remarks] == [("failure", "table-size")]
    assert message in records[0].remarks[0].message
    with pytest.raises(PassError, match=message):
        rewritten(config)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[{", "not valid JSON"),
        ("b.json", "{}", "expected a list of layers"),
        ("c.json", '[{"1": []}]', "layer 0: heads are not 0 to 0"),
        ("d.json", '[{"0": ["stream_llm"]}]', r"layer 0, head 0: expected \[pattern"),
        ("e.json", '[{"0": ["stream", 1, 2, 0]}]', "did you mean 'stream_llm'"),
        ("f.tsv", "0.5\t0.1\n0.5\tx\n", "f.tsv:2: a gate is no number"),
        ("g.toml", "[[heads]]\nwindow = -1\n", "heads.0.window"),
        ("h.yaml", "", "a heads table is .json, .tsv or .toml"),
    ],
)
def test_bad_tables(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message):
        read_table(str(path), 0.5)
    with pytest.raises(ConfigError, match=message):
        load_config(f'sparse-attention{{table="{path}"}}')


def test_a_missing_table(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the heads table"):
        load_config(f'sparse-attention{{table="{tmp_path}/no.json"}}')
