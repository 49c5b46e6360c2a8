"""Changes files in ways that are likely to hurt who reads them."""

from __future__ import annotations

import copy
import json
import math
import struct
from random import Random
from typing import Any

NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**70, 10**400, 1e308, -1e308, 5e-324),
    *(math.inf, -math.inf, math.nan, 0.5, "", "x", "0", "1e400", "../..", "/dev/zero", "a\0b"),
    *("\ud800", "(a+)+$", "x" * 5000, [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}),
]
DEEP = [b"[" * 200_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900]
TEXTS = [b"", b"null", b"3", b'"x"', b"[]", b"{}", b"\xff\xfe", b"\0" * 64, b'{"a": 1e999}', *DEEP]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    found = [path] if path else []
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        found += places(item, (*path, key))
    return found


def change_json(value: Any, chance: Random) -> Any:
    """A JSON value with one to three entries replaced, removed, renamed or swapped."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return chance.choice(NASTY)
        path = chance.choice(found)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how = chance.randrange(10)
        if how == 0:
            del parent[path[-1]]
        elif how == 1 and isinstance(parent, dict):
            parent[chance.choice(("x", "", "model_type", "\0"))] = parent.pop(path[-1])
        elif how == 2 and type(parent[path[-1]]) in (int, float):
            parent[path[-1]] *= chance.choice((-1, 0, 2, 10, 1000, 10**6, 0.5))
        elif how == 3:
            parent[path[-1]] = [copy.deepcopy(parent[path[-1]])]
        else:
            parent[path[-1]] = copy.deepcopy(chance.choice(NASTY))
    return value


def json_bytes(value: Any, chance: Random) -> bytes:
    """A changed JSON value as a file, which may be no JSON any more."""
    if chance.random() < 0.04:
        return chance.choice(TEXTS)
    text = json.dumps(change_json(value, chance)).encode("utf-8", "surrogatepass")
    return change_bytes(text, chance) if chance.random() < 0.08 else text


def change_bytes(data: bytes, chance: Random) -> bytes:
    """Bytes with one to four changes: flipped, cut, repeated, zeroed, or with extreme numbers."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(content) + 1), chance.choice((1, 2, 4, 8, 64))
        how = chance.randrange(7)
        if how == 0:
            del content[place:]
        elif how == 1:
            del content[place : place + length]
        elif how == 2:
            content[place:place] = content[place : place + length]
        elif how == 3:
            content[place : place + length] = bytes(min(length, len(content) - place))
        elif how == 4:
            number = chance.choice((0, 1, 2**7, 2**15, 2**16 - 1, 2**31, 2**32 - 1))
            packed = struct.pack(chance.choice("<>") + "I", number)
            content[place : place + 4] = packed
        elif how == 5:
            content[place:place] = chance.randbytes(length)
        elif content:
            content[place % len(content)] ^= 1 << chance.randrange(8)
    return bytes(content)


def change_safetensors(data: bytes, chance: Random) -> bytes:
    """A safetensors file with another header, other values, or other bytes."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    how = chance.randrange(4)
    if how == 0:
        return change_bytes(data, chance)
    if how == 1:
        text = json_bytes(header, chance)
        length = len(text) if chance.random() < 0.9 else chance.choice((0, 2**40, 2**63, 7))
        return length.to_bytes(8, "little") + text + body
    names = [name for name in header if name != "__metadata__"]
    start, end = header[chance.choice(names)]["data_offsets"]
    if how == 2 and end > start:
        values = (math.nan, math.inf, -math.inf, 3e38, 0.0, -1.0, 1e-45)
        number = struct.pack("<f", chance.choice(values))
        whole = chance.random() < 0.3
        place = start + 4 * chance.randrange(max(1, (end - start) // 4))
        body[start:end] = (
            number * ((end - start) // 4)
            if whole
            else body[start:place] + number + body[place + 4 :]
        )[: end - start]
    else:
        body[start:end] = chance.randbytes(end - start)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body
