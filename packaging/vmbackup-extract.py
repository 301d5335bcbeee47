#!/usr/bin/env python3
"""Reads a vmbackupd repository with neither daemon nor engine: lists backups, shows a manifest, extracts an image.

For the day when nothing else is left. This one file needs Python 3.9 or later, the `zstd` command, and (for encrypted
repositories) OpenSSL's libcrypto; it was written from docs/format.md alone and shares no code with vmbackupd. The
repository is a local directory, read only: nothing in it is ever changed.

    vmbackup-extract.py DIRECTORY --list
    vmbackup-extract.py DIRECTORY --show BACKUP
    vmbackup-extract.py DIRECTORY --extract BACKUP VOLUME FILE
    vmbackup-extract.py DIRECTORY --blob BACKUP domain.xml FILE

The image is raw and sparse, as of the backup's instant T1. Every chunk is checked against its name, in pure Python:
that takes a second of a core for each 20 MiB of data. With --no-verify it is left out (in an encrypted repository the
cipher's own check stays), and it is some ten times faster. Memory: 80 MiB.

Exit status: 0 all went well; 1 an error; 2 wrong usage; 3 --keep-going left out chunks.
"""

from __future__ import annotations

import argparse
import array
import base64
import ctypes
import ctypes.util
import getpass
import hashlib
import hmac
import json
import os
import re
import struct
import subprocess
import sys
import time
import unicodedata
from bisect import bisect_left, bisect_right
from pathlib import Path

CHUNK, NODE, ROOT = 1, 2, 3
HOLE = bytes(32)
LARGEST = 8 << 20  # bytes of a record's content at most
BATCH = 16 << 20  # bytes of contents that are read, decompressed and checked at once
ENTRY = struct.Struct("<32sIIII")  # name, pack, offset, stored, raw and kind


class Failure(Exception):
    """What ends this program, as a sentence."""


# ---- BLAKE3, keyed: https://github.com/BLAKE3-team/BLAKE3-specs
#
# Python's integers are the vector unit: one integer holds a 32-bit word of each of many inputs, in lanes of 64 bits, so
# that one addition is that of them all. Carries and bits shifted out stay in the upper half of a lane, and are masked.

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, IS_ROOT, KEYED = 1, 2, 4, 8, 16
LEAF = 1024  # bytes of a chunk, as BLAKE3 calls it
LANES = 4096  # at once: the integers stay in the CPU's cache


def _schedule():
    order, rounds = list(range(16)), []
    for _ in range(7):
        rounds.append([(*lanes, order[2 * i], order[2 * i + 1]) for i, lanes in enumerate(COLUMNS + DIAGONALS)])
        order = [order[i] for i in PERMUTATION]
    return rounds


SCHEDULE = _schedule()


def compress(cv, words, counter, length, flags, ones):
    """The compression function on many lanes; ``ones`` has a 1 in each. The last three but ``counter`` are numbers."""
    mask = ones * 0xFFFFFFFF
    v = [*cv, *(word * ones for word in IV[:4]), counter, 0, length * ones, flags * ones]
    for mixing in SCHEDULE:
        for a, b, c, d, x, y in mixing:
            p = (v[a] + v[b] + words[x]) & mask
            s = v[d] ^ p
            s = (s >> 16 | s << 16) & mask
            r = (v[c] + s) & mask
            q = v[b] ^ r
            q = (q >> 12 | q << 20) & mask
            v[a] = p = (p + q + words[y]) & mask
            s ^= p
            v[d] = s = (s >> 8 | s << 24) & mask
            v[c] = r = (r + s) & mask
            q ^= r
            v[b] = (q >> 7 | q << 25) & mask
    return [v[i] ^ v[i + 8] for i in range(8)]


