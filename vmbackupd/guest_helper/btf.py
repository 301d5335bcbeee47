"""The kernel's own description of its types (BTF, linux/btf.h): where a field lies, which argument a tracepoint has."""

import struct
from typing import Dict, List, Optional, Tuple

from .failures import HelperError

VMLINUX = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_POINTER, _STRUCT, _UNION, _TYPEDEF, _VOLATILE, _CONST, _PROTOTYPE = 2, 4, 5, 8, 9, 10, 13
_NAMED = (_STRUCT, _TYPEDEF)
_TAIL = {  # bytes that follow the twelve of a type: once, and for each member
    1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12), 17: (4, 0),
    19: (0, 12),
}  # fmt: skip
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_ARGUMENT = struct.Struct("=II")


class Types:
    """The types of one kernel."""

    def __init__(self, path: str = VMLINUX) -> None:
        """Raises ``HelperError`` where the kernel does not describe itself."""
        try:
            with open(path, "rb") as file:
                data = file.read()
            magic, _, _, header, start, length, names, names_length = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise ValueError("not of this machine")
            self._types = data[header + start : header + start + length]
            self._names = data[header + names : header + names + names_length]
            self._places, self._named = self._index()
        except (OSError, ValueError, struct.error, IndexError) as error:
            raise HelperError("NoTracking", "the guest's kernel does not describe its types (%s): %s" % (path, error))

    def offset(self, name: str, *fields: str) -> Optional[int]:
        """Bytes from the start of a struct to a field, or to a field of that field; None where there is none."""
        place = self._named.get((_STRUCT, name))
        total = 0
        for field in fields:
            found = self._field(place, field) if place is not None else None
            if found is None:
                return None
            total += found[0]
            place = self._plain(found[1])
        return total

    def argument(self, event: str, name: str) -> Optional[int]:
        """Which argument of a tracepoint is a pointer to the struct ``name``; None where there is none."""
        place = self._named.get((_TYPEDEF, "btf_trace_" + event))
        if place is None:
            return None
        prototype = self._plain(self._type(self._plain(self._type(place)[2]))[2])
        for number in range(1, self._type(prototype)[1] & 0xFFFF):  # the first is the tracepoint's own
            kind = _ARGUMENT.unpack_from(self._types, prototype + _TYPE.size + _ARGUMENT.size * number)[1]
            pointer = self._type(self._plain(kind)) if kind else (0, 0, 0)
            if pointer[1] >> 24 & 31 == _POINTER and pointer[2]:
                if self._plain(pointer[2]) == self._named.get((_STRUCT, name)):
                    return number - 1
        return None

    def _index(self) -> Tuple[List[int], Dict[Tuple[int, str], int]]:
        """Where each type begins, and the structs and typedefs by name."""
        once = [_TAIL.get(kind, (0, 0))[0] for kind in range(32)]
        each = [_TAIL.get(kind, (0, 0))[1] for kind in range(32)]
        places, named, at = [0], {}, 0
        while at < len(self._types):
            name, info, _ = _TYPE.unpack_from(self._types, at)
            kind = info >> 24 & 31
            if kind in _NAMED:
                named[kind, self._name(name)] = at
            places.append(at)
            at += _TYPE.size + once[kind] + each[kind] * (info & 0xFFFF)
        return places, named

    def _field(self, place: int, field: str) -> Optional[Tuple[int, int]]:
        """Offset in bytes and type of a member, also one of an anonymous struct or union within."""
        _, info, _ = self._type(place)
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return None
        for number in range(info & 0xFFFF):
            name, kind, bits = _TYPE.unpack_from(self._types, place + _TYPE.size * (number + 1))
            if info >> 31:
                if bits >> 24:
                    continue  # a bit field
                bits &= 0xFFFFFF
            if not name:
                found = self._field(self._plain(kind), field)
                if found is not None:
                    return bits // 8 + found[0], found[1]
            elif self._name(name) == field:
                return bits // 8, kind
        return None

    def _plain(self, kind: int) -> int:
        """Where the type behind typedefs and qualifiers begins."""
        for _ in range(32):
            place = self._places[kind]
            _, info, under = self._type(place)
            if info >> 24 & 31 not in (_TYPEDEF, _VOLATILE, _CONST) or not under:
                return place
            kind = under
        raise ValueError("a type that never ends")

    def _type(self, place: int) -> Tuple[int, int, int]:
        """Name, kind and number of members, size or type."""
        name, info, size = _TYPE.unpack_from(self._types, place)
        return name, info, size

    def _name(self, offset: int) -> str:
        return self._names[offset : self._names.index(b"\0", offset)].decode("ascii", "replace")
