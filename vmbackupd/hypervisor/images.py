"""Disk image files, through ``qemu-img``.

Formats are always given, never probed: what a probe reads is what a guest wrote.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass

from vmbackupd.errors import HypervisorError
from vmbackupd.host.process import CommandFailed, run

log = logging.getLogger("hypervisor.images")

QUICK = 60.0  # seconds for commands that read or write headers only
MAX_CHAIN = 200  # images in one chain; QEMU's own recursion gives up not far above


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file, which need not exist."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image's header says. Sizes in bytes; ``backing`` is the absolute path (or the reference) of the next
    image in the chain and ``backing_format`` the format the header records for it; ``bitmaps`` the names of the dirty
    bitmaps it keeps."""

    path: str
    format: str
    size: int
    allocated: int
    backing: str | None
    backing_format: str | None
    bitmaps: tuple[str, ...] = ()


async def _qemu_img(*words: str, timeout: float = QUICK) -> bytes:
    try:
        return (await run(["qemu-img", *words], timeout=timeout)).stdout
    except CommandFailed as error:
        raise HypervisorError(str(error)) from error


async def image_info(path: str, format: str) -> ImageInfo:
    """The header of one image, also while a VM has it open (the size on disk is then a moment's)."""
    out = await _qemu_img("info", "--output=json", "-U", "-f", format, path)
    try:
        data = json.loads(out)
        return ImageInfo(
            path=path, format=str(data["format"]), size=int(data["virtual-size"]),
            allocated=int(data.get("actual-size", 0)),
            backing=data.get("full-backing-filename") or data.get("backing-filename"),
            backing_format=data.get("backing-filename-format"),
            bitmaps=tuple(str(item["name"]) for item in
                          data.get("format-specific", {}).get("data", {}).get("bitmaps", ())))
    except (ValueError, KeyError, TypeError) as error:
        raise HypervisorError(f"qemu-img info {path}: answer not understood: {error}") from error


async def qcow2_obstacle(path: str, size: int) -> str | None:
    """Why the content of a qcow2 image cannot simply be written over, a sentence without its subject; None if it can.

    An image of another size, or with snapshots, a backing file or a data file of its own is more than its content. What
    is no sound qcow2 image at all is told in the same way.
    """
    try:
        data = json.loads(await _qemu_img("info", "--output=json", "-U", "-f", "qcow2", path))
        details = data.get("format-specific", {}).get("data", {})
        found = int(data["virtual-size"])
        if data.get("full-backing-filename") or data.get("backing-filename"):
            return "has a backing file"
        if data.get("snapshots"):
            return "has internal snapshots"
        if "data-file" in details or data.get("encrypted") or details.get("bitmaps"):
            return "has a data file, encryption or bitmaps of its own"
        if details.get("corrupt") or data.get("dirty-flag"):
            return "is marked as damaged"
    except HypervisorError as error:
        return f"is no image that can be opened ({error})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be examined (qemu-img info: {error})"
    return None if found == size else f"holds {found} bytes, the volume {size}"


async def image_chain(path: str, format: str) -> list[ImageInfo]:
    """The image and its backing files, top first.

    Raises ``HypervisorError`` where a header names a backing file without its format, since the format would have to be
    guessed from content, or one that is no local file.
    """
    chain: list[ImageInfo] = []
    while True:
        info = await image_info(path, format)
        chain.append(info)
        if info.backing is None:
            return chain
        if info.backing_format is None:
            raise HypervisorError(f"{path}: its header names the backing file {info.backing} without a format; record "
                                  f"it with qemu-img rebase -u -b {info.backing} -F FORMAT {path}")
        if not info.backing.startswith("/"):
            raise HypervisorError(f"{path}: its backing file {info.backing} is not a local file, "
                                  "which is not supported")
        if len(chain) == MAX_CHAIN:
            raise HypervisorError(f"{path}: its chain has more than {MAX_CHAIN} images")
        path, format = info.backing, info.backing_format


async def qcow2_in_use(path: str) -> bool:
    """Whether a process (QEMU, qemu-img, ...) has the qcow2 image ``path`` open for writing: they hold locks on it."""
    try:
        await run(["qemu-img", "info", "--output=json", "-f", "qcow2", path], timeout=QUICK)
    except CommandFailed as error:
        if "lock" in error.stderr:
            return True
        if error.status is None:
            raise HypervisorError(str(error)) from error
        log.debug("%s", error)  # no such file, or no whole image: a lock would have been met before that
    return False


async def create_qcow2(path: str, size: int, *, compression: str = "zlib", cluster_size: int = 65536) -> None:
    """A new sparse qcow2 image of ``size`` bytes; the file must not exist. Readable by its owner only.

    ``compression`` is what its compressed clusters, if any, are compressed with: ``zlib``, or ``zstd`` (QEMU 5.1 and
    later read it); ``cluster_size`` in bytes.
    """
    _reserve(path, 0o600)
    try:
        await _qemu_img("create", "-q", "-f", "qcow2", "-o",
                        f"compression_type={compression},cluster_size={cluster_size}", path, str(size))
    except BaseException:
        os.unlink(path)
        raise


async def create_overlay(path: str, size: int, backing: str, backing_format: str) -> None:
    """A new qcow2 overlay of ``size`` bytes over ``backing``, which is not opened (a running VM may hold its locks)."""
    _reserve(path, 0o600)
    try:
        await _qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", backing_format, path, str(size))
    except BaseException:
        os.unlink(path)
        raise


async def shrink_image(path: str, format: str, size: int) -> None:
    """Cut an image to ``size`` bytes."""
    await _qemu_img("resize", "-q", "--shrink", "-f", format, path, str(size))


async def check_image(path: str, format: str, timeout: float) -> None:
    """Check that the metadata of an image is consistent. Raises ``HypervisorError`` with what is wrong."""
    await _qemu_img("check", "-q", "-f", format, path, timeout=timeout)


async def commit_offline(path: str, timeout: float) -> None:
    """Write what the qcow2 overlay ``path`` holds into its backing file. The overlay stays as it is, so that this can
    be done again after it was cut off."""
    await _qemu_img("commit", "-q", "-f", "qcow2", "-d", path, timeout=timeout)


async def add_bitmap(path: str, name: str) -> None:
    """Put a dirty bitmap that records nothing into a qcow2 image that nobody has open."""
    await _qemu_img("bitmap", "--add", "--disable", "-f", "qcow2", path, name)


async def holds_nothing(path: str) -> bool:
    """Whether a qcow2 image leaves everything to its backing file, which is not opened."""
    top = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": path}}
    out = await _qemu_img("map", "--output=json", "-U", f"json:{json.dumps(top)}")
    try:
        return not any(extent["present"] for extent in json.loads(out))
    except (ValueError, KeyError, TypeError) as error:
        raise HypervisorError(f"qemu-img map {path}: answer not understood: {error}") from error


async def remove_bitmap(path: str, name: str) -> None:
    """Take the dirty bitmap ``name`` out of a qcow2 image that nobody has open. One that is not there is no error."""
    try:
        await run(["qemu-img", "bitmap", "--remove", "-f", "qcow2", path, name], timeout=QUICK)
    except CommandFailed as error:
        if "not found" not in error.stderr:
            raise HypervisorError(str(error)) from error


def _reserve(path: str, mode: int) -> None:
    """Make the file ourselves: exclusively, and never for a moment readable by others."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
    except OSError as error:
        raise HypervisorError(f"cannot create the image {path}: {error.strerror}") from error
