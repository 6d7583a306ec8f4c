"""Ways to harm a folder: accidents, which checksums must find, and forgeries, whose checksums are right."""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

from inference.storage import json_document


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**39, -0.0, 0.5, 1e308, -1e308, 5e-324),
    *(
        "",
        "x",
        "nan",
        "inf",
        "x" * 5000,
        "\x1b[2J",
        "\ud800",
        "../../../etc/passwd",
        "/dev/zero",
        "torch.load",
        "object",
    ),
    *("os:system", "evil:run", "evil.csv", "fifo.csv", "pickled.npz", "float32", "complex64", "save", "__class__"),
    *([], [[]], [0], [-1], [2**62, 2**62], [2**24], [1, 2, 3], [None], [""], ["a"] * 1000, [[[[[]]]]]),
    *({}, {"a": 1}, {"name": "x", "shape": [2**40], "dtype": "float32"}, {"value": []}, {"tensor": "0"}),
    *({"dict": [[[], 1]]}, {"float": "0"}, {"tuple": 3}),
]


def harm(folder, other, rng, outside):
    """Harm ``folder`` in one way; the way's name, and whether it is a forgery. ``other`` is whole, of another fit."""
    kind = rng.choice(list(ACCIDENTS) + list(FORGERIES) if any(folder.glob("*.json")) else BYTES)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".npz"))
    target = rng.choice(files)
    if kind in ACCIDENTS:
        ACCIDENTS[kind](folder, target, other, rng, outside)
        return kind, False
    kind = kind if any(folder.glob("*.safetensors")) else "value"
    FORGERIES[kind](folder, rng, outside)
    return kind, True


def flip(folder, target, other, rng, outside):
    content = bytearray(target.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    target.write_bytes(content)


def cut(folder, target, other, rng, outside):
    os.truncate(target, rng.randrange(target.stat().st_size))


def grow(folder, target, other, rng, outside):
    with target.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 4096])))


def blank(folder, target, other, rng, outside):
    content = bytearray(target.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 16, 512, 4096]))
    content[start:end] = bytes(end - start)
    target.write_bytes(content)


def noise(folder, target, other, rng, outside):
    target.write_bytes(rng.randbytes(target.stat().st_size))


def lose(folder, target, other, rng, outside):
    target.unlink()


def swap(folder, target, other, rng, outside):
    second = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    first_content, second_content = target.read_bytes(), second.read_bytes()
    target.write_bytes(second_content)
    second.write_bytes(first_content)


def exchange(folder, target, other, rng, outside):
    """The same file of another fit, under the name that it has here."""
    pattern = re.sub("-[0-9a-f]{16}", "-*", target.name)
    target.write_bytes(next(other.glob(pattern)).read_bytes())


def pickled(folder, target, other, rng, outside):
    target.write_bytes(pickle.dumps(Canary(outside / "canary"), protocol=rng.choice([0, 2, 4])))


def huge(folder, target, other, rng, outside):
    os.truncate(target, 2 ** rng.choice([33, 40]))  # sparse


def link(folder, target, other, rng, outside):
    away = outside / "away"
    shutil.copy(target, away)
    target.unlink()
    target.symlink_to(rng.choice([away, "/dev/zero", "/dev/random", "/etc/passwd", target, "/proc/self/mem", "gone"]))


def no_file(folder, target, other, rng, outside):
    target.unlink()
    rng.choice([os.mkfifo, os.mkdir])(target)


