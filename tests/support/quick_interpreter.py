# SPDX-License-Identifier: MIT
"""Makes Triton's interpreter four times as fast: the same numbers, without repeated or unused work."""

import dataclasses


def install():
    """Patch the interpreter. Do nothing if Triton is not installed or not as expected."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    names = "_patch_lang", "_get_np_dtype", "GridExecutor", "interpreter_builder", "tl"
    if not all(hasattr(interpreter, name) for name in names):
        return
    patch_once_a_launch(interpreter)
    remember_dtypes(interpreter)
    remember_shapes(interpreter.tl.core)
    options = interpreter.interpreter_builder.options
    if not options.debug:  # else each int sum also runs in int64, for an assertion that only debug mode has
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def patch_once_a_launch(interpreter):
    """A launch puts the interpreter's functions into triton.language, and removes them at its end.

    Triton puts them there again at every call of a device function, hundreds of times per launch: a third of the time.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages, patched, seen = (interpreter.tl, interpreter.tl.core), set(), set()

    def patch_what_is_not(function):
        if id(function.__globals__) in seen:
            return None
        seen.add(id(function.__globals__))
        found = {x.__name__ for x in function.__globals__.values() if any(x is language for language in languages)}
        if found and found <= patched:
            return None
        patched.update(found)
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        seen.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, launch_anew


def remember_dtypes(interpreter):
    """Remember the numpy type of each Triton type: Triton builds a table of all types at every call."""
    ask, known = interpreter._get_np_dtype, {}

    def look_up(dtype):
        if dtype.name not in known:
            known[dtype.name] = ask(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = look_up


def remember_shapes(core):
    """Remember the shapes of types and tensors: Triton builds a name, and an object per dimension, every time."""
    make_type, make_tensor, types, shapes = core.block_type.__init__, core.tensor.__init__, {}, {}

    def make_type_again(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key in types:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = types[key]
        else:
            make_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name

    def make_tensor_again(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[key]
        else:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel

    core.block_type.__init__, core.tensor.__init__ = make_type_again, make_tensor_again
