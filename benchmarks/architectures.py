"""What does raise find in every causal language model of transformers?

Each architecture is built tiny and random, captured with symbolic sizes, and rewritten
on copies of its graph: by the default pipeline, whose outputs must equal the graph's,
and by ``sparse-attention``, which must run. One process an architecture, so that one
that crashes or hangs is a row like any other.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import transformers as tf
from torch import fx
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from benchmarks.harness import keep
from graphopt.backend import rewrite
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.copying import copy_module
from graphopt.ir.model_graph import ModelGraph
from graphopt.options import parse_options
from graphopt.report import CompileReport
from graphopt.verify import compare_first_call
from tests.models import capture, padding_mask, token_ids
from tests.tiny_configs import tiny_model

TOKENS = 24
SECONDS = 600  # that one architecture may take
TOLERANCE = 1e-4  # of the largest output
SPARSE = "sparse-attention{sink=4,window=8,force=true}"
DENSE = "sparse-attention{sink=0,window=64,force=true}"  # sees every key
PACKED = "packed-prefill"
QUICK = ("llama", "gpt_oss", "mamba")
# Of MODEL_MAPPING, which also holds the base of every causal model and 400 more: those
# that token ids or pixels suffice to call.
ENCODERS = (
    "albert", "bert", "camembert", "clip_text_model", "clip_vision_model", "convbert",
    "data2vec-vision", "deberta", "deberta-v2", "deit", "dinov2", "distilbert",
    "electra", "ernie", "eurobert", "flaubert", "fnet", "funnel", "layoutlm",
    "longformer", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "nystromformer",
    "roberta", "siglip_vision_model", "squeezebert", "vit", "vit_mae", "vit_msn",
    "xlm-roberta", "yolos",
)  # fmt: skip

Row = dict[str, Any]


def main(quick: bool = False, names: Iterable[str] = ()) -> dict[str, Any]:
    """Go over all architectures; print each row as it is known."""
    chosen = list(names) or list(QUICK if quick else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    cases = [(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name)) for name in chosen]
    if not quick and not names:
        cases += [(name, None) for name in ENCODERS]
    rows = []
    for name, model_class in cases:
        rows.append(_isolated(name, model_class or _encoder(name)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return keep("architectures", rows, summary(rows), quick=quick or bool(names))


def _encoder(name: str) -> str:
    found = MODEL_MAPPING_NAMES[name]
    return found if isinstance(found, str) else found[0]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Count the rows by outcome, and the reasons for what was not raised."""
    reasons = Counter(r for row in rows for r in _reasons(row))
    return {
        "architectures": len(rows),
        "built": sum(row["built"] for row in rows),
        "captured": sum(row.get("graphs", 0) > 0 for row in rows),
        "all_raised": sum(_all_raised(row) for row in rows),
        "no_attention": sum(_no_attention(row) for row in rows),
        "lossless_changed": sum(row.get("difference", 0.0) > TOLERANCE for row in rows),
        "failed": sum(bool(row.get("failure")) for row in rows),
        "reasons": dict(reasons.most_common()),
    }


def _reasons(row: Row) -> set[str]:
    return {*row.get("unsupported", ()), *row.get("not_raised", ())}


def _all_raised(row: Row) -> bool:
    return row.get("sites", 0) > 0 and not _reasons(row)


def _no_attention(row: Row) -> bool:
    return "sites" in row and not row["sites"] and not _reasons(row)


def _isolated(name: str, model_class: str) -> Row:
    """Run one architecture in a child; a child that dies or hangs gives a row too."""
    row: Row = {"name": name, "class": model_class, "built": False}
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(sender, name, model_class), daemon=True
    )
    child.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(SECONDS) else None
        row |= answer or {"failure": f"over {SECONDS} s"}
    except EOFError:
        child.join()
        row["failure"] = f"the process died with {child.exitcode}"
    child.kill()
    child.join()
    return row


def _child(sender: Any, name: str, model_class: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    row: Row = {}
    try:
        model = tiny_model(name, getattr(tf, model_class))
        row["built"] = True
        _measure(row, model)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).splitlines()[0] if str(error) else ""
        row["failure"] = f"{type(error).__name__}: {text[:160]} ({where.name})"
    sender.send(row)