def _vectors(data, stride):
    """The 16 words of the 64 byte block at each ``stride`` bytes of ``data``, for all lanes."""
    words = array.array("I", data)
    if sys.byteorder == "big":
        words.byteswap()
    found = []
    for at in range(stride // 4):
        lanes = array.array("Q", words[at :: stride // 4])
        if sys.byteorder == "big":
            lanes.byteswap()
        found.append(int.from_bytes(lanes.tobytes(), "little"))
    return found


def _leaves(key, data, size, counters, last):
    """Chaining values (8 words) of equal pieces of ``size`` bytes, one after another in ``data``."""
    count = len(counters)
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    counter = int.from_bytes(b"".join(struct.pack("<Q", number) for number in counters), "little")
    padded = max(-(-size // 64), 1) * 64
    if padded != size:
        data = b"".join(data[at * size : (at + 1) * size].ljust(padded, b"\0") for at in range(count))
    words = _vectors(data, padded)
    cv = [word * ones for word in key]
    for at in range(0, padded, 64):
        flags = KEYED | (CHUNK_START if at == 0 else 0)
        if at + 64 == padded:
            flags |= CHUNK_END | last
        cv = compress(cv, words[at // 4 : at // 4 + 16], counter, min(64, size - at), flags, ones)
    return cv


def _cut(vector, count):
    return [vector.to_bytes(8 * count, "little")[8 * i : 8 * i + 8] for i in range(count)]


def _hash_equal(key, contents, size):
    """Hashes of contents that all have ``size`` bytes."""
    number, pieces = len(contents), max(-(-size // LEAF), 1)
    last = IS_ROOT if pieces == 1 else 0
    levels = []  # of every piece: 8 words for every content, as lanes in bytes
    whole = pieces if size == pieces * LEAF else pieces - 1
    for first in range(0, whole, max(LANES // number, 1)):
        group = range(first, min(first + max(LANES // number, 1), whole))
        data = b"".join(content[at * LEAF : (at + 1) * LEAF] for at in group for content in contents)
        cv = _leaves(key, data, LEAF, [at for at in group for _ in contents], last)
        rows = [word.to_bytes(8 * number * len(group), "little") for word in cv]
        levels += [[row[8 * number * i : 8 * number * (i + 1)] for row in rows] for i in range(len(group))]
    if whole < pieces:
        data = b"".join(content[whole * LEAF :] for content in contents)
        cv = _leaves(key, data, size - whole * LEAF, [whole] * number, last)
        levels.append([word.to_bytes(8 * number, "little") for word in cv])
    while len(levels) > 1:
        levels = _parents(key, levels, number)
    words = [struct.unpack(f"<{number}Q", row) for row in levels[0]]
    return [struct.pack("<8I", *(row[at] for row in words)) for at in range(number)]


def _parents(key, level, number):
    """One level up in the tree: pairs are joined, an odd one at the end goes up as it is."""
    pairs = len(level) // 2
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * (pairs * number), "little")
    words = [
        int.from_bytes(b"".join(level[2 * i + side][word] for i in range(pairs)), "little")
        for side in (0, 1)
        for word in range(8)
    ]
    flags = KEYED | PARENT | (IS_ROOT if len(level) == 2 else 0)
    cv = compress([word * ones for word in key], words, 0, 64, flags, ones)
    rows = [word.to_bytes(8 * pairs * number, "little") for word in cv]
    above = [[row[8 * number * i : 8 * number * (i + 1)] for row in rows] for i in range(pairs)]
    return above + level[2 * pairs :]


def hash_many(key, contents):
    """Keyed BLAKE3 of each of ``contents``; much faster for many of one size than one by one."""
    words = struct.unpack("<8I", key)
    sizes = {}
    for at, content in enumerate(contents):
        sizes.setdefault(len(content), []).append(at)
    found = [b""] * len(contents)
    for size, places in sizes.items():
        step = max(LANES * LEAF // max(size, LEAF), 1)
        for first in range(0, len(places), step):
            some = places[first : first + step]
            for at, digest in zip(some, _hash_equal(words, [contents[at] for at in some], size)):
                found[at] = digest
    return found


def keyed_hash(key, content):
    """Keyed BLAKE3 of one content."""
    return hash_many(key, [content])[0]


# ---- ciphers, by OpenSSL's libcrypto

AES_GCM, CHACHA_POLY, TAG = 1, 2, 16
_CTRL_IVLEN, _CTRL_SET_TAG = 9, 17  # EVP_CTRL_AEAD_...: openssl/evp.h
_library = None


def libcrypto():
    """OpenSSL's library, loaded when it is first needed."""
    global _library
    if _library is not None:
        return _library
    for name in ("libcrypto.so.3", "libcrypto.so.1.1", ctypes.util.find_library("crypto")):
        try:
            found = ctypes.CDLL(name) if name else None
        except OSError:
            continue
        if found is not None:
            for function in ("EVP_CIPHER_CTX_new", "EVP_aes_256_gcm", "EVP_chacha20_poly1305"):
                getattr(found, function).restype = ctypes.c_void_p
            _library = found
            return found
    raise Failure("this repository is encrypted, and OpenSSL's libcrypto was not found: install it (libssl3, openssl)")


def decrypt(cipher, key, nonce, bound, data):
    """The plaintext, or None if ``data`` is not what was encrypted with this key, nonce and associated data."""
    library = libcrypto()
    kind = {AES_GCM: library.EVP_aes_256_gcm, CHACHA_POLY: library.EVP_chacha20_poly1305}.get(cipher)
    if kind is None or len(data) < TAG:
        return None
    body, tag = data[:-TAG], data[-TAG:]
    context = ctypes.c_void_p(library.EVP_CIPHER_CTX_new())
    out = ctypes.create_string_buffer(max(len(body), 1))
    length = ctypes.c_int(0)
    place = ctypes.byref(length)
    try:
        done = (
            library.EVP_DecryptInit_ex(context, ctypes.c_void_p(kind()), None, None, None) == 1
            and library.EVP_CIPHER_CTX_ctrl(context, _CTRL_IVLEN, len(nonce), None) == 1
            and library.EVP_DecryptInit_ex(context, None, None, key, nonce) == 1
            and library.EVP_DecryptUpdate(context, None, place, bound, len(bound)) == 1
            and (not body or library.EVP_DecryptUpdate(context, out, place, body, len(body)) == 1)
            and library.EVP_CIPHER_CTX_ctrl(context, _CTRL_SET_TAG, TAG, tag) == 1
            and library.EVP_DecryptFinal_ex(context, None, place) == 1
        )
    finally:
        library.EVP_CIPHER_CTX_free(context)
    return out.raw[: len(body)] if done else None


# ---- zstd, by its command


def decompress(frames):
    """The contents of (frame, length) pairs; None for those that are no such frame. One process for all of them."""
    if not frames:
        return []
    wanted = sum(length for _, length in frames)
    data = run_zstd(b"".join(frame for frame, _ in frames))
    if data is not None and len(data) == wanted:
        found, at = [], 0
        for _, length in frames:
            found.append(data[at : at + length])
            at += length
        return found
    if len(frames) == 1:
        return [None]
    half = len(frames) // 2  # one of them is damaged
    return decompress(frames[:half]) + decompress(frames[half:])


def run_zstd(data):
    """The output of ``zstd -dc``, None if it fails."""
    try:
        done = subprocess.run(["zstd", "-dcq", "--no-progress"], input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise Failure("the command `zstd` was not found: install the package zstd") from None
    return done.stdout if done.returncode == 0 else None


# ---- the repository's keys


def canonical(fields):
    """Canonical JSON."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(data, what):
    """A JSON object."""
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise Failure(f"{what} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise Failure(f"{what} is damaged: it is no JSON object")
    return fields


def checked(data, what):
    """The fields of a JSON object that has a checksum."""
    fields = parse_json(data, what)
    if fields.pop("checksum", None) != hashlib.sha256(canonical(fields)).hexdigest():
        raise Failure(f"{what} is damaged: it does not match its checksum")
    return fields


RECOVERY_DIGITS = str.maketrans("0123456789ABCDEFGHJKMNPQRSTVWXYZILO", "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567BBA")


def recovery_secret(text):
    """The secret in a typed recovery key."""
    try:
        data = base64.b32decode(re.sub(r"[\s-]+", "", text).upper().translate(RECOVERY_DIGITS))
    except ValueError:
        data = b""
    if len(data) != 35 or hashlib.sha256(b"vmbackupd recovery key" + data[:32]).digest()[:3] != data[32:]:
        raise Failure("this is no recovery key, or it was mistyped: it has 56 letters and digits")
    return data[:32]


def wrapping_key(kdf, secret):
    """The key that wraps the master key in a slot."""
    salt = bytes.fromhex(kdf["salt"])
    if kdf["name"] == "blake3":
        return keyed_hash(salt, secret)
    if kdf["name"] == "scrypt":
        n, r, p = kdf["n"], kdf["r"], kdf["p"]
        if 128 * n * r > 1 << 30 or p > 16:
            raise Failure(f"a key slot asks for scrypt with n {n}, r {r}, p {p}: that is too much")
        return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 4), dklen=32)
    raise Failure(f"a key slot uses {kdf['name']!r}, which this program does not know")


def master_key(root, header, secrets):
    """The master key, from the first slot that one of ``secrets`` (kinds of slots, bytes) opens."""
    kinds = set()
    for path in sorted((root / "keys").glob("*")):
        try:
            slot = checked(path.read_bytes(), f"key slot {path.name}")
            wrapped, nonce, kind = bytes.fromhex(slot.pop("wrapped")), bytes.fromhex(slot["nonce"]), slot["kind"]
            if slot["version"] != 1 or slot["repository"] != header["id"] or slot["id"] != path.name:
                continue
            kinds.add(kind)
            for secret in (secret for opens, secret in secrets if kind in opens):
                master = decrypt(AES_GCM, wrapping_key(slot["kdf"], secret), nonce, canonical(slot), wrapped)
                if master is not None:
                    return master
        except (Failure, KeyError, TypeError, ValueError, OSError) as error:
            print(f"key slot {path.name} is left out: {error}", file=sys.stderr)
    there = ", ".join(sorted(kinds)) or "none at all"
    raise Failure(
        f"the repository is encrypted; its key slots: {there}. "
        + ("None of them opens with what was given" if secrets else "Give --key-file, --passphrase or --recovery-key")
    )


# ---- the repository


class Index:
    """One index file. Its entries are hints: what they lead to is checked."""

    HEAD = struct.Struct("<8sHB5x16s16sQII")

    def __init__(self, path):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        size = os.fstat(self.file.fileno()).st_size
        head = self.file.read(self.HEAD.size)
        if len(head) < self.HEAD.size:
            raise ValueError("it is truncated")
        magic, version, _, _, _, _, packs, self.blocks = self.HEAD.unpack(head)
        self.start = self.HEAD.size
        if magic != b"VMBKINDX" or version != 1:
            raise ValueError("it is no index of version 1")
        table = self.start + 4096 * self.blocks
        if size < table + 16 * packs + 40 * self.blocks + 32:
            raise ValueError("it is truncated")
        data = os.pread(self.file.fileno(), 16 * packs + 40 * self.blocks, table)
        self.packs = [data[at : at + 16].hex() for at in range(0, 16 * packs, 16)]
        directory = data[16 * packs :]
        self.firsts = [directory[at : at + 8] for at in range(0, len(directory), 40)]

    def find(self, name):
        """(pack id, offset, stored, raw, kind) of every entry of this name."""
        prefix = name[:8]
        first = max(bisect_left(self.firsts, prefix) - 1, 0)
        for block in range(first, bisect_right(self.firsts, prefix)):
            data = os.pread(self.file.fileno(), 4096, self.start + 4096 * block)
            at = data.find(name)
            while at >= 0:
                if at % ENTRY.size == 0 and at + ENTRY.size <= len(data):
                    _, pack, offset, stored, last = ENTRY.unpack_from(data, at)
                    if pack < len(self.packs):
                        yield self.packs[pack], offset, stored, last & 0xFFFFFF, last >> 24
                at = data.find(name, at + 1)


class Repository:
    """A repository in a local directory, open for reading."""

    ENVELOPE = struct.Struct("<8sHB5x16sQ")
    PACK = struct.Struct("<8sHB5x16s16s16x")
    RECORD = struct.Struct("<32sIIBB6s")
    TRAILER = struct.Struct("<8sQI4x16s8x32s")

    def __init__(self, root, secrets, verify=True):
        self.root = Path(root)
        try:
            header = checked((self.root / "repository.json").read_bytes(), f"{root}/repository.json")
        except OSError as error:
            raise Failure(f"{root} is no vmbackupd repository: {error}") from None
        if (header.get("format"), header.get("version"), header.get("hash")) != ("vmbackupd", 1, 1):
            raise Failure(f"{root} is no repository of format version 1")
        self.id = bytes.fromhex(header["id"])
        self.verify = verify
        self.encrypted = header["encryption"] is not None
        self.content_key = self.object_key = None
        if self.encrypted:
            hash_key = self._unlock(header, secrets)
        elif secrets:
            raise Failure(f"a key was given, but {root} is not encrypted: is it the right repository?")
        else:
            hash_key = bytes.fromhex(header["hash_key"])
        uses = ("chunk names", "node names", "checksums", "manifest names")
        self.chunk_key, self.node_key, self.seal_key, self.name_key = (
            keyed_hash(hash_key, f"vmbackupd {use}".encode()) for use in uses
        )
        self._indexes = None
        self._scanned = None
        self._packs = {}
        self._pack_keys = {}

    def _unlock(self, header, secrets):
        master = master_key(self.root, header, secrets)
        fields = {**header, "encryption": {"cipher": header["encryption"]["cipher"]}}
        check = keyed_hash(keyed_hash(master, b"vmbackupd header"), canonical(fields))
        if header["encryption"]["cipher"] != "aead" or check.hex() != header["encryption"]["check"]:
            raise Failure("the repository's header was changed: it does not match its key")
        self.content_key = keyed_hash(master, b"vmbackupd content key")
        self.object_key = keyed_hash(master, b"vmbackupd object key")
        return keyed_hash(master, b"vmbackupd hash key")

    # ---- manifests

    def names(self):
        """The names of all manifests."""
        return sorted(path.name for path in (self.root / "manifests").glob("*") if not path.name.startswith("."))

    def manifest(self, backup):
        """The manifest of a backup."""
        name = keyed_hash(self.name_key, backup.encode())[:16].hex() if self.encrypted else backup
        there = "/" not in name and (self.root / "manifests" / name).is_file()
        found = self.read_manifest(name) if there else None
        if found is None:
            raise Failure(f"there is no backup {backup}: --list tells which there are")
        return found

    def read_manifest(self, name):
        """The manifest in an object; None for the mark of a writer that was shut out."""
        what = f"manifest {name}"
        data = (self.root / "manifests" / name).read_bytes()
        if data[:8] == b"VMBKVOID":
            mark = self._unseal(data, b"VMBKVOID", what)
            if mark != keyed_hash(self.seal_key, f"manifests/{name}".encode()):
                raise Failure(f"{what} is the mark of another backup: an object was swapped")
            return None
        fields = parse_json(self._unseal(data, b"VMBKMANI", what), what)
        if fields.get("version") != 1:
            raise Failure(f"{what} has version {fields.get('version')}, this program reads 1")
        expected = keyed_hash(self.name_key, fields["id"].encode())[:16].hex() if self.encrypted else fields["id"]
        if expected != name:
            raise Failure(f"{what} is that of {fields['id']}: an object was swapped")
        return fields

    def _unseal(self, data, magic, what):
        head = self.ENVELOPE.size
        if len(data) < head + 32:
            raise Failure(f"{what} is truncated")
        own, version, cipher, repository, length = self.ENVELOPE.unpack_from(data)
        if own != magic or version != 1 or repository != self.id or (cipher != 0) != self.encrypted:
            raise Failure(f"{what} is damaged, or is not of this repository")
        if not hmac.compare_digest(keyed_hash(self.seal_key, data[:-32]), data[-32:]):
            raise Failure(f"{what} is damaged: it does not match its seal")
        body = data[head:-32]
        if self.encrypted:
            key = keyed_hash(self.object_key, body[:32])
            body = decrypt(cipher, key, bytes(12), data[:head], body[32:])
        if body is None or len(body) != length:
            raise Failure(f"{what} is damaged: it does not decrypt")
        return body

    # ---- records

    def places(self, name):
        """Where copies of a content may be, likely ones first."""
        if self._indexes is None:
            self._indexes = []
            for path in sorted((self.root / "indexes").glob("*")):
                try:
                    self._indexes.append(Index(path))
                except (OSError, ValueError) as error:
                    print(f"index {path.name} is left out: {error}", file=sys.stderr)
        for index in self._indexes:
            yield from index.find(name)
        if self._scanned is None:
            print("an index is missing or damaged: looking through all packs", file=sys.stderr)
            self._scanned = {}
            for path in sorted((self.root / "packs").glob("*/*")):
                self._scan(path)
        yield from self._scanned.get(name, ())

    def _scan(self, path):
        """Enter what a pack's own index tells, or where that is damaged its records one by one."""
        data = path.read_bytes()
        entries = []
        if len(data) >= self.PACK.size + self.TRAILER.size:
            magic, offset, count, _, seal = self.TRAILER.unpack_from(data, len(data) - self.TRAILER.size)
            sealed = magic == b"VMBKPEND" and keyed_hash(self.seal_key, data[offset:-32]) == seal
            if sealed and offset + count * ENTRY.size + self.TRAILER.size == len(data):
                entries = [ENTRY.unpack_from(data, offset + ENTRY.size * at) for at in range(count)]
        if entries:
            for name, _, at, stored, last in entries:
                self._scanned.setdefault(name, []).append((path.name, at, stored, last & 0xFFFFFF, last >> 24))
            return
        at = self.PACK.size
        while at + self.RECORD.size <= len(data):
            name, stored, last, compression, cipher, _ = self.RECORD.unpack_from(data, at)
            kind, end = last >> 24, at + self.RECORD.size + stored
            if kind not in (CHUNK, NODE, ROOT) or compression > 1 or cipher > 2 or end > len(data):
                break
            self._scanned.setdefault(name, []).append((path.name, at, stored, last & 0xFFFFFF, kind))
            at = end

    def _payload(self, name, kind, place):
        """(compression, payload, bytes of the content) at a place; None if there is no such record."""
        pack, offset, stored, raw, _ = place
        file = self._open(pack)
        if file is None:
            return None
        data = os.pread(file, self.RECORD.size + stored, offset)
        if len(data) != self.RECORD.size + stored:
            return None
        own, length, last, compression, cipher, reserved = self.RECORD.unpack_from(data)
        if (own, length, last, reserved) != (name, stored, raw | kind << 24, bytes(6)) or compression > 1:
            return None
        payload = data[self.RECORD.size :]
        if (cipher != 0) != self.encrypted or raw > LARGEST:
            return None
        if cipher:
            nonce = struct.pack("<I", offset) + name[:8]
            payload = decrypt(cipher, self._pack_key(pack), nonce, data[: self.RECORD.size], payload)
        if payload is None or (compression == 0 and len(payload) != raw):
            return None
        return compression, payload, raw

    def _open(self, pack):
        """A descriptor of a pack, None if there is none. A few are kept open."""
        if pack not in self._packs:
            if len(self._packs) >= 100:
                os.close(self._packs.pop(next(iter(self._packs))))
            try:
                self._packs[pack] = os.open(self.root / "packs" / pack[:2] / pack, os.O_RDONLY)
            except FileNotFoundError:
                return None
        return self._packs[pack]

    def _pack_key(self, pack):
        if pack not in self._pack_keys:
            self._pack_keys[pack] = keyed_hash(self.content_key, bytes.fromhex(pack))
        return self._pack_keys[pack]

    def contents(self, names, kind, *, verify=True):
        """The contents of these names, checked; absent where there is no sound copy."""
        found = {}
        waiting = {name: self.places(name) for name in names}
        while waiting:
            payloads = {}
            for name in list(waiting):
                for place in waiting[name]:
                    payload = self._payload(name, kind, place)
                    if payload is not None:
                        payloads[name] = payload
                        break
                else:
                    del waiting[name]
            contents = self._unpack(payloads)
            sound = list(contents)
            if verify:
                key = self.chunk_key if kind == CHUNK else self.node_key
                digests = hash_many(key, [contents[name] for name in sound])
                sound = [name for name, digest in zip(sound, digests) if name == digest]
            for name in sound:
                found[name] = contents[name]
                del waiting[name]
        return found

    @staticmethod
    def _unpack(payloads):
        """name -> content of what decompresses."""
        packed = [name for name, (compression, _, _) in payloads.items() if compression]
        unpacked = decompress([(payloads[name][1], payloads[name][2]) for name in packed])
        found = {name: payload for name, (compression, payload, _) in payloads.items() if not compression}
        found.update((name, content) for name, content in zip(packed, unpacked) if content is not None)
        return found

    def content(self, name, kind):
        """One content, checked whatever was asked for: the tree hangs on it."""
        found = self.contents([name], kind).get(name)
        if found is None:
            raise Failure(f"there is no sound copy of {'node' if kind == NODE else 'tree'} {name.hex()} in the packs")
        return found


class Image:
    """A stored image."""

    RECORD = struct.Struct("<8sHBBIIIQ32s")

    def __init__(self, repository, tree):
        self.repository = repository
        root = repository.content(bytes.fromhex(tree), ROOT)
        magic, version, self.levels, _, self.chunk, self.fanout, _, self.size, self.top = self.RECORD.unpack(root)
        if magic != b"VMBKTREE" or version != 1:
            raise Failure(f"tree {tree} is no tree of version 1")
        self._cache = {}

    def chunks(self):
        """(number, name) of every chunk that is no hole, ascending."""
        yield from self._below(self.levels - 1, 0, self.top)

    def _below(self, level, number, name):
        if name == HOLE:
            return
        for at, below in enumerate(self._names(level, name)):
            if level:
                yield from self._below(level - 1, number * self.fanout + at, below)
            elif below != HOLE:
                yield number * self.fanout + at, below

    def _names(self, level, name):
        node = self.repository.content(name, NODE)
        magic, own, _, count, _ = struct.unpack_from("<4sBBHQ", node)
        if (magic, own, len(node)) != (b"NODE", level, 16 + 32 * count) or count > self.fanout:
            raise Failure(f"node {name.hex()} is not what the tree needs")
        return [node[at : at + 32] for at in range(16, len(node), 32)]

    def read(self, offset, length):
        """``length`` bytes from ``offset``, for small parts here and there."""
        if not 0 <= offset <= offset + length <= self.size:
            raise Failure(f"{length} bytes at {offset} are not inside an image of {self.size} bytes")
        parts = []
        while length:
            number, within = divmod(offset, self.chunk)
            part = self._chunk(number)[within : within + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def _chunk(self, number):
        if number not in self._cache:
            if len(self._cache) > 64:
                self._cache.pop(next(iter(self._cache)))
            name = self.top
            for level in reversed(range(self.levels)):
                names = self._names(level, name) if name != HOLE else []
                at = number // self.fanout**level % self.fanout
                name = names[at] if at < len(names) else HOLE
            size = min(self.chunk, self.size - number * self.chunk)
            self._cache[number] = bytes(size) if name == HOLE else self.repository.content(name, CHUNK)
        return self._cache[number]


# ---- extraction


class Extraction:
    """An image on its way into a file."""

    def __init__(self, image, file, keep_going, quiet):
        self.image, self.file, self.keep_going, self.quiet = image, file, keep_going, quiet
        self.written = 0
        self.lost = []
        self._shown = time.monotonic()

    def run(self):
        """Write everything that is no hole."""
        os.ftruncate(self.file, self.image.size)
        batch = []
        for item in self.image.chunks():
            batch.append(item)
            if len(batch) * self.image.chunk >= BATCH:
                self._write(batch)
                batch = []
        self._write(batch)

    def _write(self, batch):
        repository = self.image.repository
        contents = repository.contents({name for _, name in batch}, CHUNK, verify=repository.verify)
        for number, name in batch:
            offset = number * self.image.chunk
            expected = min(self.image.chunk, self.image.size - offset)
            content = contents.get(name)
            if content is None or len(content) != expected:
                if not self.keep_going:
                    raise Failure(
                        f"bytes {offset} to {offset + expected} of the image are lost: there is no sound copy of chunk"
                        f" {name.hex()} (--keep-going leaves out what is lost)"
                    )
                self.lost.append((offset, expected))
                continue
            write_all(self.file, content, offset)
            self.written += expected
        if not self.quiet and time.monotonic() - self._shown > 1:
            self._shown = time.monotonic()
            done = (batch[-1][0] + 1) * self.image.chunk
            print(f"\r{min(100, 100 * done // self.image.size)} %", end="", file=sys.stderr, flush=True)


def write_all(file, data, offset):
    """Write all of ``data``."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def exceptions(read, length, origin_size):
    """(old chunk, new chunk) of a dm-snapshot persistent store, and its chunk size (Linux, dm-snap-persistent.c)."""
    magic, valid, version, sectors = struct.unpack("<4s3I", read(0, 16))
    chunk = 512 * sectors
    if (magic, valid, version) != (b"SnAp", 1, 1) or not chunk or chunk & (chunk - 1):
        raise Failure("a COW store is invalid: the image cannot be set back to T1")
    found, area = [], 1
    while True:
        if (area + 1) * chunk > length:
            raise Failure("a COW store is truncated: the image cannot be set back to T1")
        for old, new in struct.iter_unpack("<QQ", read(area * chunk, chunk)):
            if new == 0:
                return found, chunk
            if old * chunk >= origin_size or (new + 1) * chunk > length:
                raise Failure("a COW store is damaged: the image cannot be set back to T1")
            found.append((old, new))
        area += chunk // 16 + 1


def set_back(repository, manifest, volume, file):
    """Write to the T2 image in ``file`` what was there at T1."""
    store = Image(repository, manifest["store"]["tree"])
    for mapped in manifest["volume_maps"]:
        parts = [part for part in mapped["segments"] if part[1] == volume["id"]]
        if not parts:
            continue
        base = mapped["store_offset"]
        found, chunk = exceptions(
            lambda at, n, base=base: store.read(base + at, n), mapped["store_length"], mapped["size"]
        )
        for old, new in found:
            start, end = old * chunk, min((old + 1) * chunk, mapped["size"])
            for at, _, disk_at, length in parts:
                first, last = max(start, at), min(end, at + length)
                if first < last:
                    data = store.read(base + new * chunk + first - start, last - first)
                    write_all(file, data, disk_at + first - at)


def find_volume(manifest, name):
    """A volume of a backup."""
    for volume in manifest["volumes"]:
        if volume["id"] == name:
            return volume
    raise Failure(f"backup {manifest['id']} has the volumes {', '.join(v['id'] for v in manifest['volumes'])}")


def into_file(path, force, write):
    """Make a file whose name appears when it is complete; ``write`` gets its descriptor."""
    if os.path.lexists(path) and not force:
        raise Failure(f"{path} exists already: name another file, or replace it with --force")
    part = f"{path}.part"
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        result = write(file)
        os.fsync(file)
        os.rename(part, path)
    except BaseException:
        os.unlink(part)
        raise
    finally:
        os.close(file)
    return result


# ---- commands


def list_backups(repository):
    """A line for each backup, oldest first."""
    lines, damaged = [], 0
    for name in repository.names():
        try:
            manifest = repository.read_manifest(name)
        except (Failure, KeyError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            damaged += 1
            continue
        if manifest is None:
            continue
        volumes = ", ".join(f"{volume['id']} ({volume['size']} bytes)" for volume in manifest["volumes"])
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest["t1"]))
        lines.append((manifest["t1"], f"{manifest['id']}  {when}  {manifest['vm']['name']}  {volumes}"))
    for _, line in sorted(lines):
        print(line)
    return 1 if damaged else 0


def extract(repository, options):
    """Extract a volume."""
    backup, name, path = options.extract
    manifest = repository.manifest(backup)
    volume = find_volume(manifest, name)
    image = Image(repository, volume["tree"] or volume["t2_tree"])
    if image.size != volume["size"]:
        raise Failure(f"the image has {image.size} bytes, the manifest says {volume['size']}")
    began = time.monotonic()

    def write(file):
        extraction = Extraction(image, file, options.keep_going, options.quiet)
        extraction.run()
        if volume["tree"] is None:
            set_back(repository, manifest, volume, file)
        return extraction

    done = into_file(path, options.force, write)
    for offset, length in done.lost:
        print(f"\rlost: bytes {offset} to {offset + length}, left as zeros", file=sys.stderr)
    if not options.quiet:
        seconds = time.monotonic() - began
        mib, checks = done.written / 2**20, "" if repository.verify else ", names not checked"
        print(f"\r{path}: {mib:.1f} MiB of data in {seconds:.1f} s, {mib / seconds:.1f} MiB/s{checks}", file=sys.stderr)
    return 3 if done.lost else 0


def extract_blob(repository, options):
    """Extract a small file of the VM's configuration."""
    backup, name, path = options.blob
    manifest = repository.manifest(backup)
    if name not in manifest["config"]:
        raise Failure(f"backup {backup} has {', '.join(sorted(manifest['config'])) or 'no configuration'}")
    image = Image(repository, manifest["config"][name])
    into_file(path, options.force, lambda file: Extraction(image, file, False, True).run())
    return 0


def secrets_of(options):
    """The secrets that were given, each with the kinds of slots it may open."""
    found = []
    if options.key_file:
        found.append(({"keyfile", "credential"}, Path(options.key_file).read_bytes()))
    if options.recovery_key:
        found.append(({"recovery"}, recovery_secret(Path(options.recovery_key).read_text())))
    if options.passphrase_file or options.passphrase:
        if options.passphrase_file:
            with open(options.passphrase_file, encoding="utf-8") as file:
                text = file.readline().rstrip("\r\n")
        else:
            text = getpass.getpass("Passphrase: ")
        found.append(({"passphrase"}, unicodedata.normalize("NFC", text).encode()))
    return found


def arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="the repository")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list all backups")
    what.add_argument("--show", metavar="BACKUP", help="print a backup's manifest as JSON")
    what.add_argument("--extract", nargs=3, metavar=("BACKUP", "VOLUME", "FILE"), help="write a volume to a raw file")
    what.add_argument("--blob", nargs=3, metavar=("BACKUP", "NAME", "FILE"), help="write domain.xml or nvram to a file")
    parser.add_argument("--no-verify", action="store_true", help="do not check chunks against their names")
    parser.add_argument("--keep-going", action="store_true", help="leave out chunks that are lost, and say which")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--key-file", metavar="FILE", help="key file or credential of an encrypted repository")
    parser.add_argument("--passphrase-file", metavar="FILE", help="file whose first line is the passphrase")
    parser.add_argument("--passphrase", action="store_true", help="ask for the passphrase")
    parser.add_argument("--recovery-key", metavar="FILE", help="file with the recovery key (/dev/stdin to type it)")
    return parser.parse_args(argv)


def main(argv=None):
    """The program."""
    options = arguments(argv)
    try:
        repository = Repository(options.directory, secrets_of(options), verify=not options.no_verify)
        if options.list:
            return list_backups(repository)
        if options.show:
            print(json.dumps(repository.manifest(options.show), indent=2, ensure_ascii=False))
            return 0
        return extract(repository, options) if options.extract else extract_blob(repository, options)
    except (Failure, OSError) as error:
        print(f"vmbackup-extract: {error}", file=sys.stderr)
        return 1
    except (KeyError, TypeError, ValueError, struct.error) as error:
        print(f"vmbackup-extract: something in the repository is not as its format says: {error!r}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vmbackup-extract: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