def text(folder, target, other, rng, outside):
    json_file = rng.choice(sorted(folder.glob("*.json")))
    whole = json_file.read_text()
    hostile = [
        *("", "{", "null", "[]", '"x"', "{}", "0", "[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900),
        *(whole.replace("{", '{"schema": 1,', 1), whole + whole, whole.encode("utf-16"), "\ufeff" + whole),
        *(whole.replace(": 1,", ": " + "9" * 5000 + ",", 1), whole.replace(": 1,", ": NaN,", 1)),
        *(whole.replace(": 1,", ": 1e999,", 1), whole.replace(": 1,", ": 1.0,", 1), " " * 2**22 + whole),
        *('{"schema": 1, "sha256": null}', '{"schema": true}', '{"schema": 2}', '{"sha256": []}', b"\xff\xfe\x00"),
    ]
    chosen = rng.choice(hostile)
    json_file.write_bytes(chosen if isinstance(chosen, bytes) else chosen.encode("utf-8", "surrogatepass"))


def leftovers(folder, target, other, rng, outside):
    """What a write that was cut off leaves: nothing of it may matter."""
    for path in list(folder.iterdir()):
        (folder / f".{path.name}.partial").write_bytes(rng.randbytes(100))
    (folder / f"posterior-{'0' * 16}.safetensors").write_bytes(b"old")


ACCIDENTS = {
    "bits flipped": flip, "cut short": cut, "grown": grow, "zeros": blank, "noise": noise, "lost": lose,
    "files swapped": swap, "file of another fit": exchange, "pickle": pickled, "sparse": huge, "link": link,
    "no file": no_file, "hostile JSON": text, "leftovers": leftovers,
}  # fmt: skip


BYTES = ("bits flipped", "cut short", "grown", "zeros", "noise", "lost", "pickle", "sparse", "link", "no file")


def sealed_again(path, content):
    """Write ``content`` with the checksum that belongs to it, as the writer would if it could be made to."""
    plain = {name: value for name, value in content.items() if name != "sha256"}
    seal = json_document.digest(plain)
    path.write_text(json.dumps({**plain, "sha256": seal}))
    return seal


def posterior_sealed_again(folder, path, content):
    """The run, too, is told of the new posterior."""
    sealed_again(path, content)
    run = folder / "run.json"
    if path.name == "posterior.json" and run.exists():
        read = {name: value for name, value in content.items() if name not in ("sha256", "schema")}
        sealed_again(run, {**json.loads(run.read_text()), "posterior": json_document.digest(read)})


def forged_value(folder, rng, outside):
    """A value at any depth of any manifest replaced, removed or added."""
    path = rng.choice(sorted(folder.glob("*.json")))
    content = json.loads(path.read_text())
    place = content
    while True:
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        name = rng.choice([n for n in names if n != "sha256"])
        inner = place[name]
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.8):
            break
        place = inner
    action = rng.random()
    if action < 0.1:
        del place[name]
    elif action < 0.2 and isinstance(place, dict):
        place[rng.choice(["x", "", "__class__", "sha256 "])] = rng.choice(VALUES)
    else:
        place[name] = rng.choice(VALUES)
    posterior_sealed_again(folder, path, content)


def _tensors(folder, rng):
    path = rng.choice([p for p in sorted(folder.glob("*.json")) if "tensors" in json.loads(p.read_text())])
    return path, json.loads(path.read_text())


def forged_path(folder, rng, outside):
    path, content = _tensors(folder, rng)
    name = content["tensors"]["file"]
    away = outside / name
    shutil.copy(folder / name, away)
    hostile = [f"../{away.name}", str(away), f"./{name}", f"{name}/../{name}", f"{name}\x00", "", ".", "/dev/zero"]
    content["tensors"]["file"] = rng.choice([*hostile, name.upper(), f"x{name}", [name], None, f"{name}\n"])
    posterior_sealed_again(folder, path, content)


def forged_tensors(folder, rng, outside):
    """A safetensors file of lies, of which the manifest has the right name, size and checksum."""
    path, content = _tensors(folder, rng)
    old = folder / content["tensors"]["file"]
    raw = old.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = rng.choice(list(header))
    lies = {
        "dtype": ["F8_E4M3", "F4", "C64", "U64", "F64", "BOOL", "", 3, None, "I8"],
        "shape": [[2**40], [2**63], [-1], [0], [], [2**32, 2**32], [1] * 100, "x", None, [0, 2**60], [1.5]],
        "data_offsets": [[0, 2**60], [8, 4], [-8, 0], [0], [1, 2, 3], None, [0, 0], ["0", "4"], [2**63, 2**64]],
    }
    part = rng.choice(list(lies))
    header[name][part] = rng.choice(lies[part])
    text = json.dumps(header).encode()
    made = struct.pack("<Q", len(text)) + text + body
    whole = [
        made,
        made,
        made,
        struct.pack("<Q", 2**63) + raw[8:],
        struct.pack("<Q", len(raw) * 2) + raw[8:],
        b"\xff" * 8 + raw[8:],
        b"",
        raw[:7],
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", length + 8) + raw[8 : 8 + length] + b" " * 8 + body,
        raw[: 8 + length] + bytes(len(body)),
        pickle.dumps(Canary(outside / "canary")),
    ]
    _put(folder, path, content, rng.choice(whole))


def _put(folder, path, content, raw):
    (folder / content["tensors"]["file"]).unlink()
    digest = hashlib.sha256(raw).hexdigest()
    name = f"{path.stem}-{digest[:16]}.safetensors"
    content["tensors"] = {"file": name, "bytes": len(raw), "sha256": digest}
    (folder / name).write_bytes(raw)
    posterior_sealed_again(folder, path, content)


def forged_size(folder, rng, outside):
    path, content = _tensors(folder, rng)
    size = rng.choice([2**33, 2**62, 2**64, 0, -1, True, 1.0, "8"])
    content["tensors"]["bytes"] = size
    if size == 2**33:
        os.truncate(folder / content["tensors"]["file"], size)
    posterior_sealed_again(folder, path, content)


FORGERIES = {"value": forged_value, "path": forged_path, "tensors": forged_tensors, "size": forged_size}
