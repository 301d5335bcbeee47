"""Authenticated encryption: published vectors, another library, and everything that must be refused."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from vmbackupd.engine import aead

OTHER = {aead.AES_GCM: AESGCM, aead.CHACHA_POLY: ChaCha20Poly1305}
CIPHERS = sorted(OTHER)


def test_published_vectors() -> None:
    # The Galois/Counter Mode of Operation (McGrew, Viega), appendix B, test case 16
    assert (
        aead.encrypt(
            aead.AES_GCM,
            bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2),
            bytes.fromhex("cafebabefacedbaddecaf888"),
            bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2"),
            bytes.fromhex(
                "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
                "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
            ),
        ).hex()
        == "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    # RFC 8439, section 2.8.2
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    text += b"sunscreen would be it."
    sealed = aead.encrypt(
        aead.CHACHA_POLY,
        bytes(range(0x80, 0xA0)),
        bytes.fromhex("070000004041424344454647"),
        bytes.fromhex("50515253c0c1c2c3c4c5c6c7"),
        text,
    )
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


@pytest.mark.parametrize("cipher", CIPHERS)
def test_the_same_as_another_library(cipher: int, rng: random.Random) -> None:
    lengths = [0, 1, 15, 16, 17, 4096, 65536, 65537, *(rng.randrange(300_000) for _ in range(20))]
    for length in lengths:
        key, nonce = rng.randbytes(32), rng.randbytes(12)
        bound, data = rng.randbytes(rng.choice([0, 1, 48, 100])), rng.randbytes(length)
        sealed = aead.encrypt(cipher, key, nonce, bound, data)
        assert sealed == OTHER[cipher](key).encrypt(nonce, data, bound)
        assert aead.decrypt(cipher, key, nonce, bound, sealed) == data


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_changed_byte_is_noticed(cipher: int, rng: random.Random) -> None:
    key, nonce, bound, data = rng.randbytes(32), rng.randbytes(12), rng.randbytes(48), rng.randbytes(500)
    sealed = aead.encrypt(cipher, key, nonce, bound, data)
    parts = [key, nonce, bound, sealed]
    for number, part in enumerate(parts):
        for at in range(len(part)):
            changed = bytearray(part)
            changed[at] ^= 1 << rng.randrange(8)
            with_it = [bytes(changed) if other == number else good for other, good in enumerate(parts)]
            assert aead.decrypt(cipher, *with_it) is None, (number, at)
    for length in range(len(sealed)):
        assert aead.decrypt(cipher, key, nonce, bound, sealed[:length]) is None
    assert aead.decrypt(cipher, key, nonce, bound, sealed + b"\0") is None
    assert aead.decrypt(3 - cipher, key, nonce, bound, sealed) is None
    assert aead.decrypt(cipher, key, nonce, bound, sealed) == data


def test_wrong_arguments() -> None:
    for cipher in (-1, 0, 3):
        with pytest.raises(ValueError, match="no cipher"):
            aead.encrypt(cipher, bytes(32), bytes(12), b"", b"")
        with pytest.raises(ValueError, match="no cipher"):
            aead.decrypt(cipher, bytes(32), bytes(12), b"", bytes(16))
    for key, nonce in ((31, 12), (33, 12), (32, 11), (32, 13)):
        with pytest.raises(ValueError, match="a key has 32 bytes"):
            aead.encrypt(aead.AES_GCM, bytes(key), bytes(nonce), b"", b"")


def test_the_preferred_cipher_is_that_of_the_processor() -> None:
    with open("/proc/cpuinfo") as file:
        flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    assert aead.preferred() == (aead.AES_GCM if "aes" in flags else aead.CHACHA_POLY)
