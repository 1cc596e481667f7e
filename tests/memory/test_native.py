"""The compiled backend where it cannot run (a sentence, and the next backend), and paths that only it has."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from titans.memory import MomentumRule, SquaredError
from titans.memory.backends import native
from titans.memory.backends.native import build, missing
from titans.nn import kernels

from ..tolerances import FLOAT64, assert_close
from .problems import answers, assert_same, everything, make_problem


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing.cache_clear()
    yield tmp_path
    missing.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("no-such-compiler", "there is no no-such-compiler"),
        ("false", "compiling it with .*false failed"),
        ("refusing-compiler", "compiling it with .* failed: error: not today"),
    ],
)
def test_without_a_compiler_auto_takes_the_next_backend(cache, monkeypatch, capsys, compiler, sentence):
    script = cache / "refusing-compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: not today" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(cache), prepend=os.pathsep)
    monkeypatch.setenv("CXX", compiler)
    problem = make_problem(time=9)
    with pytest.raises(ValueError, match=f"backend='native' refuses this call: .*{sentence}"):
        problem.scan("native")
    # That there is no compiler is as it may be; that one fails is said.
    assert ("torch takes their place" in capsys.readouterr().err) == ("failed" in sentence)
    assert not list(cache.rglob("*.so"))
    for found, expected in zip(problem.scan("auto")[::2], problem.scan("chunkwise")[::2], strict=True):
        assert torch.equal(found, expected)


def test_a_damaged_library_is_built_again_and_a_sound_one_is_not(cache):
    compiler = cache / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho once >> {cache}/builds\n'
        'while [ "$1" != -o ]; do shift; done; echo "some machine code" > "$2"\n'
    )
    compiler.chmod(0o755)
    library = build._built(str(compiler), build.SOURCES)
    content = library.read_bytes()
    for damaged in (content, content[:5], b"", content[::-1]):
        library.write_bytes(damaged)
        assert build._built(str(compiler), build.SOURCES) == library and library.read_bytes() == content
    assert (cache / "builds").read_text().count("once") == 4
    assert [path.name for path in library.parent.glob("*.so")] == [library.name]


def test_of_several_that_need_a_library_one_compiles(cache):
    compiler = cache / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho once >> {cache}/builds\n'
        'while [ "$1" != -o ]; do shift; done; sleep 0.2; echo "some machine code" > "$2"\n'
    )
    compiler.chmod(0o755)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build._built(str(compiler), build.SOURCES), range(4)))
    assert len({*found}) == 1 and (cache / "builds").read_text().count("once") == 1


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ for x86-64")
@pytest.mark.parametrize(
    ("processor", "capability"),
    [("x86-64-v2", "DEFAULT"), ("x86-64-v3", "AVX2"), ("sapphirerapids", "AVX512")],
)
def test_every_processor_has_its_sources(processor, capability, request):
    # What was compiled for this machine needs no second reading.
    compiled = missing() is None and capability == torch.backends.cpu.get_cpu_capability()
    if compiled and (capability != "AVX512" or torch.ops.titans_native.has_tiles()):
        return
    # This machine's compiler reads them as it would on another: older ones, and one with matrix tiles.
    folders = build.SOURCES, Path(kernels.__file__).parent
    sources = sorted(str(file) for folder in folders for file in folder.glob("*.cpp"))
    assert len(sources) == 3
    # As one source: most of the time goes into torch's headers.
    command = ["g++", "-fsyntax-only", *build.flags(processor, capability), "-x", "c++", "-"]
    text = "".join(f'#include "{source}"\n' for source in sources)
    # It reads for seconds, and again only what has changed.
    files = [file.read_bytes() for folder in folders for file in sorted(folder.glob("*.[ch]*"))]
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    same = [*files, version, torch.__version__.encode(), "\0".join(command).encode()]
    known, digest = f"titans/read for {processor}", hashlib.sha256(b"\0".join(same)).hexdigest()
    cache = getattr(request.config, "cache", None)
    if cache is not None and cache.get(known, None) == digest:
        return
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if cache is not None:
        cache.set(known, digest)


@dataclass(frozen=True)
class MyRule(MomentumRule):
    """A rule that may do something else."""


class MyObjective(SquaredError):
    """An objective that may be something else."""


def test_other_objectives_and_rules_are_left_to_the_next_backend():
    problem = make_problem(time=5)
    for change, reason in (
        (dict(objective=MyObjective()), "SquaredError, Huber and Lp, and not MyObjective"),
        (dict(rule=MyRule()), "the update rule MomentumRule, and not MyRule"),
    ):
        changed = replace(problem, inner=replace(problem.inner, **change))
        with pytest.raises(ValueError, match=f"refuses this call: .*{reason}"):
            changed.scan("native")
        assert torch.equal(changed.scan("auto")[0], problem.scan("chunkwise")[0])


# torch's own forward-mode formulas go through what it deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_and_giant_chunks_are_left_to_the_next_backend(monkeypatch):
    problem = make_problem(time=9)
    with torch.autograd.forward_ad.dual_level():
        values = problem.leaves["values"].nan_to_num()
        dual = torch.autograd.forward_ad.make_dual(values, torch.ones_like(values))
        with pytest.raises(ValueError, match="refuses this call: it has no forward-mode derivatives"):
            problem.change(values=dual).scan("native")
        reads, _, _ = problem.change(values=dual).scan("auto")
        assert torch.autograd.forward_ad.unpack_dual(reads).tangent is not None
    monkeypatch.setattr(native, "WIDEST_CHUNK", 3)
    with pytest.raises(ValueError, match="give a chunk_size of at most 3"):
        problem.scan("native")
    assert problem.scan("auto")[0].isfinite().all()


@pytest.mark.parametrize(
    "objective", ["squared_error", {"name": "huber", "delta": 0.5}, {"name": "lp", "p": 2.5}]
)
@pytest.mark.parametrize(
    "options",
    [
        dict(norm=False, row_limit=0.7),
        dict(activation="silu", base=True),
        dict(key_dim=32, depth=1, norm=False),
        dict(key_dim=8, activation="sin", base=True),
    ],
)
def test_a_token_without_autograd_is_the_oracle(objective, options):
    # A head of whole vectors, which has a loop of its own.
    problem = make_problem(
        time=9, head_dim=16, position="same", normalize_step=True, objective=objective, **options
    )
    states = dict.fromkeys(("native", "reference"), problem.state)
    with torch.no_grad():
        for t in range(problem.time):
            found, expected = (problem.scan(name, state, slice(t, t + 1)) for name, state in states.items())
            states = dict(native=found[1], reference=expected[1])
            for name, value in answers(*expected).items():
                assert_close(answers(*found)[name], value, FLOAT64, f"{name} after token {t}")


@pytest.mark.parametrize(("key_dim", "head_dim", "chunk_size"), [(37, 11, 11), (11, 37, 11), (40, 6, 16)])
@pytest.mark.parametrize("options", [dict(depth=1), dict(activation="sin", expansion=1)])
def test_widths_that_differ_by_vectors(key_dim, head_dim, chunk_size, options):
    # More than a vector register in either direction, and no multiple of one; or keys and chunks of whole
    # vectors, which are read where the caller has them.
    problem = make_problem(
        time=30,
        key_dim=key_dim,
        head_dim=head_dim,
        chunk_size=chunk_size,
        base=True,
        normalize_step=True,
        **options,
    )
    assert_same(everything(problem, "native"), everything(problem, "reference"), FLOAT64)


def test_sin_of_large_numbers():
    numbers = torch.linspace(-100, 100, 64, dtype=torch.float64)
    problem = make_problem(
        batch=1, heads=1, time=1, head_dim=64, expansion=1, activation="sin", norm=False, residual=False
    ).require_grad()
    # Nothing is written, and the one query reads the first layer's first column.
    with torch.no_grad():
        for name in ("forget", "momentum", "step_size", "queries", "state.momentum.0", "state.momentum.1"):
            problem.leaves[name].zero_()
        problem.leaves["queries"][..., 0] = 1
        for part in ("weights", "anchor"):
            problem.leaves[f"state.{part}.0"][..., 0] = numbers
            problem.leaves[f"state.{part}.1"].copy_(torch.eye(64))
    reads, _, _ = problem.scan("native")
    (slope,) = torch.autograd.grad(reads.sum(), problem.leaves["state.weights.0"])
    assert_close(reads[0, 0, 0], numbers.sin(), 1e-15, "sin")
    assert_close(slope[0, 0, :, 0], numbers.cos(), 1e-15, "cos")


@pytest.mark.parametrize("backend", ["native_bfloat16"])
@pytest.mark.parametrize(
    ("head_dim", "chunk_size", "options"),
    [
        (40, 24, {}),
        (16, 5, {}),
        (64, 16, {}),
        (24, 16, dict(key_dim=72, depth=1)),
        (40, 16, dict(key_dim=24, activation="sin")),
    ],
)
def test_bfloat16_operands_cost_what_their_rounding_does(backend, head_dim, chunk_size, options):
    # Wider than a tile, and no multiple of one, in every direction.
    problem = make_problem(
        time=60,
        head_dim=head_dim,
        chunk_size=chunk_size,
        expansion=3,
        base=True,
        closed_gates=False,
        **options,
    ).to(torch.float32)
    exact, rounded = everything(problem, "native")[0], everything(problem, backend)[0]
    errors = {
        name: ((rounded[name] - x).norm() / x.norm()).item() for name, x in exact.items() if x.norm() > 0
    }
    assert max(errors.values()) < 0.03, errors
    assert errors["reads"] > 1e-4, "nothing was rounded"
