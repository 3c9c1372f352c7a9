"""Fetching one public file: gone on with where it was cut, and given its name only once its hash is right."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from tqdm import tqdm

from snail.files import file_hash

__all__ = ["RemoteFile", "download"]

_CHUNK = 2**16  # bytes that are read at once, at most
_HEAD = 2**10  # bytes that tell a web page from a file
_MOST = 2**33  # where neither we nor the server know the size: a body without end must not fill the disk
_PAUSE = 0.5  # seconds before the second attempt, twice as many before the third
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class RemoteFile:
    """A file that anybody can fetch, and how to tell that it is the right one.

    Args:
        name: What it is called in the folder; no path.
        addresses: Where it is, ``http`` or ``https``; they are tried in turn.
        size: In bytes; ``None`` if it is not known beforehand.
        hash: Of its content, in hex.
        hash_kind: As ``hashlib`` calls it, such as ``"md5"``.

    Raises:
        ValueError: The name is a path, an address is not one of the web, there is none, or the kind is unknown.
    """

    name: str
    addresses: tuple[str, ...]
    size: int | None
    hash: str
    hash_kind: str = "sha256"

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or re.search(r"[/\\:]", self.name):
            raise ValueError(f"the name of a file to download must not be a path, got {self.name!r}")
        if not self.addresses or any(urlsplit(each).scheme not in ("http", "https") for each in self.addresses):
            raise ValueError(f"{self.name} needs addresses that begin with http: or https:, got {self.addresses}")
        if self.hash_kind not in hashlib.algorithms_guaranteed:
            raise ValueError(f"{self.hash_kind!r}, the kind of hash of {self.name}, is unknown")


class _Failed(Exception):
    """What an address said in place of the file; whether to ask it again, and to drop what there is of the file."""

    def __init__(self, said: str, *, again: bool = False, drop: bool = False) -> None:
        super().__init__(said)
        self.again = again
        self.drop = drop


def download(file: RemoteFile, folder: Path, *, progress: bool = True, timeout: float = 30, attempts: int = 3) -> Path:
    """Fetch a file unless it is there already.

    What has come is kept in ``folder/.NAME.part``, and the next attempt, address or call goes on from there.

    Args:
        file: The file.
        folder: Where it is to lie; made once there is something to write.
        progress: Show a progress bar on standard error, if that is a terminal.
        timeout: Seconds without a sign of the server that count as a failure.
        attempts: How often an address is tried where trying again may help.

    Returns:
        The path of the file, whose size and hash are right.

    Raises:
        RuntimeError: No address gave the file, or the folder cannot be written.
    """
    target, part = folder / file.name, folder / f".{file.name}.part"
    said = []
    try:
        if _is_whole(target, file):
            return target
        if _is_whole(part, file):  # killed before it got its name
            return part.replace(target)
        for address in file.addresses:
            for attempt in range(max(attempts, 1)):
                time.sleep(_PAUSE * attempt)
                try:
                    _fetch(file, address, part, progress, timeout)
                    return part.replace(target)
                except _Failed as err:
                    answer, again = str(err), err.again
                    if err.drop:
                        part.unlink(missing_ok=True)
                if not again:
                    break
            said.append(f"{address} {answer}")
    except OSError as err:
        if _is_whole(target, file):  # another run fetched it at the same time, and was faster
            return target
        raise RuntimeError(f"{file.name} cannot be downloaded, as {folder} cannot be written ({_words(err)})") from err
    size = "" if file.size is None else f"{file.size} bytes, "
    raise RuntimeError(
        f"{file.name} could not be downloaded: {'; '.join(said)}; fetch {file.name} by hand from {file.addresses[0]} "
        f"({size}{file.hash_kind} {file.hash}) and put it into {folder}"
    )


def _is_whole(path: Path, file: RemoteFile) -> bool:
    try:
        fits = path.is_file() and file.size in (None, path.stat().st_size)
        return fits and file_hash(path, file.hash_kind) == file.hash.lower()
    except OSError:  # not to be read
        return False


def _fetch(file: RemoteFile, address: str, part: Path, progress: bool, timeout: float) -> None:
    """Bring ``part`` to its end and check it."""
    begin = part.stat().st_size if part.is_file() else 0
    if file.size is not None and begin >= file.size:  # its hash is wrong
        part.unlink()
        begin = 0
    with _ask(address, begin, timeout) as response:
        length = response.length  # what is read is taken off it
        chunk = _read(response.read, _HEAD)  # as much as that, however small the pieces that come
        page = response.status == 200 and _PAGE.match(chunk)
        if page or response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise _Failed("answered with a web page, not the file (a log-in, consent or error page)")
        at, size = _place(response, begin, length, file.size)
        end = _MOST if size is None else size
        chunk = chunk[: end - at]
        resumed = at > 0
        if not chunk:
            raise _Failed("sent nothing", again=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        off = None if progress else True
        with (
            part.open("r+b") as out,  # in place, not at the end: two runs at once write the same bytes
            tqdm(total=size, initial=at, desc=file.name, unit="B", unit_scale=True, disable=off) as bar,
        ):
            out.seek(at)
            while chunk:
                out.write(chunk)
                bar.update(len(chunk))
                at += len(chunk)
                chunk = _read(response.read1, min(end - at, _CHUNK))
            if size is not None and at < size:
                raise _Failed(f"was cut off after {at} of {size} bytes", again=True)
            out.truncate()  # what an older version of the file has left
    if (found := file_hash(part, file.hash_kind)) != file.hash.lower():
        # Pieces may be of two versions of the file, and then the whole of it from the same address is right.
        raise _Failed(f"sent another file, of {file.hash_kind} {found}", again=resumed, drop=True)


def _ask(address: str, begin: int, timeout: float) -> HTTPResponse:
    opener = request.OpenerDirector()  # that of urlopen would follow a redirection to ftp
    for handler in (
        *(request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.UnknownHandler),
        *(request.HTTPRedirectHandler, request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler),
    ):
        opener.add_handler(handler())
    headers = {"User-Agent": "snail"} | ({"Range": f"bytes={begin}-"} if begin else {})
    try:
        response: HTTPResponse = opener.open(request.Request(address, headers=headers), timeout=timeout)
        return response
    except HTTPError as err:
        err.close()
        past = err.code == 416  # there is nothing where the part ends
        again = past or err.code >= 500 or err.code in (408, 425, 429)  # these pass
        raise _Failed(f"answered {err.code} {_words(err)}", again=again, drop=past) from err
    except (OSError, HTTPException, ValueError) as err:  # ValueError: a redirection to a name that is none
        raise _Failed(f"could not be reached ({_words(err)})", again=True) from err


def _place(response: HTTPResponse, begin: int, length: int | None, size: int | None) -> tuple[int, int | None]:
    """Where in the file the body begins, and the size of the file if we or the server know it."""
    if response.status == 206:
        found = _RANGE.match(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != begin:
            raise _Failed("answered with another piece of the file than asked for", again=True, drop=True)
        stated = None if found[2] == "*" else int(found[2])
    elif response.status == 200:  # all of it, asked for or not
        begin, stated = 0, length
    else:
        raise _Failed(f"answered {response.status}, and no file")
    if size is not None and stated not in (None, size):
        raise _Failed(f"has a file of {stated} bytes, not of {size}")
    return begin, stated if size is None else size


def _read(read: Callable[[int], bytes], n: int) -> bytes:
    try:
        return read(n) if n else b""
    except (OSError, HTTPException) as err:
        raise _Failed(f"was cut off ({_words(err)})", again=True) from err


def _words(err: Exception) -> str:
    """An error in one line."""
    return " ".join((str(getattr(err, "reason", err)) or repr(err)).split())
