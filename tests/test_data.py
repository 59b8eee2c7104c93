"""Data: every set loads as declared, on every fault one line of ours, and nothing torn or foreign in the cache."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import benchtop as bt
from benchtop import data
from benchtop.data import fetch, public

MIRROR = Path(os.environ.get("BENCHTOP_DATA_MIRROR") or Path(__file__).parents[2] / "shared" / "data")
mirrored = pytest.mark.skipif(
    not (MIRROR / "DATA.yaml").is_file(), reason="no mirror: set BENCHTOP_DATA_MIRROR to a folder with the public sets"
)
EMBEDDED = [name for name in data.names() if "files" not in data.describe(name)]
FIRST = {
    f"{key}/{next(iter(entry['variants']))}" if "variants" in entry else key for key, entry in data.registry().items()
}
UNREAD = (  # files of the mirror that no set reads: texts about them, names that stand in the registry, single subjects
    *("LICENSE", "README", "index.html", "metadata.py", "awa_attributes/classes.txt", "/subjects/", "/movies.csv"),
    "karate/",  # networkx brings it along: embedded
)
SLOW = {"omniglot/background", "cifar10-copies/jpeg"}  # more than ten seconds: many small pictures to decode
PUBLIC = [  # one variant a set; "slow" has them all
    pytest.param(name, marks=pytest.mark.slow if name in SLOW or name not in FIRST else ())
    for name in data.names()
    if name not in EMBEDDED and name != "cifar10"
]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHTOP_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCHTOP_DATA_MIRROR", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("BENCHTOP_DATA_MIRROR", str(MIRROR))


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- what load gives ----


def test_digits_are_images_between_0_and_1_in_three_parts_that_share_no_row():
    digits = bt.load("digits")
    train, validation, test = digits
    assert digits.shape == (1, 8, 8) and len(digits.classes) == 10 and digits.kind == "images"
    assert digits.licence and digits.source and len(digits.checksum) == 16
    assert train.x.dtype == torch.float32 and train.y.dtype == torch.int64
    assert train.x.min() == 0 and train.x.max() == 1
    assert sorted(torch.cat(digits.rows).tolist()) == list(range(1797))
    assert [len(part.y) for part in digits] == [1078, 360, 359]
    assert train.y[:8].tolist() == bt.load("digits", size=8).train.y.tolist(), "a smaller size is a subset"
    assert torch.equal(bt.load("digits", size=8).test.x, test.x), "the other parts stay whole"
    assert torch.equal(bt.load("digits").validation.x, validation.x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_set_arrives_on_the_gpu():
    assert {t.device.type for part in bt.load("digits", device="cuda") for t in part} == {"cuda"}


@pytest.mark.parametrize("name", ["digits", "diabetes", "statsmodels/co2", "karate", "stdlib/characters"])
def test_every_tensor_of_a_set_lies_on_the_device_that_was_asked_for(name):
    split = bt.load(name, device="meta")
    held = [*(t for part in split for t in part), *split.rows, *split.extra.values()]
    held += [t for pair in (split.extra.get("scale") or {}).values() for t in pair or ()]
    assert {t.device.type for t in held if isinstance(t, torch.Tensor)} == {"meta"}
    assert split.train.x.dtype == bt.load(name).train.x.dtype


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_need_no_network_and_keep_their_checksum(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    split = bt.load(name)
    assert min(len(part.x) for part in split) > 0
    assert all(part.x.isfinite().all() and len(part.x) == len(part.y) for part in split)
    assert split.checksum == data.describe(name).get("checksum", split.checksum)
    assert data.check(name).endswith(split.checksum)
    if split.kind == "table":
        assert split.train.x.mean(0).abs().max() < 1e-4


@mirrored
@pytest.mark.parametrize("name", PUBLIC)
def test_public_sets_load_from_the_mirror_with_the_declared_content(name, mirror, own_cache):
    entry = data.describe(name)
    split = bt.load(name)  # raises when the content is not the declared one
    assert split.checksum == entry.get("checksum", split.checksum)
    assert len(split.train.x) > 0 and len(split.test.x) > 0
    assert all(len(part.x) == len(part.y) for part in split)
    if split.classes and split.train.y.dtype == torch.int64:
        assert max(part.y.max() for part in split if len(part.y)) < len(split.classes)
    if split.vocabulary:
        assert split.decode(split.train.x[:1]).strip()
    assert not own_cache.exists(), "a mirror is not copied"


@mirrored
def test_the_registry_has_every_file_of_the_mirror_with_its_size_and_checksum():
    import yaml

    held = yaml.safe_load((MIRROR / "DATA.yaml").read_text())["datasets"]
    listed = {f["path"]: f for entry in data.registry().values() for f in entry.get("files", [])}
    for file in (file for entry in held for file in entry["files"]):
        if any(part in file["path"] for part in UNREAD):
            continue
        assert listed.get(file["path"]), f"{file['path']} belongs to no set of the registry"
        assert {k: listed[file["path"]][k] for k in ("bytes", "sha256")} == {k: file[k] for k in ("bytes", "sha256")}


@mirrored
def test_what_the_public_addresses_serve_is_what_the_mirror_holds_unpacked():
    """The same bytes, not compressed, or the members of an archive: declared with the sha256 and size they have there."""
    compared = set()
    for entry in data.registry().values():
        public_forms = [f for f in entry.get("public", []) if f["sha256"]]
        archives = [MIRROR / f["path"] for f in entry["files"] if f["path"].endswith(".tar.xz")] if public_forms else []
        members = {k: v for path in archives for k, v in fetch.unpack(path).items()}
        for file in public_forms:
            plain, packed = MIRROR / file["path"], MIRROR / f"{file['path']}.gz"
            inside = [v for k, v in members.items() if k.rsplit("/", 1)[-1] == file["path"].rsplit("/", 1)[-1]]
            if plain.is_file() or packed.is_file():
                content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
            elif inside:
                (content,) = inside
            else:
                continue  # the official archive of the same content, compressed in another way
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"]), file["path"]
            compared.add(file["path"].split("/")[0])
    assert len(compared) > 10


@mirrored
@pytest.mark.parametrize(
    "name", ["ett/ETTh1", "adult", pytest.param("ucr/GunPoint", marks=pytest.mark.slow), "tu_graphs/MUTAG"]
)
def test_public_forms_read_the_same_as_those_of_the_mirror(name, own_cache):
    entry = data.describe(name)
    members = {
        k: v for f in entry["files"] if f["path"].endswith(".xz") for k, v in fetch.unpack(MIRROR / f["path"]).items()
    }
    for file in entry["public"]:
        path, packed = own_cache / file["path"], MIRROR / f"{file['path']}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        inside = [v for k, v in members.items() if k.endswith(path.name)]
        path.write_bytes(inside[0] if inside else gzip.decompress(packed.read_bytes()))
    assert data.check(name).endswith(entry["checksum"]), (
        "what was downloaded, without a mirror, has the declared content"
    )


def test_the_registry_says_where_from_how_large_and_under_which_licence():
    for row in data.table():
        assert row["licence"] and row["source"] and row["title"] and row["kind"], row["name"]
    for name in data.names():
        entry = data.describe(name)
        for file in entry.get("files", []):
            assert file["bytes"] > 0 and len(file["sha256"] or "0" * 64) == 64
        for file in entry.get("public", entry.get("files", [])):
            assert "at" in file or "mirror" in entry.get("note", ""), f"{name}: no address for {file['path']}"


def test_checksums_of_a_freshness_key_need_no_data():
    assert data.checksums(["digits"]) == {"digits": bt.load("digits").checksum}
    assert data.checksums(data.names()).keys() == set(data.names())


def test_a_record_keeps_the_checksum_of_the_text_that_this_python_has(tmp_path, monkeypatch):
    """The freshness key has the selection only: a record stays fresh under another Python, but says what it saw."""
    monkeypatch.setenv("BENCHTOP_RECORD", str(tmp_path / "log"))
    seen, key = bt.load("stdlib/characters").checksum, data.checksums(["stdlib/characters"])
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for module in (m for part in data.describe("stdlib/characters")["modules"] for m in part):
        path = tmp_path.joinpath(*module.split("."))  # another Python, in which modules are packages
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(f'"""{module}, in a later version."""\n')
    other = bt.load("stdlib/characters")
    assert other.checksum != seen and data.checksums(["stdlib/characters"]) == key
    assert len(other.vocabulary) == 96, "ids mean the same on every Python"
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [entry["checksum"] for entry in log] == [seen, other.checksum]
    (tmp_path / "os" / "__init__.py").unlink()
    (tmp_path / "os").rmdir()
    with pytest.raises(data.DataError, match=r"stdlib: this Python has no .*os") as error:
        bt.load("stdlib/characters")
    one_line(error)


def test_text_of_the_standard_library_reads_back_in_characters_and_byte_pairs():
    characters, pairs = bt.load("stdlib/characters"), bt.load("stdlib/bytepairs")
    text = characters.decode(characters.validation.x[:2000])
    assert (
        "def " in text and pairs.decode(pairs.validation.x[:400]) == text[: len(pairs.decode(pairs.validation.x[:400]))]
    )
    assert len(pairs.vocabulary) > len(characters.vocabulary) == 96
    assert torch.equal(characters.train.x[1:], characters.train.y[:-1]), "y is the next token"


def test_an_unknown_name_and_a_wrong_size_are_one_line_with_the_cure():
    with pytest.raises(data.UnknownData, match="did you mean digits") as error:
        bt.load("digit")
    one_line(error)
    with pytest.raises(data.DataError, match="expected 1 to 1078") as error:
        bt.load("digits", size=5000)
    one_line(error)


def test_other_content_than_declared_is_an_error(monkeypatch):
    entry = data.describe("digits") | {"checksum": "0" * 16}
    monkeypatch.setattr(data, "describe", lambda _: entry)
    with pytest.raises(data.DataError, match="expected 0000000000000000") as error:
        bt.load("digits")
    one_line(error)


# ---- faults, each caused ----

NAMES = b"emma\nolivia\nava\nisabella\nsophia\nmia\nzoe\nlea\nnina\nida\n"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the bodies in ``replies`` one after the other, the last one for ever; None: cut off in the middle; b"stall": no end."""

    def do_GET(self):
        self.server.asked += 1
        body = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        self.send_response(200)
        self.send_header("Content-Length", str(len(NAMES)))
        self.end_headers()
        if body == b"stall":
            self.wfile.write(NAMES[:10])
            self.server.stalled.set()
            time.sleep(20)
            return
        self.wfile.write(NAMES[:10] if body is None else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Call with replies: a server that has them, and the set "names" that is to come from it."""
    servers = []

    def start(*replies):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.replies, server.asked, server.stalled = list(replies), 0, threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        declare(monkeypatch, f"http://127.0.0.1:{server.server_port}/")
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def declare(monkeypatch, base):
    file = {
        "path": "names/names.txt",
        "bytes": len(NAMES),
        "sha256": hashlib.sha256(NAMES).hexdigest(),
        "at": "names.txt",
    }
    entry = data.registry()["names"] | {"files": [file], "bases": [base]}
    entry = {key: value for key, value in entry.items() if key not in ("checksum", "public")}
    monkeypatch.setattr(data, "registry", lambda: {"names": entry})


def kept(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_download_is_kept_and_used_again(serve, own_cache):
    server = serve(NAMES)
    assert bt.load("names").kind == "lines"
    assert server.asked == 1 and kept(own_cache) == ["names.txt"]
    bt.load("names")
    assert server.asked == 1
    assert data.check("names").startswith("names: 10 rows")


def test_a_wrong_checksum_is_tried_again_then_named_and_the_bad_file_is_gone(serve, own_cache):
    server = serve(b"x" * len(NAMES))
    with pytest.raises(data.DataError) as error:
        bt.load("names")
    message = one_line(error)
    assert "names.txt" in message and "expected" in message
    assert hashlib.sha256(b"x" * len(NAMES)).hexdigest() in message
    assert data.describe("names")["files"][0]["sha256"] in message
    assert server.asked == 2 and kept(own_cache) == []


@pytest.mark.parametrize("served", [b"x\ny\nz\nu\nv\n", b"\xff" * 60], ids=["other content", "unreadable"])
def test_a_wrong_download_whose_sha256_nobody_knows_is_told_by_its_content_and_removed(
    serve, served, own_cache, monkeypatch
):
    server = serve(NAMES)
    checksum = data.digest(data.read("names")[0])
    entry = data.registry()["names"] | {"checksum": checksum}
    entry["public"] = [entry["files"][0] | {"path": "names/all.txt", "sha256": None}]
    entry["files"] = [entry["files"][0] | {"path": "names/none.txt"}]  # what a mirror would hold
    monkeypatch.setattr(data, "registry", lambda: {"names": entry | {"file": "all.txt"}})
    server.replies = [served.ljust(len(NAMES), b"\n"), NAMES]
    with pytest.raises(data.DataError, match=r"load again$") as error:
        bt.load("names")
    one_line(error)
    assert "all.txt" not in kept(own_cache)
    assert bt.load("names").checksum == checksum, "the cure works"


def test_the_second_try_may_succeed(serve, own_cache):
    server = serve(b"x" * len(NAMES), NAMES)
    assert len(bt.load("names").train.x) == 6
    assert server.asked == 2 and kept(own_cache) == ["names.txt"]


def test_a_bad_file_in_the_cache_is_replaced(serve, own_cache):
    server = serve(NAMES)
    (own_cache / "names").mkdir(parents=True)
    (own_cache / "names" / "names.txt").write_bytes(b"old")
    bt.load("names")
    assert server.asked == 1 and (own_cache / "names" / "names.txt").read_bytes() == NAMES


def test_an_interrupted_download_leaves_no_torn_file_and_restarts(serve, own_cache):
    server = serve(None, NAMES)
    bt.load("names")
    assert server.asked == 2 and kept(own_cache) == ["names.txt"]
    assert (own_cache / "names" / "names.txt").read_bytes() == NAMES
    (own_cache / "names" / "names.txt").unlink()
    serve(None)
    with pytest.raises(data.DataError) as error:
        bt.load("names")
    one_line(error)
    assert kept(own_cache) == []


FETCH = """
import json, sys
from benchtop import data
entry = json.loads(sys.argv[1])
data.registry = lambda: {"names": entry}
print(data.get("names")[0].read_bytes() == sys.argv[2].encode())
"""


def another_process() -> subprocess.Popen:
    """A process that fetches the set "names" as it is declared now."""
    command = [sys.executable, "-c", FETCH, json.dumps(data.registry()["names"]), NAMES.decode()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_is_taken_for_the_file(serve, own_cache):
    server = serve(b"stall", NAMES)
    killed = another_process()
    assert server.stalled.wait(60), "the download has begun"
    killed.kill()
    killed.communicate()
    assert kept(own_cache) != ["names.txt"]
    bt.load("names")
    assert kept(own_cache) == ["names.txt"]
    assert (own_cache / "names" / "names.txt").read_bytes() == NAMES


def test_without_network_one_line_says_which_file_where_to_put_it_and_what_else_to_use(monkeypatch, own_cache):
    declare(monkeypatch, "http://127.0.0.1:9/")  # nothing listens there
    with pytest.raises(data.DataError) as error:
        bt.load("names")
    message = one_line(error)
    assert str(own_cache / "names" / "names.txt") in message and "load('" in message
    (own_cache / "names" / "names.txt").write_bytes(NAMES)  # the cure works
    assert len(bt.load("names").train.x) == 6


def test_two_processes_at_once_download_once(serve, own_cache):
    server = serve(NAMES)
    both = [another_process() for _ in range(2)]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == ["True", "True"]
    assert server.asked == 1 and kept(own_cache) == ["names.txt"]


def test_a_read_only_cache_is_one_line_but_what_it_holds_can_be_used(serve, own_cache, monkeypatch):
    server = serve(NAMES)
    bt.load("names")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere: mode bits would not stop the tests' user
    monkeypatch.setattr(os, "open", refuse)
    assert len(bt.load("names").train.x) == 6 and server.asked == 1
    (own_cache / "names" / "names.txt").unlink()
    with pytest.raises(data.DataError, match=r"Read-only file system.*BENCHTOP_DATA_CACHE") as error:
        bt.load("names")
    one_line(error)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_no_torn_file(serve, own_cache):
    serve(NAMES)
    (own_cache / "names").mkdir(parents=True)
    (own_cache / "names" / "names.txt.part").symlink_to("/dev/full")  # every write there: no space left on device
    with pytest.raises(data.DataError, match=r"disk full.*names.txt.*BENCHTOP_DATA_CACHE") as error:
        bt.load("names")
    one_line(error)
    assert kept(own_cache) == []


def test_a_mirror_may_be_an_address_or_a_folder_and_a_wrong_one_is_one_line(serve, own_cache, tmp_path, monkeypatch):
    server = serve(NAMES)
    monkeypatch.setenv("BENCHTOP_DATA_MIRROR", f"http://127.0.0.1:{server.server_port}")
    declare(monkeypatch, "http://127.0.0.1:9/")
    assert len(bt.load("names").train.x) == 6 and server.asked == 1
    (tmp_path / "mirror" / "names").mkdir(parents=True)
    (tmp_path / "mirror" / "names" / "names.txt").write_bytes(b"other")
    monkeypatch.setenv("BENCHTOP_DATA_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(data.DataError, match=r"sha256 is .* expected") as error:
        bt.load("names")
    one_line(error)
    assert kept(tmp_path / "mirror") == ["names.txt"], "a mirror is not ours to tidy up"
    monkeypatch.setenv("BENCHTOP_DATA_MIRROR", str(tmp_path / "none"))
    with pytest.raises(data.DataError, match="is no folder") as error:
        bt.load("names")
    one_line(error)


# ---- malformed files ----


def archive(kind: str, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as file:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def idx(shape, values: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + values


GOOD = {  # name of the file -> content, reader, registry entry
    "idx": ({f"{part}-{kind}-ubyte.gz": gzip.compress(content) for part in ("train", "t10k") for kind, content in (("images-idx3", idx((20, 3, 3), bytes(180))), ("labels-idx1", idx((20,), bytes(20))))}, {"reader": "public.idx", "kind": "images", "classes": ["0"]}),
    "npz": ({"a.npz": npz(x=np.zeros((20, 3, 3), np.uint8), y=np.zeros(20, np.uint8))}, {"reader": "public.named_arrays", "kind": "images", "x": ["a/x"], "y": ["a/y"]}),
    "zip": ({"a.zip": archive("zip", {"names.txt": NAMES})}, {"reader": "public.lines", "kind": "lines", "file": "names.txt"}),
    "tar": ({"a.tar.gz": archive("tar", {"names.txt": NAMES})}, {"reader": "public.lines", "kind": "lines", "file": "names.txt"}),
}  # fmt: skip


def put(monkeypatch, folder: Path, contents: dict[str, bytes], entry: dict) -> None:
    """Make ``contents`` the set "made" in a cache in ``folder``; no checksum protects the reader from them."""
    files = [{"path": f"made/{name}", "bytes": len(content), "sha256": None} for name, content in contents.items()]
    monkeypatch.setattr(data, "registry", lambda: {"made": {"files": files, "licence": "-", "source": "-"} | entry})
    monkeypatch.setenv("BENCHTOP_DATA_CACHE", str(folder))
    (folder / "made").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / "made" / name).write_bytes(content)


def everything_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "hypothesis" not in str(path)}


@pytest.mark.parametrize("kind", sorted(GOOD))
@given(choice=st.data())
@FUZZ
def test_damaged_files_are_an_error_of_ours_and_write_nothing(kind, choice, tmp_path, monkeypatch):
    contents, entry = GOOD[kind]
    contents = dict(contents)
    name = choice.draw(st.sampled_from(sorted(contents)))
    content = bytearray(gzip.decompress(contents[name]) if kind == "idx" else contents[name])
    for at in choice.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[at] = choice.draw(st.integers(0, 255))
    content = content[: choice.draw(st.integers(0, len(content)))] + choice.draw(st.binary(max_size=8))
    contents[name] = bytes(content)
    put(monkeypatch, tmp_path / "cache", contents, entry)
    before = everything_below(tmp_path)
    with contextlib.suppress(data.DataError):  # damage may also pass unseen: a changed pixel is still a pixel
        data.read("made", download=False)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_whole_files_of_each_format_are_read(kind, tmp_path, monkeypatch):
    put(monkeypatch, tmp_path, *GOOD[kind])
    assert len(data.read("made", download=False)[0].x) in (10, 20, 40)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_point_outside_are_never_written(kind, tmp_path, monkeypatch):
    members = {"../../outside.txt": b"x", "/tmp/benchtop-outside.txt": b"x", "names.txt": NAMES}
    suffix = {"zip": "zip", "tar": "tar.gz"}[kind]
    put(monkeypatch, tmp_path / "cache", {f"a.{suffix}": archive(kind, members)}, GOOD[kind][1])
    assert len(data.read("made", download=False)[0].x) == 10
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"a.{suffix}"]
    assert not Path("/tmp/benchtop-outside.txt").exists()


def test_links_in_a_tar_are_passed_over(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        link = tarfile.TarInfo("names.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert fetch.unpack(path) == {}


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "LIMIT", 1000)
    monkeypatch.setattr(fetch.bounded, "__defaults__", (1000,))
    put(monkeypatch, tmp_path, {"a.zip": archive("zip", {"names.txt": NAMES * 50})}, GOOD["zip"][1])
    with pytest.raises(data.DataError, match="unpacks to more than 1,000 bytes") as error:
        data.read("made", download=False)
    one_line(error)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BENCHTOP_DATA_CACHE"]) / "exploded",)


def test_no_pickle_is_ever_loaded(tmp_path, monkeypatch):
    objects = np.array([Bomb()], dtype=object)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    put(monkeypatch, tmp_path, {"a.npz": npz(x=objects, y=objects)}, GOOD["npz"][1])
    with pytest.raises(data.DataError, match="allow_pickle") as error:
        data.read("made", download=False)
    one_line(error)
    with pytest.raises(ValueError, match=r"unexpected|not"):  # Planetoid's reader lists instructions, calls nothing
        public.stored(pickle.dumps(Bomb(), protocol=4))
    assert not (tmp_path / "exploded").exists()


@given(
    st.recursive(
        st.integers(-9, 9) | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=4), max_leaves=20
    )
)
@FUZZ
def test_the_instructions_of_a_plain_pickle_give_its_value(value):
    assert public.stored(pickle.dumps({0: value}, protocol=2)) == {0: value}


@given(st.binary(max_size=60))
@FUZZ
def test_arbitrary_bytes_are_no_instructions(content):
    with contextlib.suppress(*data.MALFORMED):
        public.stored(content)


def test_readers_are_what_the_registry_names():
    from importlib import import_module

    for name in data.names():
        module, function = data.describe(name)["reader"].split(".")
        assert callable(getattr(import_module(f"benchtop.data.{module}"), function)), name


# ---- the command line ----


def command(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    from benchtop.publish.cli import main

    monkeypatch.setattr(sys, "argv", ["benchtop", "data", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


def test_commands_list_get_and_check(serve, own_cache, capsys, monkeypatch):
    code, out, _ = command(capsys, monkeypatch, "list")
    assert code == 0 and len(out.splitlines()) == len(data.names())
    assert "digits" in out and "embedded" in out and "MIT" in out
    serve(NAMES)
    code, _, err = command(capsys, monkeypatch, "check", "names")
    assert code == 1 and err == "names: not on this machine; `benchtop data get names` fetches it\n"
    code, out, _ = command(capsys, monkeypatch, "get", "names")
    assert code == 0 and str(own_cache / "names" / "names.txt") in out
    code, out, _ = command(capsys, monkeypatch, "check", "names")
    assert code == 0 and out.startswith("names: 10 rows")
    code, _, err = command(capsys, monkeypatch, "get", "nmaes")
    assert code == 1 and err == "benchtop: unknown data set 'nmaes': did you mean names?\n"


# ---- the benchmark measures what it says ----


def test_crop_and_flip_moves_each_image_by_at_most_the_pad_and_flips_half():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("data_benchmark", Path(__file__).parents[1] / "benchmarks" / "data.py")
    benchmark = module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    x = torch.rand(400, 3, 6, 7)
    found = benchmark.crop_and_flip(x, torch.Generator().manual_seed(0), pad=1)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    crops = [padded[:, :, i : i + 6, j : j + 7] for i in range(3) for j in range(3)]
    same = torch.stack([(found == c).flatten(1).all(1) for crop in crops for c in (crop, crop.flip(-1))])
    assert same.any(0).all(), "each image is one of the nine crops, or its mirror image"
    assert same.any(1).all(), "and all of them occur"
    assert 0.4 < same[1::2].any(0).float().mean() < 0.6
