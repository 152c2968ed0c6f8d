"""Packages on the Hugging Face hub: ``push`` puts one there, ``fetched`` brings one to this machine's cache.

What comes from there is a stranger's file: it is opened, and refused, as any other. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..archive import CARD, SUFFIX, Archive, write_archive
from ..errors import PackageError, SettingsError, TorchkeepError
from ..model.hub import HUB
from ..packages import package_of
from .card import HUB_ID, card_over

_PART = r"(?!\.)[^/\\:]+"
_FILE = re.compile(rf"(?:{_PART}/)*{_PART}\{SUFFIX}")
_SOURCE = re.compile(rf"{HUB}({HUB_ID})(?:@(refs/\w+/\w+|\w[\w.-]*))?(?:/({_FILE.pattern}))?")
_MOST_NAMED = 8

_UNREACHED = ("the hub cannot be reached, or broke off", "", "try again; HF_ENDPOINT and HF_HUB_OFFLINE say which hub")
_REFUSED = ("the hub refuses this", "", "")
_MISSING = ("the hub has no such thing for you", "a repository, revision and file that are there, and yours to see",
            "hf auth login, or HF_TOKEN, where it is private")  # fmt: skip
_BY_STATUS = {
    401: ("the hub does not know who asks", "a login", "hf auth login, or HF_TOKEN"),
    403: ("the hub does not allow this", "a token that may write into this repository",
          "hf auth login with such a token, or a repository under your own name"),
    404: _MISSING,
}  # fmt: skip


def push(
    package: str | Path, target: str, *, private: bool = False, message: str = "", token: str | None = None
) -> str:
    """Put a package and its card into a repository, ``hf:USER/NAME``, as one commit; gives the commit's address.

    The package is read whole first. A repository is made where there is none, ``private`` if so said. Of a card that is
    there the author's own words stay, as ``card_over`` says. ``token``: without it that of ``hf auth login``.

    Raises:  PackageError where the package is damaged, or where the hub refuses, or cannot be reached
    """
    named = re.fullmatch(f"{HUB}({HUB_ID})", target)
    if named is None:
        raise SettingsError("this names no repository", where=target, expected="hf:USER/NAME")
    archive, repo = Archive.open(Path(package)), named[1]
    archive.verify()
    hub = package_of("huggingface_hub", "hf", f"push {target}")
    api = hub.HfApi(token=token)
    name = (archive.path.name.removesuffix(SUFFIX).lstrip(".") or "model") + SUFFIX
    with _explained(hub, target, token), _as_file(archive) as file:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise PackageError("this repository is there already, for all to see", where=target,
                               fix="make it private on the hub, or leave out --private")  # fmt: skip
        files: dict[str, Path | bytes] = {name: file}
        if CARD in archive.names:
            card = bytes(archive.read(CARD)).decode("utf-8", "replace")
            is_there = any(row.rfilename == CARD for row in there.siblings or ())
            old = Path(api.hf_hub_download(repo, CARD)).read_text("utf-8", "replace") if is_there else ""
            files[CARD] = card_over(old, card).encode()
        added = [hub.CommitOperationAdd(path_in_repo=place, path_or_fileobj=held) for place, held in files.items()]
        made = api.create_commit(repo, added, commit_message=message or f"Add {name}")
    return str(made.commit_url)


def fetched(source: str) -> Path:
    """The package of ``hf:USER/NAME[@REVISION][/FILE.tkp]`` in this machine's cache, brought if it is not the newest.

    Where the hub cannot be reached, what the cache has is taken.

    Raises:  PackageError where there is none, or several and none is named
    """
    named = _SOURCE.fullmatch(source)
    if named is None:
        raise PackageError("this names no package", where=source, expected=f"hf:USER/NAME[@REVISION][/FILE{SUFFIX}]")
    hub = package_of("huggingface_hub", "hf", source)
    repo, revision, file = named.groups()
    with _explained(hub, source):
        api = hub.HfApi()
        try:
            if file is None:
                listed = api.model_info(repo, revision=revision).siblings or ()
                file = _only_one([row.rfilename for row in listed], source)
            return Path(api.hf_hub_download(repo, file, revision=revision))
        except Exception as error:
            if isinstance(error, TorchkeepError) or (_status(error) or 500) < 500:
                raise
            kept = _kept(api, repo, revision)
            file = file or (_only_one(list(kept), source) if kept else "")
            if file not in kept:
                raise
            return kept[file]


def open_archive(source: str | Path) -> Archive:
    """A package's file or folder, or that of ``hf:USER/NAME``, opened to be read.

    Raises:  PackageError where there is none, or it is damaged
    """
    return Archive.open(fetched(str(source)) if str(source).startswith(HUB) else Path(source).expanduser())


def _kept(api: Any, repo: str, revision: str | None) -> dict[str, Path]:
    """The packages of a repository that the cache has."""
    try:
        folder = Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
    except OSError:
        return {}
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob(f"*{SUFFIX}")}


def _only_one(names: list[str], source: str) -> str:
    files = sorted(filter(_FILE.fullmatch, names))
    if len(files) == 1:
        return files[0]
    shown = ", ".join(files[:_MOST_NAMED]) + (", …" if len(files) > _MOST_NAMED else "")
    raise PackageError(
        "this repository has several packages" if files else "this repository has no package", where=source,
        got=shown or f"no file that ends with {SUFFIX}", expected=f"one file that ends with {SUFFIX}",
        fix=f"{source}/{files[0]} names one" if files else "",
    )  # fmt: skip


@contextlib.contextmanager
def _as_file(archive: Archive) -> Iterator[Path]:
    """The package as one file: what is a folder is written as one, with the same identity."""
    if archive.path.is_file():
        yield archive.path
        return
    with tempfile.TemporaryDirectory(prefix="torchkeep-", ignore_cleanup_errors=True) as place:
        path = Path(place, f"package{SUFFIX}")
        write_archive(path, {name: archive.read(name) for name in archive.names}, head=archive.head)
        yield path


@contextlib.contextmanager
def _explained(hub: Any, where: str, token: str | None = None) -> Iterator[None]:
    """Whatever the library, the hub or the network bring, as the one error; what logs in is never said."""
    try:
        yield
    except TorchkeepError:
        raise
    except Exception as error:
        told = error if getattr(error, "response", None) is not None else error.__cause__ or error
        secret, said = token or hub.get_token(), " ".join(str(told).split())
        said = f"{type(told).__name__}: {said.replace(secret, '…') if secret else said}"[:400]
        status = _status(error)
        is_refused = 400 <= (status or 0) < 500 or (isinstance(error, ValueError) and not isinstance(error, OSError))
        what, expected, fix = _BY_STATUS.get(status or 0, _REFUSED if is_refused else _UNREACHED)
        if isinstance(error, hub.errors.RepositoryNotFoundError):  # a hub says 401 of what is not there, too
            what, expected, fix = _MISSING
        raise PackageError(what, where=where, got=said, expected=expected, fix=fix) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what it came of, tells of."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if status is not None or error.__cause__ is None else _status(error.__cause__)
