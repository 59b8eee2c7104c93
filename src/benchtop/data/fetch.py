"""Files of the public sets: mirror, cache, download with sha256, and safe reading of what came.

Where a file is looked for, in this order: the mirror (``BENCHTOP_DATA_MIRROR``, a folder or an address), the cache
(``BENCHTOP_DATA_CACHE``, default: the user's cache folder), the addresses in the registry. Nothing is ever unpacked
to disk and no pickle is ever loaded; archives are read in memory, so no member can land outside the cache.
"""

import contextlib
import errno
import fnmatch
import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from benchtop.data import DataError

LIMIT = 1 << 30  # bytes of one unpacked file or archive; the largest set has 0.2e9
OFFLINE = {"text": "stdlib/characters", "series": "statsmodels/sunspots", "graph": "karate", "table": "breast_cancer"}
FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)


class Absent(DataError):
    """A file is nowhere to be had."""


class Corrupt(DataError):
    """A file is there, with other bytes than declared."""


def cache() -> Path:
    """Folder that keeps downloads."""
    import platformdirs

    return Path(os.environ.get("BENCHTOP_DATA_CACHE") or platformdirs.user_cache_path("benchtop") / "data")


def locate(entry: dict[str, Any], download: bool = True) -> list[Path]:
    """Local paths of a set's files, verified; downloads what is missing unless ``download`` is false.

    ``files`` are the forms that a mirror holds; ``public`` stands in for them where the public addresses serve other
    ones (not compressed, single files and not an archive).
    """
    mirror, files = os.environ.get("BENCHTOP_DATA_MIRROR", "").rstrip("/"), entry["files"]
    public = entry.get("public", files)
    remote = "://" in mirror
    if mirror and not remote and not Path(mirror).is_dir():
        raise DataError(f"BENCHTOP_DATA_MIRROR={mirror} is no folder: set it to a folder or an address, or unset it")
    if remote and download:
        with contextlib.suppress(Absent):
            return [obtain(file, [f"{mirror}/{file['path']}"], entry) for file in files]
    places = [(Path(mirror), files)] if mirror and not remote else []
    for folder, wanted in [*places, (cache(), files), (cache(), public)]:
        if all((folder / file["path"]).is_file() for file in wanted):
            try:
                return [verified(folder / file["path"], file) for file in wanted]
            except Corrupt:
                if folder != cache() or not download:
                    raise
    if not download:
        raise Absent(f"{entry['name']}: not on this machine; `benchtop data get {entry['name']}` fetches it")
    bases = entry.get("bases", [""])
    return [obtain(file, [base + file["at"] for base in bases if "at" in file], entry) for file in public]


def verified(path: Path, file: dict[str, Any]) -> Path:
    """``path`` itself if it is there with the declared sha256 (files without one are verified by their content)."""
    import pooch

    path.stat()
    if file["sha256"] and (found := pooch.file_hash(str(path))) != file["sha256"]:
        raise Corrupt(f"{path}: sha256 is {found}, expected {file['sha256']}; replace the file")
    return path


