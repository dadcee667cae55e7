"""What every tensor of a run was computed from: the latent sites whose values it reads, plate by plate.

Provenance is kept for each storage, by watching every operation below autograd, so that views, in-place writes,
`torch.vmap`, scripted functions and custom autograd functions are seen. Where a value leaves the tensors (`item()`,
`bool()`, `numpy()`, a storage, a shape that depends on it), Python control flow may depend on it, and whatever the program
does afterwards is taken to depend on the site: more cost is charged, which is unbiased, never less. A tensor that was not there
before the run and that no operation made (another thread's, say) is taken to depend on all that was drawn before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad.pyro._compat import CONSTRUCTION, VALIDATION, WithoutDispatch, WithoutFunctions, swaps_noted
from pplgrad.pyro._tracing.argument_checks import is_plain_tensor, unwatched_checks
from pplgrad.pyro._tracing.axes import NONE, Call, Follows, counts_up, follows, reads_no_element, undeclared_writes
from pplgrad.pyro._tracing.callers import cuts_derivative, forget_modules, is_check, is_users, may_be_caught, user_line
from pplgrad.pyro._tracing.continuous_operations import jumping
from pplgrad.pyro._tracing.escapes import Leaving
from pplgrad.pyro._tracing.known_laws import unwatched_constructors
from pplgrad.pyro._tracing.operations import (
    dynamic_shape,
    facts_of,
    is_size_known,
    operands_of,
    places_written,
    tensors_in,
)
from pplgrad.pyro._tracing.storage_axes import (
    Axes,
    Known,
    is_own,
    key_of,
    lined_up,
    places_along,
    separated_axes,
    version_of,
)
from pplgrad.pyro._tracing.watchers import begin, end, watching

# What these make of a relaxed value has no gradient, or no meaning between two categories.
_COARSE = {"round", "floor", "ceil", "trunc", "sign", "argmax", "argmin", "_local_scalar_dense", "heaviside"}
_COPIES = {"clone", "_to_copy", "cat", "stack", "contiguous", "repeat", "expand_copy", "index", "index_select"}


_READ = "a value that Python reads"
RANDOM = 1
"""The bit of random numbers that belong to no site, such as the elements of a minibatch."""


class PlateAxis(NamedTuple):
    """A plate of a value that is drawn: its name, and its axis in the value counted from the right."""

    name: str
    axis: int


class Provenance(TorchDispatchMode):
    """Records, while active, which sites each tensor was computed from, as bits of an integer.

    A site has one bit, and one more for each of its plates, whose place among a tensor's axes is followed too. `escaped` has the
    bits of all sites whose values have left the tensors so far in the current program (guide or model), `escaped_ever` in
    both; `read_at` is the line where a tensor's value first left, a site's or not, and `unfollowed_at` the line where a tensor
    first turned up of which nothing is known. `given` are the tensors that were there before.
    `misused` names the relaxed sites whose value is compared, rounded or turned into whole numbers, and by what;
    `hidden_draws` says whether random numbers were drawn outside of the sites that are seen (`drawing`).
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.escaped = 0
        self.escaped_ever = 0
        self.read_at: str | None = None
        self.unfollowed_at: str | None = None
        self.drawing = False
        self.hidden_draws = False
        self.size_read: str | None = None
        self.misused: dict[str, str] = {}
        self._sites: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._plates: dict[tuple[str, str], int] = {}
        self._bit = 2 * RANDOM
        self._drawn = 0
        self._of_plates = 0
        self._relaxed = 0
        self._derived = 0
        self._lost: dict[str, str] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._of_cuts = 0
        self._derives = True
        self._without_rule = 0
        self._exposed: set[int] = set()
        self._counts: set[int] = set()
        self._given = {key_of(x): version_of(x) for x in given}
        self._by_tensor: dict[int, Known] = {}
        self._by_storage: dict[int, Known] = {}
        # A freed tensor's or storage's address may be used again, so all that are known are kept alive.
        self._alive: list[torch.Tensor] = []
        # What refers back to this is there only while it is active: a circle would keep all these tensors until they are looked for.
        self._entered: list[tuple[Leaving, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # No function is compiled by Dynamo while this watches; its guard costs as much again as a look.

    def __enter__(self) -> Provenance:
        self._derives = torch.is_grad_enabled()
        begin(self)
        self._leaving, swaps = Leaving(self), swaps_noted(self.forget)
        self._entered.append((self._leaving, swaps))
        self._leaving.__enter__()
        swaps.__enter__()
        VALIDATION.wrap(unwatched_checks(watching))
        CONSTRUCTION.wrap(unwatched_constructors(watching))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        CONSTRUCTION.unwrap()
        VALIDATION.unwrap()
        leaving, swaps = self._entered.pop()
        swaps.__exit__(None, None, None)
        leaving.__exit__(*exc)
        del self._leaving
        if self._entered:
            self._leaving = self._entered[-1][0]
        end(self)
        forget_modules()

    # What is asked.

    def of(self, *tensors: Any) -> int:
        """Return the bits of the sites that tensors were computed from."""
        bits = 0
        for tensor in tensors_in(tensors):
            bits |= self._known(tensor).bits
        return bits

    def of_these(self, tensors: Iterable[torch.Tensor]) -> int:
        """Return the bits of the sites that some tensors were computed from."""
        bits = 0
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                bits |= (self._by_tensor.get(id(tensor)) or self._known(tensor)).bits
        return bits

    def names(self, bits: int) -> list[str]:
        """Return the names of the sites that bits stand for."""
        found = []
        bits &= ~(self._of_plates | self._of_cuts | RANDOM)
        while bits:
            lowest = bits & -bits
            found.append(self._names[lowest])
            bits ^= lowest
        return found

    def mixed(self, tensor: torch.Tensor, site: str, plates: Iterable[tuple[str, int]]) -> frozenset[str]:
        """Return those of some plates (name, axis from the right) along which a tensor may mix a site's elements."""
        known = self._known(tensor)
        along = places_along(tensor, known)
        return frozenset(
            name
            for name, axis in plates
            if not (
                -axis <= len(along) and along[axis].get((1, tensor.shape[axis]), 0) & self._plates.get((site, name), 0)
            )
        )

    def cut(self, tensors: Iterable[torch.Tensor]) -> dict[str, str]:
        """Return the sites along whose value the derivative of some tensors was cut, or lost in Python, and by what."""
        bits = self.of(list(tensors)) & self._of_cuts
        return self._lost | {name: by for (name, by), bit in self._cuts.items() if bit & bits}

    def cuts_of(self, tensor: torch.Tensor) -> dict[str, str]:
        """Return the sites along whose value the derivative of a tensor was cut on some way, and by what."""
        bits = self.of(tensor) & self._of_cuts
        return {name: by for (name, by), bit in self._cuts.items() if bit & bits}

    def is_random(self, tensor: torch.Tensor) -> bool:
        """Return whether random numbers that no site drew have a part in a tensor."""
        return bool(self.of(tensor) & RANDOM)

    def is_unsure(self, site: str, plate: str) -> bool:
        """Return whether an operation of which nothing is known has seen the elements of a site along a plate."""
        return bool(self._without_rule & self._plates.get((site, plate), 0)) or (site, plate) not in self._plates

    # What is noted.

    def tag(
        self,
        name: str,
        value: torch.Tensor,
        plates: Iterable[PlateAxis] = (),
        relaxed: bool = False,
        derived: bool = False,
        made: bool = False,
    ) -> torch.Tensor:
        """Return a copy of a site's value that is known to be that site's and nothing else's, unless it was `made` of others by the model.

        It may be `relaxed`, or have a derivative in any case (`derived`).
        """
        self._derived |= self._site_bit(name) if relaxed or derived else 0
        with WithoutFunctions():
            with WithoutDispatch() if is_plain_tensor(value) else nullcontext():
                copy = value.clone()
            tagged = self._tagged(name, copy, plates, relaxed)
            if made:
                known = self._known(tagged)
                known.bits |= self._known(value).bits
                for place, bits in self._axes_from([(value, list(range(value.dim())))], tagged).items():
                    known.axes[place] = known.axes.get(place, 0) | bits
            return tagged

    def _tagged(self, name: str, value: torch.Tensor, plates: Iterable[PlateAxis], relaxed: bool) -> torch.Tensor:
        bits = self._site_bit(name)
        self._relaxed |= bits if relaxed else 0
        axes: Axes = {}
        for plate in plates:
            if -plate.axis <= value.dim() and value.shape[plate.axis] > 1:
                bit = self._plate_bit(name, plate.name)
                bits |= bit
                place = (value.stride(plate.axis), value.shape[plate.axis], value.storage_offset())
                axes[place] = axes.get(place, 0) | bit
        self._drawn |= bits
        self._note(value, Known(bits, axes, value.element_size(), name if relaxed else None), key_of(value))
        return value

    def escape(self, bits: int) -> None:
        """Note that values have left the tensors; what Python does with them has no derivative."""
        for name in self.names(bits & self._derived):
            self._lost.setdefault(name, _READ)
        for name in self.names(bits & self._relaxed):
            self.misused.setdefault(name, _READ)
        self.read_at = self.read_at or user_line()
        self.escaped |= bits
        self.escaped_ever |= bits

    def is_innocent(self, bits: int, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether a library reads truth values to check arguments, or a whole number that is the same at every step.

        Such are the numbers of a sequential plate's elements, or of a binomial's trials.
        """
        fixed = all(x.dtype == torch.bool or not (bits or x.is_floating_point()) for x in tensors)
        return fixed and is_check() and not (bits and may_be_caught())

    def mix(self, tensors: list[torch.Tensor], bits: int) -> None:
        """Note that tensors read these draws, at any of their elements."""
        for tensor in tensors:
            self._mix(self._known(tensor), bits)

    def sized(self, tensor: Any) -> None:
        """Note where the program itself reads the size of what depends on a draw."""
        if self.size_read is None and isinstance(tensor, torch.Tensor) and is_users() and self.of(tensor) & ~RANDOM:
            self.size_read = user_line()

    def give(self, *tensors: torch.Tensor) -> None:
        """Note that tensors depend on no draw."""
        for tensor in tensors:
            self._note(tensor, Known(0, {}, 1), key_of(tensor))

    def computed(self, out: torch.Tensor, read: Sequence[tuple[torch.Tensor, Follows]], by: str) -> None:
        """Note what a result reads that was computed out of sight, and which of its axes follow those of what it reads."""
        bits = self.of([x for x, _ in read])
        axes = self._axes_from(read, out)
        self._note(out, Known(bits, axes, out.element_size() if axes else 1), key_of(out))
        for site in self.names(bits & self._derived):
            self._lost.setdefault(site, by)
        for site in self.names(bits & self._relaxed):
            self.misused.setdefault(site, by)

    def combined(self, out: torch.Tensor, read: Sequence[tuple[torch.Tensor, Follows]]) -> None:
        """Record what a result reads that differentiable operations computed from some tensors where no mode saw them."""
        with torch._C.DisableTorchFunction():
            bits = self.of([x for x, _ in read])
            axes = self._axes_from(read, out)
            self._note(out, Known(bits, axes, out.element_size() if axes else 1), key_of(out))

    def read(self, tensors: Sequence[torch.Tensor], keeps_slope: bool) -> int | None:
        """Return what the tensors of a known call read; None where what it does to derivatives is to be watched."""
        bits, relaxed = 0, False
        for tensor in tensors:
            known = self._by_tensor.get(id(tensor)) or self._known(tensor)
            bits |= known.bits
            relaxed |= known.relaxed is not None
        if bits & self._derived and (relaxed or not keeps_slope or (self._derives and not torch.is_grad_enabled())):
            return None
        return bits

    def result(self, out: torch.Tensor, read: Sequence[torch.Tensor], bits: int) -> None:
        """Note what a known call returned: a view, or what reads each operand element by element."""
        key = out.untyped_storage()._cdata
        known = self._by_storage.get(key)
        if known is None:
            axes: Axes = {}
            if bits & self._of_plates:
                axes = self._axes_from([(x, lined_up(x.shape, out.shape)) for x in read], out)
            self._alive.append(out)
            self._by_tensor[id(out)] = self._by_storage[key] = Known(bits, axes, out.element_size() if axes else 1)
        elif bits & ~known.bits:
            self._mix(known, bits)

    def follow(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        """Note that one tensor stands for another, element by element, whatever its numbers are."""
        with torch._C.DisableTorchFunction():
            known = self._known(tensor)
            axes = self._axes_from([(tensor, list(range(tensor.dim())))], out)
            self._note(out, Known(known.bits, axes, out.element_size() if axes else 1), key_of(out))

    def forget(self, tensor: torch.Tensor) -> None:
        """Look a tensor up anew, which may be of another storage now."""
        self._by_tensor.pop(id(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        facts = facts_of(func)
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.escape(self.of(args, list(kwargs.values())))  # Whoever catches it knows something of the values.
            raise
        if facts.random and not self.drawing:
            self.hidden_draws = True
        if facts.lifts and key_of(args[0]) not in self._by_storage:
            # It was just made of numbers, or of a list of tensors that were given to the call that is running.
            given = self._leaving.bits_of_calls()
            self._note(
                args[0], Known(given | self._cut_bits(given, "a tensor made of numbers"), {}, 1), key_of(args[0])
            )
            self._leaving.note_all()
        bits, relaxed = RANDOM if facts.random else 0, None
        for arg in args:
            if isinstance(arg, torch.Tensor):
                known = self._by_tensor.get(id(arg)) or self._known(arg)
                bits |= known.bits
                self._leaving.note(arg)
                relaxed = known.relaxed or relaxed
            elif isinstance(arg, (list, tuple)):
                for tensor in tensors_in(arg):
                    known = self._known(tensor)
                    bits |= known.bits
                    relaxed = known.relaxed or relaxed
                    self._leaving.note(tensor)
        if kwargs:
            bits |= self.of(list(kwargs.values()))
            for tensor in tensors_in(kwargs):
                self._leaving.note(tensor)
        if facts.reads or (facts.dynamic and dynamic_shape(func, args)):
            if not (facts.reads and self.is_innocent(bits, tensors_in(args))):
                self.escape(bits)
        if facts.sizes and bits & ~RANDOM and not is_size_known(func, args, kwargs, out):
            self.escape(bits)
        if facts.fails and bits & ~RANDOM and may_be_caught():
            self.escape(bits)
        if facts.sets:
            self._note(args[0], self._unfollowed(args[0]), key_of(args[0]))
        elif facts.written and bits:
            self._wrote(func, args, kwargs, bits)
        elif out is not None:
            self._made(func, args, kwargs, out, bits)
            if facts.undeclared and bits:
                for tensor in undeclared_writes(Call(func, args, kwargs)):
                    self._show(tensor, bits)
                    self._mix(self._known(tensor), bits)
        if bits & self._derived:
            if relaxed is not None:
                self._watch_relaxed(func, relaxed, out)
            self._watch_cut(func, facts.cuts, out, bits, facts.random and not self.drawing)
        return out

    # Storages and their axes.

    def _known(self, tensor: torch.Tensor) -> Known:
        known = self._by_tensor.get(id(tensor))
        if known is None:
            key = key_of(tensor)
            known = self._by_storage.get(key) or self._from_outside(tensor, key)
            self._note(tensor, known, key)
        return known

    def _note(self, tensor: torch.Tensor, known: Known, key: int) -> None:
        self._alive.append(tensor)
        self._by_tensor[id(tensor)] = known
        if key:
            self._by_storage[key] = known

    def _from_outside(self, tensor: torch.Tensor, key: int) -> Known:
        """Return what is known of a tensor that no operation made: nothing was drawn when it was, if it was given."""
        if not self._drawn or (key in self._given and self._given[key] == version_of(tensor)):
            return Known(0, {}, 1)
        return self._unfollowed(tensor)

    def _unfollowed(self, tensor: torch.Tensor) -> Known:
        if self._drawn:
            self.unfollowed_at = self.unfollowed_at or user_line()
            self._without_rule |= self._drawn & self._of_plates
        return Known(self._drawn | self._cut_bits(self._drawn, "a way that cannot be followed"), {}, 1)

    def _made(self, func: Any, args: Any, kwargs: Any, out: Any, bits: int) -> None:
        """Note what an operation returned."""
        if bits and reads_no_element(func):
            bits = 0
        if not bits and counts_up(func, args, kwargs):
            self._counts.add(key_of(out))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tensors_in(out):
            key = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else key_of(tensor)
            known = self._by_storage.get(key)
            if known is None:
                axes = self._axes(func, args, kwargs, tensor, bits) if bits & self._of_plates else {}
                self._note(tensor, Known(bits, axes, tensor.element_size() if axes else 1), key)
            elif bits & ~known.bits:
                # What comes back is an operand or a view of one, and reads another operand too.
                self._mix(known, bits)

    def _wrote(self, func: Any, args: Any, kwargs: Any, bits: int) -> None:
        """Note what an in-place or out= operation wrote: what all of a tensor was overwritten with has its axes."""
        for place, name in places_written(func):
            for tensor in tensors_in(args[place] if place < len(args) else kwargs.get(name)):
                known = self._known(tensor)
                self._show(tensor, bits)
                axes = self._axes(func, args, kwargs, tensor, bits | known.bits) if bits & self._of_plates else {}
                self._mix(known, bits)
                if axes and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                    known.axes, known.itemsize = axes, tensor.element_size()

    def expose(self, tensor: torch.Tensor) -> None:
        """Note that the memory of a tensor can be read by other means than torch from here on, and what is in it now."""
        self._exposed.add(key_of(tensor))
        self.escape(self.of(tensor))

    def _show(self, tensor: torch.Tensor, bits: int) -> None:
        """Note that what is written into memory that others can read has left the tensors."""
        # A storage in foreign memory, or one that NumPy has a view of, cannot be resized.
        if key_of(tensor) in self._exposed or not is_own(tensor):
            self.escape(bits)

    def _mix(self, known: Known, bits: int) -> None:
        """Add what a storage reads, at any of its elements."""
        known.bits |= bits
        known.axes = {place: kept for place, old in known.axes.items() if (kept := old & ~bits)}

    def _counting_axis(self, tensor: torch.Tensor) -> int:
        """Return the axis along which a tensor is what `arange` made, whole and never written to, or `NONE`."""
        if key_of(tensor) not in self._counts or version_of(tensor) != 0 or tensor.storage_offset():
            return NONE
        long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        (axis,) = long if len(long) == 1 else (NONE,)
        return axis if axis != NONE and tensor.stride(axis) == 1 else NONE

    def _axes(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor, bits: int) -> Axes:
        """Return along which axes of a result the plates' elements lie: those that every operand has there."""
        call = Call(func, args, kwargs, self._counting_axis)
        read: list[tuple[torch.Tensor, Follows]] = []
        for place, operand in operands_of(func, args, kwargs):
            if self._known(operand).bits & self._of_plates:
                mapping = follows(call, operand, place, out)
                if mapping is None:
                    self._without_rule |= bits & self._of_plates
                    return {}
                read.append((operand, mapping))
        return self._axes_from(read, out)

    def _axes_from(self, read: Iterable[tuple[torch.Tensor, Follows]], out: torch.Tensor) -> Axes:
        known = [(tensor, self._known(tensor), follows) for tensor, follows in read]
        return separated_axes(known, out, self._of_plates)

    def _new_bit(self) -> int:
        bit, self._bit = self._bit, self._bit << 1
        return bit

    def _site_bit(self, name: str) -> int:
        if name not in self._sites:
            self._sites[name] = self._new_bit()
            self._names[self._sites[name]] = name
        return self._sites[name]

    def _plate_bit(self, name: str, plate: str) -> int:
        if (name, plate) not in self._plates:
            self._plates[name, plate] = self._new_bit()
            self._of_plates |= self._plates[name, plate]
        return self._plates[name, plate]

    def _watch_cut(self, func: Any, detaches: bool, out: Any, bits: int, hidden: bool) -> None:
        """Note that the derivative along relaxed sites ends in what an operation of the user's returned, or in a `hidden` draw."""
        made = tensors_in(out)
        without = self._derives and not torch.is_grad_enabled()
        if not (detaches or without):
            # A comparison, a conversion to whole numbers, or what is not known to be continuous.
            made = jumping(func, made)
        by = None if not made else "" if hidden else cuts_derivative(without)
        if by is not None:
            operation = func._schema.name.removeprefix("aten::")
            by = by or ("detach" if detaches else "no_grad" if without else operation)
            for tensor in made:
                known = self._known(tensor)
                marked = Known(known.bits | self._cut_bits(bits, by), known.axes, known.itemsize, known.relaxed)
                # By tensor, and not by storage: what is seen through another one is not cut.
                self._note(tensor, marked, 0 if detaches else key_of(tensor))

    def _cut_bits(self, bits: int, by: str) -> int:
        """Return the bits that say that the derivative along the relaxed sites among some bits was cut."""
        found = 0
        for name in self.names(bits & self._derived):
            if (name, by) not in self._cuts:
                self._cuts[name, by] = self._new_bit()
                self._of_cuts |= self._cuts[name, by]
            found |= self._cuts[name, by]
        return found

    def _watch_relaxed(self, func: Any, name: str, out: Any) -> None:
        """Note where a relaxed value itself is compared, rounded or turned into whole numbers, and follow its copies."""
        operation = func._schema.name.removeprefix("aten::")
        made = tensors_in(out)
        if operation in _COARSE or any(not t.is_floating_point() for t in made):
            if not is_check():
                self.misused.setdefault(name, operation)
        elif operation in _COPIES:
            for tensor in made:
                self._known(tensor).relaxed = name
