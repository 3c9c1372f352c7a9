import hashlib
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from snail.datasets.download import RemoteFile, download

CONTENT = hashlib.shake_128(b"snail").digest(200_000)  # several reads of the client
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
SIZE = len(CONTENT)
PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"


class Ask(BaseHTTPRequestHandler):
    """One request, and what an answer is made of."""

    server: "Web"
    close_connection = True

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        answers = self.server.answers[self.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        with suppress(ConnectionError):  # the client has heard enough
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def begin(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    @property
    def first(self) -> int:
        """The first byte that is asked for."""
        return int(re.fullmatch(r"bytes=(\d+)-|", self.headers.get("Range", ""))[1] or 0)  # type: ignore[index]


Answer = Callable[[Ask], None]


class Web(ThreadingHTTPServer):
    """A server on this machine: ``answers`` of a path are given in turn, the last one for good."""

    daemon_threads = False  # they are waited for at the end

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Ask)
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.over = threading.Event()

    def address(self, path: str, *answers: Answer) -> str:
        if answers:
            self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def serving() -> Iterator[Web]:
    """A server that runs, is asked directly, and again without a pause."""
    with pytest.MonkeyPatch.context() as patch, Web() as server:
        patch.setenv("no_proxy", "*")
        patch.setattr("snail.datasets.download._PAUSE", 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


def whole(content: bytes = CONTENT, cut: int | None = None, total: object = None, shift: int = 0) -> Answer:
    """A good server; or one that closes after ``cut`` bytes, or lies of the piece that it gives."""

    def answer(ask: Ask) -> None:
        piece = content[ask.first :]
        if ask.first >= len(content):
            ask.begin(416, Content_Range=f"bytes */{len(content)}")
        elif ask.first:
            span = f"bytes {ask.first + shift}-{len(content) - 1}/{total or len(content)}"
            ask.begin(206, Content_Length=len(piece), Content_Range=span)
        else:
            ask.begin(200, Content_Length=len(piece))
        ask.wfile.write(piece[:cut])

    return answer


def plain(content: bytes = CONTENT, code: int = 200, **headers: object) -> Answer:
    """No heed of Range, and the headers that are given, so that no length is told, or a wrong one."""

    def answer(ask: Ask) -> None:
        ask.begin(code, **headers)
        ask.wfile.write(content)

    return answer


def stalls(sent: int) -> Answer:
    def answer(ask: Ask) -> None:
        ask.begin(200, Content_Length=SIZE)
        ask.wfile.write(CONTENT[:sent])
        ask.server.over.wait()

    return answer


def chunked(end: bytes) -> Answer:
    def answer(ask: Ask) -> None:
        ask.begin(200, Transfer_Encoding="chunked")
        ask.wfile.write(b"%x\r\n%b\r\n" % (SIZE, CONTENT) + end)

    return answer


def endless(ask: Ask) -> None:
    ask.begin(200)
    for _ in range(200):  # 40 MB, should the client not stop
        ask.wfile.write(CONTENT)


def redirect(to: str) -> Answer:
    return lambda ask: ask.begin(302, Location=to)


missing = plain(b"Not here", 404)


def remote(*addresses: str, size: int | None = SIZE, hash: str = SHA256, kind: str = "sha256") -> RemoteFile:
    return RemoteFile("data.bin", addresses, size, hash, kind)


def has(folder: Path, **others: bytes) -> bool:
    """Whether the folder holds the right file and, with a dot before their names, the others, and nothing else."""
    expected = {"data.bin": CONTENT, **{f".{name}": content for name, content in others.items()}}
    return {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def put(folder: Path, content: bytes, name: str = ".data.bin.part") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Does not exist yet."""
    return tmp_path / "data"


def test_download_brings_the_file(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", whole()))
    assert download(file, folder) == folder / "data.bin"
    assert has(folder)
    assert web.asked == [("/a", None)]


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize(
    "answer",
    [plain(), chunked(b"0\r\n\r\n"), stalls(SIZE), redirect("/b"), plain(Content_Type="text/plain")],
    ids=["no-length", "chunked", "connection-kept", "redirection", "text"],
)
def test_download_understands_good_servers(web: Web, folder: Path, answer: Answer, size: int | None) -> None:
    web.address("/b", whole())
    download(remote(web.address("/a", answer), size=size), folder, attempts=1)
    assert has(folder)


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_download_knows_several_hashes(web: Web, folder: Path, kind: str) -> None:
    digest = hashlib.new(kind, CONTENT).hexdigest()
    download(remote(web.address("/a", whole()), hash=digest.upper(), kind=kind), folder)
    assert has(folder)
    with pytest.raises(RuntimeError, match=rf"sent another file, of {kind} {digest};"):
        download(remote(web.address("/a"), hash=digest[::-1], kind=kind), folder / "wrong")


@pytest.mark.parametrize("more", [b"", b"more"])
def test_download_brings_a_small_file_that_begins_like_a_web_page(web: Web, folder: Path, more: bytes) -> None:
    small = b"<htmx>"
    address = web.address("/a", plain(small + more))
    file = RemoteFile("small", (address,), len(small), hashlib.sha256(small).hexdigest())
    assert download(file, folder).read_bytes() == small


@pytest.mark.parametrize("size", [SIZE, None])
def test_download_leaves_alone_what_is_there(web: Web, folder: Path, size: int | None) -> None:
    file = remote(web.address("/a", whole()), size=size)
    put(folder, CONTENT, "data.bin")
    before = (folder / "data.bin").stat()
    assert download(file, folder) == folder / "data.bin"
    assert web.asked == []
    assert (folder / "data.bin").stat().st_ino == before.st_ino


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("damaged", [b"", CONTENT[:-1], CONTENT + b"x", OTHER], ids=["empty", "short", "long", "other"])
def test_download_replaces_what_is_damaged(web: Web, folder: Path, damaged: bytes, size: int | None) -> None:
    put(folder, damaged, "data.bin")
    download(remote(web.address("/a", whole()), size=size), folder)
    assert has(folder)


def test_download_keeps_what_is_damaged_until_the_other_is_whole(web: Web, folder: Path) -> None:
    put(folder, b"damaged", "data.bin")
    with pytest.raises(RuntimeError):
        download(remote(web.address("/a", whole(cut=5000))), folder, attempts=1)
    assert (folder / "data.bin").read_bytes() == b"damaged"
    download(remote(web.address("/a", whole())), folder, attempts=1)
    assert has(folder)


# -- going on with a part -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("cut", [100, 5000, 150_000])
def test_download_goes_on_where_it_was_cut(web: Web, folder: Path, cut: int, size: int | None) -> None:
    file = remote(web.address("/a", whole(cut=cut), whole()), size=size)
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", None), ("/a", f"bytes={cut}-")]


def test_download_goes_on_at_the_next_address(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", whole(cut=5000)), web.address("/b", whole()))
    download(file, folder, attempts=2)
    assert has(folder)
    assert web.asked == [("/a", None), ("/a", "bytes=5000-"), ("/b", "bytes=10000-")]


def test_download_goes_on_in_the_next_call(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", whole(cut=5000), whole()))
    with pytest.raises(RuntimeError, match=rf"/a was cut off after 5000 of {SIZE} bytes;"):
        download(file, folder, attempts=1)
    assert (folder / ".data.bin.part").read_bytes() == CONTENT[:5000]
    assert not (folder / "data.bin").exists()
    download(file, folder, attempts=1)
    assert has(folder)
    assert web.asked[1:] == [("/a", "bytes=5000-")]


def test_download_goes_on_after_a_kill(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote(web.address("/a", whole()))
    read1 = HTTPResponse.read1

    def once(self: HTTPResponse, n: int = -1) -> bytes:
        monkeypatch.setattr(HTTPResponse, "read1", killed)
        return read1(self, n)

    def killed(self: HTTPResponse, n: int = -1) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(HTTPResponse, "read1", once)
    with pytest.raises(KeyboardInterrupt):
        download(file, folder)
    monkeypatch.setattr(HTTPResponse, "read1", read1)
    kept = (folder / ".data.bin.part").read_bytes()
    assert len(kept) > 1024 and CONTENT.startswith(kept)
    assert not (folder / "data.bin").exists()
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", None), ("/a", f"bytes={len(kept)}-")]


@pytest.mark.parametrize("size", [SIZE, None])
def test_download_names_a_part_that_was_whole_when_killed(web: Web, folder: Path, size: int | None) -> None:
    put(folder, CONTENT)
    download(remote(web.address("/a", missing), size=size), folder)
    assert has(folder)
    assert web.asked == []


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("part", [CONTENT[:5000], OTHER[:5000], CONTENT + b"x"], ids=["right", "wrong", "long"])
def test_download_starts_over_where_range_is_ignored(web: Web, folder: Path, part: bytes, size: int | None) -> None:
    put(folder, part)
    download(remote(web.address("/a", plain(Content_Length=SIZE)), size=size), folder, attempts=1)
    assert has(folder)
    assert len(web.asked) == 1


def test_download_keeps_the_longer_part_where_range_is_ignored(web: Web, folder: Path) -> None:
    put(folder, CONTENT[:9000])
    file = remote(web.address("/a", plain(CONTENT[:5000], Content_Length=SIZE)), web.address("/b", whole()))
    download(file, folder, attempts=1)
    assert has(folder)
    assert web.asked == [("/a", "bytes=9000-"), ("/b", "bytes=9000-")]


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("part", [OTHER, CONTENT + b"x"], ids=["other", "long"])
def test_download_starts_over_where_the_part_has_all_and_is_wrong(
    web: Web, folder: Path, part: bytes, size: int | None
) -> None:
    put(folder, part)
    download(remote(web.address("/a", whole()), size=size), folder)
    assert has(folder)
    # Of a size that is not known beforehand the server has to tell that nothing is there: 416.
    assert web.asked == [("/a", f"bytes={len(part)}-")] * (size is None) + [("/a", None)]


def test_download_starts_over_after_416(web: Web, folder: Path) -> None:
    put(folder, CONTENT[:5000])
    file = remote(web.address("/a", plain(b"", 416), whole()))
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", "bytes=5000-"), ("/a", None)]


def test_download_gives_up_where_all_is_416(web: Web, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="/a answered 416 "):
        download(remote(web.address("/a", plain(b"", 416))), folder)
    assert len(web.asked) == 3


@pytest.mark.parametrize("size", [SIZE, None])
def test_download_starts_over_where_the_part_was_of_another_file(web: Web, folder: Path, size: int | None) -> None:
    put(folder, OTHER[:5000])
    file = remote(web.address("/a", whole()), size=size)
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", "bytes=5000-"), ("/a", None)]


@pytest.mark.parametrize(
    "answer",
    [whole(shift=1), whole(shift=-1), plain(CONTENT[5000:], 206), plain(CONTENT[5000:], 206, Content_Range="bytes x")],
    ids=["later", "earlier", "none", "nonsense"],
)
def test_download_does_not_trust_another_piece(web: Web, folder: Path, answer: Answer) -> None:
    put(folder, CONTENT[:5000])
    file = remote(web.address("/a", answer))
    with pytest.raises(RuntimeError, match="/a answered with another piece of the file than asked for;"):
        download(file, folder, attempts=1)
    assert not (folder / ".data.bin.part").exists()  # or it would get the same answer for ever
    web.address("/a", whole())
    download(file, folder, attempts=1)
    assert has(folder)


def test_download_does_not_take_a_piece_for_the_file(web: Web, folder: Path) -> None:
    span = f"bytes 5000-{SIZE - 1}/{SIZE}"
    file = remote(web.address("/a", plain(CONTENT[5000:], 206, Content_Range=span)))
    with pytest.raises(RuntimeError, match="another piece"):
        download(file, folder)


def test_download_takes_a_piece_of_a_file_of_unknown_size(web: Web, folder: Path) -> None:
    put(folder, CONTENT[:5000])
    download(remote(web.address("/a", whole(total="*"))), folder, attempts=1)
    assert has(folder)


@pytest.mark.parametrize("size", [SIZE, None])
def test_download_goes_on_over_a_redirection(web: Web, folder: Path, size: int | None) -> None:
    web.address("/b", whole(cut=5000), whole())
    download(remote(web.address("/a", redirect("/b")), size=size), folder)
    assert has(folder)
    assert web.asked[2:] == [("/a", "bytes=5000-"), ("/b", "bytes=5000-")]


def test_download_beside_another_run_that_is_faster(web: Web, folder: Path) -> None:
    quick = remote(web.address("/quick", whole()))

    def slow(ask: Ask) -> None:
        ask.begin(200, Content_Length=SIZE)
        ask.wfile.write(CONTENT[:100_000])
        download(quick, folder)
        ask.wfile.write(CONTENT[100_000:])

    assert download(remote(web.address("/slow", slow)), folder, attempts=1) == folder / "data.bin"
    assert has(folder)


# -- servers that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        (missing, "answered 404 Not Found", 1),
        (plain(b"", 403), "answered 403 Forbidden", 1),
        (plain(b"", 503), "answered 503 Service Unavailable", 3),
        (plain(b"", 429), "answered 429 Too Many Requests", 3),
        (plain(b"", 204), "answered 204, and no file", 1),
        (plain(b""), "sent nothing", 3),
        (whole(cut=0), "sent nothing", 3),
        (plain(OTHER), f"sent another file, of sha256 {hashlib.sha256(OTHER).hexdigest()}", 1),
        (redirect("ftp://127.0.0.1/b"), r"could not be reached \(unknown url type: ftp\)", 3),
        (redirect("file:///etc/passwd"), "answered 302 .*not allowed", 1),
        (redirect("http://a..b/"), r"could not be reached \(.*label.*\)", 3),
    ],
    ids=["404", "403", "503", "429", "204", "empty", "closed", "other", "ftp", "file", "no-host"],
)
def test_download_tells_what_was_wrong_and_goes_on(
    web: Web, folder: Path, answer: Answer, said: str, requests: int, size: int | None
) -> None:
    file = remote(web.address("/a", answer), size=size)
    with pytest.raises(RuntimeError, match=rf"/a {said}; fetch"):
        download(file, folder)
    assert web.asked == [("/a", None)] * requests
    assert not folder.exists() or not any(folder.iterdir())
    download(remote(*file.addresses, web.address("/b", whole()), size=size), folder)
    assert has(folder)


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize(
    "answer",
    [
        plain(PAGE, Content_Length=len(PAGE)),
        plain(PAGE),
        plain(b"\xef\xbb\xbf\r\n <HTML lang='en'>"),
        plain(b"\n<!doctype\nhtml>" + CONTENT),
        plain(PAGE[:-5], Content_Length=len(PAGE), Content_Type="application/octet-stream"),
        plain(Content_Type="text/html; charset=utf-8"),
        plain(Content_Type="TEXT/HTML", Content_Length=SIZE),
    ],
    ids=["length", "no-length", "mark", "long", "cut", "type", "type-and-length"],
)
def test_download_recognises_a_web_page(web: Web, folder: Path, answer: Answer, size: int | None) -> None:
    file = remote(web.address("/a", answer), web.address("/b", missing), size=size)
    with pytest.raises(RuntimeError, match=r"/a answered with a web page, not the file .*; http.*/b answered 404"):
        download(file, folder)
    assert web.asked == [("/a", None), ("/b", None)]
    assert not folder.exists()


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream"])
def test_download_keeps_the_part_when_a_web_page_comes(web: Web, folder: Path, content_type: str) -> None:
    put(folder, CONTENT[:5000])
    file = remote(web.address("/a", plain(PAGE, Content_Type=content_type)), web.address("/b", whole()))
    download(file, folder)
    assert has(folder)
    assert web.asked[-1] == ("/b", "bytes=5000-")


def test_download_finds_a_web_page_in_pieces(web: Web, folder: Path) -> None:
    def drops(ask: Ask) -> None:
        ask.begin(200, Content_Length=len(PAGE))
        for i in range(len(PAGE)):
            ask.wfile.write(PAGE[i : i + 1])

    with pytest.raises(RuntimeError, match="web page"):
        download(remote(web.address("/a", drops)), folder)


@pytest.mark.parametrize("stated", [SIZE + 1, SIZE - 1, 1, 10**15])
def test_download_refuses_a_file_of_another_size(web: Web, folder: Path, stated: int) -> None:
    file = remote(web.address("/a", plain(Content_Length=stated)), web.address("/b", missing))
    with pytest.raises(RuntimeError, match=rf"/a has a file of {stated} bytes, not of {SIZE};"):
        download(file, folder)
    assert len(web.asked) == 2
    assert not folder.exists()


def test_download_refuses_the_piece_of_a_file_of_another_size(web: Web, folder: Path) -> None:
    put(folder, CONTENT[:5000])
    file = remote(web.address("/a", whole(total=SIZE + 1)), web.address("/b", whole()))
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", "bytes=5000-"), ("/b", "bytes=5000-")]


@pytest.mark.parametrize("length", [{}, {"Content_Length": SIZE}, {"Content_Length": "many"}])
def test_download_reads_no_more_than_the_size(web: Web, folder: Path, length: dict[str, object]) -> None:
    download(remote(web.address("/a", plain(CONTENT + b"more", **length))), folder, attempts=1)
    assert has(folder)


@pytest.mark.parametrize("cut", [5000, SIZE - 1])
@pytest.mark.parametrize("length", [{}, {"Content_Length": SIZE}])
def test_download_notices_a_short_body(web: Web, folder: Path, cut: int, length: dict[str, object]) -> None:
    file = remote(web.address("/a", plain(CONTENT[:cut], **length)), web.address("/b", missing))
    with pytest.raises(RuntimeError, match=rf"/a was cut off after {cut} of {SIZE} bytes;"):
        download(file, folder)
    assert (folder / ".data.bin.part").read_bytes() == CONTENT[:cut]


def test_download_of_unknown_size_believes_the_length(web: Web, folder: Path) -> None:
    long, short = plain(Content_Length=SIZE + 1), plain(Content_Length=SIZE - 1)
    with pytest.raises(RuntimeError, match=rf"/a was cut off after {SIZE} of {SIZE + 1} bytes;"):
        download(remote(web.address("/a", long), size=None, hash="0" * 64), folder)
    put(folder, b"").unlink()
    with pytest.raises(RuntimeError, match="/b sent another file"):
        download(remote(web.address("/b", short), size=None), folder)
    assert not any(folder.iterdir())


def test_download_goes_on_after_a_broken_chunk(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", chunked(b"oops\r\n"), whole()), size=None, hash=hashlib.sha256(CONTENT).hexdigest())
    download(file, folder)
    assert has(folder)


def test_download_of_known_size_needs_no_last_chunk(web: Web, folder: Path) -> None:
    download(remote(web.address("/a", chunked(b""))), folder, attempts=1)
    assert has(folder)


def test_download_ends_where_the_body_does_not(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(remote(web.address("/a", endless)), folder, attempts=1)
    assert has(folder)
    monkeypatch.setattr("snail.datasets.download._MOST", 3 * SIZE)
    digest = hashlib.sha256(3 * CONTENT).hexdigest()
    with pytest.raises(RuntimeError, match=f"/a sent another file, of sha256 {digest};"):
        download(remote(web.address("/a"), size=None), folder / "unknown")


@pytest.mark.parametrize("sent", [0, 100, 5000])
def test_download_does_not_wait_for_ever(web: Web, folder: Path, sent: int) -> None:
    file = remote(web.address("/a", stalls(sent)))
    with pytest.raises(RuntimeError, match=r"/a (was cut off|could not be reached) \(.*timed out\);"):
        download(file, folder, timeout=0.3, attempts=2)
    # Tried often, as on a busy machine even a good server may take longer than the time.
    download(remote(web.address("/a", stalls(sent), whole())), folder, timeout=0.3, attempts=100)
    assert has(folder)


def test_download_survives_servers_that_speak_no_http(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", lambda ask: None, lambda ask: ask.wfile.write(b"\x16\x03\x01 hello\r\n"), whole()))
    download(file, folder)
    assert has(folder)
    with pytest.raises(RuntimeError, match=r"/b could not be reached \(.*closed connection"):
        download(remote(web.address("/b", lambda ask: None)), folder / "none")


def test_download_survives_that_nobody_answers(web: Web, folder: Path) -> None:
    with socket.socket() as bound:  # which keeps the port from others, and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}/a"
        with pytest.raises(RuntimeError, match=r"/a could not be reached \(.*refused.*\);"):
            download(remote(address), folder)
        assert not folder.exists()
        download(remote(address, web.address("/b", whole())), folder)
    assert has(folder)


def test_download_takes_the_next_address_after_a_wrong_hash(web: Web, folder: Path) -> None:
    file = remote(web.address("/a", whole(OTHER)), web.address("/b", whole()))
    download(file, folder)
    assert has(folder)
    assert web.asked == [("/a", None), ("/b", None)]


def test_download_that_fails_says_all_in_one_sentence(web: Web, folder: Path) -> None:
    first, second = web.address("/a", missing), web.address("/b", plain(PAGE))
    with pytest.raises(RuntimeError) as caught:
        download(remote(first, second), folder)
    assert str(caught.value) == (
        f"data.bin could not be downloaded: {first} answered 404 Not Found; {second} answered with a web page, not the "
        f"file (a log-in, consent or error page); fetch data.bin by hand from {first} ({SIZE} bytes, sha256 {SHA256}) "
        f"and put it into {folder}"
    )
    with pytest.raises(RuntimeError, match=rf"by hand from {first} \(sha256 {SHA256}\)"):
        download(remote(first, size=None), folder)


@pytest.mark.parametrize("attempts", [0, 1, 5])
def test_download_tries_as_often_as_it_is_told(web: Web, folder: Path, attempts: int) -> None:
    with pytest.raises(RuntimeError, match="503"):
        download(remote(web.address("/a", plain(b"", 503))), folder, attempts=attempts)
    assert len(web.asked) == max(attempts, 1)


# -- this side ----------------------------------------------------------------------------------------------------


def test_download_says_that_the_folder_cannot_be_written(web: Web, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"a file")
    folder = tmp_path / "taken" / "data"  # which even the superuser cannot make
    with pytest.raises(RuntimeError, match=rf"^data\.bin cannot be downloaded, as {folder} cannot be written \("):
        download(remote(web.address("/a", whole())), folder)
    assert len(web.asked) == 1  # asking again is no help


@pytest.mark.parametrize("name", ["data.bin", ".data.bin.part"])
def test_download_says_that_a_folder_is_in_the_way(web: Web, folder: Path, name: str) -> None:
    (folder / name / "full").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot be written"):
        download(remote(web.address("/a", whole())), folder)
    assert (folder / name / "full").is_dir()


@pytest.mark.skipif(sys.platform != "linux" or not Path("/dev/full").exists(), reason="needs /dev/full")
def test_download_says_that_the_disk_is_full(web: Web, folder: Path) -> None:
    folder.mkdir()
    (folder / ".data.bin.part").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=r"cannot be written \(.*No space left"):
        download(remote(web.address("/a", whole())), folder)


@pytest.mark.parametrize("progress", [True, False])
def test_download_is_silent_off_a_terminal(
    web: Web, folder: Path, progress: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    download(remote(web.address("/a", whole())), folder, progress=progress)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_download_shows_a_bar_on_a_terminal(
    web: Web, folder: Path, progress: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    download(remote(web.address("/a", whole())), folder, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("data.bin: 100%" in err) == progress


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a/", r"a\b", r"..\a", "C:a"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must not be a path"):
        RemoteFile(name, ("http://127.0.0.1/",), None, SHA256)


@pytest.mark.parametrize(
    "addresses",
    [(), ("file:///etc/passwd",), ("ftp://127.0.0.1/a",), ("/etc/passwd",), ("http://127.0.0.1/", "data:,x")],
)
def test_an_address_outside_the_web_is_refused(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.bin needs addresses that begin with http: or https:"):
        remote(*addresses)


def test_an_unknown_kind_of_hash_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'md6', the kind of hash of data\.bin, is unknown"):
        remote("http://127.0.0.1/", kind="md6")