def obtain(file: dict[str, Any], addresses: list[str], entry: dict[str, Any]) -> Path:
    """The file in the cache, downloaded if it is not there or not whole; a lock lets one process of several do it."""
    import filelock

    path, name = cache() / file["path"], entry["name"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            with contextlib.suppress(Corrupt, FileNotFoundError):
                return verified(path, file)
            path.unlink(missing_ok=True)
            return fetched(path, file, addresses, entry)
    except OSError as error:
        if error.errno in FULL:
            cure = f"disk full while writing {path.name} ({file['bytes']:,} bytes): free space in {cache()}"
        else:
            cure = f"cannot write to the cache {path.parent} ({error.strerror or error})"
        raise DataError(f"{name}: {cure} or set BENCHTOP_DATA_CACHE to a folder that can be written to") from None


def fetched(path: Path, file: dict[str, Any], addresses: list[str], entry: dict[str, Any]) -> Path:
    """Download to ``<name>.part`` and move to ``path`` once the checksum is right; each address gets a second try."""
    import pooch

    part, failures, bad = path.with_name(path.name + ".part"), [], 0
    transfer = pooch.HTTPDownloader(progressbar=file["bytes"] > 5_000_000, timeout=30)
    for address in [address for address in addresses for _ in range(2)]:
        try:
            transfer(address, str(part), None)
            os.replace(verified(part, file), path)
            return path
        except Corrupt as error:
            bad += 1
            failures.append(str(error).replace(str(part), address).replace("; replace the file", ""))
        except OSError as error:  # requests' errors are OSErrors too
            if error.errno in FULL + FORBIDDEN:
                raise
            failures.append(f"{address}: {type(error).__name__}")
        finally:
            part.unlink(missing_ok=True)
    name, instead = entry["name"], f"the embedded load({OFFLINE.get(entry['kind'], 'digits')!r})"
    if not failures:
        raise Absent(
            f"{name}: no public address serves {path.name} in this form ({entry.get('note', 'see the registry')}): "
            f"set BENCHTOP_DATA_MIRROR to a mirror that has it, or use {instead}"
        )
    if bad == len(failures):
        raise Corrupt(
            f"{name}: {path.name}: {failures[-1]}, {bad} times; removed, try later or set BENCHTOP_DATA_MIRROR"
        )
    raise Absent(
        f"{name}: cannot fetch {path.name} ({'; '.join(dict.fromkeys(failures))}): put it at {path}, "
        f"set BENCHTOP_DATA_MIRROR, or use {instead}"
    )


def discard(entry: dict[str, Any]) -> None:
    """Remove the downloads without a declared sha256: only their content could tell that they are wrong ones."""
    for file in entry.get("public", []):
        if not file["sha256"]:
            (cache() / file["path"]).unlink(missing_ok=True)


class Files:
    """The files of a set by name, whether they lie there as such, compressed, or inside an archive."""

    def __init__(self, paths: list[Path]):
        self.content: dict[str, Path | bytes] = {}
        for path in paths:
            if path.name.endswith((".zip", ".tar.xz", ".tar.gz")):
                self.content |= unpack(path)
            else:
                self.content[path.as_posix().removesuffix(".gz")] = path

    def names(self, pattern: str) -> list[str]:
        """Names that end in the pattern (``*`` and ``?`` as in a shell), sorted."""
        if pattern in self.content:
            return [pattern]
        return sorted(name for name in self.content if fnmatch.fnmatchcase(f"/{name}", f"*/{pattern}"))

    def read(self, pattern: str) -> bytes:
        """Content of the one file whose name ends in the pattern, gunzipped where it is compressed."""
        found = self.names(pattern)
        if len(found) != 1:
            raise ValueError(f"{len(found)} files match {pattern}, expected one")
        content = self.content[found[0]]
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return bounded((gzip.GzipFile(fileobj=file) if packed else file).read(LIMIT + 1))

    def text(self, pattern: str) -> str:
        return self.read(pattern).decode("utf-8")

    def stream(self, pattern: str) -> io.BytesIO:
        return io.BytesIO(self.read(pattern))


def bounded(content: bytes, room: int = LIMIT) -> bytes:
    if len(content) > room:
        raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
    return content


def unpack(path: Path) -> dict[str, bytes]:
    """Regular members of a zip or tar archive, in memory; links and devices are passed over."""
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path) as archive:
        if path.suffix == ".zip":
            found = ((info.filename, archive.open(info)) for info in archive.infolist() if not info.is_dir())
        else:
            found = ((info.name, archive.extractfile(info)) for info in archive if info.isreg())
        room = LIMIT
        for name, file in found:
            with file:
                members[name] = bounded(file.read(room + 1), room)
            room -= len(members[name])
    return members
