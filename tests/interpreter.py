"""Triton's interpreter, several times as fast."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any


def make_the_interpreter_fast() -> None:
    """What it computes stays; what it works out anew for every operation is kept."""
    _patch_the_language_once()
    _keep_types_and_shapes()


def _patch_the_language_once() -> None:
    """Triton's interpreter puts its own functions into the language at every call of a device function.

    A launch has done so already, and searching the modules anew takes half of all the time.
    """
    from triton import language
    from triton.runtime import interpreter

    called = interpreter.InterpretedFunction.__call__
    patch, compiled = interpreter._patch_lang, {id(x): x.range for x in (language, language.core)}
    found: dict[str, list[Any]] = {}

    def patch_what_is_not(fn: Any) -> Any:
        if fn.__module__ not in found:
            found[fn.__module__] = [x for x in fn.__globals__.values() if id(x) in compiled]
        return patch(fn) if any(x.range is compiled[id(x)] for x in found[fn.__module__]) else None

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        interpreter._patch_lang = patch_what_is_not
        try:
            return called(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch

    interpreter.InterpretedFunction.__call__ = call


def _keep_types_and_shapes() -> None:
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    # Whether integers overflow is asserted in debug mode, which is off, and was computed even so.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    make_type, broadcast = core.block_type.__init__, TritonSemantic.broadcast_impl_value
    numpy_type = interpreter._get_np_dtype
    numpy_type_of_name = cache(lambda name: numpy_type(core.dtype(name)))

    def numpy_type_of(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, core.block_type) else kind
        return numpy_type(element) if element.is_ptr() else numpy_type_of_name(element.name)

    @cache
    def block(sizes: tuple[int, ...]) -> Any:
        made = core.block_type.__new__(core.block_type)
        make_type(made, core.int32, list(sizes))
        return made

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        same = block(tuple(x.value if isinstance(x, core.constexpr) else x for x in shape))
        self.element_ty, self.shape, self.numel = element_ty, same.shape, same.numel
        self.name = f"<{self.shape}, {element_ty}>"

    @cache
    def shape_of_constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(x) for x in sizes]), core.constexpr(prod(sizes))

    def init_tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shape_of_constants(tuple(kind.shape) if kind.is_block() else ())

    def broadcast_what_differs(self: Any, a: Any, b: Any) -> tuple[Any, Any]:
        shapes = [x.type.shape if x.type.is_block() else None for x in (a, b)]
        return (a, b) if shapes[0] is shapes[1] else broadcast(self, a, b)

    interpreter._get_np_dtype = numpy_type_of
    core.block_type.__init__ = init_type
    core.tensor.__init__ = init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_what_differs
