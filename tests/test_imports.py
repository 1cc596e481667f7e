"""The package is layered; these tests read its import statements and hold the layers apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "titans"

# What stands in each folder, lowest first. A line may import from the lines above it, not from its own.
# `__init__` is the folder's own file; where it is not named it stands last. See docs/guides/structure.md.
ORDER = {
    "titans": """
        state state_header locks
        memory_file
        memory
        nn
        hf
        stream
        data
        baselines
        train zoo evaluate
        inspection
        experiments
        serve
        cli
        __main__
        """,
    "titans.memory": """
        registry decay state precision network
        objectives
        rules
        inner
        problem
        checks
        reference
        chunkwise
        backends
        scan
        """,
    "titans.memory.chunkwise": """
        chunk columns
        groups windows
        delta_block
        formed delta
        anchored
        scan
        """,
    "titans.memory.backends": """
        known
        native triton
        __init__
        traced
        """,
    "titans.nn": """
        kernels
        packing norm rotary whitening
        mlp pieces
        conv combine context
        attention memory adaptation
        blocks association residual
        """,
    "titans.nn.blocks": """
        settings protocol
        mac_segments
        attention hope lmm lstm mac mag mal rwkv7 window
        __init__
        """,
    "titans.nn.memory": """
        form features half_lives initial_weights heads starts
        learner
        token
        layer
        __init__
        caching continuum self_modifying tnt
        """,
    "titans.nn.memory.caching": """
        checkpoints
        layer
        __init__
        """,
    "titans.nn.adaptation": """
        head state
        layer
        """,
    "titans.nn.association": """
        keys gates state words
        layer
        """,
    "titans.nn.memory.tnt": """
        key_space shards
        layer
        """,
    "titans.hf": """
        flat_config presets state_file weights_file offload fingerprint parts
        known_fields
        memory_configuration
        configuration keywords state_cache memory_sentence
        cache causal_cache
        generation layer
        modeling
        classification forecasting
        graft
        """,
    "titans.hf.graft": """
        rotation base_cache window layers lora
        base_checks
        base
        memories
        configuration
        cache feature_cache
        folder
        modeling
        make
        """,
    "titans.hf.graft.memories": """
        protocol
        adaptation association residual
        """,
    "titans.serve": """
        errors extract answer choosing settings metrics
        bodies uploads shapes engine
        memories
        service
        events guard
        completions memory_routes
        app
        listening
        """,
    "titans.stream": """
        text tokenizer model live turns
        causal
        reader
        saved rows
        session_state
        session
        together decoding
        reading
        """,
    "titans.stream.reading": """
        sources pieces
        survey
        reading
        """,
}


def ranks(folder: str) -> dict[str, int]:
    """Name → line of `ORDER[folder]`."""
    lines = ORDER[folder].split("\n")
    found = {name: rank for rank, line in enumerate(lines) for name in line.split()}
    return {"__init__": len(lines)} | found


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Full dotted names that `source` imports anywhere: `from a.b import c` gives `a.b.c`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*parents, *([origin] if origin else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def place(name: str, known: frozenset[str]) -> list[str]:
    """Path of the file that a dotted name lies in; a folder's own file is its `__init__`."""
    while name not in known:
        name = name.rpartition(".")[0]
    is_folder = any(other.startswith(f"{name}.") for other in known)
    return [*name.split("."), *(["__init__"] if is_folder else [])]


def disorder(own: list[str], target: list[str]) -> str | None:
    """Why a file may not import from another, both as paths of `place`, or None."""
    common = next(i for i, (a, b) in enumerate(zip(own, target, strict=False)) if a != b)
    folder = ".".join(own[:common])
    if folder not in ORDER:
        return None
    order = ranks(folder)
    for name in (own[common], target[common]):
        if name not in order:
            return f"{folder}.{name} has no place: add it to ORDER[{folder!r}] in tests/test_imports.py"
    if order[target[common]] < order[own[common]]:
        return None
    return f"in {folder}, {own[common]} must not import from {target[common]}"


