"""Run a kernel's own Python body on whole numbers, and record what it visits.

A kernel's bounds are integer arithmetic. Here whole numbers take the place of Triton's; all else (loads, products,
stores) is a stand-in that does nothing. That takes microseconds for a case, so that every small length, window and tile
can be tried; the interpreter is too slow for that.
"""

import types


class Whole(int):
    """An integer of the chip: its division rounds towards 0, where Python's rounds down."""

    def __floordiv__(self, other):
        return Whole(abs(int(self)) // int(other) * (1 if self >= 0 else -1))

    def __mod__(self, other):
        return Whole(int(self) - int(self // other) * int(other))

    def to(self, dtype):
        return self


def _arithmetic(name):
    def operation(self, other):
        answer = getattr(int, name)(self, other)
        return Whole(answer) if isinstance(answer, int) else answer

    return operation


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"):
    setattr(Whole, _name, _arithmetic(_name))


class Anything:
    """A tensor or pointer whose values do not matter: every operation on it returns itself."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    def __iter__(self):  # without it Python would iterate by __getitem__, without end
        return iter(())

    def __bool__(self):
        raise TypeError("a bound may not depend on a tensor's values")


def _nothing(self, *_):
    return self


for _name in "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod and rand or ror".split():
    setattr(Anything, f"__{_name}__", _nothing)
for _name in "lt le gt ge eq ne neg getitem invert".split():
    setattr(Anything, f"__{_name}__", _nothing)


class Language:
    """What a kernel's body may ask of `tl`."""

    def __init__(self, program, events):
        self.program, self.events = Whole(program), events

    def __getattr__(self, name):
        return ANYTHING

    def program_id(self, axis):
        return self.program

    def maximum(self, a, b):
        return Whole(max(a, b)) if isinstance(a, int) and isinstance(b, int) else ANYTHING

    def minimum(self, a, b):
        return Whole(min(a, b)) if isinstance(a, int) and isinstance(b, int) else ANYTHING

    def cdiv(self, a, b):
        return Whole(a + b - 1) // b

    def range(self, start, stop, step=1):
        return (Whole(i) for i in range(start, stop, step))

    def static_range(self, start, stop):
        return range(start, stop)

    def debug_barrier(self):
        self.events.append(("barrier",))


ANYTHING = Anything()


def visits(module, kernel, program, recorded: dict, real: tuple[str, ...], **arguments) -> list[tuple]:
    """Run a program of a kernel, and say what it called in which order.

    Args:
        module: where the kernel lives.
        kernel: its name there.
        program: the index of the program.
        recorded: for each named step, what of its arguments is to be recorded and what it returns.
        real: the named steps that run as they are.
        arguments: the kernel's arguments that are numbers or None; the others are stand-ins.
    """
    events: list[tuple] = []
    space = {"tl": Language(program, events), "LOG2_E": 1, "LN_2": 1, "__builtins__": __builtins__}

    def record(name, function):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        chosen, returned = recorded[name]

        def step(*given, **named):
            known = dict(zip(names, function.__defaults__ or ())) | dict(zip(names, given)) | named
            events.append((name, *(known[x] for x in chosen)))
            return returned

        return step

    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if name in recorded:
            space[name] = record(name, function)
        elif name in real:
            space[name] = types.FunctionType(function.__code__, space, name, function.__defaults__)
        elif function is not None:
            space[name] = ANYTHING
    body = getattr(module, kernel).fn
    names = body.__code__.co_varnames[: body.__code__.co_argcount]
    given = {x: Whole(v) if type(v) is int else v for x, v in arguments.items() if x in names}
    types.FunctionType(body.__code__, space)(**({x: ANYTHING for x in names} | given))
    return events
