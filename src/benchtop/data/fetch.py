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
import itertools
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from benchtop.data import DataError

LIMIT = 1 << 30  # bytes of one unpacked file or archive; the largest set has 0.2e9
OFFLINE = {"text": "stdlib/characters", "series": "statsmodels/sunspots", "graph": "karate", "table": "breast_cancer"}


def cache() -> Path:
    """Folder that keeps downloads."""
    import platformdirs

    return Path(os.environ.get("BENCHTOP_DATA_CACHE") or platformdirs.user_cache_path("benchtop") / "data")


def mirror() -> str:
    """The mirror that the environment names, or an empty string."""
    return os.environ.get("BENCHTOP_DATA_MIRROR", "").rstrip("/")


def locate(entry: dict[str, Any], download: bool = True) -> list[Path]:
    """Local paths of a set's files, verified; downloads what is missing unless ``download`` is false.

    ``files`` are the forms that a mirror holds; ``public`` stands in for them where the public addresses serve other
    ones (not compressed, single files and not an archive).
    """
    folder = "" if "://" in mirror() else mirror()
    if folder and not Path(folder).is_dir():
        raise DataError(
            f"BENCHTOP_DATA_MIRROR={folder} is no folder: set it to a mirror's folder or address, or unset it"
        )
    if folder and all((Path(folder) / file["path"]).is_file() for file in entry["files"]):
        return [verified(Path(folder) / file["path"], file) for file in entry["files"]]
    public = entry.get("public", entry["files"])
    if mirror() and not folder and download:
        with contextlib.suppress(Absent):
            return [obtain(file, [f"{mirror()}/{file['path']}"], entry) for file in entry["files"]]
    for files in (entry["files"], public):
        if all((cache() / file["path"]).is_file() for file in files):
            with contextlib.suppress(Corrupt):
                return [verified(cache() / file["path"], file) for file in files]
    if not download:
        raise Absent(f"{entry['name']}: not on this machine; `benchtop data get {entry['name']}` fetches it")
    return [
        obtain(file, [prefix + file["at"] for prefix in entry.get("bases", [""]) if "at" in file], entry)
        for file in public
    ]


class Absent(DataError):
    """A file is nowhere to be had."""


class Corrupt(DataError):
    """A file is there, with other bytes than declared."""


def verified(path: Path, file: dict[str, Any]) -> Path:
    """``path`` itself if its sha256 is the declared one (files without one are verified by their content)."""
    import pooch

    if file["sha256"] and (found := pooch.file_hash(str(path))) != file["sha256"]:
        raise Corrupt(f"{path}: sha256 is {found}, expected {file['sha256']}; replace the file")
    return path


def obtain(file: dict[str, Any], addresses: list[str], entry: dict[str, Any]) -> Path:
    """The file in the cache, downloaded if it is not there or not whole.

    A download goes to ``<name>.part`` beside its place and moves there once its checksum is right; a lock lets one
    process of several download. Each address gets a second try.
    """
    import filelock

    path, name = cache() / file["path"], entry["name"]
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            with contextlib.suppress(Corrupt, FileNotFoundError):
                return verified(path, file)
            path.unlink(missing_ok=True)
            if not addresses:
                raise Absent(
                    f"{name}: no public address serves {path.name} in this form ({entry.get('note', 'see the registry')}): "
                    f"set BENCHTOP_DATA_MIRROR to a mirror that has it, or use {instead(entry)}"
                )
            failures = []
            for address in [again for address in addresses for again in (address, address)]:
                try:
                    transfer(address, part)
                    verified(part, file)
                    os.replace(part, path)
                    return path
                except Corrupt as error:
                    failures.append(str(error).replace(str(part), f"{address}").replace("; replace the file", ""))
                except OSError as error:  # requests' errors are OSErrors too
                    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                        raise
                    failures.append(f"{address}: {type(error).__name__}")
                finally:
                    part.unlink(missing_ok=True)
            if all("sha256" in failure for failure in failures):
                raise Corrupt(
                    f"{name}: {failures[-1]}, twice; the bad file was removed, try later or set BENCHTOP_DATA_MIRROR"
                )
            raise Absent(
                f"{name}: cannot fetch {path.name} ({'; '.join(dict.fromkeys(failures))}): put it at {path}, "
                f"set BENCHTOP_DATA_MIRROR, or use {instead(entry)}"
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{name}: disk full while writing {path.name} ({file['bytes']:,} bytes): free space in {cache()} "
                "or set BENCHTOP_DATA_CACHE to another disk"
            ) from None
        raise DataError(
            f"{name}: cannot write to the cache {path.parent} ({error.strerror or error}): set BENCHTOP_DATA_CACHE to a folder you may write to"
        ) from None


def instead(entry: dict[str, Any]) -> str:
    """The embedded set that stands nearest."""
    return f"the embedded load({OFFLINE.get(entry['kind'], 'digits')!r})"


def transfer(address: str, to: Path) -> None:
    """Download by pooch, with a progress bar for large files."""
    import pooch

    pooch.HTTPDownloader(progressbar=False, timeout=30)(address, str(to), None)


# ---- reading ----


class Files:
    """The files of a set by name, whether they lie there as such, compressed, or inside an archive."""

    def __init__(self, paths: list[Path]):
        self.content: dict[str, Path | bytes] = {}
        for path in paths:
            if path.name.endswith((".zip", ".tar.xz", ".tar.gz", ".tgz")):
                self.content |= unpack(path)
            else:
                self.content[path.as_posix().removesuffix(".gz")] = path

    def names(self, pattern: str) -> list[str]:
        """Names that end in the pattern (``*`` and ``?`` as in a shell), sorted."""
        return sorted(name for name in self.content if fnmatch.fnmatchcase(f"/{name}", f"*/{pattern}"))

    def read(self, pattern: str) -> bytes:
        """Content of the one file whose name ends in the pattern."""
        found = self.names(pattern)
        if len(found) != 1:
            raise ValueError(f"{len(found)} files match {pattern}, expected one")
        content = self.content[found[0]]
        return content if isinstance(content, bytes) else plain(content)

    def text(self, pattern: str) -> str:
        return self.read(pattern).decode("utf-8")

    def stream(self, pattern: str) -> io.BytesIO:
        return io.BytesIO(self.read(pattern))


def plain(path: Path) -> bytes:
    """Content of a file, gunzipped where it is compressed."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        return bounded(file.read(LIMIT + 1))


def bounded(content: bytes) -> bytes:
    if len(content) > LIMIT:
        raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
    return content


def unpack(path: Path) -> dict[str, bytes]:
    """Regular members of a zip or tar archive, in memory; links and devices are passed over."""
    members: dict[str, bytes] = {}
    room = LIMIT
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in itertools.filterfalse(zipfile.ZipInfo.is_dir, archive.infolist()):
                with archive.open(info) as file:
                    members[info.filename] = file.read(room + 1)
                room -= len(bounded(members[info.filename]))
    else:
        with tarfile.open(path) as archive:
            for info in filter(tarfile.TarInfo.isreg, archive):
                members[info.name] = archive.extractfile(info).read(room + 1)
                room -= len(members[info.name])
    if room < 0:
        raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
    return members