@torch.no_grad()
def _measure(row: Row, model: torch.nn.Module) -> None:
    difference, dense, packed = 0.0, 0.0, 0.0
    for inputs in model_inputs(model):
        for gm in capture(model, **inputs):
            fold_float_attributes(gm)
            gm.recompile()
            _describe(row, ModelGraph(gm))
            difference = max(difference, _changed(row, gm, None))
            # Rows of padding, which see no key, are not the same to an inexact pass.
            if "attention_mask" not in inputs:
                dense = max(dense, _changed(row, gm, DENSE))
            else:
                packed = max(packed, _packed(row, gm, inputs["attention_mask"]))
            _changed(row, gm, SPARSE)
    row |= {"difference": difference, "dense_difference": dense}
    row |= {"packed_difference": packed}


def _describe(row: Row, view: ModelGraph) -> None:
    """Add up what raise found over the graphs of the model."""
    row["graphs"] = row.get("graphs", 0) + 1
    row["sites"] = row.get("sites", 0) + len(view.attention)
    patterns = row.setdefault("patterns", [])
    patterns += [s.pattern for s in view.attention if not s.unsupported]
    unsupported = row.setdefault("unsupported", [])
    unsupported += [_general(s.unsupported) for s in view.attention if s.unsupported]
    left = row.setdefault("not_raised", [])
    left += [_general(text) for _, code, text in view.missed() if code == "not-raised"]


def _general(reason: str) -> str:
    """Drop numbers, so that the same reason of two models counts twice."""
    return re.sub(r"\d+", "#", reason)[:160]


def _changed(row: Row, gm: fx.GraphModule, config: str | None) -> float:
    """Return the largest difference that ``config`` makes, of the largest output."""
    copy, arguments = copy_module(gm), gm.meta["arguments"]
    report, _ = rewrite(copy, parse_options({"config": config}))
    _count(row, report, config)
    if not any(record.changed for record in report.records):
        return 0.0
    found: list[tuple[float, float]] = []
    check = compare_first_call(gm, copy, lambda *figures: found.append(figures))
    check(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    worst, largest = found[0]
    return worst / max(largest, 1e-6)


def _packed(row: Row, gm: fx.GraphModule, mask: torch.Tensor) -> float:
    """Return the largest difference of real tokens when prompts lie end to end."""
    copy = copy_module(gm)
    report, _ = rewrite(copy, parse_options({"config": PACKED}))
    _count(row, report, PACKED)
    if not any(record.changed for record in report.records):
        row["packed_refused"] = [_general(r.message) for r in report.all_remarks()]
        return 0.0
    worst = 0.0
    with torch.no_grad():
        results = (module(*gm.meta["arguments"]) for module in (gm, copy))
    for before, after in zip(*results, strict=True):
        if isinstance(before, torch.Tensor) and before.is_floating_point():
            want, got = (_real(x, mask) for x in (before, after))
            scale = max(float(want.abs().max()), 1e-6)
            worst = max(worst, float((want - got).abs().max()) / scale)
    return worst


def _real(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hide padding in an output whose rows have tokens on some axis."""
    axes = [axis for axis, size in enumerate(x.shape) if axis and size == TOKENS]
    if not axes or x.shape[0] != mask.shape[0]:
        return x
    shown = mask.view(
        mask.shape[0], *(TOKENS if a == axes[0] else 1 for a in range(1, x.ndim))
    )
    return x * shown


def _count(row: Row, report: CompileReport, config: str | None) -> None:
    remarks = report.all_remarks()
    applied = sum(r.code == "rewritten" for r in remarks)
    keys = {None: "lossless", DENSE: "dense", SPARSE: "sparse", PACKED: "packed"}
    key = keys[config]
    row[key] = row.get(key, 0) + applied
    failures = [r.message for r in remarks if r.kind == "failure"]
    if failures:
        row["failure"] = failures[0][:200]


def model_inputs(model: Any) -> list[dict[str, Any]]:
    """Return the inputs of an unpadded call, and of a padded one where masks exist."""
    names = inspect.signature(model.forward).parameters
    if "pixel_values" in names and model.main_input_name == "pixel_values":
        return [{"pixel_values": _noise(2, 3, *_image(model))}]
    ids = token_ids(2, TOKENS)
    plain = {"input_ids": ids, "use_cache": True}
    mask = padding_mask([TOKENS, 9], TOKENS)
    padded = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    calls = [plain, padded] if "attention_mask" in names else [plain]
    return [{k: v for k, v in call.items() if k in names} for call in calls]


def _image(model: Any) -> tuple[int, int]:
    size = getattr(model.config, "image_size", 32)
    return (size, size) if isinstance(size, int) else tuple(size)


def _noise(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    print(json.dumps(main(names=sys.argv[1:])["summary"], indent=1))
