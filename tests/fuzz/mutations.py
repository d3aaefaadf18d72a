"""Real files made wrong: bytes flipped, numbers swapped, keys lost or doubled, nesting, half letters."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any


NUMBERS = (
    0, -1, 1, 2, 7, 0.5, -0.0, 1.5, 255, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**64, 10**30, 10**400, -(10**400),
    1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "x", "\x00", "\x1b[2J", "\ud800", "\u202e", "a" * 5000, "../../etc/passwd", "/dev/zero", "nan", "1e999",
    "9" * 5000, "wanda", "owl", "uniform", "2:4", "0:0", "9999999999:99999999999", "group:0", "mixed:" + "9" * 20,
    "abslog/var/atan,asin/no_op@+0.08", "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)", "abslog/var/atan@+1e400", "{{ x }}",
    "model.layers.0", "model.layers.99999999999999999999", "x.json", "out", ".", "~", "-1", "True", "null", "[]",
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"sparsity": {}}, [1] * 50, ["x"] * 50)
RAW = ("[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, "-", "1.", "NaN", "'x'", "")
ALPHABET = "abcdefgh01289.,:/-_()@+* \n\t\x00é\u202eW:()NO_OPabslogvartanmean"


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Some bytes changed, lost, put in or said twice."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[min(at, len(changed) - 1)] = rng.choice((0, 0xFF, 0x22, 0x7B, 0x80, rng.randrange(256)))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.randint(1, 12))
        elif kind == 4:
            del changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
    return bytes(changed)


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Some values of a JSON text swapped, lost, doubled or nested; now and then some bytes as well."""
    value, raw = json.loads(data), {}
    for _ in range(rng.randint(1, 3)):
        value = _mutate_value(value, rng, raw)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for mark, content in raw.items():
        text = text.replace(json.dumps(mark), content)
    changed = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(changed, rng) if rng.random() < 0.15 else changed


def mutate_lines(data: bytes, rng: Random) -> bytes:
    """A line of JSON mutated, and lines lost, doubled or in another order."""
    lines = data.splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            rng.shuffle(lines)
        elif kind == 3:
            lines[at] = mutate_bytes(lines[at], rng)
        else:
            try:
                lines[at] = mutate_json(lines[at], rng)
            except (ValueError, RecursionError):  # it was mutated before
                lines[at] = mutate_bytes(lines[at], rng)
    return b"\n".join(lines) + (b"\n" if rng.random() < 0.9 else b"")


def mutate_text(data: bytes, rng: Random) -> bytes:
    """Letters of a short text changed, lost and put in, or a piece of another."""
    text = data.decode()
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(ALPHABET) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 4) :]
        elif kind == 2:
            text = text[:at] + rng.choice(ALPHABET) + text[at + 1 :]
        elif kind == 3:
            text = text[:at] + rng.choice(TEXTS) + text[at:]
        else:
            text = text[:at] + str(rng.choice(NUMBERS)) + text[at:]
    return text.encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """The header's JSON mutated under a length that fits, numbers of packed headers swapped, or bytes changed."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], bytearray(data[8 + length :])
    kind = rng.random()
    if kind < 0.5:
        header = mutate_json(header.rstrip(), rng)
        return len(header).to_bytes(8, "little") + header + bytes(body)
    if kind < 0.8:
        offsets = [part["data_offsets"][0] for name, part in json.loads(header).items() if name != "__metadata__"]
        for _ in range(rng.randint(1, 2)):
            at = rng.choice(offsets) + 8 * rng.randrange(7)
            body[at : at + 8] = _integer(rng)
        return data[: 8 + length] + bytes(body)
    return mutate_bytes(data, rng)


def mutate_packed(data: bytes, rng: Random) -> bytes:
    """Numbers of the header of a packed tensor swapped, or bytes changed."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = 8 * rng.randrange(1, 7)
        changed[at : at + 8] = _integer(rng)
    return bytes(changed)


def _integer(rng: Random) -> bytes:
    value = rng.choice((0, 1, 2, 3, 4, 5, 8, 9, 31, 32, 33, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)))
    return struct.pack("<q", value)


def _mutate_value(value: Any, rng: Random, raw: dict[str, str]) -> Any:
    """`value` with one part of it changed; changed in place where it can be."""
    holder, key = None, None
    part = value
    while isinstance(part, (dict, list)) and part and rng.random() < 0.85:
        holder = part
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        part = part[key]
    kind = rng.randrange(9)
    if holder is None or kind < 4:
        new = _new(rng, raw)
    elif kind == 4:
        del holder[key]
        return value
    elif kind == 5 and isinstance(holder, dict):
        mark = f"mark-{len(raw)}"
        raw[mark] = f"1, {json.dumps(key)}: 2"  # the key once more
        new = mark
    elif kind == 6 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
        return value
    elif kind == 7:
        new = [part]
    else:
        new = {str(key): part}
    if holder is None:
        return new
    holder[key] = new
    return value


def _new(rng: Random, raw: dict[str, str]) -> Any:
    kind = rng.randrange(8)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 7:
        return copy.deepcopy(rng.choice(OTHERS))  # what comes back is changed in place
    mark = f"mark-{len(raw)}"
    raw[mark] = rng.choice(RAW)
    return mark