def violation(module: str, imported: str, known: frozenset[str]) -> str | None:
    """Why `module` may not import `imported`, or None."""
    target = imported.split(".")
    own = module.split(".")[1]
    if target[0] == "titans":
        to = place(imported, known)
        if to == ["titans", "__init__"]:
            return None if imported == "titans.__version__" else "only titans.__version__ lives at the root"
        return None if to == place(module, known) else disorder(place(module, known), to)
    if own in ("state", "memory", "nn"):
        # Kernels alone need triton, and are imported where one runs.
        kernels = module.startswith(("titans.memory.backends.triton.", "titans.nn.kernels."))
        allowed = {"torch", "safetensors", *sys.stdlib_module_names, *(["triton"] if kernels else [])}
        return None if target[0] in allowed else f"{own} needs torch and safetensors alone"
    if target[0] == "transformers" and ("cache_utils" in target or target[-1].endswith("Cache")):
        # StateCache is one; CausalCache holds those of other models, and a graft hands one to its base.
        known_by = ("titans.hf.state_cache", "titans.hf.causal_cache", "titans.hf.graft.base_cache")
        return None if module in known_by else f"only {', '.join(known_by)} know the cache API"
    return None


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def all_imports() -> dict[str, set[str]]:
    return {
        module: set(imports(path.read_text(), module, is_package=path.name == "__init__.py"))
        for module, path in MODULES.items()
    }


def test_every_file_has_its_place() -> None:
    for folder in ORDER:
        here = {path.stem for path in PACKAGE.joinpath(*folder.split(".")[1:]).glob("*.py")} | {
            path.parent.name for path in PACKAGE.joinpath(*folder.split(".")[1:]).glob("*/__init__.py")
        }
        missing = here - set(ranks(folder))
        assert not missing, f"{sorted(missing)}: add to ORDER[{folder!r}] in tests/test_imports.py"


def test_every_import_points_downward() -> None:
    known = frozenset(MODULES)
    wrong = [
        f"{module} imports {imported}: {reason}"
        for module in sorted(known - {"titans"})
        for imported in sorted(all_imports()[module])
        if (reason := violation(module, imported, known))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    known = frozenset(MODULES)
    graph = {
        module: {
            ".".join(place(i, known)).removesuffix(".__init__") for i in found if i.startswith("titans.")
        }
        - {module, "titans"}
        for module, found in all_imports().items()
        if module != "titans"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("titans.memory.decay", "import numpy"),
        ("titans.nn.memory.layer", "def f():\n    from einops import rearrange"),
        ("titans.nn.memory.layer", "from ...hf import cache"),
        ("titans.memory.state", "from titans import nn"),
        ("titans.memory.rules", "from titans.memory.chunkwise.chunk import whole_chunks"),
        ("titans.memory.chunkwise.chunk", "from titans.memory.chunkwise import scan"),
        ("titans.memory.registry", "from titans.memory import OBJECTIVES"),
        ("titans.nn.attention.full", "from titans.nn.memory import NeuralMemory"),
        ("titans.nn.unheard_of", "from titans.nn import norm"),
        ("titans.hf.modeling", "from transformers.cache_utils import Cache"),
        ("titans.hf.modeling", "from transformers import DynamicCache"),
        ("titans.stream.session", "from titans.data import load_documents"),
        ("titans.data.batches", "import titans.train.trainer"),
        ("titans.train.trainer", "from titans.evaluate import perplexity"),
        ("titans.stream.session", "from titans import Session"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    found = list(imports(source, module, is_package=False))
    known = frozenset(MODULES) | {module}
    assert any(violation(module, imported, known) for imported in found)


def test_import_titans_is_light_and_lists_its_names() -> None:
    program = (
        "import sys, titans\n"
        "heavy = {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "missing = set(titans.__all__) ^ (set(titans._HOME) | {'__version__'})\n"
        "assert not missing, missing\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_memory_and_layers_load_without_transformers() -> None:
    program = "import sys, titans.memory, titans.nn\nassert 'transformers' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_public_name_is_refused() -> None:
    import titans

    with pytest.raises(AttributeError, match="TitansForCausalLM"):
        _ = titans.TitansForCausalLanguageModel  # type: ignore[attr-defined]
